"""The measures by name, and what ``observe`` attaches to one block."""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterable, Mapping
from contextlib import nullcontext
from functools import partial
from typing import Any, ClassVar, Literal, Protocol

import torch
from torch import Tensor

from actsparse.blocks.block import MLPBlock
from actsparse.blocks.read_gradients import Reading
from actsparse.blocks.site import Site, site_of
from actsparse.observe.density import Density
from actsparse.observe.effective_gradient import Gradient
from actsparse.observe.flatness import Flatness
from actsparse.observe.gradient_measure import GradientMeasure, Weighing
from actsparse.observe.gradient_noise import Noise
from actsparse.observe.gradient_sizes import GradientSizes
from actsparse.observe.magnitudes import Magnitudes
from actsparse.observe.spectrum import WeightSpectrum

Phase = Literal["train", "inference"]
PHASES: tuple[Phase, ...] = ("train", "inference")
Mask = Tensor | Callable[[int, int], Tensor | None]
Names = str | Iterable[str] | Mapping[str, Mapping[str, Any]]  # measures, maybe with options


class Measure(Protocol):
    """What a measure is: the numbers of one block in one phase, and how to pool blocks.

    ``columns`` are those of the printed table: title → the key in a row of the summary, and how to
    write its value. Measures that read gradients build on
    :class:`actsparse.observe.gradient_measure.GradientMeasure`.
    """

    columns: ClassVar[dict[str, tuple[str, Callable[[Any], str]]]]

    def __init__(self, block: MLPBlock) -> None: ...

    @staticmethod
    def stages(site: Site) -> tuple[str, ...]:
        """The stages ``update`` needs, out of x, z, u, a, y, with the φ now in force."""

    def update(self, site: Site, stages: dict[str, Tensor], keep: Tensor | None) -> None:
        """Take in one pass; ``keep`` [B, T] is False at padding, None where there is none."""

    def reset(self) -> None:
        """Forget all passes."""

    def state(self) -> list[Tensor]:
        """The tensors that hold it, to read: they add up over processes; zeros: nothing counted."""

    def load(self, state: list[Tensor]) -> None:
        """Go on from such a state, in a copy of its own, whatever was counted before."""

    @staticmethod
    def summary(parts: dict[str, Any]) -> dict[str, Any] | None:
        """All blocks by name, with ``"blocks"``, a list of rows ``{"block": name, …}``."""


# Name → class of Measure. A package may add its own; observe, measure and records take it then.
MEASURES: dict[str, Any] = {
    "density": Density,
    "flatness": Flatness,
    "gradient": Gradient,
    "gradient_sizes": GradientSizes,
    "magnitudes": Magnitudes,
    "noise": Noise,
    "spectrum": WeightSpectrum,
}


_counting = threading.Lock()


def options_of(measures: Names, known: Iterable[str]) -> dict[str, dict[str, Any]]:
    """``measures`` as name → options.

    Raises:
        ValueError: a name that is not ``known``.
    """
    if isinstance(measures, str):
        measures = (measures,)
    given = measures if isinstance(measures, Mapping) else {name: {} for name in measures}
    for name in given:
        if name not in (names := sorted(known)):
            columns = {key: at for at, m in MEASURES.items() for key, _ in m.columns.values()}
            hint = f" ({name} is a column of {columns[name]})" if name in columns else ""
            raise ValueError(f"unknown measure {name!r}{hint}; known: {', '.join(names)}")
        if not isinstance(given[name], Mapping):
            raise ValueError(f"{name} has options {given[name]!r}; expected a mapping")
    return {name: dict(options) for name, options in given.items()}


class Watch:
    """What is tapped at one block: for each phase, a measure of each kind."""

    def __init__(
        self,
        block: MLPBlock,
        options: dict[str, dict[str, Any]],
        mask: Mask | None,
        weighing: Weighing,
        always: bool,
    ) -> None:
        self.block, self.mask, self.weighing, self.always = block, mask, weighing, always
        self.kinds = [MEASURES[name] for name in options]
        self.measures = {
            phase: {name: MEASURES[name](block, **given) for name, given in options.items()}
            for phase in PHASES
        }
        self.taps: list[Any] = []

    def attach(self) -> None:
        """Tap the block."""
        site = site_of(self.block)
        if any(kind.stages(site) for kind in self.kinds):
            self.taps.append(self.see)
            site.tap(self.see, self.stages)
        for name, measure in self.measures["train"].items():
            if isinstance(measure, GradientMeasure):
                for reading, (place, _) in measure.readings.items():
                    tap = partial(self.read, name, reading)
                    self.taps.append(tap)
                    site.tap_gradient(tap, place, partial(_needs, measure, reading))

    def release(self) -> None:
        """Leave it; what was seen stays."""
        site_of(self.block).release(*self.taps)
        self.taps.clear()

    def stages(self, site: Site) -> list[str]:
        """All that measures of the forward need."""
        return sorted({stage for kind in self.kinds for stage in kind.stages(site)})

    def now(self) -> dict[str, Any]:
        """The measures of the phase the block is in."""
        return self.measures["train" if self.block.up.module.training else "inference"]

    def see(self, site: Site, stages: dict[str, Tensor]) -> None:
        """Take in one forward."""
        if site.recomputing:
            return
        # threads that run one model count together; compiled code counts where its graph ends
        with torch.no_grad(), nullcontext() if torch.compiler.is_compiling() else _counting:
            keep = self.keep(site, next(iter(stages.values())))
            for measure in self.now().values():
                measure.update(site, stages, keep)

    def read(
        self, name: str, reading: str, site: Site, output: Tensor, stages: dict[str, Tensor]
    ) -> Reading | None:
        """Say what to read of the gradient at one place, or that this pass has none."""
        if not (output.requires_grad or self.always):
            return None
        with torch.no_grad():
            rows = self.weighing(site, output, self.keep(site, output))
        measure: GradientMeasure = self.now()[name]
        # under another name, since compilers take no tensor twice
        return measure.reading(site, reading, rows, {**stages, "f": output.detach()})

    def keep(self, site: Site, stage: Tensor) -> Tensor | None:
        """[B, T], False at tokens to leave out; None: there are none.

        Rows that no batch orders (an expert's) are [1, N] to a mask of the user's.

        Raises:
            ValueError: the mask, the call's or the user's, is of other tokens.
        """
        tokens = site.tokens
        try:
            batch, length = tokens.arrange(stage[..., :1]).shape[:2]
        except ValueError:
            if self.mask is None:
                tokens.check_unpadded(f"sees rows of shape {tuple(stage.shape)}")
                return None
            batch, length = 1, stage.shape[:-1].numel()
        if self.mask is None:
            return tokens.keep(batch, length)
        keep = self.mask if isinstance(self.mask, Tensor) else self.mask(batch, length)
        if keep is None:
            return None
        if tuple(keep.shape) != (batch, length):
            raise ValueError(
                f"mask has shape {tuple(keep.shape)}, but block {self.block.name!r} runs on "
                f"[B, T] = {(batch, length)}; for batches of several shapes pass a function of B, T"
            )
        return keep.to(stage.device) != 0


def _needs(measure: GradientMeasure, reading: str, site: Site) -> list[str]:
    return [stage for stage in measure.needs(site, reading) if stage != "f"]

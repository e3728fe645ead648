"""``observe``: measures that read the user's own passes, and never change them."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from types import TracebackType
from typing import Any, ClassVar, Literal, Protocol, Self

import torch
from torch import Tensor, nn

from actsparse.blocks.block import MLPBlock, unwrap
from actsparse.blocks.find import find_mlp_blocks
from actsparse.blocks.site import Site, site_of
from actsparse.observe.density import Density

Phase = Literal["train", "inference"]
PHASES: tuple[Phase, ...] = ("train", "inference")
Mask = Tensor | Callable[[int, int], Tensor | None]


class Measure(Protocol):
    """What a measure is: the numbers of one block in one phase, and how to pool blocks.

    ``columns`` are those of the printed table: title → the key in a row of the summary, and how to
    write its value.
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

    @staticmethod
    def summary(parts: dict[str, Any]) -> dict[str, Any] | None:
        """All blocks by name, with ``"blocks"``, a list of rows ``{"block": name, …}``."""


MEASURES: dict[str, type[Measure]] = {"density": Density}


def observe(
    model: nn.Module,
    measures: Iterable[str] = ("density",),
    *,
    inputs: Any = None,
    blocks: Iterable[MLPBlock] | None = None,
    mask: Mask | None = None,
) -> Seen:
    """Watch the MLP blocks of ``model`` through the user's own passes until closed.

    Outputs, gradients and random numbers stay as they are. Training and inference are kept apart
    by the mode (``.train()``, ``.eval()``) each block is in. Counts are exact, added up on the
    block's device without waiting for it; a pass that gradient checkpointing repeats counts once.
    Every process counts its own passes.

    Args:
        model: any model; compiled or not, modified by ``sparsify`` before or after, or not at all.
        measures: names; ``"density"``.
        inputs: for finding the blocks in one pass, as :func:`actsparse.find_mlp_blocks` takes them.
        blocks: the blocks to watch, instead. A model that ``sparsify`` has modified needs neither.
        mask: which tokens to count: bool [B, T], True = count, or a function of (B, T), the batch
            and length of the running call, that returns such a mask or None for all. Without it,
            padding that the model's own ``attention_mask`` (or ``…_key_padding_mask``) marks is
            left out; where a model gets none, padding counts.

    Raises:
        ValueError: unknown measures; blocks missing, or not of this model.
        NoMLPFound: ``inputs`` show no MLP block.

    >>> mlp = nn.Sequential(nn.Linear(8, 32), nn.ReLU(), nn.Linear(32, 8)).eval()
    >>> x = torch.randn(4, 5, 8)
    >>> with observe(mlp, inputs=x) as seen:
    ...     y = mlp(x)
    >>> summary = seen.summary("inference")
    >>> summary["units"], summary["density"] == (mlp[0](x) > 0).double().mean().item()
    (32, True)
    >>> seen.summary("train") is None
    True
    """
    names = (measures,) if isinstance(measures, str) else tuple(measures)
    for name in names:
        if name not in MEASURES:
            raise ValueError(f"unknown measure {name!r}; known: {', '.join(sorted(MEASURES))}")
    found = _blocks_of(model, inputs, blocks)
    modules = set(model.modules())
    for block in found:
        if block.up.module not in modules:
            raise ValueError(
                f"block {block.name!r} is not part of this {type(unwrap(model)).__name__}; find "
                f"its blocks again with find_mlp_blocks (copies have blocks of their own)"
            )
    return Seen(found, dict.fromkeys(names), mask)


def _blocks_of(model: nn.Module, inputs: Any, blocks: Iterable[MLPBlock] | None) -> list[MLPBlock]:
    if inputs is not None and blocks is not None:
        raise ValueError("give observe inputs= or blocks=, not both")
    if inputs is not None:
        return list(find_mlp_blocks(model, inputs))
    if blocks is None:
        handle = unwrap(model).__dict__.get("_actsparse_handle")
        if handle is None:
            raise ValueError(
                "observe needs inputs= (a batch to find the MLP blocks with) or blocks= (from "
                "find_mlp_blocks), as sparsify has not modified this model"
            )
        blocks = handle.blocks
    chosen = list(blocks)
    if not chosen:
        raise ValueError("blocks is empty; give at least one block of find_mlp_blocks")
    return chosen


class _Watch:
    """What is tapped at one block: for each phase, a measure of each kind."""

    def __init__(self, block: MLPBlock, names: Iterable[str], mask: Mask | None) -> None:
        self.block = block
        self.mask = mask
        self.kinds = [MEASURES[name] for name in names]
        self.measures = {phase: {name: MEASURES[name](block) for name in names} for phase in PHASES}

    def stages(self, site: Site) -> list[str]:
        return sorted({stage for kind in self.kinds for stage in kind.stages(site)})

    def see(self, site: Site, stages: dict[str, Tensor]) -> None:
        if site.recomputing:
            return
        training = site.block.up.module.training
        with torch.no_grad():
            keep = self.keep(site, next(iter(stages.values())))
            for measure in self.measures["train" if training else "inference"].values():
                measure.update(site, stages, keep)

    def keep(self, site: Site, stage: Tensor) -> Tensor | None:
        tokens = site.tokens
        if self.mask is None:
            try:
                batch, length = tokens.arrange(stage[..., :1]).shape[:2]
            except ValueError:  # rows of no batch: whoever packed them has left out the padding
                return None
            return tokens.keep(batch, length)
        batch, length = tokens.arrange(stage[..., :1]).shape[:2]
        keep = self.mask if isinstance(self.mask, Tensor) else self.mask(batch, length)
        if keep is None:
            return None
        if tuple(keep.shape) != (batch, length):
            raise ValueError(
                f"mask has shape {tuple(keep.shape)}, but block {self.block.name!r} runs on "
                f"[B, T] = {(batch, length)}; for batches of several shapes pass a function of B, T"
            )
        return keep.to(stage.device) != 0


class Seen:
    """What ``observe`` has seen so far; print it for a table.

    ``blocks`` maps the name of each block (its up layer's where the name is empty or shared) to it.
    """

    def __init__(
        self, blocks: list[MLPBlock], names: Iterable[str], mask: Mask | None = None
    ) -> None:
        self.measures = tuple(names)
        called = [block.name for block in blocks]
        self._watches: dict[str, _Watch] = {}
        for block in blocks:
            alone = block.name and called.count(block.name) == 1
            label = block.name if alone else block.up.name
            self._watches[label] = _Watch(block, self.measures, mask)
        self.blocks = {name: watch.block for name, watch in self._watches.items()}
        for watch in self._watches.values():
            site_of(watch.block).tap(watch.see, watch.stages)
        self._open = True

    def summary(self, phase: Phase) -> dict[str, Any] | None:
        """The measures of all passes of ``phase``, ``"train"`` or ``"inference"``; None: no pass.

        A dict of numbers for JSON. Of density: ``density``, ``derivative_density`` (shares of all
        units × tokens), ``dead`` (how many units were never active), ``units``,
        ``living_density`` (density among units active at least once; 0.0 where none was), and
        under ``blocks`` the same of each block that tokens passed, with its name, ``block``, and
        ``tokens``. A block that is called several times in a pass (ALBERT) has its units once and
        each call's tokens.
        """
        _check(phase)
        whole: dict[str, Any] | None = None
        rows: dict[str, dict[str, Any]] = {}
        for name in self.measures:
            parts = {label: w.measures[phase][name] for label, w in self._watches.items()}
            summary = MEASURES[name].summary(parts)
            if summary is not None:
                for row in summary["blocks"]:
                    rows.setdefault(row["block"], {}).update(row)
                whole = (whole or {}) | summary
        return None if whole is None else whole | {"blocks": list(rows.values())}

    def units(self, block: str, phase: Phase) -> Tensor:
        """In what share of the tokens each unit of a block was active: float64 [H].

        Raises:
            ValueError: no such block or phase, density is not observed, or no token was seen.
        """
        _check(phase)
        if block not in self._watches:
            raise ValueError(f"unknown block {block!r}; known: {', '.join(self._watches)}")
        density = self._watches[block].measures[phase].get("density")
        if not isinstance(density, Density):
            raise ValueError(f"density is not observed; measures: {', '.join(self.measures)}")
        if not int(density.tokens):
            raise ValueError(f"block {block!r} has seen no token in phase {phase!r}")
        return density.active.double() / density.tokens

    def reset(self, phase: Phase | None = None) -> None:
        """Forget the passes of one phase, or of both."""
        if phase is not None:
            _check(phase)
        for watch in self._watches.values():
            for each in PHASES if phase is None else (phase,):
                for measure in watch.measures[each].values():
                    measure.reset()

    def close(self) -> None:
        """Stop watching; what was seen stays. Closing twice is fine."""
        if self._open:
            self._open = False
            for watch in self._watches.values():
                site_of(watch.block).release(watch.see)

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self.close()

    def print(self) -> None:
        """Print the table, in colour where the terminal has it."""
        from rich.console import Console

        Console().print(self._table())

    def __str__(self) -> str:
        from rich.console import Console

        console = Console(width=120, color_system=None)
        with console.capture() as capture:
            console.print(self._table())
        return capture.get().rstrip()

    def _table(self) -> Any:
        from rich.table import Table

        columns = {
            title: column
            for name in self.measures
            for title, column in MEASURES[name].columns.items()
        }
        table = Table()
        for title in ("phase", "block"):
            table.add_column(title, no_wrap=True)
        for title in columns:
            table.add_column(title, justify="right")
        for phase in PHASES:
            summary = self.summary(phase)
            if summary is None:
                table.add_row(phase, "no pass seen", *[""] * len(columns))
                continue
            for row in [*summary["blocks"], summary | {"block": "all"}]:
                cells = [write(row[key]) if key in row else "" for key, write in columns.values()]
                table.add_row(phase, row["block"], *cells, end_section=row["block"] == "all")
        return table


def _check(phase: str) -> None:
    if phase not in PHASES:
        raise ValueError(f"unknown phase {phase!r}; known: {', '.join(PHASES)}")

"""Trials: disturb inputs, features, weights or gradients on purpose, and measure the effect.

Each is asked of :func:`actsparse.measure` by name, with options that are plain
values, so that they can stand in a run's config and in its record. What was tried and what came
of it are rows of plain values.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import partial
from typing import Any, ClassVar, Protocol

import torch
from torch import nn
from typing_extensions import override

from actsparse.blocks.block import MLPBlock
from actsparse.blocks.trace import undisturbed
from actsparse.observe.attack import Attack, Bounds, perturb
from actsparse.observe.coverage import Filter, check_filter, covering
from actsparse.observe.disturbances import RelativeNoise, robustness
from actsparse.observe.gradient_pruning import pruning
from actsparse.observe.loss import LossFn, Reduction
from actsparse.observe.registry import Mask

Rows = list[dict[str, Any]]


class Trial(Protocol):
    """What a trial is: its options are its fields, checked when it is made.

    ``columns`` are those of the printed table, keys of a row.
    """

    columns: ClassVar[tuple[str, ...]]

    def passes(self) -> int:
        """How many times the loss function is called for each batch."""

    def rows(self, on: On) -> Rows:
        """Try it."""


@dataclass(frozen=True)
class On:
    """What a trial is made on; all as ``measure`` takes it."""

    model: nn.Module
    loss_fn: LossFn
    batches: Any
    blocks: list[MLPBlock]
    mask: Mask | None
    reduction: Reduction
    seed: int


@dataclass(frozen=True)
class RobustnessTrial(Trial):
    """Loss and accuracy, clean and disturbed: :func:`actsparse.observe.robustness`.

    ``against`` holds what :func:`disturbance_of` takes; ``bounds`` what :func:`bounds_of` does.
    """

    columns: ClassVar[tuple[str, ...]] = (
        "disturbance", "at", "norm", "steps", "size", "loss", "accuracy", "samples",
    )  # fmt: skip

    against: Sequence[Any] = (
        {"disturbance": "fgsm", "size": 0.1},
        {"disturbance": "pgd", "size": 0.1},
        {"disturbance": "noise", "size": 0.1, "at": "x"},
        {"disturbance": "noise", "size": 0.1, "at": "d"},
        {"disturbance": "noise", "size": 0.1, "at": "weights"},
    )
    bounds: Any = None

    def __post_init__(self) -> None:
        if not (_listed(self.against) and self.against):
            raise ValueError(f"against={self.against!r}: expected a list of disturbances")
        self.disturbances()
        bounds_of(self.bounds)

    def disturbances(self) -> list[Attack | RelativeNoise]:
        """``against``, made."""
        return [disturbance_of(each) for each in self.against]

    @override
    def passes(self) -> int:
        rows = [each.row() for each in self.disturbances()]
        return 1 + len(rows) + sum(row.get("steps", 0) for row in rows)

    @override
    def rows(self, on: On) -> Rows:
        return robustness(
            on.model,
            on.loss_fn,  # type: ignore[arg-type]  # a scalar is an error there
            on.batches,
            self.disturbances(),
            blocks=on.blocks,
            bounds=bounds_of(self.bounds),
            seed=on.seed,
        )


@dataclass(frozen=True)
class CoveringTrial(Trial):
    """How far weight noise covers an attack: :func:`actsparse.observe.covering`.

    The twins that ``attack`` makes of all batches are kept until the end. Rows say which attack,
    and ``rho``.
    """

    columns: ClassVar[tuple[str, ...]] = (
        "disturbance", "size", "rho", "block", "layer", "tokens", "covered", "r50", "r90", "r99",
    )  # fmt: skip

    rho: float = 0.1
    filtered: Filter | None = None
    share: float = 0.95
    attack: Any = field(default_factory=lambda: {"disturbance": "fgsm", "size": 0.1})
    bounds: Any = None

    def __post_init__(self) -> None:
        if not (_number(self.rho) and self.rho > 0):
            raise ValueError(f"rho={self.rho!r}: expected a finite number > 0")
        check_filter(self.filtered, self.share)
        self.chosen()
        bounds_of(self.bounds)

    def chosen(self) -> Attack:
        """``attack``, made."""
        chosen = disturbance_of(self.attack)
        if not isinstance(chosen, Attack):
            raise ValueError(f"attack={self.attack!r}: expected fgsm or pgd, not noise")
        return chosen

    @override
    def passes(self) -> int:
        return 2 + int(self.chosen().row()["steps"])

    @override
    def rows(self, on: On) -> Rows:
        attack = self.chosen()
        twin = partial(
            perturb,
            on.model,
            on.loss_fn,  # type: ignore[arg-type]
            attack=attack,
            bounds=bounds_of(self.bounds),
            generator=torch.Generator().manual_seed(on.seed),
        )
        with undisturbed(on.model):  # a loader draws its order
            # all of them first: covering has its taps on the model while it reads the pairs
            pairs = [(batch, twin(batch)) for batch in on.batches]
        found = covering(
            on.model, on.loss_fn, pairs, rho=self.rho, filtered=self.filtered, share=self.share,
            blocks=on.blocks, mask=on.mask,
        )  # fmt: skip
        how: dict[str, Any] = {"rho": self.rho}
        how |= {"filtered": self.filtered, "share": self.share} if self.filtered else {}
        return [{**attack.row(), **how, **row} for row in found]


@dataclass(frozen=True)
class PruningTrial(Trial):
    """Small effective gradients dropped: :func:`actsparse.observe.pruning`.

    In all parameters that require gradients, so not of a model that is frozen as a whole.
    """

    columns: ClassVar[tuple[str, ...]] = (
        "threshold", "kept", "derivative_density", "error", "cosine",
    )  # fmt: skip

    thresholds: Sequence[float] = (0.03, 0.1, 0.3, 1.0)

    def __post_init__(self) -> None:
        given = self.thresholds
        if not (_listed(given) and given and all(_number(each) and each >= 0 for each in given)):
            raise ValueError(f"thresholds={given!r}: expected a list of numbers, 0 or more")

    @override
    def passes(self) -> int:
        return len({0.0, *self.thresholds})

    @override
    def rows(self, on: On) -> Rows:
        return pruning(
            on.model,
            on.loss_fn,
            on.batches,
            self.thresholds,
            blocks=on.blocks,
            reduction=on.reduction,
        )


TRIALS: dict[str, Any] = {  # name → class of Trial
    "robustness": RobustnessTrial,
    "covering": CoveringTrial,
    "pruning": PruningTrial,
}


def disturbance_of(plain: Any) -> Attack | RelativeNoise:
    """A disturbance out of plain values, with the keys that its ``row()`` gives back.

    An attack: ``disturbance`` (``"fgsm"``, ``"pgd"``) and ``size``, in the inputs' own units; where
    it should not be as in :class:`Attack`, ``norm``, ``steps``, ``step_size``, ``random_start``.
    Noise: ``disturbance`` (``"noise"``), ``size``, ``at`` (``"x"``, ``"d"``, ``"weights"``).

    Raises:
        ValueError: another disturbance, a key that it does not have or that is missing, and what
            :class:`Attack` and :class:`RelativeNoise` say of values.

    >>> disturbance_of({"disturbance": "noise", "at": "d", "size": 0.1})
    RelativeNoise(at='d', level=0.1)
    >>> disturbance_of(Attack("pgd", 0.1, steps=3).row()).row() == Attack("pgd", 0.1, steps=3).row()
    True
    """
    if isinstance(plain, Attack | RelativeNoise):
        return plain
    kind = plain.get("disturbance") if isinstance(plain, Mapping) else None
    if kind not in ("fgsm", "pgd", "noise"):
        raise ValueError(
            f"{plain!r} is no disturbance; expected {{'disturbance': 'fgsm', 'pgd' or 'noise', "
            f"'size': …}}, Attack(...) or RelativeNoise(...)"
        )
    noise = kind == "noise"
    known = ("size", "at") if noise else ("size", "norm", "steps", "step_size", "random_start")
    given = {key: value for key, value in plain.items() if key != "disturbance"}
    for key in given:
        if key not in known:
            raise ValueError(f"{kind} has no option {key!r}; known: {', '.join(known)}")
    for key in ("size", "at") if noise else ("size",):
        if key not in given:
            raise ValueError(f"{kind} lacks {key!r}, in {plain!r}")
    for key in ("size", "step_size"):
        if key in given and not _number(given[key]):
            raise ValueError(f"{kind} has {key}={given[key]!r}: expected a finite number > 0")
    if noise:
        return RelativeNoise(given["at"], given["size"])
    attack = Attack(kind, given.pop("size"))
    # a row of fgsm also says what it cannot choose
    return replace(attack, **{k: v for k, v in given.items() if v != attack.row()[k]})


def bounds_of(plain: Any) -> Bounds | None:
    """The least and the greatest input out of plain values: ``[low, high]``, or None for no bounds.

    Each is a number, or lists in lists that broadcast to the inputs ([C, 1, 1] for images).

    Raises:
        ValueError: it is neither, or low is above high.

    >>> bounds_of([0, 1])
    (tensor(0., dtype=torch.float64), tensor(1., dtype=torch.float64))
    """
    if plain is None:
        return None
    try:
        low, high = (torch.as_tensor(each, dtype=torch.float64) for each in plain)
        fine = bool((low <= high).all())
    except (TypeError, ValueError, RuntimeError):
        fine = False
    if not fine:
        raise ValueError(
            f"bounds={plain!r:.120}: expected [low, high], numbers or lists that broadcast to the "
            f"inputs ([C, 1, 1] for images), or None"
        )
    return low, high


def ticking(loss_fn: LossFn, total: int, progress: Callable[[int, int], None] | None) -> LossFn:
    """``loss_fn``, which tells ``progress`` of its calls: how many were made, of how many."""
    if progress is None:
        return loss_fn
    done = 0

    def told(model: nn.Module, batch: Any) -> Any:
        nonlocal done
        output = loss_fn(model, batch)
        done += 1
        progress(done, total)
        return output

    return told


def _listed(value: Any) -> bool:
    return isinstance(value, Sequence) and not isinstance(value, str)


def _number(value: Any) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool) and math.isfinite(value)

"""Penalties on the activations, added to the loss."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor
from typing_extensions import override

from actsparse.blocks.block import MLPBlock
from actsparse.blocks.pass_state import OfThread
from actsparse.blocks.site import Site, site_of
from actsparse.modify.modification import Attached, Modification, Progress
from actsparse.modify.schedule import Over, Ramp, ramp_note
from actsparse.values import AtLeast0


def l1(units: int, one: Tensor) -> Tensor:
    """``‖a‖₁ / H``, the mean absolute activation of each token, of ‖a‖₁ and H units."""
    return one / units


def hoyer(units: int, one: Tensor, two: Tensor) -> Tensor:
    """``‖a‖₁² / (H·‖a‖₂²)`` of each token, of ‖a‖₁, ‖a‖₂ and H units; 0 for a silent token.

    1 where all units are equally active, 1/H where one is; blind to the scale of a. The squared
    ratio of Yang, Wen, Li 2020 ("Hoyer-Square", arXiv 1908.09979).

    >>> hoyer(2, torch.tensor([2.0, 3.0, 0.0]), torch.tensor([2.0**0.5, 3.0, 0.0]))
    tensor([1.0000, 0.5000, 0.0000])
    """
    # the where keeps the gradient of a silent token 0 instead of NaN
    return (one / torch.where(two > 0, two, torch.ones_like(two))).square() / units


# formula, and of which norms of a; nothing else of a is read, so that blocks may run sparse
PENALTIES: dict[str, tuple[Callable[..., Tensor], tuple[str, ...]]] = {
    "hoyer": (hoyer, ("l1", "l2")),
    "l1": (l1, ("l1",)),
}


@dataclass(frozen=True)
class ActivationPenalty(Modification):
    """Add a penalty on the activations a to the loss, in training mode.

    The penalty is ``weight`` times the mean over blocks and unpadded tokens of

        ``"l1"``: ``‖a‖₁ / H``
        ``"hoyer"``: ``‖a‖₁² / (H·‖a‖₂²)`` (Hoyer-Square: Yang, Wen, Li 2020, arXiv 1908.09979)

    Add it yourself, ``loss = loss + handle.penalty()``, or let the training callback do it. Blocks
    run sparse with it (:func:`actsparse.accelerate`). While the weight is 0 blocks run as without
    a penalty.

    Args:
        kind: ``"hoyer"`` or ``"l1"``.
        weight: the factor of the penalty, at least 0.
        ramp: over how many optimizer steps (int), or over which fraction of all steps (float up to
            1), the weight rises linearly from 0. None: it is constant.

    Raises:
        ValueError: unknown kind, negative weight, impossible ramp.

    >>> from actsparse import sparsify
    >>> mlp = torch.nn.Sequential(torch.nn.Linear(8, 32), torch.nn.ReLU(), torch.nn.Linear(32, 8))
    >>> x = torch.randn(4, 8)
    >>> handle = sparsify(mlp, ActivationPenalty("l1", weight=0.5), inputs=x)
    >>> loss = mlp(x).square().mean() + handle.penalty()
    >>> loss.backward()
    """

    kind: str = "hoyer"
    weight: AtLeast0 = 0.5
    ramp: Over | None = None

    @override
    def __post_init__(self) -> None:
        super().__post_init__()
        if self.kind not in PENALTIES:
            known = ", ".join(sorted(PENALTIES))
            raise ValueError(f"unknown penalty {self.kind!r}; known: {known}")

    @override
    def ramps(self) -> list[Ramp]:
        return [] if self.ramp is None else [Ramp(self.ramp)]

    @override
    def apply(self, block: MLPBlock) -> Attached:
        return _Penalised(site_of(block), self._note(), self)

    def _note(self) -> str:
        return f"{self.kind}, weight {self.weight:g}{ramp_note(self.ramps())}"


class _Values(OfThread):
    """The means of one forward, each with whether it has a gradient."""

    def __init__(self) -> None:
        self.of_pass: list[tuple[Tensor, bool]] = []


class _Penalised(Attached):
    """``weight`` is the configured one times its schedules; at 0 it reads nothing."""

    def __init__(self, site: Site, note: str, config: ActivationPenalty) -> None:
        super().__init__(site, note)
        self.config, self.weight, self.reads = config, 0.0, False
        self.values = _Values()
        site.tap(self.collect, self.stages, in_training=True)
        self.update(Progress(0, None))
        self.settle()

    def stages(self, site: Site) -> tuple[str, ...]:
        """What it reads; nothing while it weighs nothing."""
        return PENALTIES[self.config.kind][1] if self.reads else ()

    def collect(self, site: Site, stages: dict[str, Tensor]) -> None:
        if not any(norm.numel() for norm in stages.values()):  # an expert without tokens
            return
        formula, norms = PENALTIES[self.config.kind]
        value = formula(site.block.d_hidden, *(stages[norm][..., 0] for norm in norms))
        keep = site.tokens.unpadded(stages[norms[0]])
        mean = value.mean() if keep is None else (value * keep).sum() / keep.sum().clamp(min=1)
        if not site.recomputing:  # checkpointing must see the same operations, but count them once
            self.values.of_pass.append((mean, torch.is_grad_enabled()))

    @override
    def update(self, progress: Progress) -> None:
        self.weight = self.config.weight
        for ramp in self.config.ramps():
            self.weight *= ramp.value(progress.step, progress.steps)

    @override
    def settle(self) -> None:
        if self.reads != bool(self.weight):
            self.reads = bool(self.weight)
            self.site.refresh()

    @override
    def penalty(self) -> Tensor | None:
        values = self.values.of_pass[:]
        self.values.of_pass.clear()
        if not (values and self.site.block.up.module.training):
            return None  # in evaluation: of a training pass that nobody asked about
        if any(learns for _, learns in values):  # a pass without gradients inside it is no part
            values = [value for value in values if value[1]]
        elif torch.is_grad_enabled():
            raise RuntimeError(
                f"the penalty at block {self.site.block.name!r} has no gradient: the forward ran "
                f"without one (reentrant gradient checkpointing? use use_reentrant=False)"
            )
        return self.weight * torch.stack([mean for mean, _ in values]).mean()

    @override
    def forget(self) -> None:
        self.values.of_pass.clear()

    @property
    @override
    def unclaimed(self) -> bool:
        return any(learns for _, learns in self.values.of_pass)

    @override
    def remove(self) -> None:
        self.site.release(self.collect)
        self.forget()

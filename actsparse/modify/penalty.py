"""Penalties on the activations, added to the loss."""

from __future__ import annotations

from collections import deque
from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor
from typing_extensions import override

from actsparse.blocks.block import MLPBlock
from actsparse.blocks.site import Site, site_of
from actsparse.modify.modification import Attached, Modification, Progress
from actsparse.modify.schedule import Ramp, ramp_note


def l1(a: Tensor) -> Tensor:
    """Mean absolute activation of each token: [..., H] → [...]."""
    return a.abs().mean(-1, dtype=torch.promote_types(a.dtype, torch.float32))


def hoyer(a: Tensor) -> Tensor:
    """``‖a‖₁² / (H·‖a‖₂²)`` of each token, in [0, 1]: [..., H] → [...]; 0 for a silent token.

    1 where all units are equally active, 1/H where one is; blind to the scale of a (after Hoyer
    2004, the measure of sparseness).

    >>> hoyer(torch.tensor([[1.0, 1.0], [3.0, 0.0], [0.0, 0.0]]))
    tensor([1.0000, 0.5000, 0.0000])
    """
    dtype = torch.promote_types(a.dtype, torch.float32)  # a sum of squares overflows float16
    one = torch.linalg.vector_norm(a, 1, dim=-1, dtype=dtype)
    two = torch.linalg.vector_norm(a, 2, dim=-1, dtype=dtype)
    # the inner where keeps the gradient of a silent token 0 instead of NaN
    ratio = one / torch.where(two > 0, two, torch.ones_like(two))
    return ratio.square() / a.shape[-1]


PENALTIES: dict[str, Callable[[Tensor], Tensor]] = {"hoyer": hoyer, "l1": l1}


@dataclass(frozen=True)
class ActivationPenalty(Modification):
    """``weight ·`` the mean over blocks and unpadded tokens of a penalty on a, in training mode.

    ``kind`` is ``"hoyer"`` or ``"l1"``; with ``ramp`` the weight rises linearly from 0 over that
    many steps (int) or that fraction of all steps (float). The penalty enters the loss by
    ``loss = loss + handle.penalty()`` or by the training callback.
    """

    kind: str = "hoyer"
    weight: float = 0.5
    ramp: int | float | None = None

    def __post_init__(self) -> None:
        if self.kind not in PENALTIES:
            known = ", ".join(sorted(PENALTIES))
            raise ValueError(f"unknown penalty {self.kind!r}; known: {known}")
        if not self.weight >= 0:
            raise ValueError(f"ActivationPenalty(weight={self.weight!r}): expected a number ≥ 0")
        self.ramps()

    @override
    def ramps(self) -> list[Ramp]:
        return [] if self.ramp is None else [Ramp(self.ramp)]

    @override
    def apply(self, block: MLPBlock) -> Attached:
        return _Penalised(site_of(block), self._note(), self)

    def _note(self) -> str:
        return f"{self.kind}, weight {self.weight:g}{ramp_note(self.ramps())}"


class _Penalised(Attached):
    def __init__(self, site: Site, note: str, config: ActivationPenalty) -> None:
        super().__init__(site, note)
        self.config = config
        self.weight = config.weight if config.ramp is None else 0.0
        self.without_grad = False  # whether the last pass ran under no_grad
        # the passes of one forward (a shared block runs several times), never more
        self.values: deque[Tensor] = deque(maxlen=site.block.calls)
        site.tap(self.collect, ["a"], in_training=True)

    def collect(self, site: Site, stages: dict[str, Tensor]) -> None:
        a = site.tokens.arrange(stages["a"])
        value = PENALTIES[self.config.kind](a)
        keep = site.tokens.keep(*value.shape)
        mean = value.mean() if keep is None else (value * keep).sum() / keep.sum().clamp(min=1)
        if not site.recomputing:  # checkpointing must see the same operations, but count them once
            self.values.append(mean)
            self.without_grad = not torch.is_grad_enabled()

    @override
    def update(self, progress: Progress) -> None:
        for ramp in self.config.ramps():
            self.weight = self.config.weight * ramp.value(progress.step, progress.steps)

    @override
    def penalty(self) -> Tensor | None:
        if not self.site.block.up.module.training:
            self.values.clear()  # of a training pass that nobody asked about
        if not self.values:
            return None
        total = torch.stack(list(self.values)).mean()
        self.values.clear()
        if torch.is_grad_enabled() and self.without_grad:
            raise RuntimeError(
                f"the penalty at block {self.site.block.name!r} has no gradient: the forward ran "
                f"without one (reentrant gradient checkpointing? use use_reentrant=False)"
            )
        return self.weight * total

    @override
    def remove(self) -> None:
        self.site.release(self.collect)
        self.values.clear()

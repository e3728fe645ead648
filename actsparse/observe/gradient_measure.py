"""What measures of gradients share: per-sample scaling, and sums collected in backward.

A pass gives ``∂L/∂z`` of the batch's loss L, the measures are of per-sample losses ℓ_b. With
``L = Σ_b w_b ℓ_b`` the per-sample gradient of a token's row is the row divided by w_b: w_b = 1/B
where L is a mean over B samples, 1 where it is a sum, times whatever scale the loss had (1/k under
accumulation of k batches, the scale of AMP).
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, ClassVar, Literal

import torch
from torch import Tensor

from actsparse.blocks.block import MLPBlock
from actsparse.blocks.read_gradients import Reading
from actsparse.blocks.site import Site

Reduction = Literal["mean", "sum"]
Scale = float | Callable[[], float | Tensor]


@dataclass(frozen=True)
class Rows:
    """Of each row (token) of a stage [..., features]: whose it is, and what it weighs.

    ``weight`` [...] is 1/w_b, 0 at rows left out; ``sample`` [...] the number of its sample, of
    ``batch`` in all; ``samples`` [] how many of them count.
    """

    weight: Tensor
    sample: Tensor
    batch: int
    samples: Tensor


class Weighing:
    """Turns rows of a batch's gradient into per-sample gradients.

    ``reduction`` says how the batch's loss is made of per-sample losses, ``scale`` what it was
    multiplied by: a number, a function that returns it (asked in each forward), or a
    ``torch.amp.GradScaler``. ``samples`` masks samples: bool [B], True = count, or a function of B;
    those left out must have no part in the loss, and a mean is over the others.
    """

    def __init__(
        self,
        reduction: Reduction = "mean",
        scale: Scale | torch.amp.GradScaler = 1.0,
        samples: Tensor | Callable[[int], Tensor | None] | None = None,
    ) -> None:
        if reduction not in ("mean", "sum"):
            raise ValueError(f"loss_reduction={reduction!r}: expected 'mean' or 'sum'")
        if isinstance(scale, int | float) and not scale > 0:
            raise ValueError(f"loss_scale={scale!r}: expected a number above 0")
        if not (isinstance(scale, int | float) or callable(scale) or hasattr(scale, "get_scale")):
            raise ValueError(
                f"loss_scale={scale!r}: expected a number, a function that gives it, or a "
                f"torch.amp.GradScaler"
            )
        self.reduction, self.scale, self.samples = reduction, scale, samples

    def __call__(self, site: Site, stage: Tensor, keep: Tensor | None) -> Rows:
        """Of the rows of ``stage`` [..., features]; ``keep`` [B, T] is False at those left out."""
        dtype = torch.promote_types(stage.dtype, torch.float32)
        of, count = site.tokens.samples(stage)
        some = self.samples(count) if callable(self.samples) else self.samples
        if some is None:
            samples = torch.full((), float(count), dtype=dtype, device=stage.device)
            weight = torch.ones(of.shape, dtype=dtype, device=stage.device)
        else:
            if tuple(some.shape) != (count,):
                raise ValueError(
                    f"sample_mask has shape {tuple(some.shape)}, but the batch has {count} "
                    f"samples; for batches of several sizes pass a function of B"
                )
            some = some.to(stage.device).ne(0).to(dtype)
            samples, weight = some.sum(), some[of]
        if keep is not None:
            rows = site.tokens.restore(keep.unsqueeze(-1), like=stage[..., :1])
            weight = weight * rows.reshape(of.shape).to(dtype)
        if self.reduction == "mean":
            weight = weight * samples
        return Rows(weight / self._scale(), of, count, samples)

    def _scale(self) -> float | Tensor:
        if isinstance(self.scale, int | float):
            return self.scale
        if callable(self.scale):
            return self.scale()
        # its tensor, where it has one: get_scale() waits for the device
        held = getattr(self.scale, "_scale", None)
        return held if isinstance(held, Tensor) else self.scale.get_scale()


class GradientMeasure:
    """Sums over samples and tokens of one block, gathered in backward, in one phase.

    ``readings`` maps each reading's name to its place (z, u, f, y) and to the names of its sums.
    A pass whose sums are not finite (AMP's overflow) adds nothing but to ``skipped``.
    """

    columns: ClassVar[dict[str, tuple[str, Callable[[Any], str]]]] = {}
    readings: ClassVar[dict[str, tuple[str, tuple[str, ...]]]]

    def __init__(self, block: MLPBlock) -> None:
        self.block = block
        device = next((p.device for p in block.down.module.parameters()), None)
        # all of them now: compilers make no leaves, and processes must agree on what there is
        self._sums = {name: _leaf(self.size(name), device) for name in self.readings}

    @staticmethod
    def stages(site: Site) -> tuple[str, ...]:
        """None: nothing is read in the forward."""
        return ()

    def update(self, site: Site, stages: dict[str, Tensor], keep: Tensor | None) -> None:
        """Nothing: sums come in backward."""

    @staticmethod
    def needs(site: Site, reading: str) -> tuple[str, ...]:
        """The stages that ``reading`` keeps until backward."""
        raise NotImplementedError

    @staticmethod
    def kept(stage: str, value: Tensor) -> Tensor:
        """What of a stage waits for backward: all of it."""
        return value

    def read(self, site: Site, reading: str) -> Callable[..., list[Tensor]]:
        """A pure function ``(gradient, weight, samples, *kept) -> sums``, each 0-dim."""
        raise NotImplementedError

    def size(self, name: str) -> int:
        """How many numbers a reading gathers: its sums, and the passes skipped."""
        return len(self.readings[name][1]) + 1

    def reading(self, site: Site, name: str, rows: Rows, stages: dict[str, Tensor]) -> Reading:
        """What the site is to read in this pass."""
        kept = tuple(self.kept(stage, stages[stage]) for stage in self.needs(site, name))
        leaf = self.leaf(name, rows.weight.device)
        return Reading(leaf, Total(self.read(site, name)), (rows.weight, rows.samples, *kept))

    def leaf(self, name: str, device: torch.device) -> Tensor:
        """Where a reading's sums gather, on ``device``."""
        leaf = self._sums[name]
        if leaf.device != device:  # the model has moved
            new = self._sums[name] = _leaf(self.size(name), device)
            if leaf.grad is not None:
                new.grad = leaf.grad.to(device)
        return self._sums[name]

    @property
    def leaves(self) -> list[Tensor]:
        """The leaves that gather the sums as their gradients."""
        return list(self._sums.values())

    def state(self) -> list[Tensor]:
        """The sums; zeros that take no memory where no pass has come."""
        return [leaf.detach() if leaf.grad is None else leaf.grad for leaf in self.leaves]

    def load(self, state: list[Tensor]) -> None:
        """Go on from these sums."""
        for leaf, sums in zip(self.leaves, state, strict=True):
            leaf.grad = sums.to(leaf.device, copy=True) if bool(sums.any()) else None

    def sums(self, name: str) -> dict[str, float] | None:
        """What ``reading`` has gathered, by name, with ``skipped``; None: nothing."""
        grad = self._sums[name].grad
        if grad is None:
            return None
        return dict(zip((*self.readings[name][1], "skipped"), grad.tolist(), strict=True))

    def reset(self) -> None:
        """Forget all passes."""
        for leaf in self._sums.values():
            leaf.grad = None


def _leaf(size: int, device: torch.device | None) -> Tensor:
    """A leaf [size] that requires grad; its own values are never read, and take no memory."""
    with torch.inference_mode(False):
        one = torch.zeros(1, dtype=torch.float64, device=device)
        return one.expand(size).requires_grad_()


class Total:
    """The sums as one float64 vector, with a count of passes that were not finite."""

    def __init__(self, read: Callable[..., list[Tensor]]) -> None:
        self.read = read

    def __call__(self, gradient: Tensor, *kept: Tensor) -> Tensor:
        """[number of sums + 1]; the last is 1 and the others 0 where any is not finite."""
        sums = torch.stack([total.double() for total in self.read(gradient, *kept)])
        fine = sums.isfinite().all()
        skipped = (~fine).double()[None]
        return torch.cat([torch.where(fine, sums, torch.zeros_like(sums)), skipped])


def sloped(derivative: Callable[[Tensor], Tensor] | None, stage: Tensor) -> Tensor:
    """Where φ′ ≠ 0: by ``derivative`` of z, or without one where ReLU's output is not 0."""
    return (stage if derivative is None else derivative(stage)) != 0


def row_squares(rows: Tensor) -> Tensor:
    """``‖row‖²`` over the last axis, in float32 at least: [...].

    >>> row_squares(torch.tensor([[3.0, 4.0]]))
    tensor([25.])
    """
    dtype = torch.promote_types(rows.dtype, torch.float32)
    return torch.linalg.vector_norm(rows, dim=-1, dtype=dtype).square()

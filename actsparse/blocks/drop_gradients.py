"""Drop small gradients in the backward pass; the forward pass stays as it is."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor


def without_small(gradient: Tensor, threshold: float) -> Tensor:
    """``gradient`` η, any shape, with zeros where ``|η| ≤ threshold · rms(η)``; else unchanged.

    ``rms(η) = √(Σ η² / #{η ≠ 0})``, over the entries that are not zero: units that φ silences and
    tokens without a part in the loss (padding) do not lower it, so that a threshold means the same
    at every density. The rule is blind to η's scale. An η that is not finite, empty or of zeros
    alone comes back as it is, as any does at threshold 0. Half precision is judged in float32.

    >>> without_small(torch.tensor([3.0, -4.0, 0.0, 0.1]), 1.0)  # rms √(25.01 / 3) = 2.89
    tensor([ 3., -4.,  0.,  0.])
    """
    if not threshold or not gradient.numel():
        return gradient
    with torch.no_grad():  # which are small is a constant for a gradient's own gradient
        # in place, and with signs where count_nonzero or masked_fill would do: half the time
        size = gradient.abs().to(torch.promote_types(gradient.dtype, torch.float32))
        size.div_(size.amax())  # squares neither vanish nor overflow; NaN where none can be judged
        count = size.sign().sum(-1).sum()
        rms = (torch.linalg.vector_norm(size, dim=-1).square().sum() / count).sqrt()
        dropped = size.le_(threshold * rms)  # 1 or 0; NaN compares as false: nothing is dropped
        kept = dropped.neg_().add_(1).to(gradient.dtype)
    return gradient * kept


def change_gradient(
    stage: Tensor, change: Callable[[Tensor], Tensor], rows: slice | None = None
) -> Tensor:
    """``stage`` as it is; in backward ``change(gradient)`` goes on, of its features ``rows`` alone.

    ``change`` returns a tensor like the one it gets, [..., features], and leaves that as it was.

    >>> x = torch.tensor([1.0, 2.0], requires_grad=True)
    >>> change_gradient(x, lambda gradient: 10 * gradient).sum().backward()
    >>> x.grad
    tensor([10., 10.])
    """
    out: Tensor = _Change.apply(stage, change, rows)
    return out


class _Change(torch.autograd.Function):
    @staticmethod
    def forward(stage: Tensor, change: Callable[[Tensor], Tensor], rows: slice | None) -> Tensor:
        # no view: autograd lets nobody write to a view that a Function has made
        return stage.detach()  # the same memory, which what follows may overwrite as before

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
        _, ctx.change, ctx.rows = inputs

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> Any:
        if ctx.rows is None:
            return ctx.change(gradient), None, None
        changed = gradient.clone()  # others' gradient may share its memory
        changed[..., ctx.rows] = ctx.change(gradient[..., ctx.rows])
        return changed, None, None

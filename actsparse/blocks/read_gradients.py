"""Read the gradients of a block's stages where autograd passes them on.

A reading is an identity in the graph. In the backward pass it passes the gradient on and gives sums
of it to a leaf tensor as that tensor's gradient. There autograd adds them up, once for each
backward pass, also under gradient checkpointing, accumulation and ``torch.compile``.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor


@dataclass(frozen=True)
class Reading:
    """Where sums of a gradient go, how to take them, and what that needs from the forward.

    ``read(gradient, *kept)`` returns a tensor like ``sums``, a leaf that requires grad. It must be
    a pure function of tensors.
    """

    sums: Tensor
    read: Callable[..., Tensor]
    kept: tuple[Tensor, ...] = ()


def read_gradient(stage: Tensor, reading: Reading, rows: slice | None = None) -> Tensor:
    """``stage`` as it is, with ``reading`` in its backward; of its features ``rows`` alone.

    >>> x, sums = torch.tensor([1.0, 2.0], requires_grad=True), torch.zeros(1, requires_grad=True)
    >>> y = read_gradient(3 * x, Reading(sums, lambda gradient: gradient.sum()[None]))
    >>> y.square().sum().backward()
    >>> sums.grad  # 2y, summed
    tensor([18.])
    """
    out: Tensor = _Read.apply(stage, reading.sums, reading.read, rows, *reading.kept)
    return out


class _Read(torch.autograd.Function):
    @staticmethod
    def forward(
        stage: Tensor,
        sums: Tensor,
        read: Callable[..., Tensor],
        rows: slice | None,
        *kept: Tensor,
    ) -> Tensor:
        # no view: autograd lets nobody write to a view that a Function has made
        return stage.detach()  # the same memory, which what follows may overwrite as before

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
        _, _, ctx.read, ctx.rows, *kept = inputs
        ctx.save_for_backward(*kept)

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> Any:
        kept = ctx.saved_tensors  # unpacked once: checkpointing allows no second time
        with torch.no_grad():
            seen = gradient if ctx.rows is None else gradient[..., ctx.rows]
            sums = ctx.read(seen.detach(), *(tensor.detach() for tensor in kept))
        return gradient, sums, None, None, *[None] * len(kept)

"""Norms of packed rows as PyTorch operators, for penalties on blocks that run sparse.

A penalty of ‖a‖₁ and ‖a‖₂ never asks for a's zeros: they add nothing, and its gradient there is 0,
``sgn(0) = 0``, as torch's dense norms have it. So the packed values give the same numbers.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.library import custom_op

from actsparse.kernels import backends, checks
from actsparse.kernels import pack as packing


@custom_op("actsparse::row_norms", mutates_args=())
def row_norms(pointer: Tensor, value: Tensor, n: int) -> tuple[Tensor, Tensor]:
    """``Σ |value|`` and ``√Σ value²`` of each of n rows of packed entries: [n] and [n]."""
    if backends.native(value):
        return torch.ops.actsparse_cpu.row_norms(pointer, value, n)
    checks.rows(pointer, value, n)
    row, wide = packing.rows_of(pointer, n, len(value)), value.double()
    one, two = (wide.new_zeros(n).index_add_(0, row, each) for each in (wide.abs(), wide.square()))
    return one.to(value.dtype), two.sqrt().to(value.dtype)


@checks.fake(row_norms)
def _(pointer: Tensor, value: Tensor, n: int) -> tuple[Tensor, Tensor]:
    return value.new_empty(n), value.new_empty(n)


@custom_op("actsparse::row_norms_backward", mutates_args=())
def row_norms_backward(
    pointer: Tensor, value: Tensor, two: Tensor, grad_one: Tensor, grad_two: Tensor
) -> Tensor:
    """``g₁ sgn(value) + g₂ value / ‖value‖₂``, entry by entry [nnz]; 0 where the value is."""
    if backends.native(value):
        return torch.ops.actsparse_cpu.row_norms_backward(pointer, value, two, grad_one, grad_two)
    n = checks.given("two", two).numel()
    checks.rows(pointer, value, n)
    for name, t in (("two", two), ("grad_one", grad_one), ("grad_two", grad_two)):
        checks.require(name, t, (n,), value, value.dtype)
    row, share = packing.rows_of(pointer, n, len(value)), grad_two / torch.where(two > 0, two, 1)
    return grad_one[row] * value.sgn() + share[row] * value


@checks.fake(row_norms_backward)
def _(pointer: Tensor, value: Tensor, two: Tensor, grad_one: Tensor, grad_two: Tensor) -> Tensor:
    return torch.empty_like(value)


def _keep_norms(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor]) -> None:
    ctx.save_for_backward(inputs[0], inputs[1], output[1])


def _norms_backward(ctx: Any, one: Tensor, two: Tensor) -> tuple[Any, ...]:
    return None, row_norms_backward(*ctx.saved_tensors, one.contiguous(), two.contiguous()), None


row_norms.register_autograd(_norms_backward, setup_context=_keep_norms)

"""The dense programs beside the block's own layers: oneDNN's products, also of packed weights.

PyTorch multiplies float32 on the CPU by MKL, which on AMD's processors reaches half of oneDNN's
speed (docs/kernels.md). PyTorch has oneDNN's products as operators of its own, which are private:
where they are missing, there is only PyTorch's ``linear``. Results are the layers' to rounding.
"""

from __future__ import annotations

import functools
import time
from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from actsparse.activations import ActivationFunction, named
from actsparse.blocks.stages import FASTER, keep_above, sides_of
from actsparse.kernels import backends

CLEAR = 1.1  # another product takes the place of PyTorch's where it is faster by this much


@functools.cache
def has_onednn() -> bool:
    """Whether this PyTorch has oneDNN's products."""
    wanted = ("_linear_pointwise", "_reorder_linear_weight")
    return torch.backends.mkldnn.is_available() and all(
        hasattr(torch.ops.mkldnn, name) for name in wanted
    )


def onednn(x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    """``x weightᵀ + bias`` by oneDNN; x [N, D], weight [H, D] or what :func:`packed` made of it."""
    if not weight.is_mkldnn:
        if 0 in x.shape or 0 in weight.shape:  # which some of oneDNN's products refuse
            return F.linear(x, weight, bias)
        # the operator takes its operands for contiguous, whatever their strides say
        weight = weight.contiguous()
    bias = bias if bias is None else bias.contiguous()
    return product(x.contiguous(), weight, bias)


def product(x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    """The same of operands that are contiguous."""
    return torch.ops.mkldnn._linear_pointwise(x, weight, bias, "none", [], "")


def packed(weight: Tensor, tokens: int) -> Tensor:
    """A copy of weight [H, D] in oneDNN's layout for about so many tokens."""
    return torch.ops.mkldnn._reorder_linear_weight(weight.contiguous(), max(tokens, 1))


class Linear(torch.autograd.Function):
    """oneDNN's product with gradients, which are oneDNN's products too."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
        """``x weightᵀ + bias``."""
        ctx.save_for_backward(x, weight)
        return onednn(x, weight, bias)

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        """The gradients of x, weight and bias that are wanted."""
        x, weight = ctx.saved_tensors
        dx = onednn(grad, weight.t(), None) if ctx.needs_input_grad[0] else None
        dw = None
        if ctx.needs_input_grad[1]:
            dw = onednn(grad.t(), x.t(), None)
        return dx, dw, grad.sum(0) if ctx.needs_input_grad[2] else None


@functools.cache
def onednn_is_faster() -> bool:
    """Whether oneDNN's float32 product beats PyTorch's on this machine: timed once, some 10 ms."""
    if not has_onednn():
        return False
    with torch.no_grad(), torch.autocast("cpu", enabled=False):
        return _gain(onednn, torch.ones(128, 512), torch.ones(1024, 512)) > CLEAR


def by_rows(x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    """``x weightᵀ + bias`` of one token by the compiled kernels, at the speed of memory."""
    bias = bias if bias is None else bias.contiguous()
    return backends.compiled().linear(x.contiguous(), weight, bias)


@functools.cache
def rows_are_faster() -> bool:
    """Whether :func:`by_rows` beats PyTorch's bfloat16 product on this machine: timed once."""
    if not backends.loaded():
        return False
    with torch.no_grad(), torch.autocast("cpu", enabled=False):
        x, weight = (torch.ones(n, 512, dtype=torch.bfloat16) for n in (1, 1024))
        return _gain(by_rows, x, weight) > CLEAR


def _gain(product: Callable[..., Tensor], x: Tensor, weight: Tensor) -> float:
    """How much faster ``product`` is than PyTorch's."""
    best = []
    for each in (F.linear, product):
        each(x, weight, None)
        seconds = []
        for _ in range(5):
            start = time.perf_counter()
            each(x, weight, None)
            seconds.append(time.perf_counter() - start)
        best.append(min(seconds))
    return best[0] / best[1]


def linear(x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    """``x weightᵀ + bias`` by whichever product is fastest here, without gradients."""
    if torch.compiler.is_compiling() or not x.is_cpu:
        return F.linear(x, weight, bias)
    if x.dtype is torch.bfloat16 and x.numel() == x.shape[-1] and weight.is_contiguous():
        return by_rows(x, weight, bias) if rows_are_faster() else F.linear(x, weight, bias)
    if x.dtype is not torch.float32:
        return F.linear(x, weight, bias)
    if onednn_is_faster():
        return onednn(x, weight, bias)
    return F.linear(x, weight, bias)


def _keep_above(values: Tensor, threshold: Tensor) -> Tensor | None:
    """What :func:`keep_above` gives without gradients; None where there is no kernel for it."""
    if backends.native(values) and threshold.dtype is torch.float32 and values.dim():
        kept: Tensor = backends.compiled().cut(values.contiguous(), threshold.detach().contiguous())
        return kept
    return None


FASTER.append(_keep_above)


def hidden_layer(
    function: ActivationFunction,
    first: Tensor,
    second: Tensor | None,
    threshold: Tensor | None,
    product: bool,
) -> Tensor:
    """a of z and, in gated blocks, u, both [..., H]; the threshold as for ``sparse_mlp``."""
    gate, whole = (None, None) if threshold is None else sides_of(threshold, product)
    a = function.value(first)
    a = a if gate is None else keep_above(a, gate)
    a = a if second is None else a * second
    return a if whole is None else keep_above(a, whole)


def dense_mlp(
    x: Tensor,
    up: Tensor,
    bias: Tensor | None,
    down: Tensor,
    down_bias: Tensor | None,
    *,
    activation: str | ActivationFunction,
    gate: Tensor | None = None,
    gate_bias: Tensor | None = None,
    threshold: Tensor | None = None,
    of_product: bool = False,
    between: Callable[[Tensor], Tensor] | None = None,
    weights: Callable[[str, int], Tensor] | None = None,
    on_hidden: Callable[[Tensor], None] = lambda hidden: None,
) -> Tensor:
    """An MLP by oneDNN's products; arguments as for :func:`actsparse.kernels.sparse_mlp`.

    Args:
        x: the tokens [..., D].
        of_product: as ``product`` of ``sparse_mlp``.
        weights: gives the packed copy of ``first`` (gate in gated blocks, else up), ``second`` (up
            in gated blocks) and ``down`` for so many tokens; None multiplies by the weights.
        on_hidden: is called with the hidden layer [N, H] before ``between``.

    Returns:
        y [..., D].
    """
    function = named(activation) if isinstance(activation, str) else activation
    tokens = x.reshape(x.shape[:-1].numel(), x.shape[-1]).contiguous()
    n = len(tokens)

    def product(name: str, x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
        if weights is not None:
            return onednn(x, weights(name, n), bias)
        if torch.compiler.is_compiling():  # the compiler has products of its own
            return F.linear(x, weight, bias)
        if not torch.is_grad_enabled():
            return onednn(x, weight, bias)
        return Linear.apply(x, weight, bias)

    if gate is None:
        first, second = product("first", tokens, up, bias), None
    else:
        first = product("first", tokens, gate, gate_bias)
        second = product("second", tokens, up, bias)
    hidden = hidden_layer(function, first, second, threshold, of_product)
    on_hidden(hidden)
    hidden = hidden if between is None else between(hidden)
    return product("down", hidden, down, down_bias).view(*x.shape[:-1], down.shape[0])

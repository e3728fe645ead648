"""MLPs whose activation, of any kind, is cut at a threshold for each unit: what is kept, packed.

``v = φ(z)``, or in the product form of gated blocks ``v = φ(z) ⊙ u``, is computed densely, as the
layers do it in that dtype; entries with ``|v| ≤ t`` are dropped. So what is kept is what the layers
keep, and only the products after it are sparse.
"""

from __future__ import annotations

import torch
from torch import Tensor

from actsparse.activations import ActivationFunction
from actsparse.blocks.stages import drops, sides_of
from actsparse.kernels import backends, dense, ops
from actsparse.kernels.forms import FEW
from actsparse.kernels.prepared import Prepared, laid


def infer_cut(
    x: Tensor,
    first: Tensor,
    first_bias: Tensor | None,
    second: Tensor | None,
    second_bias: Tensor | None,
    down: Tensor,
    down_bias: Tensor | None,
    function: ActivationFunction,
    threshold: Tensor,
    product: bool,
    copies: Prepared,
) -> Tensor:
    """y by the compiled kernels, without gradients; ``second``: up and its bias of gated blocks."""
    x = x.contiguous()
    v = function.value(dense.linear(x, first, first_bias))
    _, _, other, rows = copies.for_inference(x.shape[:-1].numel() <= FEW, False)
    if product and second is not None:
        v, other, second_bias = v * dense.linear(x, second, second_bias), None, None
    bias, down_bias = (b if b is None else b.contiguous() for b in (second_bias, down_bias))
    forward = backends.compiled().forward
    return forward(
        v, threshold.contiguous(), x, other, bias, rows, down_bias, down.shape[0], 0, 0.0
    )


def pack_cut(
    tokens: Tensor,
    first: Tensor,
    first_bias: Tensor | None,
    second: Tensor | None,
    second_bias: Tensor | None,
    function: ActivationFunction,
    threshold: Tensor,
    product: bool,
) -> tuple[Tensor, Tensor, Tensor]:
    """Pointer, index and value of the activations that are kept, with their gradients.

    tokens [N, D] and ``first`` [H, D] laid out as :mod:`actsparse.kernels.ops` takes them.
    """
    u, (gate, whole) = None, sides_of(threshold, product)
    with torch.no_grad():
        z = dense.linear(tokens, first, first_bias)
        v = a = function.value(z)
        slope = function.derivative(z)
        if product and second is not None:
            u = dense.linear(tokens, second, second_bias)
            v = a * u
        cut = whole if gate is None else gate
        assert cut is not None
        dropped = drops(v, cut) | ((a == 0) & (slope == 0))
        a, slope = a.masked_fill(dropped, 0), slope.masked_fill(dropped, 0)
    pointer, index, value, _ = ops.pack_values(tokens, first, first_bias, a, slope)
    if second is None:
        return pointer, index, value
    second = laid(second)
    if u is None:
        value = value * ops.sample(pointer, index, tokens, second, second_bias)
        if whole is not None:
            value = value.masked_fill(drops(value, whole[index.long()]), 0)
        return pointer, index, value
    one = (~dropped).to(u.dtype)  # ∂u/∂u of the same entries
    other = ops.pack_values(tokens, second, second_bias, u.masked_fill(dropped, 0), one)
    return pointer, index, value * other[2]


def check_threshold(threshold: Tensor, up: Tensor, two: bool) -> None:
    """Raise ValueError unless it is float32, one number for each unit of up [H, D], or ``two``."""
    wanted = up.shape[:1]
    if (
        threshold.shape not in ((wanted, (2, *wanted)) if two else (wanted,))
        or threshold.dtype is not torch.float32
        or threshold.device != up.device
    ):
        raise ValueError(
            f"threshold must be torch.float32 {list(wanted)} on {up.device}, one number for each "
            f"unit{f', or {[2, *wanted]}' if two else ''}; it is {threshold.dtype} "
            f"{list(threshold.shape)} on {threshold.device}"
        )

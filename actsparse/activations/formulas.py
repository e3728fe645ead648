"""The formulas of the activation functions: value φ(z) and derivative φ′(z) side by side."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor


@dataclass(frozen=True)
class ActivationFunction:
    """An activation function that acts on each entry by itself, with its derivative.

    Args:
        name: what :func:`actsparse.activations.named` finds it by.
        value: φ, of a tensor of any shape.
        derivative: φ′, of a tensor of any shape.
        silent: whether φ is exactly zero on a set of positive length. Density means something only
            for such functions.
        same_zeros: whether φ = 0 and φ′ = 0 on the same set, as for ReLU and JSReLU. Density and
            derivative density are then one number.

    >>> relu = ActivationFunction("mine", torch.relu, lambda z: (z > 0).float(), silent=True)
    >>> relu.derivative(torch.tensor([-1.0, 2.0]))
    tensor([0., 1.])
    """

    name: str
    value: Callable[[Tensor], Tensor]
    derivative: Callable[[Tensor], Tensor]
    silent: bool = False
    same_zeros: bool = False


def _above(z: Tensor, threshold: float) -> Tensor:
    """z where z > threshold ≥ 0, else 0; NaN where z is NaN."""
    if threshold == 0:
        return torch.relu(z)  # which keeps its output for backward, where threshold keeps z
    return F.threshold(z, threshold, 0.0)


def _where_above(values: Tensor, z: Tensor, threshold: float) -> Tensor:
    """``values`` where z > threshold or NaN, else 0; half precision rounds no threshold."""
    out: Tensor = torch.ops.aten.threshold_backward(values, z, threshold)
    return out


class _JSReLU(torch.autograd.Function):
    """φ and φ′ in few passes; plain operations would keep three temporaries for backward."""

    generate_vmap_rule = True

    @staticmethod
    def forward(z: Tensor, jump: float, cap: float, threshold: float) -> Tensor:
        r = F.threshold(z, threshold, 0.0)
        if jump == 1 and cap == math.inf:
            return r.addcmul_(r, r, value=0.5)  # r + r²/2 cancels nothing, ((z+1)²-1)/2 does
        return _jsrelu_of_positive(r, jump, cap)

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
        z, *ctx.numbers = inputs
        ctx.save_for_backward(z)
        ctx.save_for_forward(z)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> Any:
        (z,), (jump, cap, threshold) = ctx.saved_tensors, ctx.numbers
        rise = z if cap == math.inf else z.clamp(max=cap - jump)
        slope = torch.addcmul(grad if jump == 1 else jump * grad, grad, rise)
        return _where_above(slope, z, threshold), None, None, None

    @staticmethod
    def jvp(ctx: Any, tangent: Tensor, *numbers: None) -> Tensor:
        pushed: Tensor = _JSReLU.backward(ctx, tangent)[0]  # pointwise: pushing is pulling
        return pushed


def _jsrelu_of_positive(r: Tensor, jump: float, cap: float) -> Tensor:
    """JSReLU of r ≥ 0, by sums of positive terms none of which is larger than φ."""
    if cap == math.inf:
        return torch.addcmul(r, r, r, value=0.5) if jump == 1 else (0.5 * r + jump) * r
    rise = r.clamp(max=cap - jump)
    bent = rise * torch.sub(r, rise, alpha=0.5)
    return torch.add(bent, r, alpha=jump) if jump else bent  # 0 · ∞ is none of the sum's terms


def jsrelu(z: Tensor, jump: float = 1.0, cap: float = math.inf, threshold: float = 0.0) -> Tensor:
    """Jump-slope ReLU (JSReLU): ``φ(z) = ((z+1)² − 1)/2`` for z > 0, else 0.

    Its derivative ``φ′(z) = (z+1)·1[z>0]`` jumps by 1 at zero; ``φ(0) = φ′(0) = 0``, and NaN gives
    NaN. Source: Peng et al. 2023 (arXiv 2309.03004), the activation of the modified Transformer.

    The options are ours. With them ``φ′(z) = min(jump + z, cap)`` for z > 0, and φ is continuous.
    A ``threshold`` t sets φ = 0 where z ≤ t, so that φ jumps at t.

    Args:
        z: pre-activations, any shape.
        jump: how far φ′ jumps at zero, at least 0.
        cap: the largest slope, above ``jump``.
        threshold: t, at least 0.

    Returns:
        φ(z), in the shape of ``z``.

    >>> jsrelu(torch.tensor([-3.0, 1.0]))
    tensor([0.0000, 1.5000])
    >>> jsrelu(torch.tensor([1.0, 3.0]), cap=2.0)  # a straight line of slope 2 from 1 on
    tensor([1.5000, 5.5000])
    """
    if torch.compiler.is_compiling():  # a compiler fuses the formula, and rejects a custom jvp
        return _jsrelu_of_positive(F.threshold(z, threshold, 0.0), jump, cap)
    out: Tensor = _JSReLU.apply(z, jump, cap, threshold)
    return out


def _s_shape(z: Tensor, half_width: float = 1.5) -> Tensor:
    return torch.relu(z - half_width).square() - torch.relu(-z - half_width).square()


def _s_shape_derivative(z: Tensor, half_width: float = 1.5) -> Tensor:
    return 2 * (torch.relu(z - half_width) + torch.relu(-z - half_width))


def _open(mask: Tensor, z: Tensor) -> Tensor:
    """1 where mask, else 0, NaN where z is NaN."""
    return torch.where(z.isnan(), z, mask.to(z.dtype))


def _gelu_derivative(z: Tensor) -> Tensor:
    density = torch.exp(-0.5 * z * z) * (0.5 / torch.pi) ** 0.5
    return 0.5 * (1 + torch.erf(z * 0.5**0.5)) + z * density


def _as_it_is(saved: Tensor) -> Tensor:
    return saved


def by_autograd(value: Callable[[Tensor], Tensor]) -> Callable[[Tensor], Tensor]:
    """φ′ of a pointwise function, by differentiating it."""

    def derivative(z: Tensor) -> Tensor:
        if torch.compiler.is_compiling() or torch.is_inference_mode_enabled():
            return torch.func.grad(lambda leaf: value(leaf.clone()).sum())(z.detach())
        # autograd.grad, unlike func.grad, takes autograd.Functions of every style; hooks of its
        # own hide what it saves from gradient checkpointing, which counts saved tensors
        with torch.enable_grad(), torch.autograd.graph.saved_tensors_hooks(_as_it_is, _as_it_is):
            leaf = z.detach().requires_grad_()
            return torch.autograd.grad(value(leaf.clone()).sum(), leaf)[0]  # may overwrite it

    return derivative


def relu_with(name: str, shift: float = 0.0, threshold: float = 0.0) -> ActivationFunction:
    """``ReLU(z − shift)`` where z > threshold, else 0; both at least 0."""

    def value(z: Tensor) -> Tensor:
        if shift == 0:
            return _above(z, threshold)
        r = torch.relu(z - shift)
        return r if threshold <= shift else _where_above(r, z, threshold)

    return ActivationFunction(name, value, lambda z: _open(value(z) > 0, z), True, True)


def jsrelu_with(
    name: str, jump: float = 1.0, cap: float = math.inf, threshold: float = 0.0
) -> ActivationFunction:
    """See :func:`jsrelu`."""

    def derivative(z: Tensor) -> Tensor:
        rise = z if cap == math.inf else z.clamp(max=cap - jump)
        return _where_above(rise + jump, z, threshold)

    value = partial(jsrelu, jump=jump, cap=cap, threshold=threshold)
    return ActivationFunction(name, value, derivative, True, True)


def squared_relu_with(name: str, threshold: float = 0.0) -> ActivationFunction:
    """``ReLU(z)²`` where z > threshold, else 0."""

    def value(z: Tensor) -> Tensor:
        return _above(z, threshold).square()

    return ActivationFunction(name, value, lambda z: 2 * _above(z, threshold), True, True)


def s_shape_with(
    name: str, dx: float = 0.0, dy: float = 0.0, half_width: float = 1.5
) -> ActivationFunction:
    """See :func:`actsparse.activations.shifted_s_shape`."""
    return ActivationFunction(
        name,
        lambda z: _s_shape(z - dx, half_width) + dy,
        lambda z: _s_shape_derivative(z - dx, half_width),
        silent=dy == 0,
        same_zeros=dy == 0,
    )


def _smooth(name: str, value: Callable[[Tensor], Tensor]) -> ActivationFunction:
    return ActivationFunction(name, value, by_autograd(value))


_WITHOUT_NUMBERS = [
    relu_with("relu"),
    jsrelu_with("jsrelu"),
    squared_relu_with("squared_relu"),
    ActivationFunction("relu6", F.relu6, lambda z: _open((z > 0) & (z < 6), z), True),
    ActivationFunction("hardtanh", F.hardtanh, lambda z: _open((z > -1) & (z < 1), z)),
    s_shape_with("s_shape"),
    ActivationFunction("gelu", F.gelu, _gelu_derivative),
    _smooth("gelu_tanh", lambda z: F.gelu(z, approximate="tanh")),
    _smooth("quick_gelu", lambda z: z * torch.sigmoid(1.702 * z)),
    _smooth("silu", F.silu),
    _smooth("tanh", torch.tanh),
    _smooth("sigmoid", torch.sigmoid),
    _smooth("elu", F.elu),
    _smooth("leaky_relu", F.leaky_relu),
    _smooth("mish", F.mish),
    _smooth("softplus", F.softplus),
    ActivationFunction("hardswish", F.hardswish, by_autograd(F.hardswish), True),
    _smooth("identity", lambda z: z * 1),
]
ACTIVATIONS: dict[str, ActivationFunction] = {f.name: f for f in _WITHOUT_NUMBERS}

"""What the sparse kernels compute, in plain PyTorch on dense tensors, forward and backward.

``z = x Uᵀ + b``, ``a = φ(z)``, ``y = a Vᵀ + b′``. Every product but the first has an operand that
is mostly exact zeros (theory of arXiv 2605.25612: a ≠ 0 drives y and dV; φ′(z) ≠ 0 drives g_a, dx
and dU), and a product with an exact zero of that operand is skipped
(:mod:`actsparse.kernels.reference`). A NaN in z counts as active.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from actsparse.activations import ActivationFunction
from actsparse.kernels.reference import product


@dataclass(frozen=True)
class Gradients:
    """Gradients of an MLP, shaped like what they are gradients of; ``gate`` None if not gated."""

    x: Tensor
    up: Tensor
    bias: Tensor
    down: Tensor
    down_bias: Tensor
    gate: Tensor | None = None
    gate_bias: Tensor | None = None


def forward(
    x: Tensor,
    up: Tensor,
    bias: Tensor | None,
    down: Tensor,
    down_bias: Tensor | None,
    activation: ActivationFunction,
    gate: Tensor | None = None,
    gate_bias: Tensor | None = None,
) -> Tensor:
    """y [N, D] of x [N, D], up [H, D], down [D, H]; gated if ``gate`` [H, D] is given.

    Gated: ``a = φ(x gateᵀ + gate_bias) ⊙ (x upᵀ + bias)``.
    """
    a = activation.value(F.linear(x, up if gate is None else gate, _first(bias, gate, gate_bias)))
    if gate is not None:
        a = torch.where(a != 0, a * F.linear(x, up, bias), 0)
    y = product(a, down.t())
    return y if down_bias is None else y + down_bias


def backward(
    grad_y: Tensor,
    x: Tensor,
    up: Tensor,
    bias: Tensor | None,
    down: Tensor,
    activation: ActivationFunction,
    gate: Tensor | None = None,
    gate_bias: Tensor | None = None,
) -> Gradients:
    """The gradients of ``sum(grad_y ⊙ y)``.

    ``dV = g_yᵀ a``, ``g_a = g_y V``, ``g_z = g_a ⊙ φ′(z)``, ``dx = g_z U``, ``dU = g_zᵀ x``; gated:
    ``g_gate = g_a ⊙ u ⊙ φ′(z)``, ``g_up = g_a ⊙ φ(z)``.
    """
    z = F.linear(x, up if gate is None else gate, _first(bias, gate, gate_bias))
    a, slope = activation.value(z), activation.derivative(z)
    grad_a = grad_y @ down
    if gate is None:
        grad_z = torch.where(slope != 0, grad_a * slope, 0)
        return Gradients(
            product(grad_z, up),
            product(grad_z.t(), x),
            grad_z.sum(0),
            product(a.t(), grad_y).t(),
            grad_y.sum(0),
        )
    u = F.linear(x, up, bias)
    grad_z = torch.where(slope != 0, grad_a * u * slope, 0)
    grad_u = torch.where(a != 0, grad_a * a, 0)
    return Gradients(
        product(grad_z, gate) + product(grad_u, up),
        product(grad_u.t(), x),
        grad_u.sum(0),
        product(torch.where(a != 0, a * u, 0).t(), grad_y).t(),
        grad_y.sum(0),
        product(grad_z.t(), x),
        grad_z.sum(0),
    )


def _first(bias: Tensor | None, gate: Tensor | None, gate_bias: Tensor | None) -> Tensor | None:
    return bias if gate is None else gate_bias

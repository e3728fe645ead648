"""Activation functions by name: the value φ(z) and the derivative φ′(z) side by side.

>>> import torch
>>> jsrelu = named("jsrelu")
>>> jsrelu.value(torch.tensor([-1.0, 0.0, 2.0]))
tensor([0., 0., 4.])
>>> jsrelu.derivative(torch.tensor([-1.0, 0.0, 2.0]))
tensor([0., 0., 3.])
>>> identify(torch.nn.GELU())
'gelu'
"""

from __future__ import annotations

import copy
import re
from collections.abc import Callable
from dataclasses import dataclass
from functools import cache
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor


@dataclass(frozen=True)
class ActivationFunction:
    """A pointwise function with its derivative.

    ``silent`` says that φ is exactly zero on a set of positive length, so that density means
    something; ``same_zeros`` says that φ = 0 and φ′ = 0 on the same set (ReLU, JSReLU), so that
    density and derivative density are one number.
    """

    name: str
    value: Callable[[Tensor], Tensor]
    derivative: Callable[[Tensor], Tensor]
    silent: bool = False
    same_zeros: bool = False

    def __reduce__(self) -> Any:
        # ours pickle by name, so that models that use them pickle
        if _ours(self.name) is self:
            return named, (self.name,)
        return super().__reduce__()


class _JSReLU(torch.autograd.Function):
    """φ and φ′ in two passes each; plain operations would keep three temporaries for backward."""

    generate_vmap_rule = True

    @staticmethod
    def forward(z: Tensor) -> Tensor:
        r = torch.relu(z)
        return r.addcmul_(r, r, value=0.5)  # r + r²/2 cancels nothing, ((z+1)²-1)/2 does

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Tensor], output: Tensor) -> None:
        ctx.save_for_backward(inputs[0])
        ctx.save_for_forward(inputs[0])

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> Tensor:
        (z,) = ctx.saved_tensors
        # as ReLU's own backward: 0 where z <= 0, so that NaN stays visible in the gradient
        slope = torch.addcmul(grad, grad, z)
        return torch.ops.aten.threshold_backward(slope, z, 0)

    @staticmethod
    def jvp(ctx: Any, tangent: Tensor) -> Tensor:
        return _JSReLU.backward(ctx, tangent)  # pointwise: pushing is pulling


def jsrelu(z: Tensor) -> Tensor:
    """Jump-slope ReLU: ``φ(z) = ((z+1)² − 1)/2`` for z > 0, else 0; any shape.

    ``φ′(z) = (z+1)·1[z>0]`` jumps by 1 at zero and ``φ(0) = φ′(0) = 0``; NaN gives NaN
    (Peng et al. 2023, arXiv 2309.03004, the activation of the modified Transformer).

    >>> jsrelu(torch.tensor([-3.0, 1.0]))
    tensor([0.0000, 1.5000])
    """
    if torch.compiler.is_compiling():  # a compiler fuses the formula, and rejects a custom jvp
        r = torch.relu(z)
        return torch.addcmul(r, r, r, value=0.5)
    return _JSReLU.apply(z)


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


def _by_autograd(value: Callable[[Tensor], Tensor]) -> Callable[[Tensor], Tensor]:
    def derivative(z: Tensor) -> Tensor:
        if torch.compiler.is_compiling() or torch.is_inference_mode_enabled():
            return torch.func.grad(lambda leaf: value(leaf.clone()).sum())(z.detach())
        # autograd.grad, unlike func.grad, takes autograd.Functions of every style; hooks of its
        # own hide what it saves from gradient checkpointing, which counts saved tensors
        with torch.enable_grad(), torch.autograd.graph.saved_tensors_hooks(_as_it_is, _as_it_is):
            leaf = z.detach().requires_grad_()
            return torch.autograd.grad(value(leaf.clone()).sum(), leaf)[0]  # may overwrite it

    return derivative


def _smooth(name: str, value: Callable[[Tensor], Tensor]) -> ActivationFunction:
    return ActivationFunction(name, value, _by_autograd(value))


_ALL = [
    ActivationFunction("relu", torch.relu, lambda z: _open(z > 0, z), True, True),
    ActivationFunction("jsrelu", jsrelu, lambda z: (z + 1).masked_fill(z <= 0, 0), True, True),
    ActivationFunction(
        "squared_relu", lambda z: torch.relu(z).square(), lambda z: 2 * torch.relu(z), True, True
    ),
    ActivationFunction("relu6", F.relu6, lambda z: _open((z > 0) & (z < 6), z), True),
    ActivationFunction("hardtanh", F.hardtanh, lambda z: _open((z > -1) & (z < 1), z)),
    ActivationFunction("s_shape", _s_shape, _s_shape_derivative, True, True),
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
    ActivationFunction("hardswish", F.hardswish, _by_autograd(F.hardswish), True),
    _smooth("identity", lambda z: z * 1),
]
ACTIVATIONS: dict[str, ActivationFunction] = {f.name: f for f in _ALL}


_NUMBER = r"(-?[0-9]+(?:\.[0-9]+)?(?:e[+-][0-9]+)?)"
_S_SHAPE = re.compile(rf"s_shape\(dx={_NUMBER}, dy={_NUMBER}(?:, half_width={_NUMBER})?\)")


class SShape(NamedTuple):
    """What tells one S-shape ``s(z − dx) + dy`` from another; see :func:`shifted_s_shape`."""

    dx: float = 0.0
    dy: float = 0.0
    half_width: float = 1.5

    @property
    def name(self) -> str:
        """``s_shape``, ``s_shape(dx=1.6, dy=-1.6)`` or, with another h, ``half_width`` as a third.

        Numbers are written in full, as Python does, whole ones without ``.0``: no two functions
        share a name, and no function has two.
        """
        if self == SShape():
            return "s_shape"
        dx, dy, h = (repr(value + 0.0).removesuffix(".0") for value in self)  # -0 is 0
        third = "" if self.half_width == SShape().half_width else f", half_width={h}"
        return f"s_shape(dx={dx}, dy={dy}{third})"


def s_shape_of(name: str) -> SShape | None:
    """The S-shape called ``name``; None where that is no S-shape's name.

    >>> s_shape_of("s_shape(dx=1.6, dy=-1.6)")
    SShape(dx=1.6, dy=-1.6, half_width=1.5)
    >>> s_shape_of("s_shape"), s_shape_of("relu")
    (SShape(dx=0.0, dy=0.0, half_width=1.5), None)
    """
    if name == SShape().name:
        return SShape()
    found = _S_SHAPE.fullmatch(name)
    if found is None:
        return None
    shape = SShape(*(float(value) + 0.0 for value in found.groups() if value is not None))
    return shape if shape.name == name and shape.half_width > 0 else None


@cache  # one function for one name, as in ACTIVATIONS
def _s_shaped(shape: SShape) -> ActivationFunction:
    dx, dy, half_width = shape
    return ActivationFunction(
        shape.name,
        lambda z: _s_shape(z - dx, half_width) + dy,
        lambda z: _s_shape_derivative(z - dx, half_width),
        silent=dy == 0,
        same_zeros=dy == 0,
    )


def _ours(name: str) -> ActivationFunction | None:
    if name in ACTIVATIONS:
        return ACTIVATIONS[name]
    shape = s_shape_of(name)
    return None if shape is None else _s_shaped(shape)


def named(name: str) -> ActivationFunction:
    """The activation function called ``name``, a key of ``ACTIVATIONS`` or a shifted S-shape.

    >>> named("s_shape(dx=1.6, dy=-1.6)") is shifted_s_shape(1.6, -1.6)
    True

    Raises:
        ValueError: no activation has that name; the message lists those that exist.
    """
    function = _ours(name)
    if function is None:
        known = ", ".join(sorted(ACTIVATIONS))
        raise ValueError(
            f"unknown activation {name!r}; known: {known}, and with numbers of your own "
            f"'s_shape(dx=1.6, dy=-1.6)' or 's_shape(dx=1.6, dy=0, half_width=2)', each written as "
            f"shifted_s_shape(...).name writes it"
        )
    return function


def shifted_s_shape(
    dx: float = 0.0, dy: float = 0.0, half_width: float = 1.5
) -> ActivationFunction:
    """The S-shape ``s(z − dx) + dy`` whose zeros of φ and of φ′ lie in different places.

    ``s(z) = r(z−h)² − r(−z−h)²``, r = ReLU, h = ``half_width`` (arXiv 2309.03004 and 2605.25612,
    the manipulation experiments). Calls with equal numbers return the same object, which
    :func:`named` finds by its name.

    Raises:
        ValueError: a number is not finite, or ``half_width`` is not above 0.

    >>> f = shifted_s_shape(dy=1.6)
    >>> f.value(torch.zeros(1)), f.derivative(torch.zeros(1))
    (tensor([1.6000]), tensor([0.]))
    >>> f.name
    's_shape(dx=0, dy=1.6)'
    """
    shape = SShape(*(float(value) + 0.0 for value in (dx, dy, half_width)))  # + 0.0: −0 is 0
    if s_shape_of(shape.name) != shape:
        raise ValueError(
            f"shifted_s_shape(dx={dx!r}, dy={dy!r}, half_width={half_width!r}): expected finite "
            f"numbers, half_width above 0"
        )
    return named(shape.name)


def identify(function: Callable[[Tensor], Tensor]) -> str | None:
    """Name a pointwise function by its values on a grid; ``None`` when it is none of ours.

    Values are compared, not classes, so that anybody's ReLU is a ReLU. The probe is float64
    and fires no hooks; the tolerance is far above rounding and far below the
    distance of any two of our functions on the grid. A module that learns has no name, since what
    it computes today says nothing about tomorrow.
    """
    grid = torch.linspace(-7.0, 7.0, 113, dtype=torch.float64)
    tolerance = 1e-6
    try:
        if isinstance(function, torch.nn.Module):
            if any(parameter.requires_grad for parameter in function.parameters()):
                return None
            if [*function.parameters(), *function.buffers()]:
                # in half precision GELU and ReLU are closer than rounding
                function = copy.deepcopy(function).double().cpu()
            function = function.forward  # nobody's hooks
        with torch.no_grad():
            values = function(grid.clone())  # which it may overwrite
    except Exception:  # a stranger's function may refuse a 1-D or float64 probe: then unnamed
        return None
    if not isinstance(values, Tensor) or values.shape != grid.shape:
        return None
    for candidate in _ALL:
        if torch.allclose(values.double(), candidate.value(grid.double()), rtol=0, atol=tolerance):
            return candidate.name
    return None


def derivative_of(
    function: Callable[[Tensor], Tensor] | None, name: str | None
) -> Callable[[Tensor], Tensor]:
    """φ′ of a block's activation: the formula where ``name`` is known, autograd otherwise.

    Raises:
        ValueError: neither a known name nor a function to differentiate.
    """
    known = None if name is None else _ours(name)
    if known is not None:
        return known.derivative
    if function is None:
        raise ValueError("the activation is computed inline and unknown: it has no derivative here")
    return _by_autograd(function)


def works_in_place(call: Callable[[Tensor], Tensor] | None) -> bool:
    """Whether φ overwrites its input, like ``nn.ReLU(inplace=True)``."""
    # a module's hooks are nobody's business here
    forward = call.forward if isinstance(call, torch.nn.Module) else call
    if forward is None:
        return False
    with torch.inference_mode(False):  # tensors made inside it count no versions
        probe = torch.zeros(2, 2)
    before = probe._version
    try:
        with torch.inference_mode(False), torch.no_grad():
            forward(probe)
    except Exception:  # a stranger's function may want another shape or dtype
        return False
    return probe._version != before

"""Telling a stranger's activation function by its values, and how it treats its input."""

from __future__ import annotations

import copy
from collections.abc import Callable

import torch
from torch import Tensor

from actsparse.activations.formulas import ACTIVATIONS, by_autograd
from actsparse.activations.names import known_as


def identify(function: Callable[[Tensor], Tensor]) -> str | None:
    """Name a pointwise function by its values on a grid; ``None`` when it is none of ours.

    Values are compared, not classes, so that anybody's ReLU is a ReLU. The probe is float64
    and fires no hooks; the tolerance is far above rounding and far below the
    distance of any two of our functions on the grid. A module that learns has no name, since what
    it computes today says nothing about tomorrow.
    """
    grid = torch.linspace(-7.0, 7.0, 113, dtype=torch.float64)
    # near zero for small thresholds and shifts, far out for caps
    far = [16.0, 100.0, 7e4, 1e9]  # beyond half precision's range, where some cap
    special = torch.tensor([2e-6, 1e-4, 2e-3, 0.02, *far], dtype=torch.float64)
    grid = torch.cat([grid, special, -special])
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
    for candidate in ACTIVATIONS.values():
        if torch.allclose(
            values.double(), candidate.value(grid.double()), rtol=1e-12, atol=tolerance
        ):
            return candidate.name
    return None


def derivative_of(
    function: Callable[[Tensor], Tensor] | None, name: str | None
) -> Callable[[Tensor], Tensor]:
    """φ′ of a block's activation: the formula where ``name`` is known, autograd otherwise.

    Raises:
        ValueError: neither a known name nor a function to differentiate.
    """
    known = None if name is None else known_as(name)
    if known is not None:
        return known.derivative
    if function is None:
        raise ValueError("the activation is computed inline and unknown: it has no derivative here")
    return by_autograd(function)


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

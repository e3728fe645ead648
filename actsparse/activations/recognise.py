"""Recognise an activation function by its values, and whether it overwrites its input."""

from __future__ import annotations

import copy
from collections.abc import Callable

import torch
from torch import Tensor

from actsparse.activations.formulas import ACTIVATIONS, by_autograd
from actsparse.activations.names import known_as


def identify(function: Callable[[Tensor], Tensor]) -> str | None:
    """The name of an activation function, found by its values on a grid, or None.

    Values are compared, not classes, so any implementation of ReLU is found to be ReLU. The
    probe is in float64 and fires no hooks. The tolerance is far above rounding errors and far below
    the distance between any two of the known functions. A module with trainable parameters has no
    name, because it may compute something else tomorrow.

    Args:
        function: a function or module that acts on each entry by itself.

    Returns:
        A key of ``ACTIVATIONS``, or None if it is none of these.

    >>> identify(torch.nn.SiLU()), identify(lambda z: z.clamp(min=0)), identify(torch.sin)
    ('silu', 'relu', None)
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
    """The derivative φ′ of an activation: by its formula if ``name`` is known, else by autograd.

    Args:
        function: φ; needed where ``name`` is unknown.
        name: its name in :mod:`actsparse.activations`, or None.

    Returns:
        A function from z to φ′(z), both of any shape.

    Raises:
        ValueError: there is neither a known name nor a function to differentiate.

    >>> derivative_of(torch.square, None)(torch.tensor([3.0]))
    tensor([6.])
    """
    known = None if name is None else known_as(name)
    if known is not None:
        return known.derivative
    if function is None:
        raise ValueError("the activation is computed inline and has no known name: no derivative")
    return by_autograd(function)


def works_in_place(call: Callable[[Tensor], Tensor] | None) -> bool:
    """Whether an activation overwrites its input, like ``nn.ReLU(inplace=True)``.

    Args:
        call: the function or module; None counts as no.

    Returns:
        Whether a tensor that is given to it has changed afterwards.

    >>> works_in_place(torch.nn.ReLU(inplace=True)), works_in_place(torch.relu)
    (True, False)
    """
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

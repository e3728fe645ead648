"""Recognise a normalisation layer, its scale and its bias by probing it, not by its class."""

from __future__ import annotations

import copy
from typing import Any

import torch
from torch import Tensor, nn

from actsparse.blocks.block import Norm


def inspect_norm(name: str, module: nn.Module) -> Norm | None:
    """The layer as a :class:`Norm` if it normalises the last axis, else ``None``.

    A normalisation gives the same output for ``p`` and ``2p`` (up to its eps), is not constant,
    and has no parameter but vectors of the axis' length. Which parameter is the scale and which
    the bias shows in what a change of it adds: a constant for a bias, something that depends on
    the input for a scale. The offset is what is left of the output at scale 0.

    >>> norm = inspect_norm("n", nn.LayerNorm(4))
    >>> norm.scale, norm.bias, norm.offset
    ('weight', 'bias', 0.0)
    >>> inspect_norm("d", nn.Linear(4, 4)) is None
    True
    """
    if any(True for _ in module.children()) or next(module.buffers(), None) is not None:
        return None
    if isinstance(module, torch.jit.ScriptModule):
        return None
    parameters = dict(module.named_parameters(recurse=False))
    width = _width(module, parameters)
    if width is None or width < 2:
        return None
    reference = next(iter(parameters.values()), torch.empty(0))
    generator = torch.Generator().manual_seed(0)
    device = torch.device("cpu") if reference.is_meta else reference.device
    probe = (8 * torch.randn(4, width, generator=generator)).to(device, reference.dtype)
    # the probe uses ones, not the layer's values, so that a zeroed scale hides nothing
    # (in new tensors, since a sharded parameter's like would be sharded too)
    values = {
        key: torch.ones(value.shape, dtype=value.dtype, device=device)
        for key, value in parameters.items()
    }

    clone = copy.copy(module)  # its forward is called, so that nobody's hooks fire
    clone.training = False
    # a forward set on the instance is bound to the module, or wraps the class's (accelerate)
    own = getattr(vars(module).get("forward"), "__func__", type(module).forward)

    def run(changes: dict[str, Tensor], x: Tensor) -> Tensor:
        held: dict[str, Any] = {**module._parameters, **values, **changes}
        clone._parameters = held
        return own(clone, x).float()

    try:
        with torch.no_grad():
            base = run({}, probe)
            if base.shape != probe.shape or not torch.allclose(
                base, run({}, 2 * probe), rtol=0.02, atol=0.02
            ):
                return None
            alone = run({}, probe[:1])
            if not torch.allclose(base[:1], alone, rtol=0.02, atol=0.02):  # a norm over the batch
                return None
            if float(base.std()) < 0.1:  # a constant is scale invariant too
                return None
            norm = Norm(name, module, None, None)
            for key, value in values.items():
                change = run({key: value + 1}, probe) - base
                if float((change - change[:1]).abs().max()) < 0.05:
                    norm.bias = key
                else:
                    norm.scale = key
            if norm.scale is not None:
                zero = {key: torch.zeros_like(value) for key, value in values.items()}
                norm.offset = 1.0 if float(run(zero, probe).std()) > 0.1 else 0.0
            return norm
    except Exception:  # not a function of one tensor with this last axis: not a norm
        return None


def _width(module: nn.Module, parameters: dict[str, nn.Parameter]) -> int | None:
    shapes = {tuple(p.shape) for p in parameters.values()}
    if len(shapes) == 1 and len(parameters) <= 2:
        (shape,) = shapes
        return shape[0] if len(shape) == 1 else None
    declared = getattr(module, "normalized_shape", None)
    if not parameters and isinstance(declared, tuple | list) and len(declared) == 1:
        return int(declared[0])
    return None if parameters or "norm" not in type(module).__name__.lower() else 8

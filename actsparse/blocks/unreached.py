"""Layers of MLP blocks that the example inputs did not reach.

These are experts that no token was routed to, layers behind an early exit, or the tower of a
modality that was not given. Whether they form blocks is judged by the sizes of their linear layers.
"""

from __future__ import annotations

from collections.abc import Iterable

import torch
from torch import nn

from actsparse.blocks.block import MLPBlock, widths
from actsparse.blocks.refused import Refused, without_numbers
from actsparse.blocks.trace import Trace, is_linear

_IDLE = "its layers did not run on these inputs; give inputs that reach it"
_SCRIPT = "TorchScript, which takes no hooks; find the blocks of the eager module"


def unreached(trace: Trace, blocks: Iterable[MLPBlock]) -> list[Refused]:
    """The parts of the model that hold MLP blocks, by their looks, of which nothing ran.

    Each is the largest module of which nothing ran. A part is listed if one of its linear layers
    stands where one of a found block does, in another layer or expert, or if two of them lead from
    D to H ≠ D features and back. Poolers, heads and adapters that are switched off are not.
    """
    ran = {part for name in trace.ran for part in _parts(name)}
    closed = [n for n, m in trace.modules.items() if isinstance(m, torch.jit.ScriptModule)]
    parts: dict[str, list[str]] = {}  # scope → linear layers in it
    tops: dict[str, str] = {}  # linear layer → the largest module around it that did not run
    for name, module in trace.modules.items():
        *above, _ = _parts(name)
        inside = name in closed or any(is_linear(trace.modules[part]) for part in above)
        if not is_linear(module) or name in ran or inside:
            continue
        tops[name] = next(part for part in _parts(name) if part not in ran)
        scope = tops[name] if tops[name] != name else _owner(trace, above)
        parts.setdefault(scope, []).append(name)
    found = {
        (without_numbers(layer.name), widths(layer.module))
        for block in blocks
        for layer in (block.up, block.gate, block.down)
        if layer is not None
    }
    listed: dict[str, None] = {}
    for names in parts.values():
        sizes = [widths(trace.modules[name]) for name in names]
        pairs = {(up, down) for up in sizes for down in sizes if _lead_back(up, down)}
        for name, size in zip(names, sizes, strict=True):
            place = (without_numbers(name), size)
            if place in found or any(size in pair for pair in pairs):
                listed[tops[name]] = None
    outermost = (name for name in closed if set(_parts(name)[:-1]).isdisjoint(closed))
    return [
        *(Refused(name, _SCRIPT) for name in outermost),
        *(Refused(name, _IDLE, reached=False) for name in listed),
    ]


def _parts(name: str) -> list[str]:
    """The names of a module and of those around it, outermost first, the root's left out."""
    steps = name.split(".")
    return [".".join(steps[: i + 1]) for i in range(len(steps))]


def _owner(trace: Trace, above: list[str]) -> str:
    """The nearest module around that is more than a list, whose forward calls the layer."""
    lists = (nn.ModuleList, nn.ModuleDict)
    return next((a for a in reversed(above) if not isinstance(trace.modules[a], lists)), "")


def _lead_back(up: tuple[int, int], down: tuple[int, int]) -> bool:
    """Whether two layers lead from D to H (or to gate and up, 2·H) and back, H not D."""
    hidden = down[0]
    return up[0] == down[1] != hidden and up[1] in (hidden, 2 * hidden)

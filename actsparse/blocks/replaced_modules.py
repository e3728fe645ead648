"""Notice modules of a block that were replaced after the block was found."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any

from torch import nn

from actsparse.blocks.block import MLPBlock
from actsparse.blocks.hooks import Wiring
from actsparse.blocks.replace_forward import Detour, Replacement
from actsparse.blocks.tokens import Tokens


class Standing:
    """The modules of one block, by name, as they were; looking at them is cheap.

    ``parts`` are what a program in their place would skip: layers, activation, dropouts.
    ``between`` are modules that hold some of them: the hidden layer leaves one and enters another.
    """

    def __init__(self, block: MLPBlock) -> None:
        self.parts = dict(_parts(block))
        self._links = list(_links(block, self.parts))
        around = block.path[block.around - 1] if block.around else None
        inside = set() if around is None else set(around.modules())
        own = {around, *self.parts.values()}
        self.between = {n: m for _, n, m in self._links if m in inside and m not in own}
        callers = {parent for parent, _, _ in self._links if parent in inside}
        self._forwards = {module: forward_of(module) for module in callers}

    def look(self) -> list[Any]:
        """What :meth:`changed` depends on, as values to compare: equal ones mean no change."""
        seen: list[Any] = []
        for parent, name, module in self._links:
            if parent._modules.get(name) is not module:
                seen.append(name)
        for module in self._forwards:
            seen += (module.__class__.forward, module.__dict__.get("forward"))
        return seen

    def changed(self) -> str | None:
        """What was exchanged since, in words, or None."""
        for parent, name, module in self._links:
            if parent._modules.get(name) is not module:
                return f"{name} was replaced since the block was found"
        for module, forward in self._forwards.items():
            if forward_of(module) != forward:
                return f"the forward of {type(module).__name__} was replaced since"
        return None


def is_own(hook: Any) -> bool:
    """Whether a hook, or a forward on an instance, is one of this library's."""
    owner = getattr(hook, "__self__", None)
    return isinstance(owner, Wiring | Tokens | Replacement | Detour)


def forward_of(module: nn.Module) -> tuple[Any, Any]:
    """What a call of the module runs, but for us: its class's forward, and the instance's."""
    forward: Any = module.__dict__.get("forward")
    while is_own(forward):
        forward = forward.__self__.own
    return type(module).forward, forward


def _parts(block: MLPBlock) -> Iterator[tuple[str, nn.Module]]:
    for layer in (block.up, block.gate, block.down):
        if layer is not None:
            yield layer.name, layer.module
    if block.activation.module is not None:
        yield block.activation.name, block.activation.module
    for part in block.between:
        if part.module is not None:
            yield part.name, part.module


def _links(
    block: MLPBlock, parts: Mapping[str, nn.Module]
) -> Iterator[tuple[nn.Module, str, nn.Module]]:
    """Parent, name and child, from the model down to each part."""
    met = set()
    for path, part in parts.items() if block.path else ():
        parent, (*way, last) = block.path[0], path.split(".")
        for name in way:
            child = parent._modules.get(name)
            if child is None:
                break
            if (id(parent), name) not in met:
                met.add((id(parent), name))
                yield parent, name, child
            parent = child
        yield parent, last, part

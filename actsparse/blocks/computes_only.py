"""Tell whether a module's forward computes one MLP block and does nothing else."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from functools import partial
from types import FunctionType
from typing import Any

from torch import nn

from actsparse.blocks.block import MLPBlock


@dataclass(frozen=True)
class _Value:
    """What a forward has made of its input: ``made`` says how."""

    made: Any

    def __mul__(self, other: object) -> _Value:
        return _Value(frozenset((self, other))) if isinstance(other, _Value) else NotImplemented


class _Children:
    """Stands for a module while its forward runs: its children say what they were called on."""

    def __init__(self, module: nn.Module, calls: list[_Value]) -> None:
        def call(child: nn.Module | None, x: object) -> _Value:
            calls.append(_Value((child, x)))
            return calls[-1]

        self.__dict__ = {name: partial(call, child) for name, child in module._modules.items()}

    def __iter__(self) -> Iterator[Any]:
        return iter(self.__dict__.values())


def computing_only(block: MLPBlock) -> nn.Module | None:
    """The module around a block, if its forward takes x, gives y, and can do nothing else.

    Its code names nothing but its children. So it runs on values that say how they were made.

    Args:
        block: the block.

    Returns:
        The module, or None.

    >>> import torch
    >>> from actsparse import find_mlp_blocks
    >>> mlp = nn.Sequential(nn.Linear(8, 32), nn.ReLU(), nn.Linear(32, 8))
    >>> (block,) = find_mlp_blocks(mlp, torch.randn(2, 8))
    >>> computing_only(block) is mlp
    True
    """
    if not block.around or block.activation.module is None or block.hidden_feeds:
        return None
    module, kind = block.path[block.around - 1], type(block.path[block.around - 1])
    forward: Any = kind.forward
    own = "forward" in module.__dict__ or kind.__call__ is not nn.Module.__call__
    if own or type(forward) is not FunctionType:
        return None
    code = forward.__code__
    inside = any(isinstance(each, type(code)) for each in code.co_consts)
    if inside or code.co_freevars or not set(code.co_names) <= module._modules.keys():
        return None
    calls: list[_Value] = []
    try:
        made = forward(_Children(module, calls), _Value("x"))
    except Exception:  # code that wants more of a tensor than this
        return None
    once = len(calls) == 3 + block.gated + len(block.between)
    return module if once and made == _y(block) else None


def _y(block: MLPBlock) -> _Value:
    x = _Value("x")
    hidden = _Value((block.activation.module, _Value((block.pre_activation.module, x))))
    if block.gate is not None:
        hidden *= _Value((block.up.module, x))
    for part in block.between:
        hidden = _Value((part.module, hidden))
    return _Value((block.down.module, hidden))

"""Models whose parameters are sharded over processes by FSDP2 (``fully_shard``).

Between passes each parameter is a ``DTensor``, of which a process holds a part; within a module's
pass it is a plain tensor, gathered. What reads a parameter between passes asks for all of it here.
"""

from __future__ import annotations

import sys
from collections.abc import Iterable
from typing import Any

import torch
from torch import Tensor, nn


def whole(tensor: Tensor) -> Tensor:
    """All of a tensor, gathered where processes hold parts of it; call it in each of them.

    >>> whole(torch.ones(2))
    tensor([1., 1.])
    """
    gather = getattr(tensor, "full_tensor", None)
    return tensor if gather is None else gather()


def sharded(modules: Iterable[nn.Module]) -> list[Any]:
    """Those of ``modules`` that ``fully_shard`` was called on.

    >>> sharded(nn.Sequential(nn.Linear(2, 2)).modules())
    []
    """
    fsdp = sys.modules.get("torch.distributed.fsdp")  # slow to load; not loaded, nothing is sharded
    return [] if fsdp is None else [each for each in modules if isinstance(each, fsdp.FSDPModule)]


def gathered_state(model: nn.Module) -> dict[str, Tensor]:
    """The state dict of a sharded model, whole, on the CPU of the first process; empty elsewhere.

    Call it in every process. Tied parameters are one tensor.
    """
    keeps = torch.distributed.get_rank() == 0
    found: dict[int, Tensor] = {}
    state = {}
    for name, tensor in model.state_dict(keep_vars=True).items():
        if id(tensor) not in found:
            one = whole(tensor.detach())  # one after another: never all of them on a device
            found[id(tensor)] = one.to("cpu", copy=True) if keeps else one.new_empty(0)
        state[name] = found[id(tensor)]
    return state if keeps else {}


def own_class(module: nn.Module) -> type[nn.Module]:
    """A module's class as it was before ``fully_shard`` derived one of its own from it.

    >>> own_class(nn.Linear(2, 2))
    <class 'torch.nn.modules.linear.Linear'>
    """
    cls = type(module)
    return cls.__bases__[1] if sharded([module]) else cls

"""Several processes: agreement, averages, and whether parameters are sharded."""

from __future__ import annotations

import os
from typing import Any

import torch
from torch import nn
from torch.distributed.tensor import DTensor

from actsparse.blocks.sharding import sharded


def together() -> bool:
    """Whether there are processes to agree with."""
    return torch.distributed.is_available() and torch.distributed.is_initialized()


def launched() -> tuple[int, int]:
    """This process's rank, and how many there are, as torchrun and ``accelerate launch`` say."""
    return int(os.environ.get("RANK", "0")), int(os.environ.get("WORLD_SIZE", "1"))


def everywhere(fine: bool, device: torch.device) -> bool:
    """Whether all processes are fine: one that stopped alone would leave the others waiting."""
    if not together():
        return fine
    flag = torch.tensor(float(fine), device=device)
    torch.distributed.all_reduce(flag, torch.distributed.ReduceOp.MIN)
    return bool(flag)


def mean_of(values: list[float], device: torch.device) -> list[float]:
    """The means over all processes."""
    if not together():
        return values
    total = torch.tensor(values, dtype=torch.float64, device=device)
    torch.distributed.all_reduce(total)
    return (total / torch.distributed.get_world_size()).tolist()


def of_the_first(value: Any) -> Any:
    """What the first process has, in all of them; ``value`` is any plain object."""
    if not together():
        return value
    box = [value]
    torch.distributed.broadcast_object_list(box)
    return box[0]


def gathered(value: Any) -> list[Any]:
    """What each process has, by rank."""
    if not together():
        return [value]
    box: list[Any] = [None] * torch.distributed.get_world_size()
    torch.distributed.all_gather_object(box, value)
    return box


def meet() -> None:
    """Wait for all processes."""
    if together():
        torch.distributed.barrier()


def unsharded(model: nn.Module) -> str | None:
    """Why a model that was to be sharded (FSDP2) is not; None if its parameters are DTensors."""
    for module in sharded(model.modules()):
        module.reshard()  # an evaluation leaves the root's parameters gathered
    whole = [name for name, each in model.named_parameters() if not isinstance(each, DTensor)]
    if not whole:
        return None
    reason = (
        "Accelerate shards with one process only after `accelerate config` or torchrun, and not on "
        "a CPU, where it falls back to DDP without a word"
    )
    return (
        f"FSDP was asked for, but {len(whole)} parameters are not sharded (DTensor), such as "
        f"{whole[0]}: {reason}; leave FSDP out (DDP), or run on GPUs"
    )

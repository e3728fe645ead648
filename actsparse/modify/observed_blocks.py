"""The blocks of an observation, for changes after training; ``modify`` imports no ``observe``."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any, Literal, Protocol

from torch import nn

from actsparse.blocks.block import MLPBlock
from actsparse.blocks.resolve import own_blocks


class Seen(Protocol):
    """What is asked of what :func:`actsparse.observe` returns."""

    @property
    def blocks(self) -> Mapping[str, MLPBlock]:
        """The blocks observed, by the names that ``part`` takes."""

    def part(self, block: str, phase: Literal["inference"], measure: str) -> Any:
        """One measure of one block; ValueError where it has seen nothing."""

    def close(self) -> None:
        """Stop watching."""


def seen_blocks(
    model: nn.Module, seen: Seen, blocks: Iterable[MLPBlock] | None, caller: str
) -> dict[str, MLPBlock]:
    """By the names they have in ``seen``: ``blocks``, or all that were observed.

    Raises:
        ValueError: blocks that were not observed, or not of this model; a wrapped model; none.
    """
    if isinstance(model, nn.parallel.DistributedDataParallel | nn.DataParallel):
        raise ValueError(
            f"{caller} takes the model inside {type(model).__name__}: give model.module"
        )
    names = {block.up.module: name for name, block in seen.blocks.items()}
    chosen = own_blocks(model, seen.blocks.values() if blocks is None else blocks)
    for block in chosen:
        if block.up.module not in names:
            raise ValueError(
                f"block {block.name!r} was not observed; seen has {', '.join(names.values())}"
            )
    return {names[block.up.module]: block for block in chosen}

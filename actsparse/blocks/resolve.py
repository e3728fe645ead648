"""The blocks that a caller means: those it gives, those found with inputs, or the handle's."""

from __future__ import annotations

import warnings
from collections.abc import Iterable
from typing import Any

from torch import nn

from actsparse.blocks.block import Blocks, MLPBlock, unwrap
from actsparse.blocks.find import find_mlp_blocks
from actsparse.blocks.refused import ALONE, told

HANDLE = "_actsparse_handle"  # a model's attribute


def handle_on(model: nn.Module) -> Any:
    """The handle of what ``sparsify`` has attached to a model, wrapped or not, or None."""
    return unwrap(model).__dict__.get(HANDLE)


def found_with(model: nn.Module, inputs: Any, caller: str, stacklevel: int = 3) -> Blocks:
    """The blocks that ``inputs`` show, with a warning of what looks like others.

    ``caller``, whom the warning speaks of, leaves those parts as they are.
    """
    found = find_mlp_blocks(model, inputs)
    left = [item for item in found.refused if not item.reached or item.reason == ALONE]
    if left:
        warnings.warn(
            f"{caller} takes {len(found)} MLP blocks and leaves out modules that look like others: "
            f"{'; '.join(told(left))}",
            stacklevel=stacklevel,
        )
    return found


def blocks_of(
    model: nn.Module, inputs: Any, blocks: Iterable[MLPBlock] | None, caller: str
) -> list[MLPBlock]:
    """The blocks given, found with ``inputs``, or those that ``sparsify`` has modified.

    ``caller`` is whom errors speak of.

    Raises:
        ValueError: both or none of them; blocks that are not the model's.
    """
    if inputs is not None and blocks is not None:
        raise ValueError(f"give {caller} inputs= or blocks=, not both")
    if inputs is not None:
        return list(found_with(model, inputs, caller, stacklevel=4))
    if blocks is None:
        handle = handle_on(model)
        if handle is None:
            raise ValueError(
                f"{caller} needs inputs= (a batch to find the MLP blocks with) or blocks= (from "
                "find_mlp_blocks), as sparsify has not modified this model"
            )
        blocks = handle.blocks
    return own_blocks(model, blocks)


def own_blocks(model: nn.Module, blocks: Iterable[MLPBlock]) -> list[MLPBlock]:
    """The blocks given, one at least, all of them the model's.

    Raises:
        ValueError: none, or one that is not.
    """
    chosen = list(blocks)
    if not chosen:
        raise ValueError("blocks is empty; give at least one")
    modules = set(model.modules())
    for block in chosen:
        if block.up.module not in modules:
            raise ValueError(
                f"block {block.name!r} is not part of this {type(unwrap(model)).__name__}; find or "
                f"observe the blocks of this very model (copies have blocks of their own)"
            )
    return chosen

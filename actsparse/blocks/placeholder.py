"""A placeholder for the hidden layer of a block that runs sparse and does not compute it."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from actsparse.blocks.autograd_graph import MOVES, MULTIPLIES
from actsparse.blocks.block import MLPBlock
from actsparse.blocks.pass_state import Running

_ASKS = {"dim", "ndimension", "size", "stride", "numel", "nelement", "is_floating_point"}


class Ghost(Tensor):
    """A tensor of NaN without memory, which nobody may compute with.

    It may be moved, and in gated blocks multiplied by another one of the same pass. All else is
    refused: then the block does more between up and down than when it was found, and its result
    would be wrong.
    """

    of: object  # the mark of its pass; not the pass, which holds a ghost: neither would be freed
    block: str

    @classmethod
    def __torch_function__(
        cls, func: Any, types: Any, args: Any = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        """Refuse what is computed with a ghost, before it is."""
        name, given = getattr(func, "__name__", str(func)), [*args, *(kwargs or {}).values()]
        ghosts = [each for each in given if isinstance(each, Ghost)]
        product = name in MULTIPLIES and len(ghosts) == 2 and ghosts[0].of is ghosts[1].of
        if not ghosts or not (product or name in MOVES or name in _ASKS):
            block = f"block {ghosts[0].block!r}" if ghosts else "a block"
            raise RuntimeError(
                f"{block} runs sparse, without its hidden layer, but {name}() reads it, which was "
                f"not so when the block was found: is that so in training mode only, or was "
                f"remove() called in the middle of a call? accelerate() does not support this block"
            )
        with torch._C.DisableTorchFunctionSubclass():
            if product and ghosts[0].shape == ghosts[1].shape:
                return ghosts[0]  # NaN times NaN, without the memory that a product would take
            result = func(*args, **(kwargs or {}))
            if isinstance(result, tuple | list):
                marked = [_mark(each, ghosts[0].of, ghosts[0].block) for each in result]
                return type(result)(marked) if type(result) in (tuple, list) else result
            return _mark(result, ghosts[0].of, ghosts[0].block)


class Ghosts:
    """Makes the ghosts of one block; ``block`` is its name."""

    def __init__(self, block: str) -> None:
        self._block = block
        self._last: tuple[Any, Tensor] | None = None

    def like(self, x: Tensor, width: int, of: Running) -> Ghost:
        """In the place of a layer's output [..., width] on x: of gate and up the same one."""
        if of.ghost is not None:
            return of.ghost
        kind = x.shape, x.dtype, x.device, width
        last = self._last
        if last is None or last[0] != kind:
            with torch.inference_mode(False):  # else gradients could never flow around it
                nan = x.new_full((1,), float("nan")).expand(*x.shape[:-1], width)
            last = self._last = kind, nan
        # a view of the last NaN costs a third of making one
        ghost: Ghost = Tensor._make_subclass(Ghost, last[1])
        ghost.of, ghost.block = object(), self._block
        of.ghost = ghost
        return ghost


def is_ghost(value: Any, now: Running) -> bool:
    """Whether ``value`` stands for the hidden layer of this pass, which an executor runs."""
    if torch.compiler.is_compiling():
        return now.detours
    return now.ghost is not None and getattr(value, "of", None) is now.ghost.of


def check_ghost(d: Tensor, block: MLPBlock, now: Running) -> None:
    """Refuse down's input d if it is not the untouched ghost that stands for this pass's a."""
    if torch.compiler.is_compiling():  # which sees strides alone: what was computed has some
        real = d.stride(-1) > 0 and not block.gated
    else:
        real = not is_ghost(d, now)
    if real:
        raise RuntimeError(
            f"block {block.name!r} runs sparse, without its hidden layer, but down gets another "
            f"input than when the block was found: is that so in training mode only, or do two "
            f"calls overlap? accelerate() does not support this block"
        )


def _mark(result: Any, of: object, block: str) -> Any:
    if not isinstance(result, Tensor):
        return result
    ghost = result.as_subclass(Ghost)
    ghost.of, ghost.block = of, block
    return ghost

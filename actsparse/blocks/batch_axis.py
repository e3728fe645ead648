"""Which axis of a block's input is the batch: [B, T, D], or [T, B, D] as in fairseq."""

from __future__ import annotations

from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from actsparse.blocks.block import Blocks, MLPBlock
from actsparse.blocks.example_inputs import run_forward
from actsparse.blocks.pass_state import sites_asleep


def lay_out(model: nn.Module, inputs: Any, blocks: Blocks) -> Blocks:
    """Set ``batch_first`` of blocks that were found on ``inputs``.

    An ``nn.MultiheadAttention`` beside the block tells. Else the shape that it saw does, where
    batch and length differ; where they do not, the model runs once more on the batch twice over.
    """
    tensors = _tensors(inputs)
    batch = tensors[0].shape[0] if tensors and tensors[0].dim() else 0
    lengths = {t.shape[1] for t in tensors if t.dim() in (2, 3) and t.shape[0] == batch}
    doubtful = []
    for block in blocks:
        beside = attention_beside(block.path)
        first, second = (*block.input_shape, 0, 0)[:2]
        if beside is not None:
            block.batch_first = beside
        elif len(block.input_shape) == 3 and first == second == batch:
            doubtful.append(block)
        elif len(block.input_shape) == 3:
            block.batch_first = not (second == batch != first and first in lengths)
    if doubtful:
        shapes = _shapes(model, inputs, batch, doubtful)
        for block in doubtful:
            first, second = (*shapes.get(block.up.name, ()), 0, 0)[:2]
            block.batch_first = None if first == second else first == 2 * batch
    return blocks


def attention_beside(path: tuple[nn.Module, ...]) -> bool | None:
    """``batch_first`` of the nearest ``nn.MultiheadAttention`` beside a block; None: there is none.

    ``path``: the modules around the block, outermost first.
    """
    for module in reversed(path):
        for child in module.children():
            if isinstance(child, nn.MultiheadAttention):
                return child.batch_first
    return None


def _shapes(
    model: nn.Module, inputs: Any, batch: int, blocks: list[MLPBlock]
) -> dict[str, tuple[int, ...]]:
    """The shape of each block's input where each sample comes twice; empty: it does not run."""
    shapes: dict[str, tuple[int, ...]] = {}

    def note(name: str, module: nn.Module, args: tuple[Tensor, ...]) -> None:
        shapes.setdefault(name, tuple(args[0].shape))

    hooks = [b.up.module.register_forward_pre_hook(partial(note, b.up.name)) for b in blocks]
    try:
        with sites_asleep(), torch.no_grad():
            run_forward(model, _twice(inputs, batch))
    except Exception:  # whatever a stranger's model makes of it
        return {}
    finally:
        for hook in hooks:
            hook.remove()
    return shapes


def _twice(value: Any, batch: int) -> Any:
    if isinstance(value, Tensor):
        return torch.cat([value, value]) if value.dim() and value.shape[0] == batch else value
    if isinstance(value, tuple):
        return tuple(_twice(part, batch) for part in value)
    if hasattr(value, "keys"):
        return {key: _twice(value[key], batch) for key in value.keys()}  # noqa: SIM118
    if value is None or isinstance(value, bool | int | float | str):
        return value
    raise TypeError(f"cannot repeat a {type(value).__name__}")  # a cache, which a call would change


def _tensors(inputs: Any) -> list[Tensor]:
    if isinstance(inputs, Tensor):
        return [inputs]
    parts = inputs if isinstance(inputs, tuple) else [inputs[key] for key in inputs.keys()]  # noqa: SIM118
    return [part for part in parts if isinstance(part, Tensor)]

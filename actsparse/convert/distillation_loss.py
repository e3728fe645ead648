"""What a student learns from: its teacher's logits, blocks or embeddings, or the text itself."""

from __future__ import annotations

from typing import Any, Literal

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from actsparse.blocks.block import MLPBlock
from actsparse.convert.embeddings import distance
from actsparse.convert.losses import logits_of
from actsparse.modify.drop_small import dropping_blocks

Loss = Literal["logits", "text", "blocks", "embeddings"]


def loss_of(
    student: nn.Module, teacher: nn.Module, ids: Tensor, there: Tensor, kind: str
) -> Tensor:
    """What is minimised, of a batch of windows.

    Args:
        student: learns.
        teacher: the dense model; it does not.
        ids: windows [B, T], filled up at the end.
        there: which of them are no padding [B, T].
        kind: see :class:`actsparse.convert.Distillation`.

    Returns:
        The mean over predicted tokens in nats; of embeddings, over tokens and windows; of blocks,
        the mean over blocks of ``Σ‖y − y′‖² / Σ‖y′‖²``, y′ by the teacher's block.
    """
    if kind == "embeddings":
        return distance(student, teacher, ids, there)
    if kind == "blocks":
        return _by_blocks(student, teacher, ids, there)
    own = logits_of(student, ids)[:, :-1].flatten(0, 1)
    ids, there = ids.to(own.device), there.to(own.device)
    if kind == "text":
        lost = F.cross_entropy(own.float(), ids[:, 1:].flatten(), reduction="none")
    else:
        with torch.no_grad():
            wanted = logits_of(teacher, ids)[:, :-1].flatten(0, 1)
        lost = divergence(own, wanted)
    mask = there[:, 1:].flatten()
    return torch.where(mask, lost, 0).sum() / mask.sum()


def divergence(own: Tensor, wanted: Tensor) -> Tensor:
    """``KL(wanted ‖ own)`` of each row of two logits [N, vocabulary], in nats: float32 [N].

    ``wanted`` has no gradient.

    >>> bool(divergence(torch.randn(2, 8), torch.randn(2, 8)).min() > 0)
    True
    """
    lost: Tensor = _Divergence.apply(own, wanted)
    return lost


class _Divergence(torch.autograd.Function):
    """KL(wanted ‖ own) of each row of two logits [N, vocabulary], in float32.

    A few rows at a time stay in a CPU's cache.
    """

    @staticmethod
    def forward(ctx: Any, own: Tensor, wanted: Tensor) -> Tensor:
        lost = own.new_empty(len(own), dtype=torch.float32)
        slope = torch.empty_like(own)
        for start in range(0, len(own), 16):
            rows = slice(start, start + 16)
            ours, theirs = own[rows].float().log_softmax(-1), wanted[rows].float().log_softmax(-1)
            share = theirs.exp()
            lost[rows] = theirs.sub_(ours).mul_(share).sum(-1)
            slope[rows] = ours.exp_().sub_(share)
        ctx.save_for_backward(slope)
        return lost

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> Any:
        (slope,) = ctx.saved_tensors
        return slope.mul_(grad[:, None].to(slope.dtype)), None  # asked once: by the loss above


def _by_blocks(student: nn.Module, teacher: nn.Module, ids: Tensor, there: Tensor) -> Tensor:
    """Each block beside its dense self on the same input, which has no gradient."""
    blocks = dropping_blocks(student)
    own, given = _through(student, blocks, ids, {})
    with torch.no_grad():
        wanted, _ = _through(teacher, blocks, ids, given)
    lost = []
    for y, to in zip(own, wanted, strict=True):
        rows, to = y.flatten(0, -2).float(), to.flatten(0, -2).float()
        if len(rows) == there.numel():
            held = there.flatten().to(rows.device)
            rows, to = rows[held], to[held]
        lost.append((rows - to).square().sum() / to.square().sum())
    return torch.stack(lost).mean()


def _through(
    model: nn.Module, blocks: list[MLPBlock], ids: Tensor, given: dict[str, Tensor]
) -> tuple[list[Tensor], dict[str, Tensor]]:
    """Run a model whose blocks read ``given`` by name, or their own input without its gradient.

    Returns the output of each block, and what each block read.
    """
    read, made, hooks = dict[str, Tensor](), dict[str, Tensor](), []
    for block in blocks:

        def enter(module: nn.Module, args: Any, name: str = block.name) -> Any:
            read[name] = given[name] if given else args[0].detach()
            return read[name], *args[1:]

        def leave(module: nn.Module, args: Any, y: Tensor, name: str = block.name) -> None:
            made[name] = y

        firsts = {layer.name for layer in (block.up, block.gate) if layer is not None}
        hooks += [model.get_submodule(n).register_forward_pre_hook(enter) for n in firsts]
        hooks.append(model.get_submodule(block.down.name).register_forward_hook(leave))
    try:
        model(ids.to(next(model.parameters()).device))
    finally:
        for hook in hooks:
            hook.remove()
    return [made[block.name] for block in blocks], read

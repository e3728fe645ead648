"""The loss's gradients for penalties that are made of them."""

from __future__ import annotations

from collections.abc import Iterable

import torch
from torch import Tensor

from actsparse.modify.modification import Attached, Modification


def differentiate(pairs: Iterable[tuple[Modification, Attached]], loss: Tensor | None) -> None:
    """Give the loss's gradients, of one backward pass, to the penalties that need them.

    Raises:
        ValueError: one needs the loss, which is missing, not 0-dim or without a graph.
        RuntimeError: the forward pass kept no gradient where one is needed.
    """
    asked = [
        (modification, attached, stages)
        for modification, attached in pairs
        if (stages := attached.differentiated())
    ]
    if not asked:
        return
    name = type(asked[0][0]).__name__
    if loss is None:
        raise ValueError(
            f"{name} needs the loss: handle.penalty(loss), the loss of the last forward pass, "
            f"a mean over its samples; in training by the callback the model itself must "
            f"return one (called with labels)"
        )
    if loss.dim() or not loss.requires_grad:
        raise ValueError(
            f"{name} needs a loss with a graph, of no dimensions; got {loss.dim()} dimensions, "
            f"requires_grad={loss.requires_grad}"
        )
    for _, attached, stages in asked:
        if not all(stage.requires_grad for stage in stages):
            raise RuntimeError(
                f"{name} at block {attached.site.block.name!r}: the forward kept no gradient "
                f"of z (reentrant gradient checkpointing? use use_reentrant=False; or nothing "
                f"up to there is trained)"
            )
    gradients = iter(
        torch.autograd.grad(
            loss,
            [stage for _, _, stages in asked for stage in stages],
            create_graph=True,
            allow_unused=True,
        )
    )
    for _, attached, stages in asked:
        attached.gradients = [next(gradients) for _ in stages]

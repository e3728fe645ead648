"""The loss that measures need: predicted positions, a sample's loss, drawn labels.

The loss function is the user's: ``loss_fn(model, batch)`` runs the model and returns either a
scalar, the mean of its samples' losses, or the pair ``(logits, targets)``: logits [B, ..., C] and
integer targets [B, ...], −100 where nothing is predicted. With a pair the loss is plain
cross-entropy,

    ``ℓ_b = Σ_t w_bt · (−log softmax(logits_bt)[target_bt])``

over the N_b predicted positions t of sample b, with w_bt = 1/N_b ("mean") or 1 ("sum"). A sample
without a predicted position has loss 0 and is not counted: the batch's loss is the mean over the
others. Half-precision logits are computed with in float32.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, Literal

import torch
import torch.nn.functional as F
from torch import Tensor, nn

IGNORE = -100  # the target where nothing is predicted, as in torch and Hugging Face

Reduction = Literal["mean", "sum"]
LossFn = Callable[[nn.Module, Any], Tensor | tuple[Tensor, Tensor]]


def check_loss(output: Any, where: str = "loss_fn") -> Tensor | tuple[Tensor, Tensor]:
    """``output`` of a loss function, if it is a finite scalar or a sound pair.

    Args:
        output: what ``loss_fn`` returned.
        where: how errors begin, e.g. ``"loss_fn on batch 3"``.

    Raises:
        ValueError: it is neither; the loss is NaN or infinite; shapes do not fit; targets are no
            integers, or outside 0..C−1; no position is predicted; logits are NaN or +∞ where one
            is.

    >>> check_loss(torch.tensor(0.5))
    tensor(0.5000)
    >>> check_loss(torch.ones(3))
    Traceback (most recent call last):
    ValueError: loss_fn returned a loss of shape [3]; return a scalar, or the pair (logits, targets)
    """
    if isinstance(output, Tensor):
        if output.ndim or not output.is_floating_point():
            raise ValueError(
                f"{where} returned a loss of shape {list(output.shape)}"
                f"{'' if output.ndim else f' and type {output.dtype}'}; return a scalar, or the "
                f"pair (logits, targets)"
            )
        if not output.isfinite():
            raise ValueError(f"{where} returned the loss {output.item()}; it must be finite")
        return output
    if (
        isinstance(output, tuple | list)
        and len(output) == 2
        and all(isinstance(part, Tensor) for part in output)
    ):
        _check_pair(output[0], output[1], where)
        return output[0], output[1]
    raise ValueError(
        f"{where} must return a scalar tensor or the pair (logits, targets), "
        f"got {type(output).__name__}"
    )


def check_logits(output: Any, purpose: str, where: str = "loss_fn") -> tuple[Tensor, Tensor]:
    """The pair of a loss function's ``output``; a scalar is not enough for ``purpose``.

    Raises:
        ValueError: as :func:`check_loss`, and where ``output`` is a scalar.

    >>> check_logits(torch.tensor(0.5), "Gauss–Newton")
    Traceback (most recent call last):
    ValueError: Gauss–Newton needs logits: loss_fn must return the pair (logits, targets), not ...
    """
    checked = check_loss(output, where)
    if isinstance(checked, Tensor):
        raise ValueError(
            f"{purpose} needs logits: {where} must return the pair (logits, targets), not a scalar"
        )
    return checked


def _check_pair(logits: Tensor, targets: Tensor, where: str) -> None:
    shapes = f"logits {list(logits.shape)} and targets {list(targets.shape)}"
    if logits.ndim < 2 or logits.shape[:-1] != targets.shape:
        raise ValueError(
            f"{where} returned {shapes}; they must be [B, ..., C] and [B, ...] (a causal model's "
            f"are shifted: logits[:, :-1], labels[:, 1:])"
        )
    if not logits.is_floating_point():
        raise ValueError(f"{where} returned logits of type {logits.dtype}; they must be floats")
    if targets.is_floating_point() or targets.is_complex() or targets.dtype == torch.bool:
        raise ValueError(
            f"{where} returned targets of type {targets.dtype}; they must be integers, the index "
            f"of a class or {IGNORE}"
        )
    classes = targets[targets != IGNORE]
    if not len(classes):
        raise ValueError(f"{where} returned no predicted position: all targets are {IGNORE}")
    low, high = int(classes.min()), int(classes.max())
    if low < 0 or high >= logits.shape[-1]:
        raise ValueError(
            f"{where} returned the target {low if low < 0 else high}; with {logits.shape[-1]} "
            f"logits targets must be 0..{logits.shape[-1] - 1}, or {IGNORE} where nothing is "
            f"predicted"
        )
    # −∞ is how models rule a class out; NaN and +∞ leave no probability
    if not (predicted_logits(logits.detach(), targets) < torch.inf).all():
        raise ValueError(f"{where} returned logits that are NaN or infinite at predicted positions")


def predicted_logits(logits: Tensor, targets: Tensor) -> Tensor:
    """The logits [N, C] of the N predicted positions, in row order; float32 or wider.

    >>> predicted_logits(torch.tensor([[1.0, 2.0], [3.0, 4.0]]), torch.tensor([-100, 0]))
    tensor([[3., 4.]])
    """
    rows = (targets != IGNORE).flatten().nonzero().squeeze(1)
    # index_select and not a mask: its backward adds whole rows
    chosen = logits.flatten(0, -2).index_select(0, rows)
    return chosen.to(torch.promote_types(logits.dtype, torch.float32))


def position_weights(
    targets: Tensor, reduction: Reduction, dtype: torch.dtype = torch.float32
) -> Tensor:
    """The weights w [N] of the N predicted positions, in row order.

    Raises:
        ValueError: ``reduction`` is neither "mean" nor "sum".

    >>> position_weights(torch.tensor([[3, 1], [2, -100]]), "mean")
    tensor([0.5000, 0.5000, 1.0000])
    """
    if reduction not in ("mean", "sum"):
        raise ValueError(f'reduction must be "mean" or "sum" over positions, got {reduction!r}')
    predicted = targets != IGNORE
    counts = predicted.reshape(len(targets), -1).sum(1)[predicted.nonzero()[:, 0]]
    return (
        counts.to(dtype).reciprocal() if reduction == "mean" else torch.ones_like(counts).to(dtype)
    )


def sample_losses(logits: Tensor, targets: Tensor, reduction: Reduction = "mean") -> Tensor:
    """The loss ℓ_b [B] of each sample, in nats; 0 where nothing is predicted. Differentiable.

    Args:
        logits: [B, ..., C].
        targets: integers [B, ...], −100 where nothing is predicted.
        reduction: "mean" or "sum" over a sample's predicted positions.

    Raises:
        ValueError: ``reduction`` is neither.

    >>> logits = torch.zeros(3, 2, 4)  # each class has probability 1/4, so each position log 4
    >>> targets = torch.tensor([[0, 3], [1, -100], [-100, -100]])
    >>> sample_losses(logits, targets, "sum") / torch.tensor(4.0).log()
    tensor([2., 1., 0.])
    """
    predicted = targets != IGNORE
    losses = F.cross_entropy(
        predicted_logits(logits, targets), targets[predicted].long(), reduction="none"
    )
    weighted = losses * position_weights(targets, reduction, losses.dtype)
    placed = losses.new_zeros(targets.shape).index_put((predicted,), weighted)
    return placed.reshape(len(targets), -1).sum(1)


def draw_labels(
    logits: Tensor, targets: Tensor, generator: torch.Generator | None = None
) -> Tensor:
    """``targets`` with a label from softmax(logits), independently, at each predicted position.

    Gradients of the loss with such labels have mean zero, and their second moment is the
    Gauss–Newton matrix (Kunstner, Balles, Hennig 2019, arXiv 1905.12558, section 2).

    Args:
        logits: [B, ..., C].
        targets: integers [B, ...]; only where they are −100 matters, and there −100 stays.
        generator: where to draw from, on the device of ``logits``; None: the global one.

    >>> certain = torch.tensor([[0.0, 99.0], [99.0, 0.0], [99.0, 0.0]])
    >>> draw_labels(certain, torch.tensor([0, 0, -100]))
    tensor([   1,    0, -100])
    """
    p = predicted_logits(logits.detach(), targets).softmax(-1)
    drawn = torch.multinomial(p, 1, generator=generator).squeeze(1)
    return targets.index_put((targets != IGNORE,), drawn.to(targets))

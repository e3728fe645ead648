"""The loss of a causal language model on windows of text, by document."""

from __future__ import annotations

from collections.abc import Callable, Iterator

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from actsparse.convert.text import Windows

PASS = 2048  # tokens in a pass at most, unless one window is longer


def logits_of(model: nn.Module, ids: Tensor) -> Tensor:
    """Logits [B, T, vocabulary] of ids [B, T]; a model may return them alone or in an output."""
    made = model(ids)
    return made if isinstance(made, Tensor) else made.logits


def batches_of(windows: Windows, size: int = PASS) -> Iterator[tuple[list[int], Tensor, Tensor]]:
    """Windows of like length together: their numbers, ids [B, T] and where there are ids [B, T].

    Short ones are filled up at their end, which a causal model cannot see from before.
    """
    order = sorted(range(len(windows.ids)), key=lambda index: len(windows.ids[index]))
    while order:
        longest = len(windows.ids[order[-1]])
        taken = order[-max(1, size // longest) :]
        del order[-len(taken) :]
        pieces = [windows.ids[index] for index in taken]
        ids = nn.utils.rnn.pad_sequence(pieces, batch_first=True)
        lengths = torch.tensor([len(piece) for piece in pieces])
        yield taken, ids, torch.arange(ids.shape[1]) < lengths[:, None]


@torch.no_grad()
def document_losses(
    model: nn.Module,
    windows: Windows,
    progress: Callable[[int], None] | None = None,
    size: int = PASS,
) -> tuple[Tensor, Tensor]:
    """Measure the loss of each document in nats.

    ``Σ −log p(token | those before it in its window)``, by documents.

    Args:
        model: gives logits [B, T, vocabulary] of ids [B, T], or an output with ``logits``; it
            stays in its mode, which should be evaluation.
        windows: the text.
        progress: called with the number of tokens that each pass has read.
        size: the tokens of a pass.

    Returns:
        The sums of losses and the numbers of predicted tokens, float64 [documents], by the order of
        the documents' numbers.

    Raises:
        ValueError: a loss is not finite, or an id is beyond the model's vocabulary.
    """
    numbers = {number: place for place, number in enumerate(sorted(set(windows.document)))}
    sums = torch.zeros(len(numbers), dtype=torch.float64)
    counts = torch.zeros_like(sums)
    device = next(model.parameters()).device
    for taken, ids, there in batches_of(windows, size):
        logits = logits_of(model, ids.to(device))
        if int(ids.max()) >= logits.shape[-1]:
            raise ValueError(
                f"token {int(ids.max())} is beyond the model's vocabulary of {logits.shape[-1]}: "
                f"the tokenizer is another model's"
            )
        loss = F.cross_entropy(
            logits[:, :-1].float().flatten(0, 1), ids[:, 1:].flatten().to(device), reduction="none"
        ).view(len(ids), -1)
        loss = torch.where(there[:, 1:], loss.cpu(), 0).double().sum(1)
        place = torch.tensor([numbers[windows.document[index]] for index in taken])
        sums.index_add_(0, place, loss)
        counts.index_add_(0, place, there[:, 1:].sum(1).double())
        if progress is not None:
            progress(int(there.sum()))
    if not bool(sums.isfinite().all()):
        raise ValueError("the model's loss on this text is not finite")
    return sums, counts


def mean_loss(model: nn.Module, windows: Windows, size: int = PASS) -> float:
    """The loss in nats for each token, all documents together.

    Args:
        model: as for :func:`document_losses`.
        windows: the text.
        size: the tokens of a pass.

    Returns:
        The mean over predicted tokens.

    Raises:
        ValueError: as :func:`document_losses`.
    """
    sums, counts = document_losses(model, windows, size=size)
    return float(sums.sum() / counts.sum())

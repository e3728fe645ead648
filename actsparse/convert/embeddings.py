"""What an encoder's embeddings lose: their cosine distance to the dense model's, by document."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, Literal

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from actsparse.convert.losses import PASS, Losses, batches_of, check_windows
from actsparse.convert.text import Windows

Pooling = Literal["mean", "cls"]


def states_of(model: nn.Module, ids: Tensor, there: Tensor | None = None) -> Tensor:
    """The last hidden states [B, T, D] of ids [B, T]; ``there``: which of them are no padding."""
    device = next(model.parameters()).device
    mask = {} if there is None else {"attention_mask": there.to(device, torch.int64)}
    made: Any = model(ids.to(device), **mask)
    found: Tensor = made if isinstance(made, Tensor) else made.last_hidden_state
    return found


def pooled(states: Tensor, there: Tensor | None, pooling: Pooling) -> Tensor:
    """Embeddings of length 1 [B, D], in float32, of hidden states [B, T, D].

    >>> pooled(torch.tensor([[[3.0, 0.0], [0.0, 4.0]]]), None, "mean")
    tensor([[0.6000, 0.8000]])
    """
    if pooling == "cls":
        return F.normalize(states[:, 0].float(), dim=-1)
    if there is not None:
        states = states * there.to(states.device, states.dtype).unsqueeze(-1)
    return F.normalize(states.float().sum(1), dim=-1)


@torch.no_grad()
def document_distances(
    model: nn.Module,
    dense: nn.Module,
    windows: Windows,
    pooling: Pooling,
    progress: Callable[[int], None] | None = None,
) -> Losses:
    """Measure how far an encoder's embeddings are from the dense encoder's, by document.

    The loss of a window is ``1 − cos(e, e′)``, of the dense encoder 0.

    Args:
        model: gives hidden states [B, T, D] of ids [B, T], or an output with
            ``last_hidden_state``; in evaluation mode.
        dense: the encoder it was made of.
        windows: the text; each window has an embedding.
        pooling: ``"mean"`` of the states of all tokens, or the first token's, ``"cls"``.
        progress: called with the number of tokens that each pass has read.

    Returns:
        ``sums`` of the model and of the dense one by document, ``counts`` of windows, and ``same``:
        the share of windows whose nearest other window, by cosine, is the same for both.

    Raises:
        ValueError: an embedding is not finite, or an id is beyond a model's vocabulary.
    """
    for each in (model, dense):
        check_windows(each, windows)
    order: list[int] = []
    rows: list[list[Tensor]] = [[], []]
    for taken, ids in batches_of(windows, PASS):
        order += taken
        for made, each in zip(rows, (model, dense), strict=True):
            made.append(pooled(states_of(each, ids), None, pooling).cpu())
        if progress is not None:
            progress(ids.numel())
    own, wanted = (torch.cat(made).double() for made in rows)
    if not bool(own.isfinite().all() and wanted.isfinite().all()):
        raise ValueError("the encoder's embeddings of this text are not finite")
    numbers = {number: place for place, number in enumerate(sorted(set(windows.document)))}
    place = torch.tensor([numbers[windows.document[index]] for index in order])
    lost = 1 - (own * wanted).sum(1)
    sums = torch.zeros(2, len(numbers), dtype=torch.float64)
    counts = torch.zeros(len(numbers), dtype=torch.float64)
    sums[0].index_add_(0, place, lost)
    counts.index_add_(0, place, torch.ones_like(lost))
    return Losses(sums, counts, float((_nearest(own) == _nearest(wanted)).double().mean()))


def mean_distance(
    model: nn.Module,
    dense: nn.Module,
    windows: Windows,
    pooling: Pooling,
    progress: Callable[[int], None] | None = None,
) -> float:
    """The mean of :func:`document_distances` over all windows."""
    found = document_distances(model, dense, windows, pooling, progress)
    return float(found.sums[0].sum() / found.counts.sum())


def _nearest(embeddings: Tensor) -> Tensor:
    """The number of the nearest other row of each row [N, D]."""
    found = []
    for start in range(0, len(embeddings), 1024):
        near = embeddings[start : start + 1024] @ embeddings.t()
        near[torch.arange(len(near)), torch.arange(start, start + len(near))] = -2
        found.append(near.argmax(1))
    return torch.cat(found)


def distance(student: nn.Module, teacher: nn.Module, ids: Tensor, there: Tensor) -> Tensor:
    """What an encoder learns from: ``1 − cos`` to the teacher, of states and of their mean.

    Args:
        student: learns.
        teacher: does not.
        ids: windows [B, T], filled up at the end.
        there: which of them are no padding [B, T].

    Returns:
        The mean over tokens plus the mean over windows.
    """
    own = states_of(student, ids, there)
    with torch.no_grad():
        wanted = states_of(teacher, ids, there)
    tokens = 1 - F.cosine_similarity(own.float(), wanted.float(), dim=-1)
    mask = there.to(own.device)
    whole = pooled(own, there, "mean") * pooled(wanted, there, "mean")
    return torch.where(mask, tokens, 0).sum() / mask.sum() + (1 - whole.sum(-1)).mean()

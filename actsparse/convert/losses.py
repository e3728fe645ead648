"""The loss of a causal language model on windows of text, by document."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from actsparse.convert.text import Windows

PASS = 2048  # tokens in a pass at most, unless one window is longer


def logits_of(model: nn.Module, ids: Tensor) -> Tensor:
    """Logits [B, T, vocabulary] of ids [B, T]; a model may return them alone or in an output."""
    made = model(ids.to(next(model.parameters()).device))
    return made if isinstance(made, Tensor) else made.logits


def check_windows(model: nn.Module, windows: Windows) -> None:
    """Refuse windows that a model of transformers has too few positions or tokens for.

    Raises:
        ValueError: a window is longer than the model's positions, or an id beyond its vocabulary.
    """
    config: Any = getattr(model, "config", None)
    config = config.get_text_config() if hasattr(config, "get_text_config") else config
    positions = getattr(config, "max_position_embeddings", None) or math.inf
    vocabulary = getattr(config, "vocab_size", None) or math.inf
    if not windows.ids:
        raise ValueError("a text has no windows")
    longest = max(map(len, windows.ids))
    if longest > positions:
        raise ValueError(
            f"a window has {longest} tokens, but the model {positions} positions: give a --window "
            f"of at most {positions}"
        )
    if (last := max(int(ids.max()) for ids in windows.ids)) >= vocabulary:
        raise ValueError(_beyond(last, int(vocabulary)))


@torch.no_grad()
def check_causal(model: nn.Module, ids: Tensor) -> None:
    """Refuse a model whose answers depend on later tokens, as an encoder's do.

    Args:
        model: in evaluation mode.
        ids: a window [T].

    Raises:
        ValueError: it is one.
    """
    other = ids.clone()
    other[-1] = ids[0] if ids[-1] != ids[0] else (ids[0] + 1 if ids[0] == 0 else 0)
    one, two = (logits_of(model, each[None])[0, :-1].float() for each in (ids, other))
    if not torch.allclose(one, two, rtol=1e-3, atol=1e-3, equal_nan=True):
        raise ValueError(
            f"the answers of this {type(model).__name__} depend on later tokens: expected a causal "
            f"language model"
        )


def batches_of(windows: Windows, size: int = PASS) -> Iterator[tuple[list[int], Tensor]]:
    """Windows of one length together: their numbers, and ids [B, T].

    Nothing is filled up, since what measures the model would count it.
    """
    lengths: dict[int, list[int]] = {}
    for number, ids in enumerate(windows.ids):
        lengths.setdefault(len(ids), []).append(number)
    for length in sorted(lengths, reverse=True):
        numbers, many = lengths[length], max(1, size // length)
        for start in range(0, len(numbers), many):
            taken = numbers[start : start + many]
            yield taken, torch.stack([windows.ids[number] for number in taken])


def counted(
    told: Callable[[str, int, int], None], stage: str, windows: Windows
) -> Callable[[int], None]:
    """A ``progress=`` for one reading of windows, which tells the stage, passes done and in all."""
    total, done = sum(1 for _ in batches_of(windows)), 0

    def progress(_: int) -> None:
        nonlocal done
        done += 1
        told(stage, done, total)

    told(stage, 0, total)
    return progress


class Losses(NamedTuple):
    """Losses by document, in the order of the documents' numbers, float64.

    ``sums`` [models, documents] in nats, ``counts`` [documents] of predicted tokens; ``same``: the
    share of positions where all models find the same token most likely.
    """

    sums: Tensor
    counts: Tensor
    same: float


@torch.no_grad()
def document_losses(
    models: Sequence[nn.Module],
    windows: Windows,
    progress: Callable[[int], None] | None = None,
    size: int = PASS,
) -> Losses:
    """Measure the loss of each document in nats, of one model or of several side by side.

    ``Σ −log p(token | those before it in its window)``, by documents.

    Args:
        models: each gives logits [B, T, vocabulary] of ids [B, T], or an output with ``logits``;
            they stay in their mode, which should be evaluation.
        windows: the text.
        progress: called with the number of tokens that each pass has read.
        size: the tokens of a pass.

    Returns:
        The losses.

    Raises:
        ValueError: a loss is not finite, or an id is beyond a model's vocabulary.
    """
    for model in models:
        check_windows(model, windows)
    numbers = {number: place for place, number in enumerate(sorted(set(windows.document)))}
    sums = torch.zeros(len(models), len(numbers), dtype=torch.float64)
    counts = torch.zeros(len(numbers), dtype=torch.float64)
    same = read = 0
    for taken, ids in batches_of(windows, size):
        place = torch.tensor([numbers[windows.document[index]] for index in taken])
        counts.index_add_(0, place, torch.full(place.shape, ids.shape[1] - 1.0).double())
        most: list[Tensor] = []
        for row, model in enumerate(models):
            logits = logits_of(model, ids)
            loss = _loss_of(logits, ids.to(logits.device)).cpu()
            sums[row].index_add_(0, place, loss.double().sum(1))
            if len(models) > 1:
                most.append(logits.argmax(-1).cpu())
        alike = [each == most[0] for each in most[1:]]
        same += int(torch.stack(alike).all(0).sum()) if alike else ids.numel()
        read += ids.numel()
        if progress is not None:
            progress(ids.numel())
    if not bool(sums.isfinite().all()):
        raise ValueError("the model's loss on this text is not finite")
    return Losses(sums, counts, same / read)


def _beyond(token: int, vocabulary: int) -> str:
    return (
        f"token {token} is beyond the model's vocabulary of {vocabulary}: the tokenizer is another "
        f"model's"
    )


def _loss_of(logits: Tensor, ids: Tensor) -> Tensor:
    """[B, T − 1], in float32."""
    if int(ids.max()) >= logits.shape[-1]:
        raise ValueError(_beyond(int(ids.max()), logits.shape[-1]))
    rows = zip(logits[:, :-1], ids[:, 1:], strict=True)  # a copy of all in float32 would be large
    return torch.stack([F.cross_entropy(row.float(), to, reduction="none") for row, to in rows])


def mean_loss(
    model: nn.Module,
    windows: Windows,
    progress: Callable[[int], None] | None = None,
    size: int = PASS,
) -> float:
    """The loss in nats for each token, all documents together.

    Args:
        model: one of those that :func:`document_losses` takes.
        windows: the text.
        progress: called with the number of tokens that each pass has read.
        size: the tokens of a pass.

    Returns:
        The mean over predicted tokens.

    Raises:
        ValueError: as :func:`document_losses`.
    """
    found = document_losses([model], windows, progress, size)
    return float(found.sums.sum() / found.counts.sum())

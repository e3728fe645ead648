"""T5's span corruption (Raffel et al. 2020, arXiv 1910.10683, section 3.1.4), in numpy.

A sequence is cut into kept and noise spans in turn, beginning with a kept one. In the inputs each
noise span becomes one sentinel; the targets hold each sentinel followed by what it hides. Both
end with `eos`; sentinels descend from `sentinel_start`, as in T5's vocabulary.
Lengths depend on the sequence length alone, so batches need no padding.
"""

from __future__ import annotations

from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

Ids = NDArray[np.int64]


class SpanLengths(NamedTuple):
    """How long everything is: `tokens` = `kept` + `noise`; `inputs` and `targets` with `eos`."""

    tokens: int
    noise: int
    spans: int
    inputs: int
    targets: int


def span_lengths(tokens: int, noise_density: float = 0.15, mean_span: float = 3.0) -> SpanLengths:
    """Lengths that corrupting a sequence of `tokens` tokens gives.

    noise = round(tokens · noise_density) and spans = round(noise / mean_span), each at least 1;
    every span needs a kept token before it, so spans never exceed tokens − noise.

    Raises `ValueError` for fewer than 2 tokens, a density outside (0, 1), a mean span below 1.

    >>> span_lengths(568)  # T5's own: 512 inputs, 114 targets
    SpanLengths(tokens=568, noise=85, spans=28, inputs=512, targets=114)
    """
    if tokens < 2:
        raise ValueError(f"tokens={tokens}: span corruption needs at least 2, one kept, one hidden")
    if not 0 < noise_density < 1:
        raise ValueError(f"noise_density={noise_density} must lie between 0 and 1, both excluded")
    if not mean_span >= 1:
        raise ValueError(f"mean_span={mean_span} must be at least 1 token")
    noise = min(max(round(tokens * noise_density), 1), tokens - 1)
    spans = min(max(round(noise / mean_span), 1), tokens - noise)
    return SpanLengths(tokens, noise, spans, tokens - noise + spans + 1, noise + spans + 1)


def tokens_for_inputs(inputs: int, noise_density: float = 0.15, mean_span: float = 3.0) -> int:
    """The longest sequence whose corrupted inputs have at most `inputs` tokens.

    Raises `ValueError` when not even 2 tokens fit.

    >>> tokens_for_inputs(512)
    568
    """
    if inputs < span_lengths(2, noise_density, mean_span).inputs:
        raise ValueError(f"inputs={inputs} is too short: one kept token, one sentinel, eos")
    low, high = 2, 4  # `low` fits; lengths never fall as tokens grow
    while span_lengths(high, noise_density, mean_span).inputs <= inputs:
        low, high = high, 2 * high
    while high - low > 1:
        middle = (low + high) // 2
        fits = span_lengths(middle, noise_density, mean_span).inputs <= inputs
        low, high = (middle, high) if fits else (low, middle)
    return low


def noise_mask(
    tokens: int, rng: np.random.Generator, noise_density: float = 0.15, mean_span: float = 3.0
) -> NDArray[np.bool_]:
    """Which tokens are hidden: [tokens] bool, the first never, the last always (as in T5).

    Kept and noise tokens are each cut into `spans` non-empty pieces, all ways equally likely.

    >>> noise_mask(8, np.random.default_rng(0), noise_density=0.25, mean_span=2.0).astype(int)
    array([0, 0, 0, 0, 0, 0, 1, 1])
    """
    lengths = span_lengths(tokens, noise_density, mean_span)
    kept = _random_pieces(tokens - lengths.noise, lengths.spans, rng)
    noise = _random_pieces(lengths.noise, lengths.spans, rng)
    pieces = np.stack([kept, noise], axis=1).reshape(-1)
    return np.repeat(np.arange(len(pieces)) % 2 == 1, pieces)


def corrupt(
    tokens: Ids,
    rng: np.random.Generator,
    *,
    sentinel_start: int,
    eos: int,
    noise_density: float = 0.15,
    mean_span: float = 3.0,
) -> tuple[Ids, Ids]:
    """Corrupt `tokens` [T] into inputs and targets, each ending with `eos`.

    An `eos` among the tokens, where one document of a packed row ends, is a token like any other.
    Raises `ValueError` when `tokens` is not one sequence of at least 2, or holds an id that is
    needed as a sentinel.

    >>> tokens = np.arange(10, 20)
    >>> rng = np.random.default_rng(1)
    >>> corrupt(tokens, rng, sentinel_start=99, eos=1, noise_density=0.3, mean_span=1.5)
    (array([10, 11, 12, 99, 15, 16, 17, 18, 98,  1]), array([99, 13, 14, 98, 19,  1]))
    """
    tokens = np.asarray(tokens, dtype=np.int64)
    if tokens.ndim != 1:
        raise ValueError(f"tokens must be one sequence [T], got shape {tokens.shape}")
    mask = noise_mask(len(tokens), rng, noise_density, mean_span)
    return apply_mask(tokens, mask, sentinel_start=sentinel_start, eos=eos)


def apply_mask(
    tokens: Ids, mask: NDArray[np.bool_], *, sentinel_start: int, eos: int
) -> tuple[Ids, Ids]:
    """`corrupt` for a mask [T] that is already known."""
    starts = mask & ~np.concatenate([[False], mask[:-1]])
    span = np.cumsum(starts) - 1
    lowest = sentinel_start - int(starts.sum()) + 1
    clash = tokens[(tokens >= lowest) & (tokens <= sentinel_start)]
    if len(clash):
        raise ValueError(
            f"token id {clash[0]} is taken: sentinels are {lowest} to {sentinel_start}"
        )
    inputs = np.where(starts, sentinel_start - span, tokens)[~mask | starts]
    hidden = np.flatnonzero(mask)
    sentinels = sentinel_start - np.arange(int(starts.sum()))
    targets = np.insert(tokens[hidden], np.flatnonzero(starts[hidden]), sentinels)
    return np.append(inputs, eos), np.append(targets, eos)


def _random_pieces(items: int, pieces: int, rng: np.random.Generator) -> Ids:
    """Cut `items` into `pieces` non-empty runs, every way equally likely."""
    cuts = 1 + np.sort(rng.choice(items - 1, size=pieces - 1, replace=False))
    return np.diff(np.concatenate([[0], cuts, [items]])).astype(np.int64)

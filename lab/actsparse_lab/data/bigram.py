"""A bigram model of bytes: what a network must beat before it has used more than one byte."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Protocol, runtime_checkable

import numpy as np
from numpy.typing import NDArray

from actsparse_lab.data.splits import Splits

Pairs = tuple[NDArray[np.uint8], NDArray[np.uint8]]
SMOOTHING = (1e-4, 1e-3, 3e-3, 1e-2, 3e-2, 1e-1, 3e-1, 1.0)


@runtime_checkable
class ByteText(Protocol):
    """Text data: `pairs` is what a model is scored on, `every_pair` what a bigram may count."""

    def pairs(self) -> Pairs: ...  # noqa: D102
    def every_pair(self) -> Pairs: ...  # noqa: D102


@dataclass(frozen=True)
class Bigram:
    """log p(following | previous), [S, S] float64 in nats, row = previous; `k` was added."""

    log_prob: NDArray[np.float64]
    k: float

    def nats(self, pairs: Pairs) -> float:
        """Mean −log p(following | previous) over `pairs`, in nats per byte.

        Raises `ValueError` when there is no pair.
        """
        previous, following = pairs
        if len(previous) == 0:
            raise ValueError("no pair of bytes to score: the held-out text has fewer than 2 bytes")
        return float(-self.log_prob[previous, following].mean())


def fit_bigram(
    train: Pairs, validation: Pairs, *, symbols: int = 256, ks: Sequence[float] = SMOOTHING
) -> Bigram:
    """Count `train`, add the k of `ks` that scores `validation` best.

    p(y | x) = (count(x, y) + k) / (count(x) + k · symbols).  Pairs are two arrays [N] of symbols,
    previous and following. Raises `ValueError` for an empty `ks` or a k that is not positive.

    >>> text = np.frombuffer(b"abababac", dtype=np.uint8)
    >>> pairs = (text[:-1], text[1:])
    >>> bigram = fit_bigram(pairs, pairs, ks=[1e-9])
    >>> round(bigram.nats(pairs), 4)  # a→b 3 times, a→c once, b→a always
    0.3213
    """
    if not ks or min(ks) <= 0:
        raise ValueError(f"ks={ks!r}: smoothing needs at least one k, each above 0")
    flat = train[0].astype(np.int64) * symbols + train[1]
    counts = np.bincount(flat, minlength=symbols * symbols).reshape(symbols, symbols)

    def smoothed(k: float) -> Bigram:
        total = counts.sum(axis=1, keepdims=True) + k * symbols
        return Bigram(np.log((counts + k) / total), k)

    return min((smoothed(k) for k in ks), key=lambda bigram: bigram.nats(validation))


def bigram_nats(splits: Splits[ByteText]) -> dict[str, float]:
    """The bigram's nats per byte on the very bytes a model of `splits` is scored on.

    Fit on `train`, k chosen on `validation`. For `lm_splits` every predicted byte is scored given
    the byte before it. For `span_corruption_splits` every hidden byte is, given the byte before
    it in the *original* text: that byte may itself be hidden from the encoder (though not from
    the decoder, which has just been told it), and sentinels and eos, which a model finds easy,
    are left out: compare with a model's loss over hidden bytes alone.

    Returns `{"k", "validation", "test"}`. Raises `TypeError` for data that is not text.

    >>> from actsparse_lab.data.text import lm_splits
    >>> baseline = bigram_nats(lm_splits(block=64))
    >>> 2.0 < baseline["test"] < 3.0
    True
    """
    for part in (splits.train, splits.validation, splits.test):
        if not isinstance(part, ByteText):
            raise TypeError(f"a bigram needs text such as lm_splits(), got {type(part).__name__}")
    validation, test = splits.validation.pairs(), splits.test.pairs()
    bigram = fit_bigram(splits.train.every_pair(), validation)
    return {"k": bigram.k, "validation": bigram.nats(validation), "test": bigram.nats(test)}

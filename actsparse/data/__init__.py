"""Data that needs no download: digits, text as bytes, span corruption, a bigram baseline."""

from __future__ import annotations

from actsparse.data.bigram import Bigram, bigram_nats, fit_bigram
from actsparse.data.digits import load_digits_splits
from actsparse.data.span_corruption import SpanLengths, corrupt, noise_mask, span_lengths
from actsparse.data.splits import Splits, TensorRows
from actsparse.data.text import lm_splits, span_corruption_splits

__all__ = [
    "Bigram",
    "SpanLengths",
    "Splits",
    "TensorRows",
    "bigram_nats",
    "corrupt",
    "fit_bigram",
    "lm_splits",
    "load_digits_splits",
    "noise_mask",
    "span_corruption_splits",
    "span_lengths",
]

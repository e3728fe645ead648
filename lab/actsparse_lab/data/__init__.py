"""Data that needs no download: digits, text as bytes, span corruption, a bigram baseline."""

from __future__ import annotations

from actsparse_lab.data.augment import Mixed, Stream
from actsparse_lab.data.bigram import Bigram, bigram_nats, fit_bigram
from actsparse_lab.data.decoded import decoded_image_splits
from actsparse_lab.data.digits import load_digits_splits
from actsparse_lab.data.images import image_splits
from actsparse_lab.data.rows import CausalRows, SpanRows
from actsparse_lab.data.shards import Corpus, corpus
from actsparse_lab.data.span_corruption import SpanLengths, corrupt, noise_mask, span_lengths
from actsparse_lab.data.splits import Splits, TensorRows
from actsparse_lab.data.streams import ShardLoader, text_splits
from actsparse_lab.data.text import lm_splits, span_corruption_splits
from actsparse_lab.data.tokenizer import Tokenizer, load_tokenizer

__all__ = [
    "Bigram",
    "CausalRows",
    "Corpus",
    "Mixed",
    "ShardLoader",
    "SpanLengths",
    "SpanRows",
    "Splits",
    "Stream",
    "TensorRows",
    "Tokenizer",
    "bigram_nats",
    "corpus",
    "corrupt",
    "decoded_image_splits",
    "fit_bigram",
    "image_splits",
    "lm_splits",
    "load_digits_splits",
    "load_tokenizer",
    "noise_mask",
    "span_corruption_splits",
    "span_lengths",
    "text_splits",
]

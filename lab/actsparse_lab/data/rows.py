"""What becomes of T tokens of text: a row for a causal LM, or T5's inputs and targets."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Protocol

import numpy as np

from actsparse_lab.data.span_corruption import Ids, corrupt, span_lengths, tokens_for_inputs
from actsparse_lab.data.tokenizer import Tokenizer


class Rows(Protocol):
    """What becomes of `tokens` tokens: named ids, of the same lengths for every row."""

    @property
    def tokens(self) -> int:
        """Tokens of text in a row, T."""

    def check(self, tokenizer: Tokenizer) -> None:
        """Raise `ValueError` when such rows cannot be made with this tokenizer."""

    def row(self, ids: Ids, tokenizer: Tokenizer, rng: np.random.Generator) -> dict[str, Ids]:
        """The row made of `ids` [T]."""


@dataclass(frozen=True)
class CausalRows:
    """Rows [T] for a causal LM; `labels` are `input_ids`, since HF's causal LMs shift them."""

    tokens: int = 1024

    def check(self, tokenizer: Tokenizer) -> None:
        """Raise `ValueError` when a row has nothing to predict."""
        if self.tokens < 2:
            raise ValueError(f"tokens={self.tokens} must be at least 2: one to see, one to predict")

    def row(self, ids: Ids, tokenizer: Tokenizer, rng: np.random.Generator) -> dict[str, Ids]:
        """`ids` [T] as they are."""
        return {"input_ids": ids, "labels": ids}


@dataclass(frozen=True)
class SpanRows:
    """T5's rows: `input_ids` [I] and `labels` [L] of span corruption, I ≤ `inputs`.

    By default T5's own: 568 tokens give 512 inputs and 114 targets (Raffel et al. 2020,
    arXiv 1910.10683, section 3.1.4). Lengths that `span_lengths` refuses raise its `ValueError`.

    >>> SpanRows(inputs=512).tokens
    568
    """

    inputs: int = 512
    noise_density: float = 0.15
    mean_span: float = 3.0

    @property
    def tokens(self) -> int:
        """Tokens of text in a row, T."""
        return tokens_for_inputs(self.inputs, self.noise_density, self.mean_span)

    def check(self, tokenizer: Tokenizer) -> None:
        """Raise `ValueError` when the tokenizer has fewer sentinels than a row has spans."""
        spans = span_lengths(self.tokens, self.noise_density, self.mean_span).spans
        if spans > tokenizer.sentinels:
            raise ValueError(
                f"rows of inputs={self.inputs} need {spans} sentinels, {tokenizer.name} has "
                f"{tokenizer.sentinels}: use shorter rows, a longer mean_span or T5's tokenizer"
            )

    def row(self, ids: Ids, tokenizer: Tokenizer, rng: np.random.Generator) -> dict[str, Ids]:
        """`ids` [T] with spans hidden."""
        assert tokenizer.sentinel_start is not None  # `check` has seen to it
        inputs, targets = corrupt(
            ids,
            rng,
            sentinel_start=tokenizer.sentinel_start,
            eos=tokenizer.eos,
            noise_density=self.noise_density,
            mean_span=self.mean_span,
        )
        return {"input_ids": inputs, "labels": targets}

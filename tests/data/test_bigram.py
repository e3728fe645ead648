from __future__ import annotations

import math
from collections import Counter
from itertools import pairwise

import numpy as np
import pytest

from actsparse_lab.data import bigram_nats, fit_bigram, lm_splits, load_digits_splits
from actsparse_lab.data.bigram import Pairs

TRAIN, HELD_OUT = b"the cat sat on the mat, the rat sat", b"that mat sat on the hat"


def pairs(text: bytes) -> Pairs:
    array = np.frombuffer(text, dtype=np.uint8)
    return array[:-1], array[1:]


def brute_force(train: bytes, held_out: bytes, k: float, symbols: int) -> float:
    both = Counter(pairwise(train))
    first = Counter(train[:-1])
    losses = [-math.log((both[x, y] + k) / (first[x] + k * symbols)) for x, y in pairwise(held_out)]
    return sum(losses) / len(losses)


@pytest.mark.parametrize("k", [1e-3, 0.1, 2.0])
def test_nats_are_those_of_a_brute_force_count(k: float) -> None:
    bigram = fit_bigram(pairs(TRAIN), pairs(HELD_OUT), ks=[k])
    expected = brute_force(TRAIN, HELD_OUT, k, symbols=256)
    assert bigram.nats(pairs(HELD_OUT)) == pytest.approx(expected, rel=1e-12)


def test_k_is_the_best_on_validation() -> None:
    ks = [1e-3, 0.03, 0.3, 3.0]
    bigram = fit_bigram(pairs(TRAIN), pairs(HELD_OUT), ks=ks)
    assert bigram.k == min(ks, key=lambda k: brute_force(TRAIN, HELD_OUT, k, symbols=256))


def test_each_row_is_a_distribution() -> None:
    bigram = fit_bigram(pairs(TRAIN), pairs(HELD_OUT))
    np.testing.assert_allclose(np.exp(bigram.log_prob).sum(axis=1), 1, rtol=1e-12)


def test_on_the_corpus_it_scores_the_bytes_the_lm_predicts() -> None:
    splits = lm_splits(block=64)
    result = bigram_nats(splits)
    windows = splits.test.columns["input_ids"].numpy() - 2
    bigram = fit_bigram(splits.train.pairs(), splits.validation.pairs())
    losses = [
        -bigram.log_prob[window[position - 1], window[position]]
        for window in windows[:50]
        for position in range(1, 64)
    ]
    first_50 = tuple(side[: 50 * 63] for side in splits.test.pairs())
    assert bigram.nats((first_50[0], first_50[1])) == pytest.approx(np.mean(losses), rel=1e-12)
    assert result["k"] == bigram.k
    assert 2.0 < result["validation"] < 3.0


def test_bad_input_is_refused() -> None:
    nothing = pairs(b"x")
    with pytest.raises(ValueError, match="no pair"):
        fit_bigram(pairs(TRAIN), pairs(HELD_OUT)).nats(nothing)
    for ks in ([], [0.0]):
        with pytest.raises(ValueError, match="above 0"):
            fit_bigram(pairs(TRAIN), pairs(HELD_OUT), ks=ks)
    with pytest.raises(TypeError, match="TensorRows"):
        bigram_nats(load_digits_splits())

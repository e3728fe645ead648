"""The laws of T5's span corruption (Raffel et al. 2020, section 3.1.4)."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from actsparse_lab.data.span_corruption import (
    apply_mask,
    corrupt,
    noise_mask,
    span_lengths,
    tokens_for_inputs,
)

SENTINEL_START, EOS = 100_000, 1
lengths = st.integers(2, 300)
densities = st.floats(0.01, 0.99)
mean_spans = st.floats(1, 10)
seeds = st.integers(0, 2**32 - 1)


def restored(inputs: np.ndarray, targets: np.ndarray, lowest: int) -> list[int]:
    """Undo the corruption by reading alone: each sentinel stands for what follows it."""
    hidden: dict[int, list[int]] = {}
    for token in targets[:-1].tolist():
        if token >= lowest:
            current = hidden[token] = []
        else:
            current.append(token)
    return [
        original
        for token in inputs[:-1].tolist()
        for original in (hidden[token] if token >= lowest else [token])
    ]


@given(lengths, densities, mean_spans, seeds)
def test_inputs_and_targets_give_the_text_back(
    length: int, density: float, mean_span: float, seed: int
) -> None:
    rng = np.random.default_rng(seed)
    tokens = rng.integers(1, 258, size=length)  # eos among them, as where documents are packed
    inputs, targets = corrupt(
        tokens,
        rng,
        sentinel_start=SENTINEL_START,
        eos=EOS,
        noise_density=density,
        mean_span=mean_span,
    )
    expected = span_lengths(length, density, mean_span)
    lowest = SENTINEL_START - expected.spans + 1
    assert restored(inputs, targets, lowest) == tokens.tolist()
    assert (len(inputs), len(targets)) == (expected.inputs, expected.targets)
    assert inputs[-1] == targets[-1] == EOS
    for ids in (inputs, targets):
        descending = list(range(SENTINEL_START, lowest - 1, -1))
        assert ids[ids >= lowest].tolist() == descending


@given(lengths, densities, mean_spans, seeds)
def test_the_mask_has_the_noise_and_the_spans_of_the_formula(
    length: int, density: float, mean_span: float, seed: int
) -> None:
    mask = noise_mask(length, np.random.default_rng(seed), density, mean_span)
    expected = span_lengths(length, density, mean_span)
    assert mask.shape == (length,)
    assert mask.sum() == expected.noise == min(max(round(length * density), 1), length - 1)
    starts = np.flatnonzero(np.diff(mask.astype(int)) == 1)
    assert len(starts) == expected.spans
    assert not mask[0]
    assert mask[-1]


@given(lengths, densities, mean_spans, seeds)
def test_every_token_is_in_the_inputs_or_in_the_targets_once(
    length: int, density: float, mean_span: float, seed: int
) -> None:
    rng = np.random.default_rng(seed)
    inputs, targets = corrupt(
        np.arange(2, 2 + length),
        rng,
        sentinel_start=SENTINEL_START,
        eos=EOS,
        noise_density=density,
        mean_span=mean_span,
    )
    text = [ids[(ids != EOS) & (ids < 2 + length)].tolist() for ids in (inputs, targets)]
    assert sorted(text[0] + text[1]) == list(range(2, 2 + length))
    assert text == [sorted(text[0]), sorted(text[1])]  # and in order


@given(st.integers(100, 2000), st.floats(0.05, 0.5), st.floats(1, 5))
def test_the_share_of_noise_and_the_length_of_spans_are_those_asked_for(
    length: int, density: float, mean_span: float
) -> None:
    found = span_lengths(length, density, mean_span)
    # each is rounded to a whole number, the mean span after the noise
    assert abs(found.noise - length * density) <= 0.5
    if found.noise / mean_span <= length - found.noise:
        assert abs(found.spans - found.noise / mean_span) <= 0.5


def test_t5s_own_lengths() -> None:
    # T5's C4 task: 512 inputs take 568 tokens and give 114 targets.
    assert tokens_for_inputs(512) == 568
    assert span_lengths(tokens_for_inputs(10**12)).inputs == 10**12  # at once
    assert span_lengths(568)[-2:] == (512, 114)


@given(st.integers(4, 400), st.floats(0.05, 0.5), st.floats(1, 10))
def test_the_window_is_the_longest_that_fits(inputs: int, density: float, mean_span: float) -> None:
    tokens = tokens_for_inputs(inputs, density, mean_span)
    assert span_lengths(tokens, density, mean_span).inputs <= inputs
    assert span_lengths(tokens + 1, density, mean_span).inputs > inputs


def test_all_ways_to_cut_are_equally_likely() -> None:
    # 6 tokens, 2 noise, 2 spans: kept 4 in two pieces, 3 ways; noise 1 + 1.
    rng = np.random.default_rng(0)
    draws = [tuple(np.flatnonzero(noise_mask(6, rng, 1 / 3, 1.0))) for _ in range(3000)]
    counts = {mask: draws.count(mask) for mask in set(draws)}
    assert set(counts) == {(1, 5), (2, 5), (3, 5)}
    # 1000 expected, standard deviation 26: five of them is 130.
    assert all(abs(count - 1000) < 130 for count in counts.values())


def test_a_worked_example() -> None:
    tokens = np.array([10, 11, 12, 13, 14, 15])
    mask = np.array([0, 1, 1, 0, 0, 1], dtype=bool)
    inputs, targets = apply_mask(tokens, mask, sentinel_start=99, eos=1)
    assert inputs.tolist() == [10, 99, 13, 14, 98, 1]
    assert targets.tolist() == [99, 11, 12, 98, 15, 1]


def test_the_papers_example() -> None:
    # Figure 2: "Thank you for inviting me to your party last week ."; its targets end with a third
    # sentinel where T5's data, and ours, have eos alone.
    thank, you, for_, inviting, me, to, your, party, last, week, stop = range(10, 21)
    tokens = np.array([thank, you, for_, inviting, me, to, your, party, last, week, stop])
    mask = np.isin(tokens, [for_, inviting, last])
    inputs, targets = apply_mask(tokens, mask, sentinel_start=32_099, eos=1)
    assert inputs.tolist() == [thank, you, 32_099, me, to, your, party, 32_098, week, stop, 1]
    assert targets.tolist() == [32_099, for_, inviting, 32_098, last, 1]


def test_an_eos_inside_is_a_token_like_any_other() -> None:
    mask = np.array([0, 1, 0, 1], dtype=bool)
    inputs, targets = apply_mask(np.array([1, 1, 5, 1]), mask, sentinel_start=99, eos=1)
    assert inputs.tolist() == [1, 99, 5, 98, 1]
    assert targets.tolist() == [99, 1, 98, 1, 1]


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"tokens": 1}, "tokens=1"),
        ({"tokens": 0}, "tokens=0"),
        ({"tokens": 9, "noise_density": 0.0}, r"noise_density=0\.0"),
        ({"tokens": 9, "noise_density": 1.0}, r"noise_density=1\.0"),
        ({"tokens": 9, "mean_span": 0.5}, r"mean_span=0\.5"),
        ({"tokens": 9, "mean_span": float("nan")}, "mean_span=nan"),
    ],
)
def test_what_cannot_be_corrupted_is_refused(arguments: dict[str, float], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        span_lengths(**arguments)


def test_ids_that_are_sentinels_are_refused() -> None:
    rng = np.random.default_rng(0)
    with pytest.raises(ValueError, match="token id 99 is taken"):
        corrupt(np.array([99, 5, 6]), rng, sentinel_start=99, eos=1)
    with pytest.raises(ValueError, match="one sequence"):
        corrupt(np.ones((2, 8)), rng, sentinel_start=99, eos=1)
    with pytest.raises(ValueError, match="inputs=2 is too short"):
        tokens_for_inputs(2)

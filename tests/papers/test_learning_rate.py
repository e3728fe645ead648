"""The grid of learning rates and batch sizes: effects by hand, verdicts, the picture."""

from __future__ import annotations

import math

import pytest

from actsparse_lab.papers.experiments import EXPERIMENTS
from actsparse_lab.papers.learning_rate import plot
from actsparse_lab.papers.learning_rate.claims import BATCHES, RATES, arm
from actsparse_lab.records import Run
from tests.papers.made_up import answers, assert_drawn, made_up, with_measures, words

EXPERIMENT = EXPERIMENTS["learning-rate"]


def density(rate: int, batch: int, seed: int) -> float:
    return 0.2 + 0.05 * rate + 0.01 * batch + 0.001 * seed * (1 + rate)


def world(seeds: int = 5, sign: int = 1) -> list[Run]:
    """Densities and flatness that grow as noise falls (``sign`` −1: as it grows)."""
    runs = []
    for r, rate in enumerate(RATES):
        for b, batch in enumerate(BATCHES):
            for seed in range(seeds):
                place = (r, b) if sign > 0 else (2 - r, 2 - b)
                dense = density(*place, seed)
                run = made_up(arm(rate, batch), seed, dense, 0.98 - 0.001 * r * (1 + seed % 2))
                flat = dense**2 if sign > 0 else 1 / dense
                flat *= 1 + 0.001 * seed * b  # no two seeds alike
                runs.append(with_measures(run, {"flatness": flat}))
    return runs


def test_effects_by_hand() -> None:
    by_rate, by_batch, flat_rate, _, together, learnt = answers(EXPERIMENT, world())
    for seed in range(5):
        rate = [math.log(density(0, b, seed) / density(2, b, seed)) for b in range(3)]
        batch = [math.log(density(r, 0, seed) / density(r, 2, seed)) for r in range(3)]
        assert by_rate.effects[seed] == pytest.approx(sum(rate) / 3)
        assert by_batch.effects[seed] == pytest.approx(sum(batch) / 3)
        assert flat_rate.effects[seed] == pytest.approx(2 * sum(rate) / 3)
        assert 0.999 < together.effects[seed] <= 1 + 1e-12
        assert learnt.effects[seed] == pytest.approx(-0.002 * (1 + seed % 2))


def test_planted_claims_hold_and_their_reversal_does_not() -> None:
    assert set(words(EXPERIMENT, world())) == {"holds"}
    turned = words(EXPERIMENT, world(sign=-1))
    # flatness now grows with noise, and density too: what is flatter is no longer sparser
    assert turned[:2] == ["does not hold here"] * 2
    assert turned[4] == "does not hold here"


def test_a_seed_without_one_of_the_nine_drops_out() -> None:
    runs = [run for run in world() if (run.arm, run.seed) != (arm(RATES[1], BATCHES[1]), 2)]
    found = answers(EXPERIMENT, runs)
    assert sorted(found[4].effects) == [0, 1, 3, 4]
    assert found[4].verdict.word == "undecided"
    assert sorted(found[0].effects) == [0, 1, 2, 3, 4]


def test_the_picture() -> None:
    assert_drawn(plot.grid, world(seeds=2))

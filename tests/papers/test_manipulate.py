"""Where pre-activations gather: effects by hand from made-up records, verdicts, pictures."""

from __future__ import annotations

import math
import random
import statistics
from collections.abc import Sequence
from typing import Any

import pytest

from actsparse_lab.analysis.effects import Arms
from actsparse_lab.analysis.plots import Picture
from actsparse_lab.papers.experiments import EXPERIMENTS
from actsparse_lab.papers.manipulate.claims import DECAYED, SHIFTS
from actsparse_lab.records import Run
from tests.papers.made_up import answers, assert_drawn, effects, made_up, measures, run_of, words

EXPERIMENT = EXPERIMENTS["manipulate"]

(
    MATTER, GAINS, RISES, ENDS, STABLE, AS_RELU, OF_USE,
    GAINS_DECAYED, STABLE_DECAYED, AS_RELU_DECAYED, OF_USE_DECAYED,
) = range(11)  # fmt: skip
DECAYED_ROWS = (GAINS_DECAYED, STABLE_DECAYED, AS_RELU_DECAYED, OF_USE_DECAYED)
TOLERANCE = 1e-12  # sums of fewer than ten shares below 1, a few roundings of 2⁻⁵³ each
Path4 = Sequence[tuple[float, float]]  # of P₀ and P_a, at equal distances over the steps


def made(arm: str, seed: int, path: Path4, quality: float, first: int = 0) -> Run:
    """A run with P₀ and P_a on its validation lines, the first at step ``first``."""
    evals = [
        {
            "split": "validation",
            "step": first + 150 * place,
            "loss": 1.0,
            "quality": 0.5,
            "measures": measures(0.9) | {"zero_derivative": p0, "zero_activation": pa},
        }
        for place, (p0, pa) in enumerate(path)
    ]
    return made_up(arm, seed, 0.9, quality, evals=evals)


def world(seeds: int = 5, sign: float = 1.0, **changed: Any) -> list[Run]:
    """All arms: P₀ gains about 0.2, P_a 0.1 and less evenly; a ``sign`` below 0 swaps them."""
    runs = []
    for seed in range(seeds):
        draw = random.Random(f"manipulate{seed}")
        for place, shift in enumerate(SHIFTS):
            for ending in ("", DECAYED):
                p0 = 0.2 + 0.005 * draw.gauss(0, 1)
                pa = 0.1 + 0.03 * (place - 1.5) + 0.002 * draw.gauss(0, 1)
                own, other = (p0, pa) if sign > 0 else (pa, p0)
                path = [(0.3 + own * t, 0.35 + other * t) for t in (0, 0.5, 0.8, 1)]
                quality = 0.96 + 0.002 * draw.random()
                runs.append(made(shift + ending, seed, path, quality, **changed))
        for ending in ("", DECAYED):
            runs.append(made("vanilla" + ending, seed, [], 0.965 + 0.001 * draw.random()))
            runs.append(made("no-mlp" + ending, seed, [], 0.87 + 0.01 * draw.random()))
    return runs


def test_effects_by_hand() -> None:
    starts = [(0.3, 0.4), (0.5, 0.2), (0.25, 0.25), (0.1, 0.35)]
    ends = [(0.6, 0.5), (0.7, 0.3), (0.55, 0.75), (0.2, 0.05)]
    # the changes: (.3, .1), (.2, .1), (.3, .5), (.1, −.3)
    runs = [
        made(shift, 3, [start, (0.9, 0.9), end], 0.9 + start[0] / 10)
        for shift, start, end in zip(SHIFTS, starts, ends, strict=True)
    ]
    runs += [made("vanilla", 3, [], 0.9), made("no-mlp", 3, [], 0.7)]
    found = effects(EXPERIMENT, runs)
    expected = {
        GAINS: (0.2 + 0.1 - 0.2 + 0.4) / 4,
        RISES: 0.9 / 4,
        ENDS: (0.1 + 0.4 - 0.2 + 0.15) / 4,
        # deviations of P₀'s from .225: .075 .025 .075 .125; of P_a's from .1: 0 0 .4 .4
        STABLE: math.log(math.sqrt((2 * 0.075**2 + 0.025**2 + 0.125**2) / 0.32)),
        AS_RELU: 0.115 / 4,
        OF_USE: 0.2 + 0.115 / 4,
    }
    for at, value in expected.items():
        assert found[at] == {3: pytest.approx(value, abs=TOLERANCE)}, at
    assert found[MATTER] == {3: pytest.approx(0.2, abs=TOLERANCE)}
    assert all(found[at] == {} for at in DECAYED_ROWS)


def test_quality_by_hand_with_decay() -> None:
    qualities = dict.fromkeys(SHIFTS, 0.5) | {"vanilla": 0.6, "no-mlp": 0.7}
    qualities |= {shift + DECAYED: 0.8 + 0.01 * place for place, shift in enumerate(SHIFTS)}
    qualities |= {"vanilla" + DECAYED: 0.825, "no-mlp" + DECAYED: 0.7}
    found = effects(EXPERIMENT, [made(arm, 2, [], quality) for arm, quality in qualities.items()])
    by_hand = {AS_RELU: -0.1, AS_RELU_DECAYED: -0.01, OF_USE: -0.2, OF_USE_DECAYED: 0.115}
    for at, value in by_hand.items():
        assert found[at] == {2: pytest.approx(value, abs=TOLERANCE)}, at


def test_effects_by_brute_force() -> None:
    runs = world()
    found = effects(EXPERIMENT, runs)
    for seed in range(5):
        for ending, lead, stable in (("", GAINS, STABLE), (DECAYED, GAINS_DECAYED, STABLE_DECAYED)):
            changes = []
            for key in ("zero_derivative", "zero_activation"):
                lines = [run_of(runs, shift + ending, seed).evals for shift in SHIFTS]
                changes.append([e[-1]["measures"][key] - e[0]["measures"][key] for e in lines])
            gain = sum(changes[0]) / 4 - sum(changes[1]) / 4
            # spreads of 0.002 and more, to 1e-15: to 1e-12 of themselves
            spread = math.log(statistics.stdev(changes[0]) / statistics.stdev(changes[1]))
            assert found[lead][seed] == pytest.approx(gain, abs=TOLERANCE)
            assert found[stable][seed] == pytest.approx(spread, abs=10 * TOLERANCE)


def test_what_is_planted_holds_and_its_reversal_does_not() -> None:
    assert set(words(EXPERIMENT, world())) == {"holds"}
    turned = words(EXPERIMENT, world(sign=-1))
    others = {GAINS, GAINS_DECAYED, ENDS, STABLE, STABLE_DECAYED}
    assert [at for at, word in enumerate(turned) if word == "does not hold here"] == sorted(others)


def test_an_s_shape_that_learns_worse_is_found() -> None:
    runs = world()
    for seed in range(5):
        for ending in ("", DECAYED):
            runs.append(made("vanilla" + ending, seed, [], 0.99 + 0.001 * seed))
            runs.append(made("no-mlp" + ending, seed, [], 0.98 + 0.001 * seed))
    found = words(EXPERIMENT, runs)
    worse = (AS_RELU, AS_RELU_DECAYED, OF_USE, OF_USE_DECAYED)
    assert {found[at] for at in worse} == {"does not hold here"}


def test_a_seed_that_lacks_a_shift_drops_out() -> None:
    lacking = made("s-1.6+1.6", 4, [], 0.96)  # its quality is known, its occupancy is not
    found = answers(EXPERIMENT, [*world(), lacking])
    assert list(found[GAINS].effects) == list(found[STABLE].effects) == [0, 1, 2, 3]
    assert found[GAINS].verdict.word == "undecided"
    assert list(found[AS_RELU].effects) == list(found[GAINS_DECAYED].effects) == [0, 1, 2, 3, 4]


def test_without_a_start_there_is_no_change() -> None:
    found = answers(EXPERIMENT, world(first=150))
    changes = (GAINS, GAINS_DECAYED, RISES, ENDS, STABLE, STABLE_DECAYED)
    assert all(found[at].effects == {} for at in changes)
    assert all(found[at].verdict.word == "undecided" for at in changes)


@pytest.mark.parametrize("picture", EXPERIMENT.pictures, ids=lambda picture: picture.name)
def test_pictures(picture: Picture) -> None:
    assert_drawn(picture.plot, world(seeds=2))
    bare = [made("s-1.6+1.6", 0, [], 0.9)]
    assert picture.plot(Arms(bare), False) is None
    assert_drawn(picture.plot, [*bare, made("s+1.6+1.6", 0, [(0.1, 0.2), (0.3, 0.2)], 0.9)])

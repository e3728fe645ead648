"""Where pre-activations gather: effects by hand from made-up records, verdicts, pictures."""

from __future__ import annotations

import math
import random
import statistics
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest

from actsparse_lab.analysis.effects import Arms
from actsparse_lab.analysis.findings import Finding
from actsparse_lab.analysis.plots import Picture
from actsparse_lab.papers.experiments import EXPERIMENTS
from actsparse_lab.papers.manipulate.claims import DECAYED, SHIFTS
from actsparse_lab.records import Entry, RecordWriter, environment, read_runs, run_path
from tests.papers import made_up

EXPERIMENT = EXPERIMENTS["manipulate"]

(
    MATTER, GAINS, RISES, ENDS, STABLE, AS_RELU, OF_USE,
    GAINS_DECAYED, STABLE_DECAYED, AS_RELU_DECAYED, OF_USE_DECAYED,
) = range(11)  # fmt: skip
DECAYED_ROWS = (GAINS_DECAYED, STABLE_DECAYED, AS_RELU_DECAYED, OF_USE_DECAYED)
PNG = b"\x89PNG"
HERE = environment(threads=1)
TOLERANCE = 1e-12  # sums of fewer than ten shares below 1, a few roundings of 2⁻⁵³ each
Path4 = Sequence[tuple[float, float]]  # of P₀ and P_a, at equal distances over the steps


def write(out: Path, arm: str, seed: int, path: Path4, quality: float, first: int = 0) -> None:
    """A finished run with P₀ and P_a on its validation lines, the first at step ``first``."""
    plain = {"density": 0.9, "derivative_density": 0.4, "dead": 0, "units": 4}
    shown: Entry = {**plain, "living_density": 0.9, "blocks": []}
    header = {"task": "digits", "arm": arm, "seed": seed, "config": {}, **HERE}
    with RecordWriter(run_path(out, arm, seed), header) as record:
        for place, (p0, pa) in enumerate(path):
            measures = shown | {"zero_derivative": p0, "zero_activation": pa}
            at = {"split": "validation", "step": first + 150 * place, "quality": 0.5}
            record.write("eval", **at, loss=1.0, measures=measures)
        scored = {"loss": 0.2, "quality": quality, "quality_name": "accuracy"}
        record.write(
            "result",
            **scored,
            split="test",
            step=450,
            higher_is_better=True,
            inference=shown,
            training=shown,
            skippable=None,
            baselines={},
            time={"seconds": 1.0},
        )


def answers(out: Path) -> list[Finding]:
    return made_up.answers(EXPERIMENT, read_runs(out))


def world(out: Path, seeds: int = 5, sign: float = 1.0, **changed: Any) -> None:
    """All arms: P₀ gains about 0.2, P_a 0.1 and less evenly; a ``sign`` below 0 swaps them."""
    for seed in range(seeds):
        draw = random.Random(f"manipulate{seed}")
        for place, shift in enumerate(SHIFTS):
            for ending in ("", DECAYED):
                p0 = 0.2 + 0.005 * draw.gauss(0, 1)
                pa = 0.1 + 0.03 * (place - 1.5) + 0.002 * draw.gauss(0, 1)
                own, other = (p0, pa) if sign > 0 else (pa, p0)
                path = [(0.3 + own * t, 0.35 + other * t) for t in (0, 0.5, 0.8, 1)]
                write(out, shift + ending, seed, path, 0.96 + 0.002 * draw.random(), **changed)
        for ending in ("", DECAYED):
            write(out, "vanilla" + ending, seed, [], 0.965 + 0.001 * draw.random())
            write(out, "no-mlp" + ending, seed, [], 0.87 + 0.01 * draw.random())


def test_effects_by_hand(tmp_path: Path) -> None:
    starts = [(0.3, 0.4), (0.5, 0.2), (0.25, 0.25), (0.1, 0.35)]
    ends = [(0.6, 0.5), (0.7, 0.3), (0.55, 0.75), (0.2, 0.05)]
    # the changes: (.3, .1), (.2, .1), (.3, .5), (.1, −.3)
    for shift, start, end in zip(SHIFTS, starts, ends, strict=True):
        write(tmp_path, shift, 3, [start, (0.9, 0.9), end], 0.9 + start[0] / 10)
    write(tmp_path, "vanilla", 3, [], 0.9)
    write(tmp_path, "no-mlp", 3, [], 0.7)
    found = [answer.effects for answer in answers(tmp_path)]
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


def test_quality_by_hand_with_decay(tmp_path: Path) -> None:
    for place, shift in enumerate(SHIFTS):
        write(tmp_path, shift, 2, [], 0.5)
        write(tmp_path, shift + DECAYED, 2, [], 0.8 + 0.01 * place)
    for arm, quality in (
        ("vanilla", 0.6),
        ("vanilla" + DECAYED, 0.825),
        ("no-mlp", 0.7),
        ("no-mlp" + DECAYED, 0.7),
    ):
        write(tmp_path, arm, 2, [], quality)
    found = [answer.effects for answer in answers(tmp_path)]
    by_hand = {AS_RELU: -0.1, AS_RELU_DECAYED: -0.01, OF_USE: -0.2, OF_USE_DECAYED: 0.115}
    for at, value in by_hand.items():
        assert found[at] == {2: pytest.approx(value, abs=TOLERANCE)}, at


def test_effects_by_brute_force(tmp_path: Path) -> None:
    world(tmp_path)
    runs = {(run.arm, run.seed): run for run in read_runs(tmp_path)}
    found = answers(tmp_path)
    for seed in range(5):
        for ending, lead, stable in (("", GAINS, STABLE), (DECAYED, GAINS_DECAYED, STABLE_DECAYED)):
            changes = []
            for key in ("zero_derivative", "zero_activation"):
                lines = [runs[shift + ending, seed].evals for shift in SHIFTS]
                changes.append([e[-1]["measures"][key] - e[0]["measures"][key] for e in lines])
            gain = sum(changes[0]) / 4 - sum(changes[1]) / 4
            # spreads of 0.002 and more, to 1e-15: to 1e-12 of themselves
            spread = math.log(statistics.stdev(changes[0]) / statistics.stdev(changes[1]))
            assert found[lead].effects[seed] == pytest.approx(gain, abs=TOLERANCE)
            assert found[stable].effects[seed] == pytest.approx(spread, abs=10 * TOLERANCE)


def test_what_is_planted_holds_and_its_reversal_does_not(tmp_path: Path) -> None:
    world(tmp_path / "as claimed")
    world(tmp_path / "reversed", sign=-1)
    claimed = [answer.verdict.word for answer in answers(tmp_path / "as claimed")]
    turned = [answer.verdict.word for answer in answers(tmp_path / "reversed")]
    assert set(claimed) == {"holds"}
    others = {GAINS, GAINS_DECAYED, ENDS, STABLE, STABLE_DECAYED}
    assert [at for at, word in enumerate(turned) if word == "does not hold here"] == sorted(others)


def test_an_s_shape_that_learns_worse_is_found(tmp_path: Path) -> None:
    world(tmp_path)
    for seed in range(5):
        for ending in ("", DECAYED):
            write(tmp_path, "vanilla" + ending, seed, [], 0.99 + 0.001 * seed)
            write(tmp_path, "no-mlp" + ending, seed, [], 0.98 + 0.001 * seed)
    found = answers(tmp_path)
    worse = (AS_RELU, AS_RELU_DECAYED, OF_USE, OF_USE_DECAYED)
    assert {found[at].verdict.word for at in worse} == {"does not hold here"}


def test_a_seed_that_lacks_a_shift_drops_out(tmp_path: Path) -> None:
    world(tmp_path)
    write(tmp_path, "s-1.6+1.6", 4, [], 0.96)  # its quality is known, its occupancy is not
    found = answers(tmp_path)
    assert list(found[GAINS].effects) == list(found[STABLE].effects) == [0, 1, 2, 3]
    assert found[GAINS].verdict.word == "undecided"
    assert list(found[AS_RELU].effects) == list(found[GAINS_DECAYED].effects) == [0, 1, 2, 3, 4]


def test_without_a_start_there_is_no_change(tmp_path: Path) -> None:
    world(tmp_path, first=150)
    found = answers(tmp_path)
    changes = (GAINS, GAINS_DECAYED, RISES, ENDS, STABLE, STABLE_DECAYED)
    assert all(found[at].effects == {} for at in changes)
    assert all(found[at].verdict.word == "undecided" for at in changes)


def test_no_runs_are_undecided() -> None:
    found = made_up.answers(EXPERIMENT, [])
    assert {answer.verdict.word for answer in found} == {"undecided"}


@pytest.mark.parametrize("picture", EXPERIMENT.pictures, ids=lambda picture: picture.name)
def test_pictures(tmp_path: Path, picture: Picture) -> None:
    world(tmp_path / "whole", seeds=2)
    write(tmp_path / "bare", "s-1.6+1.6", 0, [], 0.9)
    assert picture.plot(Arms([]), False) is None
    assert picture.plot(Arms(read_runs(tmp_path / "bare")), False) is None
    write(tmp_path / "bare", "s+1.6+1.6", 0, [(0.1, 0.2), (0.3, 0.2)], 0.9)
    for folder in ("whole", "bare"):
        arms = Arms(read_runs(tmp_path / folder))
        light, dark = picture.plot(arms, False), picture.plot(arms, True)
        assert light is not None
        assert dark is not None
        assert light.startswith(PNG)
        assert dark.startswith(PNG)
        assert light != dark

"""Weight noise's claims: effects by hand, verdicts on planted records and their reversal."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable
from functools import partial
from statistics import fmean
from typing import Any

import numpy as np
import pytest
from matplotlib.figure import Figure

from actsparse_lab.analysis.effects import Arms
from actsparse_lab.papers.experiments import EXPERIMENTS
from actsparse_lab.papers.weight_noise import plot
from actsparse_lab.records import Entry, Run
from tests.papers import made_up

EXPERIMENT = EXPERIMENTS["weight-noise"]

AddRun = Callable[..., Run]
Planted = Callable[..., list[Run]]
effects, words = (partial(read, EXPERIMENT) for read in (made_up.effects, made_up.words))
QUALITY, MATTER = 10, 11
# arm: density, Gauss–Newton trace, that with copies, accuracy, of seed 0
ENDS: dict[str, tuple[float, float, float, float]] = {
    "vanilla": (0.3, 100.0, 20.0, 0.970),
    "weight-noise": (0.2, 80.0, 15.0, 0.968),
    "weight-noise-0.3": (0.1, 50.0, 9.0, 0.96),
    "vanilla-no-1d-decay": (0.25, 70.0, 12.0, 0.972),
    "weight-noise-no-1d-decay": (0.24, 60.0, 11.0, 0.971),
    "weight-noise-0.3-no-1d-decay": (0.18, 55.0, 10.0, 0.97),
}
PAIRS = [  # of each question: arm, other, place in `ENDS`
    ("weight-noise", "vanilla", 1),
    ("weight-noise", "vanilla", 2),
    ("weight-noise-no-1d-decay", "vanilla-no-1d-decay", 1),
    ("weight-noise", "vanilla", 0),
    ("weight-noise-no-1d-decay", "vanilla-no-1d-decay", 0),
    ("weight-noise", "vanilla-no-1d-decay", 0),
    ("weight-noise-0.3", "weight-noise", 0),
    ("weight-noise-0.3-no-1d-decay", "weight-noise-no-1d-decay", 0),
    ("weight-noise-0.3", "vanilla", 0),
    ("weight-noise-0.3-no-1d-decay", "vanilla-no-1d-decay", 0),
    ("weight-noise", "vanilla", 3),
    ("vanilla", "no-mlp", 3),
]
# A planted value is rounded twice, their quotient once and its ln, below 1 here, once: 6 · 2⁻⁵³.
TOLERANCE = 6 * 2**-53
SWAP = {arm: arm.replace("vanilla", "weight-noise") for arm in ENDS if "vanilla" in arm}
SWAP |= {other: arm for arm, other in SWAP.items()}


def of(arm: str, seed: int) -> tuple[float, ...]:
    """Of a seed: the more noise, the more seeds change it, so that effects differ."""
    if arm == "no-mlp":
        return (0.0, 0.0, 0.0, 0.8 - 0.002 * seed)
    dose = {"vanilla": 0, "weight-noise": 1, "weight-noise-0.3": 2}[
        arm.removesuffix("-no-1d-decay")
    ]
    density, trace, copies, accuracy = ENDS[arm]
    factor = 1 - 0.01 * dose * seed
    return (density * factor, trace * factor, copies * factor, accuracy - 0.001 * dose * seed)


@pytest.fixture
def planted(add_run: AddRun, measured: Callable[..., Any]) -> Planted:
    def make(seeds: int = 5) -> list[Run]:
        one = add_run("vanilla", 0)

        def run(arm: str, seed: int, measured: list[Entry], **result: Any) -> Run:
            header = one.header | {"arm": arm, "seed": seed}
            result = (one.result or {}) | result
            return dataclasses.replace(one, header=header, measured=measured, result=result)

        runs = [
            run("no-mlp", seed, [], inference=None, quality=of("no-mlp", seed)[3])
            for seed in range(seeds)
        ]
        for arm in ENDS:
            for seed in range(seeds):
                density, trace, copies, accuracy = of(arm, seed)
                curvature = {"gauss_newton": {"value": trace}, "token_copies": {"value": copies}}
                first = {"step": 0, "curvature": {name: {"value": 1e6} for name in curvature}}
                last = {"step": 1500, "curvature": curvature}
                inference = measured(density)
                runs.append(run(arm, seed, [first, last], inference=inference, quality=accuracy))
        return runs

    return make


def test_effects_are_what_was_planted(planted: Planted) -> None:
    runs = planted()
    assert len(EXPERIMENT.questions) == len(PAIRS)
    for at, (arm, other, place) in enumerate(PAIRS):
        pairs = [(of(arm, seed)[place], of(other, seed)[place]) for seed in range(5)]
        by_hand = [a - b if at in (QUALITY, MATTER) else math.log(a / b) for a, b in pairs]
        assert effects(runs)[at] == pytest.approx(dict(enumerate(by_hand)), abs=TOLERANCE, rel=0), (
            at
        )


def test_planted_claims_hold_and_their_reversal_does_not(planted: Planted) -> None:
    runs = planted()
    assert words(runs) == ["holds"] * 12
    swapped = [
        dataclasses.replace(run, header=run.header | {"arm": SWAP.get(run.arm, run.arm)})
        for run in runs
    ]
    # vanilla's accuracy is no worse; more noise is still sparser than what now counts as less
    kept = {QUALITY, MATTER, 6, 7, 8, 9}
    expected = ["holds" if at in kept else "does not hold here" for at in range(12)]
    assert words(swapped) == expected


def test_less_noise_that_is_sparser_does_not_hold(planted: Planted) -> None:
    """What is called 0.3 is denser than none by a tenth and more; MLPs do harm."""
    runs = planted()
    found = {(run.arm, run.seed): run for run in runs}
    for run in runs:
        if run.arm.startswith("weight-noise-0.3"):
            dense = 1.1 * of(run.arm.replace("weight-noise-0.3", "vanilla"), 0)[0]
            assert run.result is not None
            run.result["inference"]["density"] = dense * (1 + 0.01 * run.seed)
    for seed in range(5):
        own, other = found["vanilla", seed].result, found["no-mlp", seed].result
        assert own is not None
        assert other is not None
        own["quality"], other["quality"] = other["quality"], own["quality"]
    assert [words(runs)[at] for at in (6, 7, 8, 9, MATTER)] == ["does not hold here"] * 5


def test_more_than_a_point_is_not_kept(planted: Planted) -> None:
    runs = planted()
    for run in runs:
        if run.arm == "weight-noise":
            assert run.result is not None
            run.result["quality"] -= 0.02
    assert words(runs)[QUALITY] == "does not hold here"


def test_a_start_is_no_end(planted: Planted) -> None:
    runs = [dataclasses.replace(run, measured=run.measured[:1]) for run in planted()]
    for at in (0, 1, 2):
        assert effects(runs)[at] == {}
        assert words(runs)[at] == "undecided"
    assert words(runs)[3] == "holds"


def test_a_seed_that_lacks_a_number_drops_out(planted: Planted) -> None:
    runs = planted()
    run = next(run for run in runs if (run.arm, run.seed) == ("weight-noise", 3))
    assert run.result is not None
    del run.measured[1]["curvature"]["gauss_newton"]
    run.result["inference"]["density"] = 0.0  # no logarithm
    for at in (0, 3):
        assert sorted(effects(runs)[at]) == [0, 1, 2, 4]
        assert words(runs)[at] == "undecided"
    assert sorted(effects(runs)[1]) == [0, 1, 2, 3, 4]
    without = [run for run in runs if run.arm != "vanilla"]
    assert all(effects(without)[at] == {} for at in (0, 1, 3, 8, 10, 11))
    assert set(words(planted(seeds=4))) == {"undecided"}


def test_the_picture(planted: Planted, add_run: AddRun) -> None:
    made_up.assert_drawn(plot.against_noise, planted(seeds=2))
    assert plot.against_noise(Arms([add_run("no-mlp", 0, inference=None)])) is None


def test_the_picture_shows_means_by_noise(
    planted: Planted, monkeypatch: pytest.MonkeyPatch
) -> None:
    drawn: list[tuple[Figure, dict[str, Any]]] = []
    monkeypatch.setattr(plot, "render", lambda *args: drawn.append(args) or b"kept")
    plot.against_noise(Arms(planted(seeds=3)))
    ((figure, lines),) = drawn
    assert list(lines) == ["decay of all", "norms, biases spared", "without MLPs"]
    assert [axes.get_yscale() for axes in figure.axes] == ["linear", "log", "linear"]
    density, trace, accuracy = (
        [np.asarray(line.get_xydata()).T for line in axes.lines if line.get_linewidth() > 2]
        for axes in figure.axes
    )
    arms = ("vanilla", "weight-noise", "weight-noise-0.3")
    for at, ending in enumerate(("", "-no-1d-decay")):
        ends = [[of(arm + ending, seed) for seed in range(3)] for arm in arms]
        assert density[at][0].tolist() == [0.0, 0.1, 0.3]
        np.testing.assert_allclose(density[at][1], [fmean(e[0] for e in each) for each in ends])
        geometric = [math.exp(fmean(math.log(e[1]) for e in each)) for each in ends]
        np.testing.assert_allclose(trace[at][1], geometric)
        np.testing.assert_allclose(accuracy[at][1], [fmean(e[3] for e in each) for each in ends])
    level = figure.axes[2].lines[-1].get_ydata()
    np.testing.assert_allclose(np.asarray(level), fmean(of("no-mlp", seed)[3] for seed in range(3)))


def test_panels_without_numbers_are_left_out(
    planted: Planted, monkeypatch: pytest.MonkeyPatch
) -> None:
    runs = [dataclasses.replace(run, measured=[]) for run in planted(seeds=2)]
    panels = made_up.figure_of(monkeypatch, plot, plot.against_noise, runs).axes
    titles = [axes.get_title(loc="left") for axes in panels]
    assert titles == ["inference density", "accuracy"]

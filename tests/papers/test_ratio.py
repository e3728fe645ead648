"""The ratio's claims: effects by hand, verdicts on planted records and their reversal, pictures."""

from __future__ import annotations

import dataclasses
import math
import sys
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from matplotlib.figure import Figure

from actsparse_lab.analysis.effects import Arms
from actsparse_lab.analysis.plots import spread
from actsparse_lab.papers.experiments import EXPERIMENTS
from actsparse_lab.papers.ratio import claims, plot
from actsparse_lab.records import Run, read_runs
from tests.papers import made_up

EXPERIMENT = EXPERIMENTS["ratio"]

AddRun = Callable[..., Run]
QUESTIONS = EXPERIMENT.questions
effects, words = (partial(read, EXPERIMENT) for read in (made_up.effects, made_up.words))
ARMS = ("vanilla", "paper", "vanilla-no-1d-decay")
STEPS = (300, 900, 1500)
EPOCH = 19
LOSSES = (2.0, claims.UNFITTED, 0.01)  # the first half is not fitted yet
# ln of last over first, of vanilla's seed 0; each further seed's lies a hundredth lower
CHANGES = {
    "ratio": -0.5,
    "density": -0.45,
    "living_density": -0.4,
    "flatness": -6.0,
    "input_norm": 0.3,
    "effective_gradient": 0.2,
    "coefficient": -5.55,
}
NORMS = {"vanilla": 2.0, "paper": 60.0, "vanilla-no-1d-decay": 40.0, "no-mlp": 1.0}  # at first
SHARES = {"vanilla": 1.0, "paper": 0.75, "vanilla-no-1d-decay": 0.5, "no-mlp": 1.0}  # of `CHANGES`
# Planted values come from exp, a product or two, and are divided and put into ln again: each rounds
# by a relative 2⁻⁵³ or, of the C library, 2⁻⁵²; six of them, and ln's own rounding of at most 7.
TOLERANCE = 6 * 2**-52 + 7 * 2**-52


def moved(arm: str, seed: int, key: str) -> float:
    """ln of last over first."""
    return SHARES[arm] * (CHANGES[key] - 0.01 * seed)


def values(arm: str, seed: int, share: float) -> dict[str, Any]:
    """Measures at a share of the way from first to last window."""
    norm = NORMS[arm] * (1 + 0.1 * seed if arm == "paper" else 1)
    start = dict.fromkeys(CHANGES, 0.5) | {"input_norm": norm}
    return {k: start[k] * math.exp(share * moved(arm, seed, k)) for k in CHANGES}


def accuracy(arm: str, seed: int) -> float:
    """Without MLPs it is lower, by two points and more."""
    return 0.97 - 0.01 * seed if arm == "no-mlp" else 0.99


@pytest.fixture
def planted(add_run: AddRun, measured: Callable[..., Any]) -> Callable[..., list[Run]]:
    """Runs of `CHANGES`; ``backwards`` has the windows in the other order."""

    def make(seeds: int = 5, backwards: bool = False) -> list[Run]:
        runs, one = [], add_run("vanilla", 0)
        for arm in (*ARMS, "no-mlp"):
            for seed in range(seeds):
                shares = (0.0, 0.5, 1.0)[:: -1 if backwards else 1]
                found = [measured(0.2) | values(arm, seed, share) for share in shares]
                train = [
                    {"step": step, "loss": loss, "measures": m}
                    for step, loss, m in zip(STEPS, LOSSES, found, strict=True)
                ]
                ends = [
                    {"step": s, "measures": m} for s, m in zip((0, 1500), found[::2], strict=True)
                ]
                correct = dict(zip((0, EPOCH, 1500), found, strict=True))
                ends.insert(1, {"step": EPOCH, "measures": None})
                for line in ends:
                    row = correct[line["step"]] | {"correct": 0.5}
                    line["trials"] = {"flatness_correct": [row]}
                config = one.header["config"] | {"active_at": [1, 2, EPOCH]}
                header = one.header | {"arm": arm, "seed": seed, "config": config}
                result = (one.result or {}) | {"quality": accuracy(arm, seed)}
                runs.append(
                    dataclasses.replace(
                        one, header=header, train=train, measured=ends, result=result
                    )
                )
        return runs

    return make


# -- effects and verdicts ---------------------------------------------------------------------

RATIO, DENSITY, PAPER, SPARED, NUMERATOR, DRAWN, CORRECT, CORRECT_RATIO, IN_EPOCH = range(9)
NORM, NORMS_APART, GRADIENT, UNFITTED, UNFITTED_SPARED, MATTER = range(9, 15)
OF = {  # the questions on a change from first to last line: arm, key
    RATIO: ("vanilla", "ratio"),
    DENSITY: ("vanilla", "density"),
    PAPER: ("paper", "ratio"),
    SPARED: ("vanilla-no-1d-decay", "ratio"),
    NUMERATOR: ("vanilla", "flatness"),
    DRAWN: ("vanilla", "flatness"),  # of the measured lines
    CORRECT: ("vanilla", "flatness"),  # of correctly classified samples, as the next
    CORRECT_RATIO: ("vanilla", "ratio"),
    NORM: ("vanilla", "input_norm"),
    GRADIENT: ("vanilla", "effective_gradient"),
}
HALVES = {UNFITTED: "vanilla", UNFITTED_SPARED: "vanilla-no-1d-decay"}


def test_effects_are_what_was_planted(planted: Callable[..., list[Run]]) -> None:
    runs = planted()
    by_hand = {at: [moved(arm, s, key) for s in range(5)] for at, (arm, key) in OF.items()}
    for at, arm in HALVES.items():
        by_hand[at] = [moved(arm, s, "effective_gradient") / 2 for s in range(5)]
    by_hand[IN_EPOCH] = [moved("vanilla", s, "ratio") / 2 for s in range(5)]
    by_hand[NORMS_APART] = [
        math.log(60 * (1 + 0.1 * s) / 40) + (0.75 - 0.5) * (CHANGES["input_norm"] - 0.01 * s)
        for s in range(5)
    ]
    by_hand[MATTER] = [0.02 + 0.01 * seed for seed in range(5)]
    assert len(QUESTIONS) == len(by_hand)
    for at, expected in by_hand.items():
        assert effects(runs)[at] == pytest.approx(dict(enumerate(expected)), abs=TOLERANCE, rel=0)


def test_records_as_they_are_written(theory_runs: Path) -> None:
    """There density is 0.5 / i in window i of 6, AF (1 + seed) 10^(1 − i), the ratio 1.25 density,
    c = AF / (100 density), the input norm 48, the loss 1 / i."""
    runs = read_runs(theory_runs)
    fall = math.log(1 / 6)
    assert effects(runs)[RATIO] == pytest.approx({0: fall, 1: fall}, abs=TOLERANCE, rel=0)
    assert effects(runs)[DENSITY] == pytest.approx({0: fall, 1: fall}, abs=TOLERANCE, rel=0)
    assert effects(runs)[NUMERATOR] == pytest.approx(dict.fromkeys((0, 1), -5 * math.log(10)))
    assert effects(runs)[DRAWN] == {}  # measured lines without measures
    assert all(effects(runs)[at] == {} for at in (CORRECT, CORRECT_RATIO, IN_EPOCH))  # and trials
    assert effects(runs)[NORM] == {0: 0.0, 1: 0.0}
    gradient = -5 * math.log(10) - fall
    assert effects(runs)[GRADIENT] == pytest.approx({0: gradient, 1: gradient})
    assert effects(runs)[UNFITTED] == effects(runs)[GRADIENT]  # no loss is below a tenth
    assert set(words(runs)) == {"undecided"}


def test_planted_claims_hold_and_their_reversal_does_not(
    planted: Callable[..., list[Run]],
) -> None:
    assert words(planted()) == ["holds"] * 15
    back = words(planted(backwards=True))
    assert [back[at] for at in (*OF, *HALVES, IN_EPOCH)] == ["does not hold here"] * 13
    other = {"paper": "vanilla-no-1d-decay", "vanilla": "no-mlp"}
    other |= {to: arm for arm, to in other.items()}
    swapped = [dataclasses.replace(r, header=r.header | {"arm": other[r.arm]}) for r in planted()]
    for at in (NORMS_APART, MATTER):
        assert words(swapped)[at] == "does not hold here"


def test_a_gradient_that_falls_once_the_data_is_fitted(planted: Callable[..., list[Run]]) -> None:
    runs = planted()
    for run in runs:
        run.train[-1]["measures"]["effective_gradient"] *= 1e-3
    assert words(runs)[GRADIENT] == "does not hold here"
    assert words(runs)[UNFITTED] == "holds"


@pytest.mark.parametrize(
    ("losses", "share"),
    [
        pytest.param((2.0, 0.05, 0.2), 1.0, id="the last that is not fitted"),
        pytest.param((0.05, 0.2, 0.05), 0.5, id="from the first whatever its loss"),
        pytest.param((2.0, 0.05, 0.05), None, id="one window alone"),
        pytest.param((0.05, 0.05, 0.05), None, id="fitted at once"),
        pytest.param((2.0, 0.2, None), 0.5, id="no loss is no large one"),
    ],
)
def test_windows_that_are_not_fitted_yet(
    planted: Callable[..., list[Run]], losses: tuple[float | None, ...], share: float | None
) -> None:
    runs = planted(seeds=1)
    for run in runs:
        for line, loss in zip(run.train, losses, strict=True):
            line["loss"] = loss
    expected = {} if share is None else {0: share * CHANGES["effective_gradient"]}
    assert effects(runs)[UNFITTED] == pytest.approx(expected, abs=TOLERANCE, rel=0)


@pytest.mark.parametrize("end", [pytest.param(0, id="first"), pytest.param(-1, id="last")])
def test_a_seed_whose_first_or_last_window_lacks_the_number_drops_out(
    planted: Callable[..., list[Run]], end: int
) -> None:
    runs = planted()
    lame = next(run for run in runs if (run.arm, run.seed) == ("vanilla", 2))
    lame.train[end]["measures"]["ratio"] = None
    lame.train[end]["measures"]["flatness"] = 0.0  # no logarithm
    lame.measured[end]["measures"] = None
    for at in (RATIO, NUMERATOR, DRAWN):
        assert sorted(effects(runs)[at]) == [0, 1, 3, 4]
        assert words(runs)[at] == "undecided"
    assert sorted(effects(runs)[DENSITY]) == [0, 1, 2, 3, 4]


def test_a_start_where_nothing_is_classified_correctly_is_no_start(
    planted: Callable[..., list[Run]],
) -> None:
    runs = planted()
    for run in runs:
        (row,) = run.measured[0]["trials"]["flatness_correct"]
        if run.seed == 3:
            row |= {"correct": 0.0, "flatness": None, "ratio": None}
    for at in (CORRECT, CORRECT_RATIO, IN_EPOCH):
        assert sorted(effects(runs)[at]) == [0, 1, 2, 4]
        assert words(runs)[at] == "undecided"


def test_too_few_seeds_or_windows_are_undecided(planted: Callable[..., list[Run]]) -> None:
    assert set(words(planted(seeds=4))) == {"undecided"}
    assert set(words([])) == {"undecided"}
    short = [dataclasses.replace(r, train=r.train[:1], measured=[]) for r in planted()]
    assert all(effects(short)[at] == {} for at in range(MATTER))


def test_a_last_line_before_the_end_is_no_last_window(planted: Callable[..., list[Run]]) -> None:
    runs = [dataclasses.replace(run, train=run.train[:-1]) for run in planted()]
    assert effects(runs)[NORMS_APART] == {}


# -- pictures ---------------------------------------------------------------------------------

PLOTS = [pytest.param(picture.plot, id=picture.name) for picture in EXPERIMENT.pictures]


@pytest.mark.parametrize("plot", PLOTS)
def test_pictures(planted: Callable[..., list[Run]], plot: made_up.Plot, add_run: AddRun) -> None:
    made_up.assert_drawn(plot, planted(seeds=2))
    assert plot(Arms([add_run("vanilla", 0)]), False) is None


@pytest.fixture
def draw(monkeypatch: pytest.MonkeyPatch) -> Callable[[made_up.Plot, list[Run]], Figure]:
    """Calls a plot and returns its figure."""
    return partial(made_up.figure_of, monkeypatch, plot)


def test_parts_begin_at_one_and_end_at_the_geometric_mean_of_their_changes(
    planted: Callable[..., list[Run]], draw: Callable[..., Figure]
) -> None:
    figure = draw(plot.parts_over_steps, planted(seeds=3))
    assert [axes.get_title(loc="left") for axes in figure.axes] == list(ARMS)
    for axes in figure.axes:
        assert axes.get_yscale() == "log"
        thick = [line for line in axes.lines if line.get_linewidth() > 2]
        assert len(thick) == len(plot.PARTS)
        for key, line in zip(plot.PARTS, thick, strict=True):
            steps, heights = np.asarray(line.get_xydata()).T
            assert tuple(steps) == STEPS
            # the mean of seeds 0, 1, 2 is that of seed 1
            expected = np.exp(np.array([0, 0.5, 1]) * moved(axes.get_title(loc="left"), 1, key))
            np.testing.assert_allclose(heights, expected, rtol=TOLERANCE)


def test_correct_samples_are_drawn_from_the_first_step_on(
    planted: Callable[..., list[Run]], draw: Callable[..., Figure]
) -> None:
    flatness, ratio, correct = draw(plot.over_correct, planted(seeds=3)).axes
    for axes, key in ((flatness, "flatness"), (ratio, "ratio")):
        thick = [line for line in axes.lines if len(line.get_xdata()) == 3 and not line.get_alpha()]
        assert len(thick) == len(ARMS)
        for arm, line in zip(plot.SHOWN, thick, strict=True):
            steps, heights = np.asarray(line.get_xydata()).T
            assert tuple(steps) == (0, EPOCH, 1500)
            expected = 0.5 * np.exp(np.array([0, 0.5, 1]) * moved(arm, 1, key))
            np.testing.assert_allclose(heights, expected, rtol=TOLERANCE)
        assert [line.get_xdata()[0] for line in axes.lines if len(line.get_xdata()) == 2] == [EPOCH]
    assert {y for line in correct.lines for y in line.get_ydata()} == {0, 0.5, 1}  # 0, 1: the epoch


def test_a_series_whose_first_window_is_missing_is_not_drawn(
    planted: Callable[..., list[Run]], draw: Callable[..., Figure]
) -> None:
    runs = planted(seeds=1)
    runs[0].train[0]["measures"]["flatness"] = None
    figure = draw(plot.parts_over_steps, runs)
    drawn = [[text.get_text() for text in axes.texts] for axes in figure.axes]
    assert "flatness AF" not in drawn[0]
    assert "flatness AF" in drawn[1]


def test_changes_are_drawn_where_they_are(
    planted: Callable[..., list[Run]], draw: Callable[..., Figure]
) -> None:
    (axes,) = draw(plot.changes, planted(seeds=3)).axes
    marks = [line for line in axes.lines if line.get_markersize() == 9]
    at = [float(np.asarray(line.get_xdata())[0]) for line in marks]
    expected = [math.exp(moved(arm, 1, key)) for arm in ARMS for key in plot.NAMES]
    assert at == pytest.approx(expected, rel=TOLERANCE)
    assert [label.get_text() for label in axes.get_yticklabels()] == list(plot.NAMES.values())


@given(
    st.lists(st.floats(-1, 2), min_size=1, max_size=6).map(sorted),
    st.floats(0.01, 0.3),
)
def test_labels_are_apart_and_move_only_where_they_must(places: list[float], room: float) -> None:
    own = np.array(places)
    moved = spread(own, room)
    rounding = 8 * sys.float_info.epsilon * (2 + 6 * 0.3)  # eight operations on numbers up to that
    assert (np.diff(moved) >= room - rounding).all()
    if (np.diff(own) >= room).all():
        np.testing.assert_allclose(moved, own, rtol=0, atol=rounding)

"""The ratio's claims: effects by hand, verdicts on planted records and their reversal, pictures."""

from __future__ import annotations

import dataclasses
import math
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from matplotlib.figure import Figure

from actsparse.records import Run, read_runs
from actsparse.report.claims import ratio
from actsparse.report.claims.ratio import EXPERIMENT, spread
from actsparse.report.findings import Arms, Effects, findings

AddRun = Callable[..., Run]
QUESTIONS = EXPERIMENT.questions
ARMS = ("vanilla", "paper", "vanilla-no-1d-decay")
STEPS = (300, 900, 1500)
# ln of last over first, of seed 0; each further seed's lies a hundredth lower
CHANGES = {
    "ratio": -0.5,
    "density": -0.45,
    "living_density": -0.4,
    "flatness": -6.0,
    "input_norm": 0.3,
    "effective_gradient": 0.2,
    "coefficient": -5.55,
}
NORMS = {"vanilla": 2.0, "paper": 60.0, "vanilla-no-1d-decay": 40.0}  # in the first window
# Planted values come from exp, a product or two, and are divided and put into ln again: each rounds
# by a relative 2⁻⁵³ or, of the C library, 2⁻⁵²; six of them, and ln's own rounding of at most 7.
TOLERANCE = 6 * 2**-52 + 7 * 2**-52


def values(arm: str, seed: int, share: float) -> dict[str, Any]:
    """Measures at a share of the way from first to last window."""
    norm = NORMS[arm] * (1 + 0.1 * seed if arm == "paper" else 1)
    start = dict.fromkeys(CHANGES, 0.5) | {"input_norm": norm}
    return {k: start[k] * math.exp(share * (CHANGES[k] - 0.01 * seed)) for k in CHANGES}


@pytest.fixture
def planted(add_run: AddRun, measured: Callable[..., Any]) -> Callable[..., list[Run]]:
    """Runs of `CHANGES`; ``backwards`` has the windows in the other order."""

    def make(seeds: int = 5, backwards: bool = False) -> list[Run]:
        runs, one = [], add_run("vanilla", 0)
        for arm in ARMS:
            for seed in range(seeds):
                shares = (0.0, 0.5, 1.0)[:: -1 if backwards else 1]
                found = [measured(0.2) | values(arm, seed, share) for share in shares]
                train = [{"step": s, "measures": m} for s, m in zip(STEPS, found, strict=True)]
                ends = [
                    {"step": s, "measures": m} for s, m in zip((0, 1500), found[::2], strict=True)
                ]
                header = one.header | {"arm": arm, "seed": seed}
                runs.append(dataclasses.replace(one, header=header, train=train, measured=ends))
        return runs

    return make


def effects(runs: list[Run], at: int) -> Effects:
    return QUESTIONS[at].effects(Arms(runs))


def words(runs: list[Run]) -> list[str]:
    return [found.verdict.word for found in findings(EXPERIMENT, runs, {}).findings]


# -- effects and verdicts ---------------------------------------------------------------------

VANILLA = {
    0: "ratio",
    1: "density",
    2: "living_density",
    3: "flatness",
    4: "flatness",  # of the measured lines
    5: "input_norm",
    6: "effective_gradient",
}


def test_effects_are_what_was_planted(planted: Callable[..., list[Run]]) -> None:
    runs = planted()
    within = {at: [CHANGES[key] - 0.01 * seed for seed in range(5)] for at, key in VANILLA.items()}
    within[7] = within[0]  # of paper
    # the changes are the same
    within[8] = [math.log(60 * (1 + 0.1 * seed) / 40) for seed in range(5)]
    assert len(QUESTIONS) == len(within)
    for at, expected in within.items():
        assert effects(runs, at) == pytest.approx(dict(enumerate(expected)), abs=TOLERANCE, rel=0)


def test_records_as_they_are_written(theory_runs: Path) -> None:
    """There density is 0.5 / i in window i of 6, AF (1 + seed) 10^(1 − i), the ratio 1.25 density,
    c = AF / (100 density), the input norm 48."""
    runs = read_runs(theory_runs)
    fall = math.log(1 / 6)
    assert effects(runs, 0) == pytest.approx({0: fall, 1: fall}, abs=TOLERANCE, rel=0)
    assert effects(runs, 1) == pytest.approx({0: fall, 1: fall}, abs=TOLERANCE, rel=0)
    assert effects(runs, 3) == pytest.approx(dict.fromkeys((0, 1), -5 * math.log(10)))
    assert effects(runs, 4) == {}  # measured lines without measures
    assert effects(runs, 5) == {0: 0.0, 1: 0.0}
    gradient = -5 * math.log(10) - fall
    assert effects(runs, 6) == pytest.approx({0: gradient, 1: gradient})
    assert set(words(runs)) == {"undecided"}


def test_planted_claims_hold_and_their_reversal_does_not(
    planted: Callable[..., list[Run]],
) -> None:
    assert words(planted()) == ["holds"] * 9
    assert words(planted(backwards=True))[:8] == ["does not hold here"] * 8
    other = {"paper": "vanilla-no-1d-decay", "vanilla-no-1d-decay": "paper", "vanilla": "vanilla"}
    swapped = [dataclasses.replace(r, header=r.header | {"arm": other[r.arm]}) for r in planted()]
    assert words(swapped)[8] == "does not hold here"


@pytest.mark.parametrize("end", [pytest.param(0, id="first"), pytest.param(-1, id="last")])
def test_a_seed_whose_first_or_last_window_lacks_the_number_drops_out(
    planted: Callable[..., list[Run]], end: int
) -> None:
    runs = planted()
    lame = next(run for run in runs if (run.arm, run.seed) == ("vanilla", 2))
    lame.train[end]["measures"]["ratio"] = None
    lame.train[end]["measures"]["flatness"] = 0.0  # no logarithm
    lame.measured[end]["measures"] = None
    for at in (0, 3, 4):
        assert sorted(effects(runs, at)) == [0, 1, 3, 4]
        assert words(runs)[at] == "undecided"
    assert sorted(effects(runs, 1)) == [0, 1, 2, 3, 4]


def test_too_few_seeds_or_windows_are_undecided(planted: Callable[..., list[Run]]) -> None:
    assert set(words(planted(seeds=4))) == {"undecided"}
    assert set(words([])) == {"undecided"}
    short = [dataclasses.replace(r, train=r.train[:1], measured=[]) for r in planted()]
    assert all(effects(short, at) == {} for at in range(9))


def test_a_last_line_before_the_end_is_no_last_window(planted: Callable[..., list[Run]]) -> None:
    runs = [dataclasses.replace(run, train=run.train[:-1]) for run in planted()]
    assert effects(runs, 8) == {}


# -- pictures ---------------------------------------------------------------------------------

PLOTS = [pytest.param(picture.plot, id=picture.name) for picture in EXPERIMENT.pictures]
Plot = Callable[..., bytes | None]


@pytest.mark.parametrize("plot", PLOTS)
@pytest.mark.parametrize("dark", [False, True], ids=["light", "dark"])
def test_pictures_are_pngs(planted: Callable[..., list[Run]], plot: Plot, dark: bool) -> None:
    drawn = plot(Arms(planted(seeds=2)), dark)
    assert drawn is not None
    assert drawn.startswith(b"\x89PNG")


@pytest.mark.parametrize("plot", PLOTS)
def test_no_picture_without_data(plot: Plot, add_run: AddRun) -> None:
    assert plot(Arms([]), False) is None
    assert plot(Arms([add_run("vanilla", 0)]), False) is None


@pytest.fixture
def draw(monkeypatch: pytest.MonkeyPatch) -> Iterator[Callable[..., Figure]]:
    """Calls a plot and returns its figure."""
    drawn: list[Figure] = []

    def keep(figure: Figure, lines: Any) -> bytes:
        drawn.append(figure)
        return b"kept"

    monkeypatch.setattr(ratio, "render", keep)

    def call(plot: Plot, runs: list[Run]) -> Figure:
        plot(Arms(runs), False)
        return drawn.pop()

    return call


def test_parts_begin_at_one_and_end_at_the_geometric_mean_of_their_changes(
    planted: Callable[..., list[Run]], draw: Callable[..., Figure]
) -> None:
    figure = draw(ratio.parts_over_steps, planted(seeds=3))
    assert [axes.get_title(loc="left") for axes in figure.axes] == list(ARMS)
    for axes in figure.axes:
        assert axes.get_yscale() == "log"
        thick = [line for line in axes.lines if line.get_linewidth() > 2]
        assert len(thick) == len(ratio.PARTS)
        for key, line in zip(ratio.PARTS, thick, strict=True):
            steps, heights = np.asarray(line.get_xydata()).T
            assert tuple(steps) == STEPS
            # the mean of seeds 0, 1, 2 is that of seed 1
            expected = np.exp(np.array([0, 0.5, 1]) * (CHANGES[key] - 0.01))
            np.testing.assert_allclose(heights, expected, rtol=TOLERANCE)


def test_a_series_whose_first_window_is_missing_is_not_drawn(
    planted: Callable[..., list[Run]], draw: Callable[..., Figure]
) -> None:
    runs = planted(seeds=1)
    runs[0].train[0]["measures"]["flatness"] = None
    figure = draw(ratio.parts_over_steps, runs)
    drawn = [[text.get_text() for text in axes.texts] for axes in figure.axes]
    assert "flatness AF" not in drawn[0]
    assert "flatness AF" in drawn[1]


def test_changes_are_drawn_where_they_are(
    planted: Callable[..., list[Run]], draw: Callable[..., Figure]
) -> None:
    (axes,) = draw(ratio.changes, planted(seeds=3)).axes
    marks = [line for line in axes.lines if line.get_markersize() == 9]
    at = [float(np.asarray(line.get_xdata())[0]) for line in marks]
    expected = [math.exp(CHANGES[key] - 0.01) for _ in ARMS for key in ratio.NAMES]
    assert at == pytest.approx(expected, rel=TOLERANCE)
    assert [label.get_text() for label in axes.get_yticklabels()] == list(ratio.NAMES.values())


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

"""Seconds to a goal come off the records' clock, paired by seed, both arms by one rule."""

from __future__ import annotations

import json
import math
import statistics
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st
from scipy.stats import t as student

from actsparse_lab.analysis.intervals import factor
from actsparse_lab.records import read_runs
from actsparse_lab.report import markdown_frontier, write_report
from actsparse_lab.report.frontier_page import sections
from actsparse_lab.report.race import Race, race_table, races
from tests.report.frontier_records import ordinary, write_run, write_task

Curve = list[tuple[float, float]]
DENSE: Curve = [(1.0, 0.1), (11.0, 0.8), (21.0, 0.9), (31.0, 0.92)]
FAST: Curve = [(1.0, 0.1), (6.0, 0.7), (11.0, 0.93), (16.0, 0.95)]


def write_race(
    out: Path, dense: Curve = DENSE, fast: Curve = FAST, seeds: int = 5, **how: str
) -> None:
    """Each seed's times a little longer than those of the one before."""
    for seed in range(seeds):
        for arm, curve in (("vanilla", dense), ("best", fast)):
            stretched = [((1 + 0.1 * seed) * seconds, value) for seconds, value in curve]
            write_run(out, arm, seed, stretched, quality=0.9, accelerate=arm == "best", **how)  # type: ignore[arg-type]


def only(out: Path) -> Race:
    """The race to the same quality; beside accuracy there is one to the same loss too."""
    found = {race.goal: race for race in races(read_runs(out))}
    assert list(found) in (["loss", "accuracy"], ["bits per byte"])
    return found[list(found)[-1]]


def test_each_arm_is_timed_to_its_first_validation_as_good_as_vanillas_last(tmp_path: Path) -> None:
    write_race(tmp_path)
    race = only(tmp_path)
    assert (race.dense, race.fast, race.sooner) == ("vanilla", "best", "yes")
    assert [lap.seed for lap in race.laps] == [0, 1, 2, 3, 4]
    assert (race.laps[0].goal, race.laps[0].dense, race.laps[0].fast) == (0.92, 31.0, 11.0)
    assert (race.laps[0].dense_whole, race.laps[0].fast_whole) == (31.0, 16.0)
    assert race.to_goal is not None
    assert race.to_goal.median == pytest.approx(31 / 11)
    assert race.whole is not None
    assert race.whole.mean == pytest.approx(31 / 16)
    assert race_table([race]).rows[0][4:6] == ("5 of 5 seeds", "37 against 13")  # seed 2's


def test_the_same_loss_is_a_goal_of_its_own(tmp_path: Path) -> None:
    """Made-up losses fall with the step alone: both arms are there at their last."""
    write_race(tmp_path)
    race, _ = races(read_runs(tmp_path))
    assert (race.goal, race.sooner) == ("loss", "yes")
    assert (race.laps[0].goal, race.laps[0].dense, race.laps[0].fast) == (0.5, 31.0, 16.0)
    (section,) = sections(tmp_path, read_runs(tmp_path))
    assert [row[3] for row in section.table.rows] == ["loss", "accuracy"]


def test_vanilla_may_reach_its_goal_before_its_end(tmp_path: Path) -> None:
    write_race(tmp_path, dense=[(1.0, 0.1), (11.0, 0.93), (21.0, 0.9), (31.0, 0.92)])
    assert only(tmp_path).laps[0].dense == 11.0


def test_where_lower_is_better(tmp_path: Path) -> None:
    dense, fast = ([(seconds, 3 - value) for seconds, value in each] for each in (DENSE, FAST))
    write_race(tmp_path, dense, fast, name="bits per byte")
    race = only(tmp_path)
    assert race.laps[0].fast == 11.0
    assert race.sooner == "yes"


@pytest.mark.parametrize(
    ("fast", "seeds", "word"),
    [
        (FAST, 5, "yes"),
        (FAST, 4, "undecided"),
        ([(2 * seconds * 2, value) for seconds, value in FAST], 5, "no"),
        ([(seconds, min(value, 0.91)) for seconds, value in FAST], 5, "no"),
    ],
    ids=["sooner", "too few seeds", "later", "never"],
)
def test_the_verdict(fast: Curve, seeds: int, word: str, tmp_path: Path) -> None:
    write_race(tmp_path, fast=fast, seeds=seeds)
    assert only(tmp_path).sooner == word


def test_one_seed_that_never_gets_there_leaves_it_open(tmp_path: Path) -> None:
    write_race(tmp_path)
    late = [(seconds, min(value, 0.91)) for seconds, value in FAST]
    write_run(tmp_path, "best", 3, late, quality=0.9, accelerate=True, resumed_at=2)
    race = only(tmp_path)
    assert (race.laps[3].fast, race.sooner) == (None, "undecided")
    assert race_table([race]).rows[0][4] == "4 of 5 seeds"
    assert race.to_goal is not None
    assert race.to_goal.n == 4
    assert race.whole is not None
    assert race.whole.n == 5
    assert "Resumed on the way: seed 3." in race_table([race]).notes[0]


def test_goals_are_those_of_the_better_vanilla(tmp_path: Path) -> None:
    write_race(tmp_path)
    for seed in range(5):
        worse = [(seconds / 10, value - 0.2) for seconds, value in DENSE]
        write_run(tmp_path, "vanilla-no-1d-decay", seed, worse, quality=0.99)
    assert only(tmp_path).dense == "vanilla"


def test_records_without_a_clock_and_dense_arms_are_no_race(tmp_path: Path) -> None:
    write_race(tmp_path)
    for seed in range(5):
        write_run(tmp_path, "vanilla", seed, DENSE, quality=0.9, clock=False)
    assert races(read_runs(tmp_path)) == ()
    plain = write_task(tmp_path / "plain", ordinary())
    assert races(read_runs(plain)) == ()


@given(st.lists(st.floats(0.01, 100), min_size=2, max_size=8))
def test_a_factor_is_of_logarithms(ratios: list[float]) -> None:
    found = factor(ratios)
    assert found is not None
    logs = [math.log(each) for each in ratios]
    mean, n = statistics.fmean(logs), len(logs)
    half = student.ppf(0.975, n - 1) * statistics.stdev(logs) / math.sqrt(n)
    # sums of at most 8 logarithms below 5, and a t quantile of up to 12.7 on their spread
    assert math.log(found.mean) == pytest.approx(mean, abs=1e-9)
    assert found.low is not None
    assert found.high is not None
    assert math.log(found.low) == pytest.approx(mean - half, abs=1e-9)
    assert math.log(found.high) == pytest.approx(mean + half, abs=1e-9)
    assert found.median == statistics.median(ratios)


@pytest.mark.parametrize("dark", [False, True], ids=["light", "dark"])
def test_the_plot_is_drawn(dark: bool, tmp_path: Path) -> None:
    write_race(tmp_path)
    (section,) = sections(tmp_path, read_runs(tmp_path))
    drawn = section.picture.plot(*section.shown, dark)
    assert drawn is not None
    assert drawn.startswith(b"\x89PNG")


@pytest.mark.usefixtures("undrawn")
def test_a_race_beside_a_tasks_runs_is_on_both_pages(tmp_path: Path) -> None:
    place = write_task(tmp_path, ordinary())
    write_race(place / "race")
    html = write_report(place).read_text(encoding="utf-8")
    assert "best, accelerated, against dense vanilla" in html
    assert (place / "plots" / "race-best.png").read_bytes().startswith(b"\x89PNG")
    page = markdown_frontier(tmp_path)
    assert "(digits/plots/race-best.png)" in page
    assert "best accelerated: sooner than dense vanilla" in page
    alone = write_report(place / "race").read_text(encoding="utf-8")
    assert "5 of 5 seeds" in alone
    assert json.loads((place / "race" / "table.json").read_text())["task"] == "digits"

"""Which arm is sooner at the same validation quality, by the clock: dense against accelerated.

The goal of a seed is what the best vanilla's run of that seed ended with on the validation split,
in loss and, where that is another number, in quality: accuracy on a few thousand rows is the
noisier of the two, and both verdicts are told. Both arms are timed to their first validation that
is at least as good. So vanilla always gets there, at its end or sooner; with one goal for all
seeds, its mean, about half of its own runs would not. The clock is that of the records' ``eval``
lines: since training began, validations included. A resumed run's goes on from its checkpoint's:
the pause does not count, steps done twice count once.
"""

from __future__ import annotations

import statistics
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from actsparse_lab.analysis import plots
from actsparse_lab.analysis.comparison import Comparison
from actsparse_lab.analysis.effects import Arms
from actsparse_lab.analysis.intervals import Factor, factor
from actsparse_lab.analysis.numbers import NONE, decimal, ratio
from actsparse_lab.analysis.plots import Picture
from actsparse_lab.analysis.tables import Column, Table
from actsparse_lab.analysis.verdicts import fewest_seeds
from actsparse_lab.records import Entry, Run
from actsparse_lab.report.frontier import best_vanilla, higher_is_better

if TYPE_CHECKING:
    from matplotlib.axes import Axes


@dataclass(frozen=True)
class Lap:
    """One seed: seconds to the ``goal``, None where it was not reached, and in all."""

    seed: int
    goal: float
    dense: float
    fast: float | None
    dense_whole: float
    fast_whole: float
    resumed: bool


@dataclass(frozen=True)
class Race:
    """An accelerated arm against the best vanilla; ratios are dense seconds ÷ its own.

    ``to_goal`` is over the seeds in which it reached the goal, ``whole`` over all. ``sooner`` is
    "yes" where it reached every seed's goal and the interval of ``to_goal`` lies above 1, "no"
    where it lies below 1 or no seed reached it, else, and of fewer than 5 seeds, "undecided".
    """

    task: str
    goal: str  # "loss", or quality by its name
    dense: str
    fast: str
    laps: tuple[Lap, ...]
    to_goal: Factor | None
    whole: Factor | None
    sooner: str


def races(runs: Sequence[Run]) -> tuple[Race, ...]:
    """Each accelerated arm of a folder against its best vanilla; none where the clock is unknown.

    To the same validation loss, and to the same quality where higher is better: else it is a loss
    itself. An arm is accelerated where its config says ``accelerate``.
    """
    dense = Arms([run for run in runs if not _accelerated(run)])
    fast = Arms([run for run in runs if _accelerated(run)])
    best = best_vanilla(dense)
    if best is None:
        return ()
    keys = ("loss", "quality") if higher_is_better(list(dense[best].values())) else ("quality",)
    found = (
        _race(dense[best], own, best, name, key)
        for name, own in sorted(fast.items())
        for key in keys
    )
    return tuple(race for race in found if race is not None)


def _accelerated(run: Run) -> bool:
    return bool(run.header["config"].get("accelerate"))


def _race(
    dense: dict[int, Run], fast: dict[int, Run], best: str, name: str, key: str
) -> Race | None:
    pairs = [(dense[seed], fast[seed]) for seed in sorted(dense.keys() & fast.keys())]
    pairs = [pair for pair in pairs if all(map(_clocked, pair))]
    if not pairs:
        return None
    first = pairs[0][0]
    assert first.result is not None
    higher = key == "quality" and higher_is_better([first])
    laps = tuple(_lap(own, other, key, higher) for own, other in pairs)
    to_goal = factor(lap.dense / lap.fast for lap in laps if lap.fast is not None)
    return Race(
        task=first.task,
        goal=key if key == "loss" else first.result["quality_name"],
        dense=best,
        fast=name,
        laps=laps,
        to_goal=to_goal,
        whole=factor(lap.dense_whole / lap.fast_whole for lap in laps),
        sooner=_sooner(laps, to_goal),
    )


def _sooner(laps: Sequence[Lap], to_goal: Factor | None) -> str:
    reached = [lap.fast is not None for lap in laps]
    if len(laps) < fewest_seeds():
        return "undecided"
    if to_goal is None or (to_goal.high is not None and to_goal.high < 1):
        return "no"
    return "yes" if all(reached) and to_goal.low is not None and to_goal.low > 1 else "undecided"


def _clocked(run: Run) -> bool:
    return bool(run.evals) and all("time" in entry for entry in run.evals)


def _seconds(entry: Entry) -> float:
    return float(entry["time"]["seconds"])


def _lap(dense: Run, fast: Run, key: str, higher: bool) -> Lap:
    goal = float(dense.evals[-1][key])

    def first(run: Run) -> float | None:
        for entry in run.evals:
            if entry[key] >= goal if higher else entry[key] <= goal:
                return _seconds(entry)
        return None

    reached = first(dense)
    assert reached is not None  # by its last validation
    return Lap(
        seed=dense.seed,
        goal=goal,
        dense=reached,
        fast=first(fast),
        dense_whole=_seconds(dense.evals[-1]),
        fast_whole=_seconds(fast.evals[-1]),
        resumed=any(
            run.result is not None and run.result["time"].get("resumed_at") is not None
            for run in (dense, fast)
        ),
    )


# -- in words, and to look at ------------------------------------------------------------------

COLUMNS = tuple(map(Column, (
    "task", "dense", "accelerated", "same validation", "goal reached", "seconds to the goal",
    "dense ÷ accelerated", "whole training", "sooner?",
)))  # fmt: skip


def race_table(several: Sequence[Race]) -> Table:
    """A row for each of some races of one accelerated arm."""
    rows = tuple(map(_row, several))
    return Table(
        f"race-{several[0].fast}-table", _title(several[0]), COLUMNS, rows, (_note(several[0]),)
    )


def _title(race: Race) -> str:
    return f"{race.fast}, accelerated, against dense {race.dense}"


def _row(race: Race) -> tuple[str, ...]:
    reached = [(lap.dense, lap.fast) for lap in race.laps if lap.fast is not None]
    seconds = [decimal(statistics.median(each), 0) for each in zip(*reached, strict=True)]
    return (
        race.task,
        race.dense,
        race.fast,
        race.goal,
        f"{len(reached)} of {len(race.laps)} seeds",
        " against ".join(seconds) or NONE,
        ratio(race.to_goal),
        ratio(race.whole),
        race.sooner,
    )


def race_text(race: Race) -> str:
    """What came of it, in one line."""
    word = {"yes": "sooner", "no": "not sooner"}.get(race.sooner, "undecided whether sooner")
    reached = sum(lap.fast is not None for lap in race.laps)
    said = f"{race.task}, {race.fast} accelerated: {word} than dense {race.dense} at the same "
    said += f"validation {race.goal}, reached in {reached} of {len(race.laps)} seeds"
    return said + (f", there {ratio(race.to_goal)} times as fast." if reached else ".")


def _note(race: Race) -> str:
    """How to read a race's row and picture."""
    resumed = [str(lap.seed) for lap in race.laps if lap.resumed]
    said = (
        f"Goal of a seed: what {race.dense} ended with on validation rows. "
        f"Seconds since training began, validations included, medians over seeds; ratios: their "
        f"median, in brackets the 95 % interval of the geometric mean over paired seeds."
    )
    return said + (f" Resumed on the way: seed {', '.join(resumed)}." if resumed else "")


def race_plot(
    race: Race, table: Comparison, runs: Sequence[Run], dark: bool = False
) -> bytes | None:
    """Validation loss and quality over wall-clock seconds: a line a seed, thick for the mean.

    ``table`` gives arms their colours. The mean is of seconds and values at the same step. Dotted
    lines are the means of the goals.
    """
    shown = [run for run in runs if run.arm in (race.dense, race.fast) and _clocked(run)]
    seeds = {lap.seed for lap in race.laps}
    shown = [run for run in shown if run.seed in seeds]
    figure, (above, below) = plots.new_figure(dark, rows=2, size=(plots.WIDTH, 1.5 * plots.HEIGHT))
    for axes, key in ((above, "loss"), (below, "quality")):
        ends = [run.evals[-1][key] for run in shown if run.arm == race.dense]
        axes.axhline(statistics.fmean(ends), color=plots.INK[dark], linestyle=":", linewidth=1.2)
        for name, style in plots.styles(table, dark):
            _curves(axes, [run for run in shown if run.arm == name], key, name, style)
    plots.log_axis(above, "y", few=True)
    below.sharex(above)
    above.tick_params(labelbottom=False)
    above.set_ylabel("validation loss")
    below.set_ylabel(f"validation {table.quality_name}")
    below.set_xlabel("seconds since training began")
    return plots.png(figure, table)


def _curves(axes: Axes, runs: list[Run], key: str, name: str, style: dict[str, Any]) -> None:
    line = {"color": style["color"], "linestyle": style["linestyle"]}
    by_step: dict[int, list[tuple[float, float]]] = {}
    for run in runs:
        points = [(_seconds(entry), float(entry[key])) for entry in run.evals]
        axes.plot(*zip(*points, strict=True), **line, alpha=0.3, linewidth=1)
        for entry, point in zip(run.evals, points, strict=True):
            by_step.setdefault(entry["step"], []).append(point)
    means = [
        tuple(statistics.fmean(column) for column in zip(*points, strict=True))
        for points in by_step.values()
        if len(points) == len(runs)
    ]
    if means:
        axes.plot(*zip(*means, strict=True), **line, linewidth=2.4, label=name)


def race_picture(race: Race) -> Picture:
    """The plot with its words."""
    return Picture(
        f"race-{race.fast}",
        race_plot,
        "Validation over wall-clock time",
        "Thick: mean over seeds at a step; thin: each seed; dotted: the means of the goals.",
    )

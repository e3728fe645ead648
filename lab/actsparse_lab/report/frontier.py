"""The frontier's numbers and rules: which arm is sparsest at the best vanilla's quality?

A folder of frontier tasks has one folder for each, with ``frontier.json``, ``runs/`` and where
speed was measured ``speed.json``; `board` reads one of them, from records alone.

Every rule has three outcomes. An interval is a 95 % t-interval over seeds; changes and improvements
are paired, seed by seed, with the *best vanilla*: of the two, with weight decay on norms and biases
or without, the one with the better mean quality on validation rows when training ended. All other
numbers are of the test split. "yes" where the interval lies wholly on the right side of the bar,
"no" where it lies wholly on the other, else "undecided"; and undecided wherever fewer than 5 seeds,
or fewer than were planned, have the number: those left would be a choice.

Each arm is judged by itself. Of many arms that are exactly at a bar, one in forty passes by chance.
"""

from __future__ import annotations

import statistics
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from actsparse_lab.analysis.comparison import (
    CONTROL,
    HALF,
    REFERENCE,
    SUBJECT,
    VANILLAS,
    WHOLE,
    Arm,
    arm_of,
)
from actsparse_lab.analysis.effects import (
    QUALITY,
    Arms,
    difference,
    paired,
    within,
)  # fmt: skip
from actsparse_lab.analysis.intervals import Estimate, t_interval
from actsparse_lab.analysis.manifest import FRONTIER
from actsparse_lab.analysis.verdicts import Word, beyond, every, fewest_seeds, margin
from actsparse_lab.records import Entry, Run, read_runs
from actsparse_lab.report.speed import Speed, read_speeds

# A task is at the knee where the second half of the training, with a schedule of its own for either
# length, brings less than so many of those margins: 1.5 points, or 5 % of the loss. Not 1: curves
# of language models never get there. On the steep part of a curve it brings several times that.
KNEE = 5
SPARSE = 0.03  # target (a): both densities, within noise
FEWER = 0.6  # target (b): relative improvement of both over the best vanilla


@dataclass(frozen=True)
class Row(Arm):
    """An arm against the best vanilla; None where it has no such number (none there, or itself).

    ``validation_change`` is of quality in its own unit. ``sparse`` is target (a), ``fewer`` target
    (b).
    """

    validation: Estimate | None = None
    validation_change: Estimate | None = None
    within_noise: Word | None = None
    validation_within: Word | None = None
    sparse: Word | None = None
    fewer: Word | None = None
    speed: Speed | None = None


@dataclass(frozen=True)
class PapersClaim:
    """`SUBJECT` against the papers' own vanilla, `REFERENCE`, whose norms and biases decay, too.

    The claim is of arXiv 2605.25612: at least 36 % fewer active units in inference and 50 % in
    training. ``kept``: quality is within noise. ``holds`` where all three do.
    """

    inference: Estimate | None
    training: Estimate | None
    change: Estimate | None
    fewer_inference: Word
    fewer_training: Word
    kept: Word

    @property
    def holds(self) -> Word:
        """ "yes" where all three do."""
        return every(self.fewer_inference, self.fewer_training, self.kept)


@dataclass(frozen=True)
class Board:
    """A frontier task. ``rows`` go from dense to sparse, the control without MLPs last.

    ``margin`` is the loss of quality that is still within noise, in quality's own unit; ``knee``
    the gain in test quality from half of the steps to all, and ``at_knee`` whether it is below
    `KNEE` margins; ``needs_mlps`` whether the control is worse by more than the margin; ``counts``
    whether both hold. ``chosen``: of the arms within noise on *validation* rows the one sparsest
    there; the test split has no say in the choice.
    """

    task: str
    command: str
    seeds: int
    quality_name: str
    higher_is_better: bool
    best: str | None
    margin: float | None
    knee: Estimate | None
    at_knee: Word
    needs_mlps: Word
    counts: Word
    chosen: str | None
    rows: tuple[Row, ...]
    claim: PapersClaim | None = None  # None without the papers' recipe or their vanilla

    @property
    def few(self) -> bool:
        """Whether the seeds are too few to decide anything."""
        return self.seeds < fewest_seeds()

    def row(self, arm: str | None) -> Row | None:
        """The row of an arm, None where there is none."""
        return next((row for row in self.rows if row.name == arm), None)


def frontiers_in(folder: str | Path) -> list[Path]:
    """The folders of frontier tasks: ``folder`` itself, or those in it; in the order of names."""
    if (Path(folder) / FRONTIER.file).is_file():
        return [Path(folder)]
    return [path.parent for path in sorted(Path(folder).glob(f"*/{FRONTIER.file}"))]


def board(folder: str | Path, runs: Sequence[Run] | None = None) -> Board | None:
    """The judgement of one frontier task; None for a folder that is none, or has no finished run.

    Raises `RecordError` for a broken manifest, ``speed.json`` or record.
    """
    manifest = FRONTIER.read(folder)
    runs = read_runs(folder) if runs is None else runs
    first = next((run.result for run in runs if run.result is not None), None)
    if manifest is None or first is None:
        return None
    arms, higher, planned = Arms(runs), higher_is_better(runs), int(manifest["seeds"])
    best = best_vanilla(arms)
    loss, early = (
        None if best is None else margin(first["quality_name"], within(arms, best, read).values())
        for read in (QUALITY, _validation)
    )
    speeds = read_speeds(folder)
    judged = _Judge(arms, best, loss, early, higher, planned)
    names = dict.fromkeys(run.arm for run in runs)
    measured = (arm_of(each, [r for r in runs if r.arm == each], arms, best) for each in names)
    rows = [judged.row(arm, speeds.get(arm.name)) for arm in measured]
    rows.sort(key=lambda row: (not row.inference_density, -_mean(row.inference_density), row.name))
    gain = judged.gain(paired(arms, WHOLE, HALF, QUALITY, difference))
    bar = None if loss is None else -KNEE * loss
    at_knee = beyond(gain and -gain, bar, planned)
    without = next((row.within_noise for row in rows if row.name == CONTROL), None)
    opposite: dict[Word | None, Word] = {"yes": "no", "no": "yes"}
    needs_mlps = opposite.get(without, "undecided")
    return Board(
        task=manifest["task"],
        command=manifest["command"],
        seeds=planned,
        quality_name=first["quality_name"],
        higher_is_better=higher,
        best=best,
        margin=loss,
        knee=gain,
        at_knee=at_knee,
        needs_mlps=needs_mlps,
        counts=every(at_knee, needs_mlps),
        chosen=_chosen(arms, rows, best),
        rows=tuple(rows),
        claim=_papers_claim(runs, arms, first["quality_name"], judged),
    )


def final(run: Run) -> Entry | None:
    """A finished run's last validation."""
    return run.evals[-1] if run.finished and run.evals else None


def best_vanilla(arms: Arms) -> str | None:
    """The one of `VANILLAS` with the better mean quality at the last validation; None for none.

    Over the seeds that both have, where there are some.
    """
    ends = {
        name: {seed: end for seed, run in arms[name].items() if (end := final(run)) is not None}
        for name in VANILLAS
    }
    ends = {name: each for name, each in ends.items() if each}
    if not ends:
        return None
    shared = set.intersection(*(set(each) for each in ends.values()))
    higher = higher_is_better([run for name in ends for run in arms[name].values()])

    def mean(name: str) -> float:
        seeds = shared or set(ends[name])
        quality = statistics.fmean(ends[name][seed]["quality"] for seed in seeds)
        return quality if higher else -quality

    return max(ends, key=mean)


def higher_is_better(runs: Sequence[Run]) -> bool:
    """Which way quality goes, as the first finished run says."""
    return next((bool(run.result["higher_is_better"]) for run in runs if run.result), True)


# -- one arm -----------------------------------------------------------------------------------


def _validation(run: Run) -> float | None:
    end = final(run)
    return None if end is None else float(end["quality"])


@dataclass(frozen=True)
class _Judge:
    arms: Arms
    best: str | None
    margin: float | None
    validation_margin: float | None
    higher: bool
    planned: int

    def row(self, arm: Arm, speed: Speed | None) -> Row:
        rival = self.best not in (None, arm.name)
        effects = paired(self.arms, arm.name, self.best or "", _validation, difference)
        on_validation = t_interval(effects.values()) if rival else None
        noise, validation_noise = (
            beyond(self.turn(found), loss and -loss, self.planned) if rival else None
            for found, loss in ((arm.change, self.margin), (on_validation, self.validation_margin))
        )
        densities = (arm.inference_density, arm.training_density)
        reduced = (arm.inference_improvement, arm.training_improvement)
        words = [beyond(found and -found, -SPARSE, self.planned) for found in densities]
        dense = arm.inference_density is None or not rival
        return Row(
            **vars(arm),
            validation=t_interval(within(self.arms, arm.name, _validation).values()),
            validation_change=on_validation,
            within_noise=noise,
            validation_within=validation_noise,
            sparse=None if dense or noise is None else every(*words, noise),
            fewer=None if dense else every(*(beyond(f, FEWER, self.planned) for f in reduced)),
            speed=speed,
        )

    def turn(self, change: Estimate | None) -> Estimate | None:
        """A change of quality such that more is better."""
        return change if self.higher or change is None else -change

    def gain(self, effects: dict[int, float]) -> Estimate | None:
        """The same of effects by seed."""
        return self.turn(t_interval(effects.values()))


def _papers_claim(
    runs: Sequence[Run], arms: Arms, quality_name: str, judged: _Judge
) -> PapersClaim | None:
    if not (arms[SUBJECT] and arms[REFERENCE]):
        return None
    own = [run for run in runs if run.arm == SUBJECT]
    found, planned = arm_of(SUBJECT, own, arms, REFERENCE), judged.planned
    loss = margin(quality_name, within(arms, REFERENCE, QUALITY).values())
    return PapersClaim(
        inference=found.inference_improvement,
        training=found.training_improvement,
        change=found.change,
        fewer_inference=beyond(found.inference_improvement, 0.36, planned),
        fewer_training=beyond(found.training_improvement, 0.5, planned),
        kept=beyond(judged.turn(found.change), loss and -loss, planned),
    )


def _mean(found: Estimate | None) -> float:
    return 0.0 if found is None else found.mean


def _chosen(arms: Arms, rows: Sequence[Row], best: str | None) -> str | None:
    """Sparsest on validation rows of the arms that are within noise there, if sparser than best."""
    densities = {}
    for row in rows:
        ends = [end for run in arms[row.name].values() if (end := final(run)) is not None]
        seen = [end["measures"]["density"] for end in ends if end["measures"]]
        if seen and (row.name == best or row.validation_within == "yes"):
            densities[row.name] = sum(seen) / len(seen)
    bar = densities.get(best or "", 0.0)
    densities = {
        arm: each for arm, each in densities.items() if arm not in (*VANILLAS, HALF) and each < bar
    }
    return min(densities, key=lambda arm: densities[arm], default=None)

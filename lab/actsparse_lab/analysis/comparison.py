"""From runs to a table of arms: means over seeds, 95 % t-intervals, paired with the reference."""

from __future__ import annotations

import dataclasses
import json
import math
from collections import Counter, defaultdict
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

from actsparse_lab.analysis.effects import (
    BIGRAM,
    INFERENCE,
    LIVING,
    LOSS,
    QUALITY,
    TRAINING,
    Arms,
    Reader,
    dead_share,
    difference,
    fewer,
    of_result,
    paired,
    within,
)  # fmt: skip
from actsparse_lab.analysis.intervals import Estimate, t_interval
from actsparse_lab.analysis.verdicts import margin, quality_verdict
from actsparse_lab.records import Entry, RecordError, Run

REFERENCE = "vanilla"
CONTROL = "no-mlp"  # does the task need its MLPs at all?
SUBJECT = "paper"  # arms whose names begin so are what is tested, not baselines
BEST = "best"  # the recipe that ships: no simple baseline
VANILLAS = (REFERENCE, "vanilla-no-1d-decay")  # the better of them is what recipes are held to
HALF, WHOLE = "half-steps", "vanilla-no-1d-decay"  # WHOLE over half its steps: is it at the knee?
# arms trained for half as many steps as another, each with a schedule of its own
HALVES = {HALF: WHOLE, "best-half-steps": BEST, "paper-half-steps": SUBJECT}
UNDERTRAINED = 0.01  # relative fall of the validation loss over the last fifth of the steps


@dataclass(frozen=True)
class Arm:
    """One row. None where not measured or not applicable (an arm without MLPs, no reference).

    ``change`` and the improvements are paired: seed by seed against the reference, seeds both have.
    ``verdict`` on quality is `verdicts.quality_verdict`, of a `Comparison` alone.
    """

    name: str
    seeds: tuple[int, ...]  # of the finished runs
    failed: int
    unfinished: int
    step: int | None
    loss: Estimate | None = None
    quality: Estimate | None = None
    change: Estimate | None = None  # quality minus the reference's, in quality's own unit
    verdict: str | None = None
    inference_density: Estimate | None = None
    training_density: Estimate | None = None
    inference_improvement: Estimate | None = None  # relative: 0.3 is 30 % fewer active units
    training_improvement: Estimate | None = None
    living_improvement: Estimate | None = None  # of inference, among units that are not dead
    dead_share: Estimate | None = None
    living_density: Estimate | None = None
    skippable_forward: Estimate | None = None  # share of the multiplications
    skippable_backward: Estimate | None = None
    loss_drop: Estimate | None = None  # relative, over the last fifth of the steps
    undertrained: bool | None = None
    beats_bigram: bool | None = None
    before_quality: Estimate | None = None  # on the test split, where finetuning began
    before_density: Estimate | None = None


@dataclass(frozen=True)
class Comparison:
    """All arms of one task: the reference first, then from dense to sparse.

    ``needs_mlps`` is what the control without MLPs says, None where it cannot tell.
    ``subject`` is the arm under test; ``baseline`` the sparsest of the others without clear loss of
    quality; ``baseline_gain`` its relative improvement over the subject, negative if it is denser.
    """

    task: str
    quality_name: str | None
    higher_is_better: bool
    arms: tuple[Arm, ...]
    reference: str = REFERENCE
    control: str = CONTROL
    needs_mlps: bool | None = None
    subject: str | None = None
    baseline: str | None = None
    baseline_gain: Estimate | None = None

    def arm(self, name: str | None) -> Arm | None:
        """The row of that name, None where there is none."""
        return next((arm for arm in self.arms if arm.name == name), None)


def compare(runs: list[Run]) -> Comparison:
    """The table of a directory's runs; failed and unfinished ones are counted, never dropped.

    Raises `RecordError` for no runs, runs of two tasks, two measures of quality, or one seed twice.
    """
    if not runs:
        raise RecordError("no runs to compare; make some with `actsparse compare`")
    task = _same([run.header for run in runs], "tasks", "task")
    results = [run.result for run in runs if run.result is not None]
    quality_name = _same(results, "measures of quality", "quality_name")
    data = [entry["data"] for entry in results if "sha256" in (entry.get("data") or {})]
    _same(data, "versions of the data (Python's own text changes with its version)", "sha256")
    higher = _same(results, "directions of quality", "higher_is_better") is not False
    (arm, seed), times = Counter((run.arm, run.seed) for run in runs).most_common(1)[0]
    if times > 1:
        raise RecordError(f"arm {arm!r} has {times} records of seed {seed}; keep one of them")

    by_arm: dict[str, list[Run]] = defaultdict(list)
    for run in runs:
        by_arm[run.arm].append(run)
    found = Arms(runs)
    loss = margin(quality_name or "", within(found, REFERENCE, QUALITY).values()) or 0.0
    judge = partial(quality_verdict, loss=loss, higher=higher)
    rows = (arm_of(name, own, found, REFERENCE) for name, own in by_arm.items())
    judged = (dataclasses.replace(arm, verdict=judge(arm.change)) for arm in rows)
    arms = sorted(judged, key=_reading_order)
    table = Comparison(task, quality_name, higher, tuple(arms))

    control = table.arm(CONTROL)
    needs_mlps = None
    if control is not None and control.verdict in ("better", "kept", "lower"):
        needs_mlps = control.verdict == "lower"
    subject = _subject(arms)
    baseline = _strongest_baseline(arms, subject, higher)
    gain = None
    if subject is not None and baseline is not None:
        gain = t_interval(paired(found, baseline, subject, INFERENCE, fewer).values())
    return dataclasses.replace(
        table, needs_mlps=needs_mlps, subject=subject, baseline=baseline, baseline_gain=gain
    )


def to_json(table: Any) -> str:
    """The table, or the `Theory`, as JSON text; an interval is ``{"mean", "low", "high", "n"}``."""
    return json.dumps(plain(table), indent=2, allow_nan=False)


def plain(value: Any) -> Any:
    """What `to_json` writes, as plain values."""
    if isinstance(value, Estimate):
        return {"mean": value.mean, "low": value.low, "high": value.high, "n": value.n}
    if dataclasses.is_dataclass(value):
        fields = dataclasses.fields(value)
        return {field.name: plain(getattr(value, field.name)) for field in fields}
    if isinstance(value, dict):
        return {key: plain(each) for key, each in value.items()}
    return [plain(each) for each in value] if isinstance(value, tuple) else value


def loss_drop(run: Run) -> float | None:
    """Relative fall of the validation loss over the last fifth of the steps.

    From the last validation at or before four fifths of the steps, unless that lies before three
    fifths: then there are too few of them to tell, and the answer is None.
    """
    losses = {entry["step"]: float(entry["loss"]) for entry in run.evals}
    last = max(losses, default=0)
    before = [step for step in losses if 0.6 * last <= step <= 0.8 * last and step < last]
    if not before or losses[max(before)] <= 0:
        return None
    start = losses[max(before)]
    return (start - losses[last]) / start


def arm_of(name: str, runs: Sequence[Run], arms: Arms, reference: str | None) -> Arm:
    """The row of an arm, whose ``runs`` these are, against another of ``arms``."""
    done = list(arms[name].values())

    def over_seeds(read: Reader) -> Estimate | None:
        return t_interval(map(read, done))

    def against(read: Reader, combine: Callable[[float, float], float | None]) -> Estimate | None:
        if reference in (None, name):
            return None
        return t_interval(paired(arms, name, reference, read, combine).values())

    loss, bigram = over_seeds(LOSS), over_seeds(BIGRAM)
    return Arm(
        name=name,
        seeds=tuple(sorted(run.seed for run in done)),
        failed=sum(run.failed is not None for run in runs if not run.finished),
        unfinished=sum(run.failed is None for run in runs if not run.finished),
        step=max((run.result["step"] for run in done if run.result), default=None),
        loss=loss,
        quality=over_seeds(QUALITY),
        change=against(QUALITY, difference),
        inference_density=over_seeds(INFERENCE),
        training_density=over_seeds(TRAINING),
        inference_improvement=against(INFERENCE, fewer),
        training_improvement=against(TRAINING, fewer),
        living_improvement=against(LIVING, fewer),
        dead_share=over_seeds(dead_share),
        living_density=over_seeds(LIVING),
        skippable_forward=over_seeds(of_result("skippable", "forward")),
        skippable_backward=over_seeds(of_result("skippable", "backward")),
        loss_drop=over_seeds(loss_drop),
        undertrained=_undertrained([drop for run in done if (drop := loss_drop(run)) is not None]),
        beats_bigram=None if bigram is None or loss is None else loss.mean < bigram.mean,
        before_quality=over_seeds(of_result("before", "quality")),
        before_density=over_seeds(of_result("before", "inference", "density")),
    )


def _undertrained(drops: list[float]) -> bool | None:
    if not drops:
        return None
    return math.fsum(drops) / len(drops) > UNDERTRAINED and min(drops) > 0


def _reading_order(arm: Arm) -> tuple[bool, bool, float, str]:
    density = -1.0 if arm.inference_density is None else arm.inference_density.mean
    return (arm.name != REFERENCE, density < 0, -density, arm.name)


def _subject(arms: list[Arm]) -> str | None:
    """The paper's arm where there is one, else the sparsest."""
    rivals = [arm for arm in arms if arm.name not in (REFERENCE, CONTROL) and arm.inference_density]
    named = [arm for arm in rivals if arm.name in (SUBJECT, f"{SUBJECT}-finetune")]
    return (named or rivals)[-1].name if rivals else None  # arms come from dense to sparse


def _strongest_baseline(arms: list[Arm], subject: str | None, higher: bool) -> str | None:
    def keeps_quality(arm: Arm) -> bool:
        if arm.verdict == "one seed" and arm.change is not None:
            return (arm.change.mean >= 0) if higher else (arm.change.mean <= 0)
        return arm.verdict in ("better", "kept")

    rivals = [
        arm.name
        for arm in arms
        if arm.name not in (REFERENCE, CONTROL, BEST, subject)
        and not arm.name.startswith(SUBJECT)
        and arm.inference_density is not None
        and keeps_quality(arm)
    ]
    return rivals[-1] if rivals else None


def _same(entries: list[Entry], what: str, field: str) -> Any:
    """What all entries have in a field; None for no entries."""
    values = [entry[field] for entry in entries]
    seen = sorted((v for at, v in enumerate(values) if v not in values[:at]), key=str)
    if len(seen) > 1:
        names = " and ".join(str(value) for value in seen)
        raise RecordError(
            f"the runs have {len(seen)} {what}: {names}; compare one at a time, in a folder each"
        )
    return seen[0] if seen else None

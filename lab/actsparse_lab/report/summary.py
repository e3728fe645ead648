"""What a comparison says, in plain words: title, lead, remarks and the large numbers."""

from __future__ import annotations

from actsparse_lab.analysis.comparison import Arm, Comparison
from actsparse_lab.analysis.intervals import Estimate
from actsparse_lab.analysis.numbers import change, counted, decimal, percent


def title(table: Comparison) -> str:
    """The finding in one line.

    >>> title(Comparison("digits", "accuracy", True, arms=()))
    'digits: no finished runs to compare yet'
    """
    arm = table.arm(table.subject)
    if arm is None:
        some = any(each.seeds for each in table.arms)
        return f"{table.task}: no {'pair of arms' if some else 'finished runs'} to compare yet"
    fewer = arm.inference_improvement
    if fewer is None:
        return f"{arm.name}: no finished {table.reference} run of the same seed to compare with"
    name = table.quality_name or "quality"
    if fewer.half is None:
        return f"{arm.name}: {_fewer_text(fewer.mean)} than {table.reference}, in one seed"
    clear = fewer.half < abs(fewer.mean)
    first = _fewer_text(fewer.mean) if clear else "no clear change in active neurons"
    ending = {
        "better": f"at better {name}",
        "kept": f"at {name} that is kept",
        "unclear": f"{name} unclear at so few seeds",
        "lower": f"but at clearly worse {name}",
    }.get(arm.verdict or "", "")
    return f"{arm.name}: {first} {'than' if clear else 'against'} {table.reference}, {ending}"


def lead(table: Comparison) -> str:
    """The sentence under the title: the numbers the title rests on."""
    arm, base = table.arm(table.subject), table.arm(table.reference)
    if arm is None or base is None or base.inference_density is None or arm.change is None:
        return f"{counted(len(table.arms), 'arm')} on {table.task}."
    return (
        f"On {table.task}, {percent(arm.inference_density)} of the hidden units are active on "
        f"held-out data, against {percent(base.inference_density)} in {base.name}; while "
        f"training {percent(arm.training_density)} against "
        f"{percent(base.training_density)}. {(table.quality_name or 'quality').capitalize()} "
        f"changes by {change(table.quality_name, arm.change)} "
        f"({counted(arm.change.n, 'paired seed')})."
    )


def remarks(table: Comparison, rivals: bool = True) -> list[str]:
    """What a reader must know before believing the title; ``rivals``: about baselines too."""
    said = []
    if table.needs_mlps is False:
        said.append(
            f"This task does not need its MLPs: density here proves little. The control "
            f"{table.control} is not clearly worse than {table.reference}."
        )
    elif table.needs_mlps is None:
        control = table.arm(table.control)
        why = "was not run"
        if control is not None:
            unclear = control.verdict == "unclear"
            why = "is neither clearly worse nor as good" if unclear else "has too few seeds"
        said.append(
            f"Whether this task needs its MLPs is not known: the control without them "
            f"({table.control}) {why}."
        )
    baseline, gain = table.arm(table.baseline), table.baseline_gain
    if not rivals:
        pass
    elif table.subject is not None and baseline is None:
        said.append("No simple baseline is known to keep its quality here, or none was run.")
    elif baseline is not None:
        density = decimal(baseline.inference_density)
        dead = baseline.dead_share.mean if baseline.dead_share else 0
        said.append(
            f"Strongest simple baseline that keeps its quality: {baseline.name}, density "
            f"{density}, {percent(dead, 0)} of its units dead{_beside(table.subject, gain)}."
        )
    late = [arm.name for arm in table.arms if arm.undertrained]
    if late:
        said.append(f"Still learning when stopped, so not a final answer: {', '.join(late)}.")
    lost = [arm for arm in table.arms if arm.failed or arm.unfinished]
    if lost:
        each = (f"{arm.name} ({', '.join(_lost(arm))})" for arm in lost)
        said.append(f"Not in the numbers: {'; '.join(each)}.")
    worse = [arm.name for arm in table.arms if arm.beats_bigram is False]
    if worse:
        said.append(f"No better than counting pairs of bytes (bigram): {', '.join(worse)}.")
    steps = {arm.step for arm in table.arms if arm.step is not None}
    if len(steps) > 1:
        said.append(
            f"The arms ran for different numbers of steps ({', '.join(map(str, sorted(steps)))}), "
            f"so they do not compare like with like."
        )
    if any(len(arm.seeds) == 1 for arm in table.arms):
        said.append("One seed gives no interval: those rows are leads, not results.")
    return said


def _beside(subject: str | None, gain: Estimate | None) -> str:
    if gain is None:
        return f"; it shares no seed with {subject}"
    if gain.half is not None and gain.half >= abs(gain.mean):
        return f"; its density is not clearly other than that of {subject}"
    return f"; it has {_fewer_text(gain.mean)} than {subject}"


def marks(arm: Arm) -> list[str]:
    """The labels on a row."""
    return [*(["undertrained"] if arm.undertrained else []), *_lost(arm)]


def tiles(table: Comparison) -> list[tuple[str, str]]:
    """A few large numbers of the arm under test: number, what it counts."""
    arm = table.arm(table.subject)
    if arm is None:
        return []
    found = [
        (arm.inference_improvement, "fewer active neurons, inference"),
        (arm.training_improvement, "fewer active neurons, training"),
        (arm.skippable_forward, "of forward multiplications skippable"),
        (arm.skippable_backward, "of backward multiplications skippable"),
    ]
    return [(percent(value, 0), what) for value, what in found if value is not None]


def _fewer_text(share: float) -> str:
    return f"{percent(abs(share), 0)} {'fewer' if share >= 0 else 'more'} active neurons"


def _lost(arm: Arm) -> list[str]:
    counts = ((arm.failed, "failed"), (arm.unfinished, "unfinished"))
    return [f"{count} {what}" for count, what in counts if count]

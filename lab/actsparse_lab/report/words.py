"""What a table says, in plain words, and its numbers as text."""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable
from typing import Any

from actsparse.values import printable
from actsparse_lab.records import Entry, Run
from actsparse_lab.report.comparison import Arm, Estimate, Table, t_interval
from actsparse_lab.report.measures import Drawn, Identity, Measured, Theory, number, read_measures

NONE = "–"
ROUNDING = 2**-8  # bfloat16 rounds by up to 2⁻⁹, a square by twice that
_RAISED = str.maketrans("-0123456789", "⁻⁰¹²³⁴⁵⁶⁷⁸⁹")


def title(table: Table) -> str:
    """The finding in one line.

    >>> title(Table("digits", "accuracy", True, arms=()))
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
        return f"{arm.name}: {_share_fewer(fewer.mean)} than {table.reference}, in one seed"
    clear = fewer.half < abs(fewer.mean)
    first = _share_fewer(fewer.mean) if clear else "no clear change in active neurons"
    ending = {
        "better": f"at better {name}",
        "kept": f"at {name} that is kept",
        "unclear": f"{name} unclear at so few seeds",
        "lower": f"but at clearly worse {name}",
    }.get(arm.verdict or "", "")
    return f"{arm.name}: {first} {'than' if clear else 'against'} {table.reference}, {ending}"


def lead(table: Table) -> str:
    """The sentence under the title: the numbers the title rests on."""
    arm, base = table.arm(table.subject), table.arm(table.reference)
    if arm is None or base is None or base.inference_density is None or arm.change is None:
        return f"{counted(len(table.arms), 'arm')} on {table.task}."
    return (
        f"On {table.task}, {percent_text(arm.inference_density)} of the hidden units are active on "
        f"held-out data, against {percent_text(base.inference_density)} in {base.name}; while "
        f"training {percent_text(arm.training_density)} against "
        f"{percent_text(base.training_density)}. {(table.quality_name or 'quality').capitalize()} "
        f"changes by {change_text(table, arm.change)} ({counted(arm.change.n, 'paired seed')})."
    )


def remarks(table: Table, rivals: bool = True) -> list[str]:
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
        density = density_text(baseline.inference_density)
        dead = baseline.dead_share.mean if baseline.dead_share else 0
        said.append(
            f"Strongest simple baseline that keeps its quality: {baseline.name}, density "
            f"{density}, {_percent(dead)} of its units dead{_beside(table.subject, gain)}."
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
    return f"; it has {_share_fewer(gain.mean)} than {subject}"


def marks(arm: Arm) -> list[str]:
    """The labels on a row."""
    return [*(["undertrained"] if arm.undertrained else []), *_lost(arm)]


def tiles(table: Table) -> list[tuple[str, str]]:
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
    return [(_large(value), what) for value, what in found if value is not None]


def _large(share: Estimate) -> str:
    if share.half is None:
        return _percent(share.mean)
    return f"{_minus(f'{100 * share.mean:.0f}')} ± {100 * share.half:.0f} %"


def identity_text(identity: Identity) -> str:
    """How far the identity held, and whether rounding explains it."""
    said = (
        f"The two sides are measured apart. Over {identity.count} pairs, in all lines and blocks "
        f"of all runs, they differ by at most {amount(identity.gap)} of the density "
        f"({identity.where})."
    )
    if identity.gap > ROUNDING:
        said += (
            " That is more than rounding: the two have not seen the same passes, or one is wrong."
        )
    if identity.skipped:
        said += (
            f" {identity.skipped} more are not compared: gradients that were not finite are left "
            f"out of AF, and their passes not of density."
        )
    return said


def curvature_table(theory: Theory) -> tuple[list[str], list[tuple[str, list[list[str]]]]]:
    """Heads, and for each arm with any number its name and cells, of lines of text."""
    columns: list[tuple[str, Callable[[Measured], Drawn | Estimate | None]]] = [
        ("Gauss–Newton trace", lambda arm: arm.gauss_newton),
        ("Hessian trace", lambda arm: arm.hessian),
        ("token-copied trace", lambda arm: arm.token_copies),
        ("AF of all MLP layers", lambda arm: arm.flatness),
        ("largest eigenvalue", lambda arm: arm.top_eigenvalue),
    ]
    arms = [arm for arm in theory.arms if arm.curved]
    shown = [(head, read) for head, read in columns if any(read(arm) for arm in arms)]
    rows = [
        (arm.arm, [*(_lines(read(arm)) for _, read in shown), [str(arm.seeds)]]) for arm in arms
    ]
    return [*(head for head, _ in shown), "seeds"], rows


def _lines(value: Drawn | Estimate | None) -> list[str]:
    if value is None:
        return [NONE]
    seeds = value.over_seeds if isinstance(value, Drawn) else value
    lines = [amount(seeds.mean)]
    lines += [] if seeds.half is None else [f"± {amount(seeds.half)}"]
    if isinstance(value, Drawn) and value.standard_error is not None:
        lines.append(f"SE {amount(value.standard_error)}")
    return lines


def how_text(theory: Theory) -> str:
    """On what the trained models were measured, and whether all in one way."""
    ways = [
        ", ".join(f"{key}: {_plain(value)}" for key, value in how.items()).replace("_", " ")
        for how in theory.how
    ]
    if len(ways) < 2:
        return "".join(f"How: {way}." for way in ways)
    return f"Measured in {len(ways)} ways, which do not compare like with like: {'; '.join(ways)}."


def _plain(value: Any) -> str:
    return amount(value) if isinstance(value, int | float) else str(value)


def markdown(text: str) -> str:
    r"""Text in one line of Markdown, where no character of it means anything.

    >>> print(markdown("a|b <i> [c](d)"))
    a\|b \<i\> \[c\](d)
    """
    return re.sub(r"([\\`*\[\]<>|])", r"\\\1", printable(text)).replace("\n", " ")


def code(text: str) -> str:
    """Text in Markdown as it is, in one line; a backtick would end it."""
    return f"`{printable(text).translate({96: chr(39), 10: ' '})}`"


# Numbers as text


def markdown_theory(runs: list[Run]) -> str:
    """Density beside what it is made of, at three steps, for a lab log; "" without any.

    Means over seeds with 95 % t-intervals, over training batches since the line before. Curvature
    is of the rows that the run was measured on; a last row has what `actsparse measure` found.
    """
    told = [run for run in runs if run.train and number(run.train[-1], "measures", "flatness")]
    if not told:
        return ""
    passive = {"density": "density", "AF": "flatness", "c": "coefficient", "‖x‖²": "input_norm",
               "η², active": "effective_gradient"}  # fmt: skip
    traces = {"Gauss–Newton": "gauss_newton", "token copies": "token_copies"}
    lines = [" | ".join(["arm", "step", *passive, *traces])]
    lines.append(" | ".join(["---"] * len(lines[0].split(" | "))))
    logged = {entry["step"] for entry in told[0].train}
    steps = [entry["step"] for entry in told[0].measured if entry["step"] in logged]
    steps = steps or sorted(logged)
    for arm in dict.fromkeys(run.arm for run in told):
        own = [run for run in told if run.arm == arm]
        rows = {
            str(step): [(_at(run.train, step), _at(run.measured, step)) for run in own]
            for step in (steps[0], steps[(len(steps) - 1) // 2], steps[-1])
        }
        later = [entry for run in own if (entry := read_measures(run)) is not None]
        if later:
            split = later[0]["how"].get("split", "measured")
            rows[f"end, {split} rows"] = [(entry, entry) for entry in later]
        for name, found in rows.items():
            cells = [markdown(arm), markdown(name)]
            for key in passive.values():
                cells.append(_spread(number(entry, "measures", key) for entry, _ in found))
            for key in traces.values():
                cells.append(
                    _spread(number(entry, "curvature", key, "value") for _, entry in found)
                )
            lines.append(" | ".join(cells))
    return "".join(f"| {line} |\n" for line in lines)


def _at(entries: list[Entry], step: int) -> Entry | None:
    return next((entry for entry in entries if entry["step"] == step), None)


def _spread(values: Iterable[float | None]) -> str:
    estimate = t_interval([value for value in values if value is not None])
    if estimate is None:
        return NONE
    half = "" if estimate.half is None else f" ± {estimate.half:.2g}"
    return f"{estimate.mean:.3g}{half}"


def density_text(estimate: Estimate | None) -> str:
    """A density as stored, 0 to 1."""
    return _text(estimate, "{:.3f}")


def percent_text(estimate: Estimate | None) -> str:
    """A share, in percent."""
    return _text(estimate, "{:.1f} %", 100)


def quality_text(table: Table, estimate: Estimate | None) -> str:
    """Accuracy in percent, any other quality in its own unit."""
    if table.quality_name == "accuracy":
        return percent_text(estimate)
    return density_text(estimate)


def change_text(table: Table, estimate: Estimate | None) -> str:
    """A change of accuracy in percentage points, of any other quality in its own unit."""
    if table.quality_name == "accuracy":
        return _text(estimate, "{:+.1f} points", 100)
    return _text(estimate, "{:+.3f}")


def amount(value: float) -> str:
    """A number of any size, three digits of it.

    >>> amount(31215.0), amount(0.25), amount(-0.0000314), amount(1e-5)
    ('31200', '0.25', '−3.14 × 10⁻⁵', '10⁻⁵')
    """
    plain = f"{float(f'{value:.3g}'):g}"
    digits, e, power = plain.partition("e")
    if e:
        raised = str(int(power)).translate(_RAISED)
        plain = f"10{raised}" if digits == "1" else f"{digits} × 10{raised}"
    return _minus(plain)


def _text(estimate: Estimate | None, form: str, scale: float = 1) -> str:
    """Mean ± half the interval: ``0.192 ± 0.014``, ``28.1 ± 3.0 %``."""
    if estimate is None:
        return NONE
    number, _, unit = form.partition(" ")
    unit = f" {unit}" if unit else ""
    mean = number.format(scale * estimate.mean)
    if estimate.half is None:
        return _minus(mean) + unit
    half = number.replace("+", "").format(scale * estimate.half)
    return f"{_minus(mean)} ± {half}{unit}"


def _minus(number: str) -> str:
    return number.replace("-", "−")


def _share_fewer(share: float) -> str:
    return f"{_percent(abs(share))} {'fewer' if share >= 0 else 'more'} active neurons"


def _percent(share: float) -> str:
    return _minus(f"{100 * share:.0f} %")


def counted(count: int, what: str) -> str:
    """``1 seed``, ``2 seeds``."""
    return f"{count} {what}{'' if count == 1 else 's'}"


def _lost(arm: Arm) -> list[str]:
    counts = ((arm.failed, "failed"), (arm.unfinished, "unfinished"))
    return [f"{count} {what}" for count, what in counts if count]

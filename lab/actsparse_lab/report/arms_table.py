"""The table of arms, and the table of every run."""

from __future__ import annotations

from collections.abc import Callable

from rich.console import Console
from rich.text import Text

from actsparse_lab.analysis.comparison import Arm, Comparison, compare
from actsparse_lab.analysis.intervals import Estimate
from actsparse_lab.analysis.numbers import NONE, change, decimal, percent, quality
from actsparse_lab.analysis.tables import Cell, Column, Table
from actsparse_lab.records import Run
from actsparse_lab.report.summary import lead, marks, remarks, title

VERDICTS = {
    "better": "better",
    "kept": "kept",
    "unclear": "unclear",
    "lower": "clearly worse",
    "one seed": "one seed: cannot tell",
}
YES = {True: "yes", False: "no", None: NONE}


def arms_table(found: Comparison) -> Table:
    """A row for each arm; columns from what matters most."""
    name = found.quality_name
    some = found.arms
    shown: list[tuple[Column, Callable[[Arm], Cell | str]]] = [
        (Column("arm"), lambda arm: Cell(arm.name, marks=tuple(marks(arm)))),
        (Column(name or "quality"), lambda arm: quality(name, arm.quality)),
        (
            Column(f"change from {found.reference}", brief=False),
            lambda arm: change(name, arm.change),
        ),
        (Column("quality kept?"), lambda arm: VERDICTS.get(arm.verdict or "", NONE)),
        (Column("inference density"), _with_bar(found, lambda arm: arm.inference_density)),
        (Column("training density"), _with_bar(found, lambda arm: arm.training_density)),
        (Column("fewer active, inference"), lambda arm: percent(arm.inference_improvement)),
        (
            Column("fewer active, training", brief=False),
            lambda arm: percent(arm.training_improvement),
        ),
        (Column("dead units", brief=False), lambda arm: percent(arm.dead_share)),
        (Column("living density", brief=False), lambda arm: decimal(arm.living_density)),
        (Column("skippable, forward / backward", brief=False), _skippable),
        (Column("seeds"), lambda arm: str(len(arm.seeds))),
    ]
    if any(arm.before_quality is not None for arm in some):
        before = Column(f"before: {name or 'quality'}, density")
        shown.insert(1, (before, lambda arm: _before(arm, name)))
    if any(arm.beats_bigram is not None for arm in some):
        shown.insert(-1, (Column("beats bigram", brief=False), lambda arm: YES[arm.beats_bigram]))
    return Table(
        "arms-table",
        "arms",
        tuple(column for column, _ in shown),
        tuple(tuple(cell(arm) for _, cell in shown) for arm in some),
    )


def _with_bar(
    found: Comparison, read: Callable[[Arm], Estimate | None]
) -> Callable[[Arm], Cell | str]:
    """A density, with a bar as a share of the longest."""
    longest = max((value.mean for arm in found.arms if (value := read(arm))), default=0)

    def cell(arm: Arm) -> Cell | str:
        value = read(arm)
        return Cell(decimal(value), bar=value.mean / longest if value and longest else None)

    return cell


def _before(arm: Arm, name: str | None) -> str:
    return f"{quality(name, arm.before_quality)}, {decimal(arm.before_density)}"


def _skippable(arm: Arm) -> str:
    if arm.skippable_forward is None or arm.skippable_backward is None:
        return NONE
    forward, backward = arm.skippable_forward.mean, arm.skippable_backward.mean
    return f"{decimal(100 * forward, 0)} / {percent(backward, 0)}"


def markdown_table(found: Comparison) -> str:
    """The table of arms with every column, for a README or a lab log."""
    return arms_table(found).markdown()


def print_table(runs: list[Run], console: Console, titled: bool = True) -> None:
    """The finding, the table and the remarks, for the terminal; the first if ``titled``."""
    found = compare(runs)
    if titled:
        console.print(Text(title(found), style="bold"))
        console.print(Text(lead(found)))
    arms_table(found).print(console)
    for remark in remarks(found, rivals=titled):
        console.print(Text(f"• {remark}"))


def runs_table(found: Comparison, runs: list[Run]) -> Table:
    """A row for each run, whatever became of it."""
    heads = (
        "run", "state", "steps", "test loss", found.quality_name or "quality", "inference density",
        "seconds",
    )  # fmt: skip
    rows = tuple((f"{run.arm} seed {run.seed}", *_state(run, found.quality_name)) for run in runs)
    return Table("runs-table", "runs", tuple(map(Column, heads)), rows)


def _state(run: Run, name: str | None) -> tuple[str, ...]:
    result = run.result
    if result:
        return (
            "finished",
            str(result["step"]),
            decimal(result["loss"]),
            quality(name, result["quality"]),
            decimal(result["inference"]["density"] if result["inference"] else None),
            decimal(result["time"]["seconds"], 0),
        )
    none = (NONE,) * 4
    if run.failed:
        return (f"failed: {run.failed['reason']}", str(run.failed["step"]), *none)
    torn = ", last line torn" if run.torn else ""
    return (f"unfinished{torn}", str(run.train[-1]["step"] if run.train else 0), *none)

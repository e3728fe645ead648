"""The frontier in words and tables, for the terminal, a README and the pages."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.table import Table as Grid
from rich.text import Text

from actsparse_lab.records import RecordError
from actsparse_lab.report.comparison import BEST, Estimate
from actsparse_lab.report.frontier import (
    CONTROL,
    FEWER,
    KNEE,
    LOSS,
    MANIFEST,
    POINTS,
    SPARSE,
    WHOLE,
    Board,
    Row,
    board,
    frontiers_in,
)
from actsparse_lab.report.speed import factor_text
from actsparse_lab.report.words import NONE, code, markdown

RULE = (
    f"± is half a 95 % t-interval over seeds. Changes and “fewer active” are paired, seed by seed, "
    f"with the best vanilla: of the two, with weight decay on norms and biases and without, the "
    f"one of better mean quality on validation rows when training ended. All else is of the test "
    f"split. “Within noise”: the interval of the change excludes a loss of more than "
    f"{100 * POINTS:g} points of accuracy, or of {100 * LOSS:g} % of the best vanilla’s mean where "
    f"quality is something else; “no” where it lies wholly beyond that; else “undecided”. (a): "
    f"within noise, and the intervals of both densities lie at {SPARSE:g} or below. (b): the "
    f"intervals of both improvements lie at {100 * FEWER:g} % or above, whatever the quality. "
    f"Fewer than 5 seeds, or than planned, decide nothing. A task counts where half the steps cost "
    f"{WHOLE} less than {KNEE * 100 * POINTS:g} points or {KNEE * 100 * LOSS:g} % of the loss, and "
    f"the control without MLPs is worse by more than noise. Each arm is judged by itself: of many "
    f"that are just at a bar, one in forty passes by chance."
)


# -- numbers as text ----------------------------------------------------------------------------


def _number(
    found: Estimate | None, digits: int = 3, scale: float = 1, unit: str = "", sign: str = ""
) -> str:
    """``0.192 ± 0.014``; a dash for None."""
    if found is None:
        return NONE
    mean = f"{scale * found.mean:{sign}.{digits}f}".replace("-", "−")
    half = "" if found.half is None else f" ± {scale * found.half:.{digits}f}"
    return f"{mean}{half}{unit}"


def _percent(found: Estimate | None) -> str:
    return _number(found, 1, 100, " %")


def quality_text(of: Board, found: Estimate | None) -> str:
    """Accuracy in per cent, any other quality in its own unit."""
    return _percent(found) if of.quality_name == "accuracy" else _number(found)


def change_text(of: Board, found: Estimate | None) -> str:
    """A change of accuracy in points, of any other quality in its own unit."""
    if of.quality_name == "accuracy":
        return _number(found, 2, 100, " points", "+")
    return _number(found, sign="+")


def heads_of(of: Board) -> tuple[str, ...]:
    """The columns after the arm's name."""
    return (
        of.quality_name, "change, points" if of.quality_name == "accuracy" else "change",
        "within noise", "inference density", "training density",
        "living density", "dead units", "fewer active, inference", "fewer active, training",
        "(a)", "(b)", "MLPs × faster", "model × faster", "seeds",
    )  # fmt: skip


def cells_of(of: Board, row: Row) -> tuple[str, ...]:
    """One arm's numbers under `heads_of`."""
    return (
        quality_text(of, row.quality),
        change_text(of, row.change).removesuffix(" points"),
        row.within_noise or NONE,
        _number(row.inference, 4),
        _number(row.training, 4),
        _number(row.living, 4),
        _percent(row.dead),
        _percent(row.fewer_inference),
        _percent(row.fewer_training),
        row.sparse or NONE,
        row.fewer or NONE,
        factor_text(row.speed.mlps if row.speed else None),
        factor_text(row.speed.model if row.speed else None),
        f"{row.seeds}" + (f", {row.lost} lost" if row.lost else ""),
    )


def counts_text(of: Board) -> str:
    """Whether the task counts, and the two figures that decide it."""
    words = {"yes": "counts", "no": "does not count", "undecided": "may not count (undecided)"}
    control = of.row(CONTROL)
    without = None if control is None else control.change
    bar = NONE if of.margin is None else _number(Estimate(KNEE * of.margin, None, 1), **_unit(of))
    noise = NONE if of.margin is None else _number(Estimate(of.margin, None, 1), **_unit(of))
    cost = _number(of.knee, **_unit(of))
    return (
        f"{of.task} {words[of.counts]}. Half the steps cost {cost} of {of.quality_name} (below "
        f"{bar}: {of.at_knee}); without MLPs it changes by {change_text(of, without)} (worse by "
        f"more than {noise}: {of.needs_mlps})."
    )


def _unit(of: Board) -> dict[str, Any]:
    return {"digits": 2, "scale": 100, "unit": " points"} if of.quality_name == "accuracy" else {}


def reached_text(of: Board) -> str:
    """The best vanilla, what validation chose, and which arms reach the targets."""
    best = of.row(of.best)
    if best is None:
        return "No vanilla run is finished, so there is nothing to compare with."
    said = f"Best vanilla: {best.arm}, {quality_text(of, best.quality)}, inference density "
    said += f"{_number(best.inference, 4)}."
    if (row := of.row(of.chosen)) is not None:
        said += (
            f" Sparsest within noise on validation rows: {row.arm}, "
            f"{_percent(row.fewer_inference)} fewer active in inference and "
            f"{_percent(row.fewer_training)} in training, at a change of "
            f"{change_text(of, row.change)} on the test split (within noise: {row.within_noise})."
        )
    else:
        said += " No arm is within noise on validation rows."
    for name, bar, reached in (
        ("(a)", f"at most {100 * SPARSE:g} % active, within noise", [r.sparse for r in of.rows]),
        ("(b)", f"at least {100 * FEWER:g} % fewer active", [r.fewer for r in of.rows]),
    ):
        names = [row.arm for row, word in zip(of.rows, reached, strict=True) if word == "yes"]
        said += f" {name}, {bar}: {', '.join(names) or 'none'}."
    return said


def summary(of: Board) -> str:
    """One line: does the task count, and what came of it."""
    return f"{counts_text(of)} {reached_text(of)}"


def headline(of: Board) -> str:
    """What validation chose, in a few words."""
    row = of.row(of.chosen)
    if row is None or row.fewer_inference is None:
        return f"{of.task}: no arm is known to be sparser within noise of the best vanilla"
    return (
        f"{of.task}: {row.arm} has {100 * row.fewer_inference.mean:.0f} % fewer active neurons "
        f"than the best vanilla, within its noise on test rows: {row.within_noise}"
    )


# -- tables --------------------------------------------------------------------------------------


def boards(folder: str | Path) -> dict[Path, Board]:
    """Every frontier task in ``folder`` that has a finished run.

    Raises `RecordError` where there is none, and as `board` does.
    """
    found = {place: judged for place in frontiers_in(folder) if (judged := board(place))}
    if not found:
        raise RecordError(
            f"no {MANIFEST} with finished runs in {folder} or a folder in it; `actsparse frontier` "
            f"makes them"
        )
    return found


def print_board(of: Board, console: Console) -> None:
    """The task's line and the columns that decide, for the terminal."""
    console.print(Text(summary(of), style="bold"))
    heads = heads_of(of)
    shown = [heads.index(head) for head in heads if head not in _LONG]
    rows = [(row.arm, cells_of(of, row)) for row in of.rows]
    grid = Grid(box=None, pad_edge=False, collapse_padding=True, header_style="bold")
    grid.add_column("arm", no_wrap=True)
    for at in shown:
        words = " ".join([heads[at], *(cells[at] for _, cells in rows)]).split()
        grid.add_column(heads[at], justify="right", min_width=max(map(len, words)))
    for arm, cells in rows:
        grid.add_row(arm, *(cells[at].replace(" ± ", "\n± ") for at in shown))
    console.print(grid)


def markdown_scoreboard(folder: str | Path) -> str:
    """For a README: of each task the best vanilla, and `BEST` or else what validation chose."""
    heads = ("task", "counts", "arm", "quality", *_SCORES)
    lines = [table_line(heads), table_line(["---"] * len(heads))]
    for judged in boards(folder).values():
        second = judged.row(BEST) or judged.row(judged.chosen)
        for row in (judged.row(judged.best), second):
            if row is None:
                continue
            cells = dict(zip(heads_of(judged), cells_of(judged, row), strict=True))
            quality = f"{quality_text(judged, row.quality)} ({judged.quality_name})"
            shown = [cells[head] for head in _SCORES[:-1]]
            scores = [judged.task, judged.counts, row.arm, quality, *shown]
            lines.append(table_line([*scores, code(judged.command)]))
    return "\n".join(lines) + "\n"


_SCORES = (
    "within noise", "inference density", "training density", "living density", "dead units",
    "MLPs × faster", "model × faster", "command",
)  # fmt: skip


_LONG = (
    "living density", "dead units", "fewer active, inference", "fewer active, training",
    "MLPs × faster", "model × faster", "seeds",
)  # fmt: skip


def table_line(cells: Sequence[str]) -> str:
    """A row of a Markdown table; a cell of code stays code."""
    return f"| {' | '.join(c if c.startswith('`') else markdown(c) for c in cells)} |"

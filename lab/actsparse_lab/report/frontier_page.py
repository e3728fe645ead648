"""The frontier's pages: docs/frontier.md, what a task's own page shows, and the plot."""

from __future__ import annotations

import json
from dataclasses import dataclass, field
from itertools import groupby
from pathlib import Path
from typing import Any

from actsparse_lab.records import Run, read_runs, write_whole
from actsparse_lab.report import plots
from actsparse_lab.report.board import (
    RULE,
    boards,
    cells_of,
    counts_text,
    headline,
    heads_of,
    markdown_scoreboard,
    reached_text,
    summary,
    table_line,
)
from actsparse_lab.report.comparison import Table, compare, plain
from actsparse_lab.report.frontier import HALF, Board, board
from actsparse_lab.report.plots import Picture
from actsparse_lab.report.race import HEADS, race_note, race_picture, race_row, race_text, races
from actsparse_lab.report.slim import SLIM_RULE, TITLE, markdown_slim, read_slim
from actsparse_lab.report.words import markdown

RACE = "race"  # a folder of a task's: runs timed one at a time
ABOUT = (
    "# The frontier: how sparse at equal quality?\n\n"
    "Made from records by `actsparse report benchmarks/frontier --markdown`; do not edit."
)


@dataclass(frozen=True)
class Section:
    """A part of a page: a picture, drawn of ``shown``, and a table.

    ``heading`` is what replaces the page's own, ``title`` and ``lead``; empty: nothing. ``rule``
    is told once where there are several such parts.
    """

    name: str
    title: str
    text: str
    picture: Picture
    shown: tuple[Any, ...]
    heads: tuple[str, ...]
    rows: tuple[tuple[str, ...], ...]
    note: str
    rule: str = ""
    heading: dict[str, str] = field(default_factory=dict)


def scoreboard(folder: str | Path) -> dict[str, Any]:
    """The scoreboard as plain values: each task's `Board`, and its races."""
    return {
        judged.task: {
            **plain(judged),
            "summary": summary(judged),
            "races": [plain(race) for race in races(read_runs(place / RACE))],
            "slim": plain(read_slim(place)),
        }
        for place, judged in boards(folder).items()
    }


def write_scoreboard(folder: str | Path) -> Path:
    """Write ``scoreboard.json`` and ``scoreboard.md`` into a folder of tasks; the latter's path."""
    folder = Path(folder)
    text = json.dumps(scoreboard(folder), indent=2, allow_nan=False) + "\n"
    write_whole(folder / "scoreboard.json", text.encode())
    write_whole(folder / "scoreboard.md", markdown_frontier(folder).encode())
    return folder / "scoreboard.md"


def markdown_frontier(folder: str | Path, link: str = "") -> str:
    """The page of all tasks in ``folder``; ``link`` is what leads to it from the page."""
    found = boards(folder)
    slims = {place: slim for place in found if (slim := read_slim(place)) is not None}
    lines = [ABOUT, "", markdown_scoreboard(folder), RULE, *(["", SLIM_RULE] if slims else [])]
    for place, judged in found.items():
        way = link if place == Path(folder) else f"{link}{place.name}/"
        lines += ["", f"## {markdown(judged.task)}"]
        for each in sections(place, read_runs(place)):
            lines += ["", f"### {markdown(each.title)}"] if each.name != FRONTIER.name else []
            text = " ".join(filter(None, [each.heading.get("lead"), each.text]))
            lines += [
                "",
                markdown(text),
                "",
                f"![{markdown(each.title)}]({way}plots/{each.name}.png)",
                "",
            ]
            lines += map(table_line, (each.heads, ["---"] * len(each.heads), *each.rows))
            lines += ["", each.note]
        if place in slims:
            lines += ["", f"### {TITLE}", "", markdown_slim(slims[place], judged)]
    return "\n".join(lines) + "\n"


def sections(folder: str | Path, runs: list[Run]) -> list[Section]:
    """What a page shows of the frontier and of races in ``folder``, where there are any."""
    found = []
    judged = board(folder, runs)
    if judged is not None:
        found.append(
            Section(
                name=FRONTIER.name,
                title="The frontier",
                text=reached_text(judged),
                picture=FRONTIER,
                shown=(judged, compare(runs)),
                heads=("arm", *heads_of(judged)),
                rows=tuple((row.arm, *cells_of(judged, row)) for row in judged.rows),
                note=_note(judged),
                rule=RULE,
                heading={"title": headline(judged), "lead": counts_text(judged)},
            )
        )
    for timed in (runs, read_runs(Path(folder) / RACE)):
        for _, heats in groupby(races(timed), key=lambda race: race.fast):
            race, *others = heats  # the same runs, to goals of another kind
            found.append(
                Section(
                    name=f"race-{race.fast}",
                    title=f"{race.fast}, accelerated, against dense {race.dense}",
                    text=" ".join(map(race_text, (race, *others))),
                    picture=race_picture(race),
                    shown=(race, compare(timed), timed),
                    heads=HEADS,
                    rows=tuple(tuple(race_row(each)) for each in (race, *others)),
                    note=race_note(race),
                )
            )
    return found


def _note(of: Board) -> str:
    """The command, and how the blocks ran where speed was measured."""
    ran = [f"{row.arm}: {row.speed.why}" for row in of.rows if row.speed]
    return f"Made by {of.command}." + (f" Blocks in inference: {'; '.join(ran)}." if ran else "")


# -- to look at --------------------------------------------------------------------------------


def frontier_plot(of: Board, table: Table, dark: bool = False) -> bytes | None:
    """Quality against inference density on a log axis: means with 95 % intervals over seeds.

    The control without MLPs is a line; shaded is what lies within noise of the best vanilla's
    mean. ``table`` gives arms their colours.
    """
    rows = [row for row in of.rows if row.quality is not None and row.arm != HALF]
    dense = [row for row in rows if row.inference is not None]
    best = of.row(of.best)
    if not dense or best is None or best.quality is None or of.margin is None:
        return None
    height = plots.HEIGHT + 0.14 * len(rows)  # the legend's lines
    figure, (axes,) = plots.new_figure(dark, size=(plots.WIDTH, height))
    middle = best.quality.mean
    axes.axhspan(middle - of.margin, middle + of.margin, color=plots.INK[dark], alpha=0.12)
    smallest = min(
        (r.inference.mean for r in dense if r.inference and r.inference.mean > 0), default=1e-4
    )
    values = [middle]
    for name, style in plots.styles(table, dark):
        row = next((row for row in rows if row.arm == name), None)
        if row is None or row.quality is None:
            continue
        values.append(row.quality.mean)
        if row.inference is None:
            axes.axhline(row.quality.mean, color=style["color"], linestyle="--", label=name)
            continue
        x, half = max(row.inference.mean, smallest / 2), row.inference.half or 0.0
        axes.errorbar(
            x, row.quality.mean, xerr=[[min(half, 0.9 * x)], [half]], yerr=row.quality.half or 0.0,
            color=style["color"], marker=style["marker"], linestyle="", markersize=8,
            elinewidth=1.2, label=name,
        )  # fmt: skip
    plots.log_axis(axes, "x", few=True)
    space = max(0.12 * (max(values) - min(values)), 2 * of.margin)
    axes.set_ylim(min(values) - space, max(values) + space)
    axes.set_xlabel("inference density  (left is sparser)")
    axes.set_ylabel(f"{of.quality_name}  ({'up' if of.higher_is_better else 'down'} is better)")
    return plots.png(figure, table)


FRONTIER = Picture(
    "frontier",
    frontier_plot,
    "Quality against density",
    "Test split, means with 95 % intervals over seeds. Dashed: the control without MLPs. Shaded: "
    "within noise of the best vanilla’s mean.",
)

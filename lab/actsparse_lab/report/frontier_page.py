"""The frontier in words, tables and pages: docs/frontier.md, a README and a task's own page."""

from __future__ import annotations

import json
from dataclasses import dataclass, field
from itertools import groupby
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.text import Text

from actsparse_lab.analysis.comparison import BEST, CONTROL, WHOLE, compare, plain
from actsparse_lab.analysis.manifest import FRONTIER
from actsparse_lab.analysis.numbers import NONE, change, counted, decimal, percent, quality, ratio
from actsparse_lab.analysis.plots import Picture
from actsparse_lab.analysis.prose import sections as words_of
from actsparse_lab.analysis.tables import Cell, Column, Table, code, markdown
from actsparse_lab.analysis.verdicts import POINTS, SHARE, fewest_seeds
from actsparse_lab.records import RecordError, Run, read_runs, write_whole
from actsparse_lab.report.frontier import FEWER, KNEE, SPARSE, Board, Row, board, frontiers_in
from actsparse_lab.report.frontier_plot import FRONTIER_PLOT
from actsparse_lab.report.race import race_picture, race_table, race_text, races
from actsparse_lab.report.slim import SLIM_RULE, TITLE, read_slim, slim_table, slim_text

RACE = "race"  # a folder of a task's: runs timed one at a time
ABOUT = (
    "# The frontier: how sparse at equal quality?\n\n"
    "Made from records by `actsparse report benchmarks/frontier --markdown`; do not edit."
)


RULE = words_of("report/rules.md")["The frontier"].format(
    points=100 * POINTS,
    share=100 * SHARE,
    sparse=SPARSE,
    fewer=100 * FEWER,
    whole=WHOLE,
    knee_points=KNEE * 100 * POINTS,
    knee_share=KNEE * 100 * SHARE,
)


# -- in words ------------------------------------------------------------------------------------


def counts_text(of: Board) -> str:
    """Whether the task counts, and the two figures that decide it."""
    words = {"yes": "counts", "no": "does not count", "undecided": "may not count (undecided)"}
    control = of.row(CONTROL)
    without = None if control is None else control.change
    shown = (2, 100.0, " points") if of.quality_name == "accuracy" else (3, 1.0, "")
    cost, noise = decimal(of.knee, *shown), decimal(of.margin, *shown)
    bar = decimal(None if of.margin is None else KNEE * of.margin, *shown)
    changed = change(of.quality_name, without, 2)
    return (
        f"{of.task} {words[of.counts]}. Half the steps cost {cost} of {of.quality_name} (below "
        f"{bar}: {of.at_knee}); without MLPs it changes by {changed} (worse by more than {noise}: "
        f"{of.needs_mlps})."
    )


def reached_text(of: Board) -> str:
    """The best vanilla, what validation chose, and which arms reach the targets."""
    best = of.row(of.best)
    if best is None:
        return "No vanilla run is finished, so there is nothing to compare with."
    said = f"Best vanilla: {best.name}, {quality(of.quality_name, best.quality)}, inference "
    said += f"density {decimal(best.inference_density, 4)}."
    if (row := of.row(of.chosen)) is not None:
        said += (
            f" Sparsest within noise on validation rows: {row.name}, "
            f"{percent(row.inference_improvement)} fewer active in inference and "
            f"{percent(row.training_improvement)} in training, at a change of "
            f"{change(of.quality_name, row.change, 2)} on the test split (within noise: "
            f"{row.within_noise})."
        )
    else:
        said += " No arm is within noise on validation rows."
    for bar, reached in (
        (f"At most {100 * SPARSE:g} % active, within noise", [row.sparse for row in of.rows]),
        (f"At least {100 * FEWER:g} % fewer active", [row.fewer for row in of.rows]),
    ):
        names = [row.name for row, word in zip(of.rows, reached, strict=True) if word == "yes"]
        said += f" {bar}: {', '.join(names) or 'none'}."
    return said


def claim_text(of: Board) -> str:
    """The papers' claim against the papers' own vanilla; nothing where it was not run."""
    if (claim := of.claim) is None:
        return ""
    if of.few:
        return (
            f" The papers’ recipe has {percent(claim.inference)} fewer active neurons in inference "
            f"and {percent(claim.training)} in training than vanilla as the papers decay it, at a "
            f"change of {change(of.quality_name, claim.change, 2)}."
        )
    word = {"yes": "holds", "no": "does not hold here", "undecided": "is undecided"}[claim.holds]
    return (
        f" The papers’ claim {word}: against their vanilla, which decays norms and biases too, the "
        f"papers’ recipe has {percent(claim.inference)} fewer active in inference (at least 36 %: "
        f"{claim.fewer_inference}) and {percent(claim.training)} in training (at least 50 %: "
        f"{claim.fewer_training}), at a change of {change(of.quality_name, claim.change, 2)} "
        f"(within noise: {claim.kept})."
    )


def summary(of: Board) -> str:
    """One line: does the task count, and what came of it."""
    return f"{counts_text(of)} {reached_text(of)}{claim_text(of)}"


def _shown(of: Board) -> Row | None:
    """The arm that the page leads with: what validation chose; of few seeds the default recipe."""
    return of.row(of.chosen) or (of.row(BEST) if of.few else None)


def headline(of: Board) -> str:
    """What validation chose, or of few seeds the default recipe, in a few words."""
    row = _shown(of)
    if row is None or row.inference_improvement is None:
        return f"{of.task}: no arm is known to be sparser within noise of the best vanilla"
    if of.few:
        return (
            f"{row.name} has {percent(row.inference_improvement.mean, 0)} fewer active neurons "
            f"than the best vanilla: {counted(of.seeds, 'seed')}, on your machine"
        )
    return (
        f"{of.task}: {row.name} has {percent(row.inference_improvement.mean, 0)} fewer active "
        f"neurons than the best vanilla, within its noise on test rows: {row.within_noise}"
    )


def lead(of: Board) -> str:
    """What the title's numbers rest on; of a task with enough seeds also whether it counts."""
    row, best = _shown(of), of.row(of.best)
    if row is None or best is None or not of.few:
        return counts_text(of)
    return (
        f"{percent(row.inference_density, 1)} of its hidden units are active on held-out data, "
        f"{percent(best.inference_density, 1)} of {best.name}’s. The {of.quality_name} are "
        f"{quality(of.quality_name, row.quality)}, {best.name}’s are "
        f"{quality(of.quality_name, best.quality)}. {counted(of.seeds, 'seed').capitalize()} "
        f"cannot tell whether quality is kept: that takes {fewest_seeds()}."
    )


def tiles(of: Board) -> list[tuple[str, str]]:
    """How many active neurons are fewer: of all, while training, and among living units."""
    if (row := _shown(of)) is None:
        return []
    found = (
        (row.inference_improvement, "fewer active neurons in inference"),
        (row.training_improvement, "fewer in training"),
        (row.living_improvement, "fewer in inference among units that are not dead"),
    )
    return [(percent(value.mean, 0), what) for value, what in found if value is not None]


# -- tables --------------------------------------------------------------------------------------


def frontier_table(of: Board) -> Table:
    """A row for each arm; of few seeds without the columns that only enough of them can fill."""
    columns = _columns(of)
    ran = [f"{row.name}: {row.speed.why}" for row in of.rows if row.speed]
    note = f"Made by {of.command}." + (f" Blocks in inference: {'; '.join(ran)}." if ran else "")
    rows = [(row.name, *_cells(of.quality_name, row)) for row in of.rows]
    kept = [at for at, column in enumerate(columns) if not of.few or column.head not in _JUDGED]
    return Table(
        f"{FRONTIER_PLOT.name}-table",
        "The frontier",
        tuple(columns[at] for at in kept),
        tuple(tuple(row[at] for at in kept) for row in rows),
        (note,),
    )


def _columns(of: Board) -> tuple[Column, ...]:
    name = of.quality_name
    return (
        Column("arm"), Column(name),
        Column("change, points" if name == "accuracy" else "change"), Column("within noise"),
        Column("inference density"), Column("training density"),
        Column("living density", brief=False), Column("dead units", brief=False),
        Column("fewer active, inference", brief=of.few),
        Column("fewer active, training", brief=of.few),
        Column("at most 3 % active"), Column("at least 60 % fewer"),
        Column("MLPs × faster", brief=False), Column("model × faster", brief=False),
        Column("seeds", brief=False),
    )  # fmt: skip


_JUDGED = ("within noise", "at most 3 % active", "at least 60 % fewer")


def _cells(name: str, row: Row) -> tuple[str, ...]:
    lost = row.failed + row.unfinished
    return (
        quality(name, row.quality),
        change(name, row.change, 2, unit=""),
        row.within_noise or NONE,
        decimal(row.inference_density, 4),
        decimal(row.training_density, 4),
        decimal(row.living_density, 4),
        percent(row.dead_share),
        percent(row.inference_improvement),
        percent(row.training_improvement),
        row.sparse or NONE,
        row.fewer or NONE,
        ratio(row.speed.mlps if row.speed else None),
        ratio(row.speed.model if row.speed else None),
        f"{len(row.seeds)}" + (f", {lost} lost" if lost else ""),
    )


def print_board(of: Board, console: Console) -> None:
    """The task's line and the columns that decide, for the terminal."""
    few = f"{headline(of)}. {lead(of)}{claim_text(of)}"
    told = few if of.few else summary(of)
    console.print(Text(told, style="bold"))
    frontier_table(of).print(console)


def markdown_scoreboard(folder: str | Path) -> str:
    """For a README: of each task the best vanilla, and `BEST` or else what validation chose."""
    heads = ("task", "counts", "arm", "quality", *_SCORES, "command")
    rows: list[tuple[Cell | str, ...]] = []
    for judged in boards(folder).values():
        columns = [column.head for column in _columns(judged)[1:]]
        for row in (judged.row(judged.best), judged.row(BEST) or judged.row(judged.chosen)):
            if row is None:
                continue
            name = judged.quality_name
            cells = dict(zip(columns, _cells(name, row), strict=True))
            scored = f"{quality(name, row.quality)} ({name})"
            command = Cell(judged.command, markdown=code(judged.command))
            shown = (cells[head] for head in _SCORES)
            rows.append((judged.task, judged.counts, row.name, scored, *shown, command))
    return Table("scoreboard", "tasks", tuple(map(Column, heads)), tuple(rows)).markdown()


_SCORES = (
    "within noise", "inference density", "training density", "living density", "dead units",
    "MLPs × faster", "model × faster",
)  # fmt: skip


# -- pages ---------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Section:
    """A part of a page: a picture, drawn of ``shown``, if any, and a table.

    ``heading`` is what replaces the page's own, ``title``, ``lead`` and ``tiles``; empty: nothing.
    ``rule`` is told once where there are several such parts.
    """

    name: str
    title: str
    text: str
    table: Table
    picture: Picture | None = None
    shown: tuple[Any, ...] = ()
    rule: str = ""
    heading: dict[str, Any] = field(default_factory=dict)


def boards(folder: str | Path) -> dict[Path, Board]:
    """Every frontier task in ``folder`` that has a finished run.

    Raises `RecordError` where there is none, and as `board` does.
    """
    found = {place: judged for place in frontiers_in(folder) if (judged := board(place))}
    if not found:
        raise RecordError(
            f"no {FRONTIER.file} with finished runs in {folder} or a folder in it; "
            f"`actsparse frontier` makes them"
        )
    return found


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


def index(folder: str | Path) -> Section:
    """A row for each task in ``folder``, with what validation chose there; leads to their pages."""
    heads = (
        "task", "quality", "counts", "arm", "fewer active, inference", "fewer active, training",
        "change", "within noise",
    )  # fmt: skip
    rows = []
    for place, of in boards(folder).items():
        row = of.row(of.chosen)
        link = Cell(of.task, link=f"{place.name}/report.html")
        shown = (
            (row.name, percent(row.inference_improvement), percent(row.training_improvement),
             change(of.quality_name, row.change, 2), row.within_noise or NONE)
            if row
            else (NONE,) * 5
        )  # fmt: skip
        rows.append((link, of.quality_name, of.counts, *shown))
    table = Table("tasks-table", "tasks", tuple(map(Column, heads)), tuple(rows))
    return Section("tasks", "Tasks", "", table, rule=RULE)


def markdown_frontier(folder: str | Path, link: str = "") -> str:
    """The page of all tasks in ``folder``; ``link`` is what leads to it from the page."""
    found = boards(folder)
    slims = {place: slim for place in found if (slim := read_slim(place)) is not None}
    lines = [ABOUT, "", markdown_scoreboard(folder), RULE, *(["", SLIM_RULE] if slims else [])]
    for place, judged in found.items():
        way = link if place == Path(folder) else f"{link}{place.name}/"
        lines += ["", f"## {markdown(judged.task)}"]
        for each in sections(place, read_runs(place)):
            lines += ["", f"### {markdown(each.title)}"] if each.name != FRONTIER_PLOT.name else []
            text = " ".join(filter(None, [each.heading.get("lead"), each.text]))
            lines += [
                "",
                markdown(text),
                "",
                f"![{markdown(each.title)}]({way}plots/{each.name}.png)",
                "",
            ]
            lines += [each.table.markdown().rstrip("\n")]
        if place in slims:
            slimmed = slim_table(slims[place], judged.quality_name).markdown().rstrip("\n")
            lines += ["", f"### {TITLE}", "", slim_text(slims[place]), "", slimmed]
    return "\n".join(lines) + "\n"


def sections(folder: str | Path, runs: list[Run]) -> list[Section]:
    """What a page shows of the frontier and of races in ``folder``, where there are any."""
    found = []
    judged = board(folder, runs)
    if judged is not None:
        found.append(
            Section(
                name=FRONTIER_PLOT.name,
                title="The frontier",
                text=("" if judged.few else reached_text(judged)) + claim_text(judged),
                table=frontier_table(judged),
                picture=FRONTIER_PLOT,
                shown=(judged, compare(runs)),
                rule="" if judged.few else RULE,
                heading={
                    "title": headline(judged),
                    "lead": lead(judged),
                    "tiles": tiles(judged),
                },
            )
        )
    for timed in (runs, read_runs(Path(folder) / RACE)):
        for _, heats in groupby(races(timed), key=lambda race: race.fast):
            several = tuple(heats)  # the same runs, to goals of different kinds
            table = race_table(several)
            found.append(
                Section(
                    name=f"race-{several[0].fast}",
                    title=table.title,
                    text=" ".join(map(race_text, several)),
                    picture=race_picture(several[0]),
                    shown=(several[0], compare(timed), timed),
                    table=table,
                )
            )
    return found

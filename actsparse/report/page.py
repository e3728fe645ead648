"""The page: what was found, first in words, then as a table, then to look at. And the same table
for the terminal."""

from __future__ import annotations

import base64
import importlib.resources
import math
import struct
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import jinja2
from rich.console import Console
from rich.table import Table as Grid
from rich.text import Text

from actsparse.records import Entry, RecordError, Run, read_runs, write_whole
from actsparse.report import plots
from actsparse.report.compare import Arm, Estimate, Table, compare, to_json
from actsparse.report.measures import theory_of
from actsparse.report.plots import Picture
from actsparse.report.theory import THEORY
from actsparse.report.words import (
    NONE,
    change_text,
    curvature_table,
    density_text,
    how_text,
    identity_text,
    lead,
    marks,
    percent_text,
    quality_text,
    remarks,
    tiles,
    title,
)

_HARD = "\N{NO-BREAK SPACE}"
VERDICTS = {
    "better": "better",
    "kept": "kept",
    "unclear": "unclear",
    "lower": "clearly worse",
    "one seed": "one seed: cannot tell",
}


@dataclass(frozen=True)
class Column:
    """A column of the table of arms."""

    head: str
    cell: Callable[[Arm], str]
    bar: Callable[[Arm], Estimate | None] | None = None  # drawn under the number
    brief: bool = True  # also in the terminal

    def bars(self, table: Table) -> dict[str, float]:
        """The bar of each arm, as a share of the longest."""
        read = self.bar or (lambda arm: None)
        means = {arm.name: value.mean for arm in table.arms if (value := read(arm))}
        longest = max(means.values(), default=0)
        return {name: mean / longest for name, mean in means.items()} if longest else {}


PICTURES = (
    Picture(
        "quality-against-density",
        plots.quality_against_density,
        "Quality against density",
        "Large marks are means with 95 % intervals over seeds, small ones single seeds. "
        "Intervals of two or three seeds may run off the plot.",
    ),
    Picture(
        "inference-density",
        plots.inference_density,
        "Inference density while training",
        "Held-out data, eval mode. Thick: mean over seeds; thin: each seed.",
    ),
    Picture(
        "training-density",
        plots.training_density,
        "Training density",
        "Training batches, train mode. Thick: mean over seeds; thin: each seed.",
    ),
    Picture(
        "density-by-block",
        plots.density_by_block,
        "Density by depth",
        "Inference density of each block when training ended. Line: mean over seeds.",
    ),
    Picture(
        "loss",
        plots.loss,
        "Validation loss",
        "A curve that still falls at the right edge belongs to an arm that was stopped early.",
    ),
)


def write_report(out: str | Path) -> Path:
    """Build ``report.html``, ``plots/*.png`` and ``table.json`` in ``out`` from its records alone.

    Where the records hold measures of the theory, also ``theory.json``: a `Theory`, as JSON.

    Returns the page's path. Raises `RecordError` where there are no records, where one is broken,
    or where the disk refuses.

    ``write_report("out")`` gives ``out/report.html``, one file to open, send or keep.
    """
    out = Path(out)
    runs = read_runs(out)
    if not runs:
        raise RecordError(
            f"no records under {out / 'runs'}; give the folder that `actsparse compare --out` wrote"
        )
    table = compare(runs)
    found = theory_of(table, runs)
    shown = [list(_drawn(pictures, table, runs, out)) for pictures in (PICTURES, THEORY)]
    write_whole(out / "table.json", to_json(table).encode() + b"\n")
    if found is not None:
        write_whole(out / "theory.json", to_json(found).encode() + b"\n")
    page = _template().render(
        table=table,
        title=title(table),
        lead=lead(table),
        remarks=remarks(table),
        tiles=tiles(table),
        columns=columns(table),
        marks=marks,
        pictures=shown[0],
        theory=found,
        theory_pictures=shown[1],
        identity_text=identity_text,
        how_text=how_text,
        curvature_table=curvature_table,
        runs=runs,
        facts=facts(runs),
        differences=differences(table, runs),
        run_quality=lambda run: quality_text(table, Estimate(run.result["quality"], None, 1)),
        number=lambda value: f"{value:.3f}",
    )
    path = out / "report.html"
    write_whole(path, page.encode())
    return path


def _drawn(
    pictures: Iterable[Picture], table: Table, runs: list[Run], out: Path
) -> Iterator[dict[str, Any]]:
    """Those with something to show, for the template; each is also written to its file."""
    for picture in pictures:
        light, dark = (picture.plot(table, runs, each) for each in (False, True))
        if light is None or dark is None:
            continue
        write_whole(out / "plots" / f"{picture.name}.png", light)
        width, height = struct.unpack(">II", light[16:24])  # where a PNG has them
        images = {"light": _inline(light), "dark": _inline(dark)}
        yield {"picture": picture, "width": width, "height": height, **images}


def print_table(runs: list[Run], console: Console) -> None:
    """The finding, the table and the remarks, for the terminal."""
    table = compare(runs)
    grid = Grid(box=None, pad_edge=False, collapse_padding=True, header_style="bold")
    shown = [column for column in columns(table) if column.brief]
    grid.add_column("arm", no_wrap=True)
    for column in shown:
        words = column.head.split()
        grid.add_column(column.head, justify="right", min_width=max(map(len, words)))
    for arm in table.arms:
        name = Text(arm.name)
        for mark in marks(arm):
            name.append(f"\n{mark}", style="yellow")
        grid.add_row(name, *(column.cell(arm).replace(" ± ", "\n± ") for column in shown))
    console.print(Text(title(table), style="bold"))
    console.print(Text(lead(table)))
    console.print(grid)
    for remark in remarks(table):
        console.print(Text(f"• {remark}"))


def markdown_table(table: Table) -> str:
    """The table of arms with every column, for a README or a lab log."""
    shown = columns(table)
    lines = [" | ".join(["arm", *(column.head for column in shown)])]
    lines.append(" | ".join(["---"] * (len(shown) + 1)))
    for arm in table.arms:
        name = " ".join([arm.name, *(f"*({mark})*" for mark in marks(arm))])
        lines.append(" | ".join([name, *(column.cell(arm) for column in shown)]))
    return "".join(f"| {line} |\n" for line in lines)


def columns(table: Table) -> list[Column]:
    """The columns after the arm's name, from what matters most."""

    def fewer(read: Callable[[Arm], Estimate | None]) -> Callable[[Arm], str]:
        return lambda arm: percent_text(read(arm))

    def skippable(arm: Arm) -> str:
        if arm.skippable_forward is None or arm.skippable_backward is None:
            return NONE
        forward, backward = 100 * arm.skippable_forward.mean, 100 * arm.skippable_backward.mean
        return f"{forward:.0f} / {backward:.0f} %"

    shown = [
        Column(table.quality_name or "quality", lambda arm: quality_text(table, arm.quality)),
        Column(
            f"change from {table.reference}",
            lambda arm: change_text(table, arm.change),
            brief=False,
        ),
        Column("quality kept?", lambda arm: VERDICTS.get(arm.verdict or "", NONE)),
        Column(
            "inference density",
            lambda arm: density_text(arm.inference_density),
            lambda arm: arm.inference_density,
        ),
        Column(
            "training density",
            lambda arm: density_text(arm.training_density),
            lambda arm: arm.training_density,
        ),
        Column("fewer active, inference", fewer(lambda arm: arm.inference_improvement)),
        Column("fewer active, training", fewer(lambda arm: arm.training_improvement), brief=False),
        Column("dead units", fewer(lambda arm: arm.dead_share), brief=False),
        Column("living density", lambda arm: density_text(arm.living_density), brief=False),
        Column("skippable, forward / backward", skippable, brief=False),
    ]
    if any(arm.beats_bigram is not None for arm in table.arms):
        yes = {True: "yes", False: "no", None: NONE}
        shown.append(Column("beats bigram", lambda arm: yes[arm.beats_bigram], brief=False))
    return [*shown, Column("seeds", lambda arm: str(len(arm.seeds)))]


def facts(runs: list[Run]) -> list[tuple[str, str]]:
    """What ran, when, on what: every value the runs had, most have one."""

    def each(read: Callable[[Run], Any]) -> str:
        return "; ".join(dict.fromkeys(str(read(run)) for run in runs if read(run)))

    def versions(run: Run) -> str:
        return ", ".join(f"{name} {version}" for name, version in run.header["versions"].items())

    def hardware(run: Run) -> str:
        has = run.header["hardware"]
        units = {"cores": "cores: {}", "threads": "threads: {}", "memory_gib": "{} GiB"}
        return ", ".join(units.get(k, "{}").format(v) for k, v in has.items() if v is not None)

    def git(run: Run) -> str:
        state = run.header["git"]
        if not state:
            return "not from a git checkout"
        return str(state.get("commit"))[:12] + (", with changes" if state.get("dirty") else "")

    started = sorted(str(run.header["started"]).replace("T", " ") for run in runs)
    seconds = math.fsum(run.result["seconds"] for run in runs if run.result)
    rows = [
        ("runs", f"{len(runs)}, of which {sum(run.finished for run in runs)} finished"),
        ("started", started[0] if started[0] == started[-1] else f"{started[0]} to {started[-1]}"),
        ("time in all", f"{seconds / 60:.1f} min"),
        ("hardware", each(hardware)),
        ("versions", each(versions)),
        ("git", each(git)),
        ("command", each(lambda run: run.header.get("command"))),
    ]
    return [(name, value) for name, value in rows if value]


def differences(table: Table, runs: list[Run]) -> list[tuple[str, str]]:
    """For each arm the settings in which its config differs from the reference's."""
    flat = {run.arm: dict(_flat(run.header["config"])) for run in reversed(runs)}
    base = flat.get(table.reference, {})
    found = []
    for arm in table.arms:
        own = flat[arm.name]
        keys = [key for key in own | base if own.get(key) != base.get(key) and key != "seed"]
        if keys and arm.name != table.reference:
            found.append((arm.name, ", ".join(f"{key} = {own.get(key)}" for key in keys)))
    return found


def _flat(config: Entry, prefix: str = "") -> Iterable[tuple[str, Any]]:
    for key, value in config.items():
        if isinstance(value, dict):
            yield from _flat(value, f"{prefix}{key}.")
        else:
            yield f"{prefix}{key}", value


def _inline(png: bytes) -> str:
    return "data:image/png;base64," + base64.b64encode(png).decode()


def _tie(text: str) -> str:
    """Keeps a number on one line with its interval and unit."""
    return text.replace(" ± ", f"{_HARD}±{_HARD}").replace(" %", f"{_HARD}%")


def _template() -> jinja2.Template:
    source = importlib.resources.files("actsparse.report").joinpath("page.html.jinja")
    environment = jinja2.Environment(
        autoescape=True, undefined=jinja2.StrictUndefined, trim_blocks=True, lstrip_blocks=True
    )
    environment.filters["tie"] = _tie
    return environment.from_string(source.read_text(encoding="utf-8"))

"""The page: what was found, first in words, then as a table, then to look at. And the same table
for the terminal."""

from __future__ import annotations

import base64
import importlib.resources
import json
import struct
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import jinja2
from rich.console import Console
from rich.table import Table as Grid
from rich.text import Text

from actsparse.values import printable
from actsparse_lab.records import RecordError, Run, read_runs, write_whole
from actsparse_lab.report import plots
from actsparse_lab.report.benchmarks import Payoff, benchmark_files, payoff_of
from actsparse_lab.report.comparison import Arm, Estimate, Table, compare, to_json
from actsparse_lab.report.facts import differences, facts
from actsparse_lab.report.findings import Arms, Findings
from actsparse_lab.report.frontier_page import Section, sections
from actsparse_lab.report.measures import theory_of
from actsparse_lab.report.payoff import PAYOFF, payoff_lead, payoff_tables, payoff_title
from actsparse_lab.report.plots import Picture
from actsparse_lab.report.reproduction import EFFECTS, RULE, findings_in, heading
from actsparse_lab.report.theory import THEORY
from actsparse_lab.report.words import (
    NONE,
    change_text,
    curvature_table,
    density_text,
    how_text,
    identity_text,
    lead,
    markdown,
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


@dataclass(frozen=True)
class Material:
    """What a page is made of: a folder's runs and benchmarks, of which either may be none.

    ``findings`` are the verdicts where the runs are an experiment's, ``sections`` those of the
    frontier and of races.
    """

    home: Path  # where the page goes unless told
    runs: list[Run]
    payoff: Payoff | None
    findings: Findings | None = None
    sections: tuple[Section, ...] = ()


def gather(*paths: str | Path) -> Material:
    """Read a folder, records of benchmarks, or both; a folder's own benchmarks belong to it.

    Raises `RecordError` where there is nothing, where a record is broken, or for two folders.
    """
    given = [Path(path) for path in paths]
    files = [path for path in given if path.is_file() or path.suffix == ".json"]
    folders = [path for path in given if path not in files]
    if len(folders) > 1:
        raise RecordError(
            f"a page is of one folder of runs, got {', '.join(map(str, folders))}; give one"
        )
    runs = read_runs(folders[0]) if folders else []
    files += benchmark_files(folders[0]) if folders else []
    payoff = payoff_of({path.resolve(): path for path in files}.values())
    if not runs and payoff is None:
        raise RecordError(
            f"no records under {folders[0] / 'runs'}; give the folder that `actsparse compare "
            f"--out` wrote, or a record of `actsparse bench`"
        )
    found = findings_in(folders[0], runs) if runs else None
    more = tuple(sections(folders[0], runs)) if runs else ()
    return Material(folders[0] if folders else files[0].with_suffix(""), runs, payoff, found, more)


def write_report(*paths: str | Path, out: str | Path | None = None) -> Path:
    """Build ``report.html``, ``plots/*.png`` and the tables as JSON from records alone.

    ``paths`` are a folder of runs, records of benchmarks, or both. The page goes into ``out``; into
    the folder if that is not told; or, of benchmarks alone, into a folder named as the first, less
    its ``.json``. ``table.json`` has the arms; ``theory.json``, a `Theory`, is there where runs
    hold measures of it; ``payoff.json``, a `Payoff`, where there are benchmarks; ``verdicts.json``
    where the runs are those of an experiment of the papers.

    Returns the page's path. Raises `RecordError` where there are no records, where one is broken,
    or where the disk refuses.

    ``write_report("out")`` gives ``out/report.html``, one file to open, send or keep.
    """
    found = gather(*paths)
    out = found.home if out is None else Path(out)
    shown: dict[str, Any] = {"payoff": found.payoff, "table": None, "theory": None}
    shown["findings"] = found.findings
    if found.payoff is not None:
        shown |= _of_benchmarks(found.payoff, out)
    if found.runs:
        shown |= _of_arms(found.runs, out)
    if found.findings is not None:
        shown |= _of_claims(found.findings, found.runs, out)
        shown["remarks"] = remarks(shown["table"], rivals=False)
        text = json.dumps(found.findings.to_json(), indent=2, allow_nan=False)
        write_whole(out / "verdicts.json", text.encode() + b"\n")
    shown["sections"] = [(each, _of_section(each, out)) for each in found.sections]
    if headings := [each.heading for each in found.sections if each.heading]:
        shown |= headings[0] | {"tiles": [], "remarks": remarks(shown["table"], rivals=False)}
    for name in ("table", "theory", "payoff"):
        if shown[name] is not None:
            write_whole(out / f"{name}.json", to_json(shown[name]).encode() + b"\n")
    path = out / "report.html"
    page = _template().render(facts=facts(found.runs, found.payoff), **shown)
    write_whole(path, page.encode())
    return path


def _of_arms(runs: list[Run], out: Path) -> dict[str, Any]:
    """What the template shows of runs."""
    table = compare(runs)
    return {
        "table": table,
        "title": title(table),
        "lead": lead(table),
        "remarks": remarks(table),
        "tiles": tiles(table),
        "columns": columns(table),
        "marks": marks,
        "pictures": list(_drawn(PICTURES, out, table, runs)),
        "theory": theory_of(table, runs),
        "theory_pictures": list(_drawn(THEORY, out, table, runs)),
        "identity_text": identity_text,
        "how_text": how_text,
        "curvature_table": curvature_table,
        "runs": runs,
        "differences": differences(table, runs),
        "run_quality": lambda run: quality_text(table, Estimate(run.result["quality"], None, 1)),
        "number": lambda value: f"{value:.3f}",
    }


def _of_claims(found: Findings, runs: list[Run], out: Path) -> dict[str, Any]:
    """What the template shows of an experiment's verdicts; its title and lead go first."""
    drawn = [*_drawn(found.experiment.pictures, out, Arms(runs)), *_drawn((EFFECTS,), out, found)]
    return {**heading(found), "rule": RULE, "claim_pictures": drawn}


def _of_section(section: Section, out: Path) -> dict[str, Any]:
    """What the template shows of a part: pictures, and rows of cells of lines."""
    rows = [(row[0], [cell.replace(" ± ", "\n± ").split("\n") for cell in row[1:]])
            for row in section.rows]  # fmt: skip
    return {"pictures": list(_drawn((section.picture,), out, *section.shown)), "rows": rows}


def _of_benchmarks(payoff: Payoff, out: Path) -> dict[str, Any]:
    """What the template shows of benchmarks; title and lead where there are no runs."""
    return {
        "title": payoff_title(payoff),
        "lead": payoff_lead(payoff),
        "payoff_lead": payoff_lead(payoff),
        "payoff_tables": payoff_tables(payoff),
        "payoff_pictures": list(_drawn(PAYOFF, out, payoff)),
    }


def _drawn(pictures: Iterable[Picture], out: Path, *what: Any) -> Iterator[dict[str, Any]]:
    """Those with something to show, for the template; each is also written to its file."""
    for picture in pictures:
        try:
            light, dark = (picture.plot(*what, each) for each in (False, True))
        except (ValueError, ArithmeticError) as error:  # numbers that no axis can show
            raise RecordError(f"the plot {picture.title!r} cannot be drawn: {error}") from error
        if light is None or dark is None:
            continue
        write_whole(out / "plots" / f"{picture.name}.png", light)
        width, height = struct.unpack(">II", light[16:24])  # where a PNG has them
        images = {"light": _inline(light), "dark": _inline(dark)}
        yield {"picture": picture, "width": width, "height": height, **images}


def print_table(runs: list[Run], console: Console, titled: bool = True) -> None:
    """The finding, the table and the remarks, for the terminal; the first if ``titled``."""
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
    if titled:
        console.print(Text(title(table), style="bold"))
        console.print(Text(lead(table)))
    console.print(grid)
    for remark in remarks(table, rivals=titled):
        console.print(Text(f"• {remark}"))


def markdown_table(table: Table) -> str:
    """The table of arms with every column, for a README or a lab log."""
    shown = columns(table)
    lines = [" | ".join(["arm", *(markdown(column.head) for column in shown)])]
    lines.append(" | ".join(["---"] * (len(shown) + 1)))
    for arm in table.arms:
        name = " ".join([markdown(arm.name), *(f"*({mark})*" for mark in marks(arm))])
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
    if any(arm.before_quality is not None for arm in table.arms):
        shown.insert(
            0,
            Column(
                f"before: {table.quality_name or 'quality'}, density",
                lambda arm: (
                    f"{quality_text(table, arm.before_quality)}, {density_text(arm.before_density)}"
                ),
            ),
        )
    if any(arm.beats_bigram is not None for arm in table.arms):
        yes = {True: "yes", False: "no", None: NONE}
        shown.append(Column("beats bigram", lambda arm: yes[arm.beats_bigram], brief=False))
    return [*shown, Column("seeds", lambda arm: str(len(arm.seeds)))]


def _inline(png: bytes) -> str:
    return "data:image/png;base64," + base64.b64encode(png).decode()


def _tie(text: str) -> str:
    """Keeps a number on one line with its interval and unit."""
    return text.replace(" ± ", f"{_HARD}±{_HARD}").replace(" %", f"{_HARD}%")


def _template() -> jinja2.Template:
    source = importlib.resources.files("actsparse_lab.report").joinpath("page.html.jinja")
    environment = jinja2.Environment(
        autoescape=True,
        undefined=jinja2.StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
        finalize=lambda value: printable(value) if type(value) is str else value,
    )
    environment.filters["tie"] = _tie
    return environment.from_string(source.read_text(encoding="utf-8"))

"""The page: what was found, first in words, then as a table, then to look at."""

from __future__ import annotations

import base64
import importlib.resources
import json
import struct
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import jinja2

from actsparse.values import printable
from actsparse_lab.analysis import plots
from actsparse_lab.analysis.comparison import compare, to_json
from actsparse_lab.analysis.effects import Arms
from actsparse_lab.analysis.findings import Findings
from actsparse_lab.analysis.measures import theory_of
from actsparse_lab.analysis.plots import Picture
from actsparse_lab.analysis.prose import pictures
from actsparse_lab.analysis.theory_plots import THEORY
from actsparse_lab.records import RecordError, Run, read_runs, write_whole
from actsparse_lab.report.arms_table import arms_table, runs_table
from actsparse_lab.report.benchmark_plots import BENCHMARK_PICTURES
from actsparse_lab.report.benchmark_tables import (
    benchmarks_lead,
    benchmarks_title,
    speed_tiles,
    tables_of,
)
from actsparse_lab.report.benchmarks import Benchmarks, benchmark_files, benchmarks_of
from actsparse_lab.report.demo import demo_sections
from actsparse_lab.report.frontier_page import Section, index, sections
from actsparse_lab.report.provenance import differences, what_ran
from actsparse_lab.report.reproduction import EFFECTS, findings_in, findings_table, heading
from actsparse_lab.report.summary import lead, remarks, tiles, title
from actsparse_lab.report.theory_tables import curvature_table, how_text, identity_text
from actsparse_lab.report.width_page import width_sections

_HARD = "\N{NO-BREAK SPACE}"

PICTURES = pictures(
    {
        "quality-against-density": plots.quality_against_density,
        "inference-density": plots.inference_density,
        "training-density": plots.training_density,
        "density-by-block": plots.density_by_block,
        "loss": plots.loss,
    },
    "report/captions.md",
)


@dataclass(frozen=True)
class Material:
    """What a page is made of: a folder's runs and benchmarks, of which either may be none.

    ``findings`` are the verdicts where the runs are an experiment's, ``sections`` those of the
    frontier and of races.
    """

    home: Path  # where the page goes unless told
    runs: list[Run]
    benchmarks: Benchmarks | None
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
    benchmarks = benchmarks_of({path.resolve(): path for path in files}.values())
    if not runs and benchmarks is None:
        raise RecordError(
            f"no records under {folders[0] / 'runs'}; give the folder that `actsparse compare "
            f"--out` wrote, or a record of `actsparse bench`"
        )
    found = findings_in(folders[0], runs) if runs else None
    more = (*sections(folders[0], runs), *demo_sections(folders[0])) if runs else ()
    return Material(
        folders[0] if folders else files[0].with_suffix(""), runs, benchmarks, found, more
    )


def write_report(*paths: str | Path, out: str | Path | None = None) -> Path:
    """Build ``report.html``, ``plots/*.png`` and the tables as JSON from records alone.

    ``paths`` are a folder of runs, records of benchmarks, or both. The page goes into ``out``; into
    the folder if that is not told; or, of benchmarks alone, into a folder named as the first, less
    its ``.json``. ``table.json`` has the arms; ``theory.json``, a `Theory`, is there where runs
    hold measures of it; ``payoff.json``, `Benchmarks`, where there are some; ``verdicts.json``
    where the runs are those of an experiment of the papers.

    Returns the page's path. Raises `RecordError` where there are no records, where one is broken,
    or where the disk refuses.

    ``write_report("out")`` gives ``out/report.html``, one file to open, send or keep.
    """
    found = gather(*paths)
    out = found.home if out is None else Path(out)
    shown: dict[str, Any] = {"payoff": found.benchmarks, "table": None, "theory": None}
    shown["findings"] = found.findings
    if found.benchmarks is not None:
        shown |= _of_benchmarks(found.benchmarks, out)
    if found.runs:
        shown |= _of_arms(found.runs, out)
    if found.findings is not None:
        shown |= _of_claims(found.findings, found.runs, out)
        shown["remarks"] = remarks(shown["table"], rivals=False)
        text = json.dumps(found.findings.to_json(), indent=2, allow_nan=False)
        write_whole(out / "verdicts.json", text.encode() + b"\n")
    shown["sections"] = [
        (each, list(_drawn((each.picture,), out, *each.shown)) if each.picture else [])
        for each in found.sections
    ]
    if headings := [each.heading for each in found.sections if each.heading]:
        shown |= headings[0] | {"remarks": remarks(shown["table"], rivals=False)}
        shown["tiles"] += speed_tiles(found.benchmarks)
    for name in ("table", "theory", "payoff"):
        if shown[name] is not None:
            write_whole(out / f"{name}.json", to_json(shown[name]).encode() + b"\n")
    path = out / "report.html"
    page = _template().render(facts=what_ran(found.runs, found.benchmarks), **shown)
    write_whole(path, page.encode())
    return path


def write_index(folder: str | Path) -> Path:
    """Build ``index.html`` of a folder of frontier tasks, which leads to their pages.

    Returns the page's path. Raises `RecordError` as `boards` does.
    """
    path = Path(folder) / "index.html"
    drawn = [
        (each, list(_drawn((each.picture,), path.parent, *each.shown)) if each.picture else [])
        for each in width_sections(folder)
    ]
    page = _template().render(
        title="How sparse at equal quality?",
        lead="Of each task the arm that validation chose, against the best vanilla.",
        sections=[(index(folder), []), *drawn],
        facts=[],
        **dict.fromkeys(("table", "theory", "payoff", "findings")),
    )
    write_whole(path, page.encode())
    return path


def _of_arms(runs: list[Run], out: Path) -> dict[str, Any]:
    """What the template shows of runs."""
    table = compare(runs)
    theory = theory_of(table, runs)
    curvature = None if theory is None else curvature_table(theory)
    return {
        "table": table,
        "title": title(table),
        "lead": lead(table),
        "remarks": remarks(table),
        "tiles": tiles(table),
        "arms": arms_table(table),
        "pictures": list(_drawn(PICTURES, out, table, runs)),
        "theory": theory,
        "theory_pictures": list(_drawn(THEORY, out, table, runs)),
        "identity": identity_text(theory.identity) if theory and theory.identity else "",
        "how": how_text(theory) if theory else "",
        "curvature": curvature if curvature and curvature.rows else None,
        "runs": runs_table(table, runs),
        "differences": differences(table, runs),
    }


def _of_claims(found: Findings, runs: list[Run], out: Path) -> dict[str, Any]:
    """What the template shows of an experiment's verdicts; its title and lead go first."""
    drawn = [*_drawn(found.experiment.pictures, out, Arms(runs)), *_drawn((EFFECTS,), out, found)]
    return {**heading(found), "verdicts": findings_table(found), "claim_pictures": drawn}


def _of_benchmarks(measured: Benchmarks, out: Path) -> dict[str, Any]:
    """What the template shows of benchmarks; title and lead where there are no runs."""
    return {
        "title": benchmarks_title(measured),
        "lead": benchmarks_lead(measured),
        "benchmarks_lead": benchmarks_lead(measured),
        "tables_of": tables_of(measured),
        "benchmark_pictures": list(_drawn(BENCHMARK_PICTURES, out, measured)),
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

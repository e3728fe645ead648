"""An experiment's verdicts, for the terminal, the page, and docs/reproduction.md."""

from __future__ import annotations

import math
import textwrap
from collections.abc import Iterable
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from rich.console import Console
from rich.text import Text

from actsparse_lab.analysis import plots
from actsparse_lab.analysis.findings import OURS, Finding, Findings, findings
from actsparse_lab.analysis.manifest import REPRODUCTION
from actsparse_lab.analysis.numbers import amount, decimal
from actsparse_lab.analysis.plots import DARK, INK, LIGHT, WIDTH
from actsparse_lab.analysis.prose import pictures, sections
from actsparse_lab.analysis.tables import Cell, Column, Table, code, markdown
from actsparse_lab.papers.experiments import EXPERIMENTS
from actsparse_lab.records import RecordError, Run, read_runs

if TYPE_CHECKING:
    from matplotlib.axes import Axes

RULE = sections("report/rules.md")["Claims"]
STYLES: dict[str, Literal["yes", "no", "open"]] = {
    "holds": "yes", "does not hold here": "no", "undecided": "open"
}  # fmt: skip
ROW = 0.62  # inches of a question in the plot


def findings_in(folder: str | Path, runs: list[Run] | None = None) -> Findings | None:
    """The verdicts on the runs of a folder; None unless they are an experiment's.

    Raises `RecordError` for an experiment that is not known, and what reading raises.
    """
    manifest = REPRODUCTION.read(folder)
    if manifest is None:
        return None
    if manifest["name"] not in EXPERIMENTS:
        raise RecordError(
            f"{Path(folder) / REPRODUCTION.file}: unknown experiment {manifest['name']!r}; known: "
            f"{', '.join(EXPERIMENTS)}"
        )
    runs = read_runs(folder) if runs is None else runs
    return findings(EXPERIMENTS[manifest["name"]], runs, manifest)


def counts(found: Findings) -> str:
    """How many of the papers' claims got which verdict; checks and controls of ours apart.

    ``3 of 5 claims hold here, 1 does not, 1 undecided; 2 of 4 checks of ours hold``
    """
    theirs = [each for each in found.findings if each.question.claim.source != OURS]
    words = [each.verdict.word for each in theirs]
    holds, fails = words.count("holds"), words.count("does not hold here")
    said = f"{holds} of {len(words)} claims hold here"
    said += f", {fails} {'does' if fails == 1 else 'do'} not" if fails else ""
    rest = len(words) - holds - fails
    said += f", {rest} undecided" if rest else ""
    own = [each.verdict.word for each in found.findings if each not in theirs]
    return said + (f"; {own.count('holds')} of {len(own)} checks of ours hold" if own else "")


def heading(found: Findings) -> dict[str, str]:
    """Title and lead of the experiment's page."""
    experiment = found.experiment
    mark = "" if experiment.title.endswith("?") else ":"
    return {"title": f"{experiment.title}{mark} {counts(found)}", "lead": experiment.about}


def print_findings(found: Findings, console: Console) -> None:
    """The verdicts, for the terminal."""
    console.print(Text(heading(found)["title"], style="bold"))
    findings_table(found).print(console)


def findings_table(found: Findings) -> Table:
    """A row for each claim."""
    columns = (
        Column("claim", prose=True), Column("source", prose=True, brief=False),
        Column("effect of a seed", prose=True, brief=False), Column("bar"),
        Column("our figure"), Column("verdict"), Column("why", prose=True, brief=False),
    )  # fmt: skip
    rows = []
    for each in found.findings:
        claim, word = each.question.claim, each.verdict.word
        verdict = Cell(word, style=STYLES[word], markdown=f"**{word}**")
        told = (claim.text, claim.source, each.question.effect, each.bar, each.figure)
        rows.append((*told, verdict, each.verdict.why))
    return Table("verdicts", "verdicts", columns, tuple(rows), (RULE,))


def effects_plot(found: Findings, dark: bool = False) -> bytes | None:
    """Every question's effects: a mark a seed, the interval, and the bar they must lie beyond."""
    shown = [each for each in found.findings if each.effects]
    if not shown:
        return None
    heights = (WIDTH, ROW * len(shown) * 1.6 + 0.6)
    figure, every = plots.new_figure(dark, rows=len(shown), size=heights)
    colours = dict(zip(STYLES, _colours(dark), strict=True))
    lines: dict[str, Any] = {}
    for axes, each in zip(every, shown, strict=True):
        word, mean = each.verdict.word, each.verdict.estimate
        # a logarithm is drawn as the ratio that it is of
        place = math.exp if (log := each.question.scale == "log") else float
        colour = colours[word]
        bar, rises = place(each.question.claim.bar), each.question.claim.direction == "rises"
        axes.axvline(bar, color=INK[dark], linestyle=":", linewidth=1.2)
        values = [place(effect) for effect in each.effects.values()]
        axes.plot(values, [0] * len(values), "o", color=colour, alpha=0.45, markersize=6)
        if mean is not None:
            ends = [mean.low, mean.mean, mean.high] if mean.half else [mean.mean]
            (lines[word],) = axes.plot(
                [place(end) for end in ends if end is not None], [0] * len(ends), "|-",
                color=colour, linewidth=2.4, markersize=14, markeredgewidth=2.4,
            )  # fmt: skip
        axes.set_yticks([])
        axes.grid(visible=False)
        axes.spines["left"].set_visible(False)
        axes.tick_params(labelsize=9)
        if log:
            plots.log_axis(axes, "x", few=True)
        _ticks(axes, each)
        title = textwrap.fill(each.question.claim.text, 66)
        axes.set_title(title, loc="left", fontsize=9.5, color=INK[dark])
        axes.margins(x=0.08, y=1)
        low, high = axes.get_xlim()
        axes.axvspan(bar if rises else low, high if rises else bar, color=INK[dark], alpha=0.07)
        axes.set_xlim(low, high)
    return plots.render(figure, lines)


(EFFECTS,) = pictures({"effects": effects_plot}, "report/captions.md")


def _colours(dark: bool) -> Iterable[str]:
    palette = DARK if dark else LIGHT
    return palette[2], palette[1], plots.SERIES_INK[dark]


def _ticks(axes: Axes, found: Finding) -> None:
    """Few, and labelled as effects are shown; of ratios at round ones."""
    from matplotlib.ticker import FuncFormatter, MaxNLocator

    if found.question.scale == "log":
        axes.xaxis.set_major_formatter(FuncFormatter(lambda ratio, _: f"× {amount(ratio)}"))
        return
    axes.xaxis.set_major_locator(MaxNLocator(5))
    axes.xaxis.set_major_formatter(FuncFormatter(lambda value, _: found.value(value)))


# -- docs/reproduction.md -----------------------------------------------------------------------


def reproductions_in(folder: str | Path) -> dict[str, Path]:
    """The experiments whose folders lie in ``folder``, in the order of `EXPERIMENTS`."""
    found: dict[str, Path] = {}
    for path in sorted(Path(folder).glob(f"*/{REPRODUCTION.file}")):
        manifest = REPRODUCTION.read(path.parent)
        assert manifest is not None
        if (name := str(manifest["name"])) in found:
            raise RecordError(f"{found[name]} and {path.parent} both hold {name}; keep one of them")
        found[name] = path.parent
    return {name: found[name] for name in EXPERIMENTS if name in found}


def markdown_reproduction(folder: str | Path, link: str = "") -> str:
    """The page of all experiments in ``folder``; ``link`` is what leads to it from the page."""
    places = reproductions_in(folder)
    if not places:
        raise RecordError(
            f"no {REPRODUCTION.file} in a folder under {folder}; `actsparse reproduce` makes them"
        )
    every: dict[str, tuple[Findings, list[Run]]] = {}
    for name, place in places.items():
        runs = read_runs(place)
        found = findings_in(place, runs)
        assert found is not None
        every[name] = found, runs
    heads = (Column("experiment"), Column("claim", prose=True), Column("source"))
    rows = tuple(
        (
            Cell(name, markdown=f"[{name}](#{name})"),
            each.question.claim.text,
            each.question.claim.source,
            each.figure,
            each.verdict.word,
        )
        for name, (found, _) in every.items()
        for each in found.findings
    )
    note = f"{len(rows)} verdicts, of claims and of checks of ours. {RULE}"
    columns = (*heads, Column("our figure"), Column("verdict"))
    summary = Table("experiments", "verdicts", columns, rows, (note,)).markdown()
    lines = [_INTRODUCTION, "", summary.rstrip("\n")]
    for name, (found, runs) in every.items():
        lines += ["", *_section(name, found, runs, places[name], link)]
    return "\n".join(lines) + "\n"


_INTRODUCTION = """# The papers' experiments, small

Made from records by `actsparse report benchmarks/reproduce --markdown`; do not edit. v1 is
arXiv 2309.03004, v2 is arXiv 2605.25612 (Peng et al.)."""


def _section(name: str, found: Findings, runs: list[Run], folder: Path, link: str) -> list[str]:
    experiment, place = found.experiment, f"{link}{folder.name}"
    mark = "" if experiment.title.endswith("?") else "."
    lines = [f"## {name}", "", f"**{experiment.title}{mark}** {experiment.about}", ""]
    for picture in (*experiment.pictures, EFFECTS):
        if not (folder / "plots" / f"{picture.name}.png").is_file():
            continue  # these records do not hold what it shows
        lines += [f"![{picture.title}]({place}/plots/{picture.name}.png)", ""]
    lines += [markdown_findings(found)]
    if experiment.limits:
        lines += [f"*Limits.* {experiment.limits}", ""]
    return [*lines, *_made(found.manifest, runs)]


def markdown_findings(found: Findings) -> str:
    """The verdicts on one experiment, as a table."""
    return replace(findings_table(found), notes=()).markdown()


def _made(manifest: dict[str, Any], runs: list[Run]) -> list[str]:
    hardware = runs[0].header["hardware"] if runs else {}
    where = hardware.get("gpu") or hardware.get("cpu")
    took = f"{decimal(manifest['time']['seconds'] / 60, 1)} min in all, {len(runs)} runs judged"
    on = markdown(f"{hardware.get('cores')} cores ({where})")
    return [f"{code(manifest['command'])}: {took}, on {on}."]

"""What benchmarks found, in words and tables: dense time and memory over a program's own."""

from __future__ import annotations

from collections.abc import Callable, Iterator

from rich.console import Console
from rich.text import Text

from actsparse_lab.analysis.numbers import NONE, amount, decimal, percent, span
from actsparse_lab.analysis.tables import Cell, Column, Table
from actsparse_lab.report.benchmarks import (
    KINDS,
    OURS,
    PHASES,
    PROGRAMS,
    Benchmarks,
    Ratio,
    Row,
    Whole,
)

BRIEF = 8  # columns that fit a terminal
NAMES = {"bfloat16": "dense bfloat16"}
GAIN = {"forward": "forward", "training": "forward + backward"}


def benchmarks_title(measured: Benchmarks) -> str:
    """The finding in one line: from the worst to the best of all that was measured."""
    gains = [gain for layer in measured.layers for row in layer.rows for gain in _best(row)]
    said = [f"one MLP {span(gains)}"] if gains else []
    wholes = [whole.ratio.value for whole in measured.wholes]
    said += [f"a whole model {span(wholes)}"] if wholes else []
    return f"Dense time ÷ sparse time: {'; '.join(said)}"


def benchmarks_lead(measured: Benchmarks) -> str:
    """What the title's numbers are of."""
    said = []
    rows = [row for layer in measured.layers for row in layer.rows]
    if rows:
        densities = span([row.density for row in rows], 3)
        tokens = span([row.tokens for row in rows], 0)
        said.append(
            f"One MLP at densities {densities} and T = {tokens}: at each the faster of the "
            f"programs, sparse and screened, also where dense is faster than both."
        )
    if measured.wholes:
        densities = span([whole.density for whole in measured.wholes], 3)
        said.append(f"Whole models at densities {densities}, as accelerated.")
    return " ".join(said)


def speed_tiles(measured: Benchmarks | None) -> list[tuple[str, str]]:
    """Of a trained model alone: its training step, inference, and what is kept for backward."""
    found = []
    for whole in measured.wholes if measured else ():
        phase = whole.label.rpartition(", ")[2]
        if phase not in PHASES:
            continue
        of = "a training step" if phase == "training" else "inference"
        limit = decimal(whole.limit.value, 2)
        found.append(
            (
                f"{decimal(whole.ratio.value, 2)} ×",
                f"as fast in {of} as the best dense (limit {limit})",
            )
        )
        if whole.kept is not None:
            found.append((percent(1 - whole.kept, 0), "less memory kept for backward"))
    return found


def tables_of(measured: Benchmarks) -> list[Table]:
    """The charts' numbers: one MLP, the densities at which it breaks even, whole models."""
    tables = (_layer_table(measured), _break_even_table(measured), _whole_table(measured))
    return [table for table in tables if table.rows]


def markdown_benchmarks(measured: Benchmarks) -> str:
    """The tables, for a README or a lab log; intervals are in brackets."""
    return "\n".join(table.markdown() for table in tables_of(measured))


def print_benchmarks(measured: Benchmarks, console: Console) -> None:
    """The finding and the tables' first columns, for the terminal; the page has the intervals."""
    console.print(Text(benchmarks_title(measured), style="bold"))
    console.print(Text(benchmarks_lead(measured)))
    for table in tables_of(measured):
        table.print(console)
        console.print()


def _columns(first: str, *heads: str) -> tuple[Column, ...]:
    rest = (Column(head, brief=at < BRIEF) for at, head in enumerate(heads, 1))
    return (Column(first, prose=True), *rest)


def _layer_table(measured: Benchmarks) -> Table:
    several = len(measured.layers) > 1
    every = [row for layer in measured.layers for row in layer.rows]
    timed = [
        (kind, program)
        for kind in KINDS
        for program in PROGRAMS
        if any(program in row.ratios.get(kind, {}) for row in every)
    ]
    named = [kind for kind in KINDS if any(kind in row.best_dense for row in every)]
    kept = [program for program in OURS if any(program in row.memory for row in every)]
    rows = tuple(
        (
            *((layer.label,) if several else ()),
            str(row.tokens),
            decimal(row.density),
            *(_ratio(row.ratios.get(kind, {}).get(program)) for kind, program in timed),
            *(row.best_dense.get(kind, NONE) for kind in named),
            *(decimal(row.memory.get(program), 2) for program in kept),
        )
        for layer in measured.layers
        for row in layer.rows
    )
    heads = [*(["record"] if several else []), "T", "density"]
    heads += [f"{GAIN[kind]}: {NAMES.get(program, program)}" for kind, program in timed]
    heads += [f"{GAIN[kind]}: best dense" for kind in named]
    heads += [f"memory kept: {program}" for program in kept]
    return Table("mlp-table", "One MLP, dense ÷ own time", _columns(*heads), rows)


def _break_even_table(measured: Benchmarks) -> Table:
    known = [
        (layer, kind) for layer in measured.layers for kind in KINDS if layer.break_even.get(kind)
    ]
    tokens = sorted({t for layer, kind in known for t in layer.break_even[kind]})
    heads = ("break-even density", *(f"T = {t}" for t in tokens))
    rows = tuple(
        (
            ", ".join(filter(None, [layer.label, GAIN[kind]])),
            *(decimal(layer.break_even[kind].get(t)) for t in tokens),
        )
        for layer, kind in known
    )
    return Table("break-even-table", "Break-even", _columns(*heads), rows)


def _whole_table(measured: Benchmarks) -> Table:
    columns: dict[str, Callable[[Whole], Cell | str]] = {
        "density": lambda whole: decimal(whole.density),
        "dense, s": lambda whole: amount(whole.dense),
        "dense ÷ accelerated": lambda whole: _ratio(whole.ratio),
        "dense ÷ dense bfloat16": lambda whole: _ratio(whole.half),
        "Amdahl": lambda whole: decimal(whole.amdahl, 2),
        "reached": lambda whole: percent(whole.reached, 0),
        "limit: without MLPs": lambda whole: _ratio(whole.limit),
        "MLPs alone": lambda whole: decimal(whole.mlp_ratio, 2),
        "peak memory": lambda whole: decimal(whole.memory, 2),
        "kept for backward": lambda whole: decimal(whole.kept, 2),
        "error of logits": lambda whole: amount(whole.error),
    }
    shown = {
        head: read
        for head, read in columns.items()
        if any(read(whole) != NONE for whole in measured.wholes)
    }
    rows = tuple(
        (whole.label, *(read(whole) for read in shown.values())) for whole in measured.wholes
    )
    return Table("model-table", "Whole models", _columns("model", *shown), rows)


def _best(row: Row) -> Iterator[float]:
    """Of each kind, dense ÷ the faster of our programs."""
    for ratios in row.ratios.values():
        ours = [ratios[program].value for program in OURS if program in ratios]
        yield from [max(ours)] if ours else []


def _ratio(ratio: Ratio | None) -> Cell | str:
    if ratio is None:
        return NONE
    return Cell(decimal(ratio.value, 2), (f"{ratio.low:.2f} … {ratio.high:.2f}",))

"""What the demo's page has beside the frontier: the text that was written, and the full form."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

from actsparse.values import Text
from actsparse_lab.analysis.manifest import FRONTIER, read_checked
from actsparse_lab.analysis.tables import Column, Table
from actsparse_lab.records import read_runs
from actsparse_lab.report.frontier_page import Section, sections
from actsparse_lab.report.frontier_plot import FRONTIER_PLOT

FILLED_IN = "filled-in.json"
FULL = Path("benchmarks/frontier/demo")  # in a checkout
_ROW = {"given": Text, "dense": Text, "sparse": Text}
_TEXT = (
    "The trained network fills in hidden spans of held-out text, the likeliest byte each time. It "
    "is a small one, trained for minutes. Sparse execution skips only what is multiplied by zero, "
    "so that both fill in the same."
)


def demo_sections(folder: Path) -> Iterator[Section]:
    """The text that a demo wrote, and beside a demo of few seeds the record of the full form.

    Raises `RecordError` for a file of another shape.
    """
    if (written := read_checked(folder / FILLED_IN, {"rows": [_ROW]})) is not None:
        rows = tuple(
            (each["given"], each["dense"], _sparse(each["dense"], each["sparse"]))
            for each in written["rows"]
        )
        columns = (Column("held-out text", prose=True), Column("dense", prose=True))
        table = Table("filled-in", "Text", (*columns, Column("accelerated", prose=True)), rows)
        yield Section("filled-in", "What it fills in", _TEXT, table=table)
    found = FRONTIER.read(folder)
    if found is None or found["task"] != "demo" or found["seeds"] > 1 or not FULL.is_dir():
        return
    for each in sections(FULL, read_runs(FULL)):
        if each.picture is not None and each.name == FRONTIER_PLOT.name:
            own = replace(each.picture, name="frontier-full")
            table = replace(each.table, name="frontier-full-table")
            title = "The same with five paired seeds, from the record"
            yield replace(each, title=title, picture=own, table=table, heading={})


def _sparse(dense: str, sparse: str) -> str:
    return "the same" if dense == sparse else sparse

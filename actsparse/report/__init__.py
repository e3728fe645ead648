"""For human eyes: the table of arms, its plots, one page that holds both. Reads records only."""

from __future__ import annotations

from actsparse.report.compare import Table, compare, to_json
from actsparse.report.page import markdown_table, print_table, write_report
from actsparse.report.words import markdown_theory

__all__ = [
    "Table",
    "compare",
    "markdown_table",
    "markdown_theory",
    "print_table",
    "to_json",
    "write_report",
]

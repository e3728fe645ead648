"""For human eyes: the table of arms, its plots, one page that holds both. Reads records only."""

from __future__ import annotations

from actsparse.report.compare import Table, compare, to_json
from actsparse.report.page import markdown_table, print_table, write_report

__all__ = ["Table", "compare", "markdown_table", "print_table", "to_json", "write_report"]

"""Tables, plots and pages of records: comparisons, the frontier, claims, benchmarks, model cards.

Reads records only.
"""

from __future__ import annotations

from actsparse_lab.analysis.comparison import Comparison, compare, plain, to_json
from actsparse_lab.report.arms_table import markdown_table, print_table
from actsparse_lab.report.benchmark_tables import markdown_benchmarks, print_benchmarks
from actsparse_lab.report.card import model_card
from actsparse_lab.report.frontier import frontiers_in
from actsparse_lab.report.frontier_page import (
    boards,
    markdown_frontier,
    markdown_scoreboard,
    print_board,
    scoreboard,
    write_scoreboard,
)  # fmt: skip
from actsparse_lab.report.page import gather, write_index, write_report
from actsparse_lab.report.reproduction import (
    findings_in,
    markdown_findings,
    markdown_reproduction,
    print_findings,
    reproductions_in,
)  # fmt: skip
from actsparse_lab.report.theory_tables import markdown_theory
from actsparse_lab.report.width import write_prediction
from actsparse_lab.report.width_page import markdown_widths

__all__ = [
    "Comparison", "boards", "compare", "findings_in", "frontiers_in", "gather",
    "markdown_benchmarks", "markdown_findings", "markdown_frontier", "markdown_reproduction",
    "markdown_scoreboard", "markdown_table", "markdown_theory", "markdown_widths", "model_card",
    "plain", "print_benchmarks", "print_board", "print_findings", "print_table",
    "reproductions_in", "scoreboard", "to_json", "write_index", "write_prediction",
    "write_report", "write_scoreboard",
]  # fmt: skip

"""For human eyes: the table of arms, the frontier, what silence pays, plots, pages, a model's card.

Reads records only.
"""

from __future__ import annotations

from actsparse_lab.report.board import boards, markdown_scoreboard, print_board
from actsparse_lab.report.card import model_card
from actsparse_lab.report.claims import CLAIMS
from actsparse_lab.report.comparison import Table, compare, plain, to_json
from actsparse_lab.report.frontier import frontiers_in
from actsparse_lab.report.frontier_page import (
    markdown_frontier,
    scoreboard,
    write_scoreboard,
)
from actsparse_lab.report.page import gather, markdown_table, print_table, write_report
from actsparse_lab.report.payoff import markdown_payoff, print_payoff
from actsparse_lab.report.reproduction import (
    findings_in,
    markdown_findings,
    markdown_reproduction,
    print_findings,
    reproductions_in,
)
from actsparse_lab.report.words import markdown_theory

__all__ = [
    "CLAIMS",
    "Table",
    "boards",
    "compare",
    "findings_in",
    "frontiers_in",
    "gather",
    "markdown_findings",
    "markdown_frontier",
    "markdown_payoff",
    "markdown_reproduction",
    "markdown_scoreboard",
    "markdown_table",
    "markdown_theory",
    "model_card",
    "plain",
    "print_board",
    "print_findings",
    "print_payoff",
    "print_table",
    "reproductions_in",
    "scoreboard",
    "to_json",
    "write_report",
    "write_scoreboard",
]

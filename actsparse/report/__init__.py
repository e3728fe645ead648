"""For human eyes: the table of arms and what silence pays, their plots, one page, a model's card.

Reads records only.
"""

from __future__ import annotations

from actsparse.report.card import model_card
from actsparse.report.claims import CLAIMS
from actsparse.report.compare import Table, compare, plain, to_json
from actsparse.report.page import gather, markdown_table, print_table, write_report
from actsparse.report.payoff import markdown_payoff, print_payoff
from actsparse.report.reproduction import (
    findings_in,
    markdown_findings,
    markdown_reproduction,
    print_findings,
    reproductions_in,
)
from actsparse.report.words import markdown_theory

__all__ = [
    "CLAIMS",
    "Table",
    "compare",
    "findings_in",
    "gather",
    "markdown_findings",
    "markdown_payoff",
    "markdown_reproduction",
    "markdown_table",
    "markdown_theory",
    "model_card",
    "plain",
    "print_findings",
    "print_payoff",
    "print_table",
    "reproductions_in",
    "to_json",
    "write_report",
]

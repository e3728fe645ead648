"""One table reads the same in the terminal, in Markdown and in HTML, whatever its cells hold."""

from __future__ import annotations

import io
import re
from html import unescape

import pytest
from hypothesis import given
from hypothesis import strategies as st
from rich.console import Console

from actsparse_lab.analysis.tables import Cell, Column, Table

WORDS = st.text("ab|<*`[]&\\1", min_size=1, max_size=8)
TABLE = Table(
    "place",
    "arms",
    (Column("arm"), Column("why", prose=True, brief=False), Column("density")),
    (
        (Cell("paper", marks=("undertrained",)), "as `r50` says", Cell("0.192 ± 0.014", bar=0.5)),
        ("vanilla", "a|b", Cell("1.50", ("1.40 … 1.60",), style="yes")),
    ),
    ("Read it so.",),
)


def printed(table: Table) -> str:
    out = io.StringIO()
    table.print(Console(file=out, width=80))
    return out.getvalue()


def test_markdown_has_every_cell_its_lines_and_marks() -> None:
    assert TABLE.markdown().splitlines() == [
        "| arm | why | density |",
        "| --- | --- | --- |",
        "| paper *(undertrained)* | as `r50` says | 0.192 ± 0.014 |",
        "| vanilla | a\\|b | 1.50 [1.40 … 1.60] |",
        "",
        "Read it so.",
    ]


def test_the_terminal_has_the_brief_columns_and_intervals_below() -> None:
    lines = [line.split() for line in printed(TABLE).splitlines()]
    assert lines == [
        ["arm", "density"],
        ["paper", "0.192"],
        ["undertrained", "±", "0.014"],
        ["vanilla", "1.50"],
    ]


def test_html_marks_the_subject_and_draws_bars() -> None:
    html = TABLE.html("paper")
    assert re.findall(r'<tr class="subject"><th scope="row">(\w+)', html) == ["paper"]
    assert '0.192<small>± 0.014</small><span class="bar" style="width:50.0%">' in html
    assert '<span class="verdict yes">1.50</span><small>1.40 … 1.60</small>' in html
    assert 'id="place"' in html
    assert html.endswith('<p class="note">Read it so.</p>')


@given(WORDS)
def test_no_cell_is_markup_in_html(text: str) -> None:
    html = Table("t", "t", (Column("head"),), ((text,),)).html()
    (cell,) = re.findall(r'<th scope="row">(.*?)</th>', html)
    assert "<" not in cell
    assert unescape(cell) == text


@given(WORDS)
def test_no_cell_ends_a_column_of_markdown(text: str) -> None:
    lines = Table("t", "t", (Column("head"),), ((text,),)).markdown().splitlines()
    (row,) = lines[2:]
    assert len(re.findall(r"(?<!\\)(?:\\\\)*\|", row)) == 2


def test_a_row_of_another_length_is_refused() -> None:
    table = Table("t", "t", (Column("one"), Column("two")), (("only",),))
    with pytest.raises(ValueError, match="longer"):
        table.markdown()

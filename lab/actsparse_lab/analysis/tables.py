"""One table, written for the terminal, in Markdown and in HTML."""

from __future__ import annotations

import re
from dataclasses import dataclass
from typing import Literal

from markupsafe import Markup
from rich.console import Console
from rich.table import Table as Grid
from rich.text import Text

from actsparse.terminal import UNLIMITED
from actsparse.values import printable

COLOURS = {"yes": "green", "no": "red", "open": "yellow"}
RULE = "---"


@dataclass(frozen=True)
class Cell:
    """A cell that is more than plain text.

    ``lines`` stand small under the text, in Markdown behind it in brackets; the terminal leaves
    them out. ``marks`` are labels; ``style`` colours the text; ``bar`` is a length from 0 to 1 that
    HTML draws; ``markdown`` is what Markdown has instead of the text; ``link`` is where it leads in
    HTML.
    """

    text: str
    lines: tuple[str, ...] = ()
    marks: tuple[str, ...] = ()
    style: Literal["yes", "no", "open", ""] = ""
    bar: float | None = None
    markdown: str | None = None
    link: str = ""


@dataclass(frozen=True)
class Column:
    """``prose`` wraps and stands left, and may hold Markdown; ``brief`` columns fit a terminal."""

    head: str
    prose: bool = False
    brief: bool = True


@dataclass(frozen=True)
class Table:
    """Rows of cells under columns, the first of which names the row; ``notes`` stand below.

    ``name`` is the place on the page that a link leads to.
    """

    name: str
    title: str
    columns: tuple[Column, ...]
    rows: tuple[tuple[Cell | str, ...], ...]
    notes: tuple[str, ...] = ()

    def markdown(self) -> str:
        """The table and its notes in Markdown.

        >>> print(Table("t", "T", (Column("arm"), Column("x")), (("a|b", "1"),)).markdown(), end="")
        | arm | x |
        | --- | --- |
        | a\\|b | 1 |
        """
        heads = [markdown(column.head) for column in self.columns]
        lines = [heads, [RULE] * len(heads)]
        for row in self.rows:
            pairs = zip(row, self.columns, strict=True)
            lines.append([_in_markdown(cell, column) for cell, column in pairs])
        text = "".join(f"| {' | '.join(line)} |\n" for line in lines)
        return text + "".join(f"\n{note}\n" for note in self.notes)

    def html(self, subject: str | None = None) -> Markup:
        """The table in HTML; the row that begins with ``subject`` stands out."""
        heads = Markup("").join(
            Markup('<th scope="col"{}>{}</th>').format(_prose(column), column.head)
            for column in self.columns
        )
        rows = Markup("\n").join(self._row(row, subject) for row in self.rows)
        return Markup(
            '<div class="card scroll" id="{}" tabindex="0" role="region" aria-label="Table: {}">\n'
            "<table>\n<thead><tr>{}</tr></thead>\n<tbody>\n{}\n</tbody>\n</table>\n</div>\n{}"
        ).format(
            self.name,
            self.title,
            heads,
            rows,
            Markup("\n").join(Markup('<p class="note">{}</p>').format(n) for n in self.notes),
        )

    def _row(self, row: tuple[Cell | str, ...], subject: str | None) -> Markup:
        cells = []
        for at, (cell, column) in enumerate(zip(row, self.columns, strict=True)):
            tag = Markup("td") if at else Markup('th scope="row"')
            inside = _in_html(cell, column)
            cells.append(Markup("<{}{}>{}</{}>").format(tag, _prose(column), inside, tag[:2]))
        own = Markup(' class="subject"') if _text(row[0]) == subject else ""
        return Markup("<tr{}>{}</tr>").format(own, Markup("").join(cells))

    def print(self, console: Console) -> None:
        """The brief columns, for the terminal."""
        grid = Grid(box=None, pad_edge=False, collapse_padding=True, header_style="bold")
        shown = [at for at, column in enumerate(self.columns) if column.brief]
        for at in shown:
            column = self.columns[at]
            words = " ".join([column.head, *(_text(row[at]) for row in self.rows)]).split()
            grid.add_column(
                Text(column.head),
                justify="left" if column.prose or not at else "right",
                overflow="fold",
                no_wrap=not at and not column.prose,
                min_width=0 if column.prose else max(map(len, words), default=0),
            )
        whole = console.width >= UNLIMITED
        for row in self.rows:
            grid.add_row(*(_in_terminal(row[at], self.columns[at], whole) for at in shown))
        console.print(grid)


def _text(cell: Cell | str) -> str:
    return cell if isinstance(cell, str) else cell.text


def _stacked(cell: Cell | str, column: Column) -> list[str]:
    """The text, an interval on a line of its own."""
    text = printable(_text(cell))
    return [text] if column.prose else text.replace(" ± ", "\n± ").split("\n")


def _in_markdown(cell: Cell | str, column: Column) -> str:
    if isinstance(cell, Cell) and cell.markdown is not None:
        return cell.markdown
    text = _text(cell)
    text = text.replace("|", "\\|") if column.prose else markdown(text)
    if isinstance(cell, str):
        return text
    lines = [f" [{markdown(line)}]" for line in cell.lines]
    return "".join([text, *lines, *(f" *({mark})*" for mark in cell.marks)])


def _prose(column: Column) -> Markup:
    return Markup(' class="prose"') if column.prose else Markup("")


def _in_html(cell: Cell | str, column: Column) -> Markup:
    first, *small = _stacked(cell, column)
    more = cell if isinstance(cell, Cell) else Cell("")
    style = Markup('<span class="verdict {}">{}</span>')
    text = style.format(more.style, first) if more.style else Markup("{}").format(first)
    if more.link:
        text = Markup('<a href="{}">{}</a>').format(more.link, text)
    text += Markup("").join(
        Markup("<small>{}</small>").format(printable(line)) for line in (*small, *more.lines)
    )
    text += Markup("").join(Markup('<span class="mark">{}</span>').format(m) for m in more.marks)
    if more.bar is not None:
        text += Markup('<span class="bar" style="width:{:.1f}%"></span>').format(100 * more.bar)
    return text


def _in_terminal(cell: Cell | str, column: Column, whole: bool) -> Text:
    """The cell in one line if ``whole``, else stacked to save width."""
    more = cell if isinstance(cell, Cell) else Cell("")
    end = " " if whole else "\n"
    text = Text(end.join(_stacked(cell, column)), style=COLOURS.get(more.style, ""))
    for mark in more.marks:
        text.append(f" ({mark})" if whole else f"\n{mark}", style="yellow")
    return text


def markdown(text: str) -> str:
    r"""Text in one line of Markdown, where no character of it means anything.

    >>> print(markdown("a|b <i> [c](d)"))
    a\|b \<i\> \[c\](d)
    """
    return re.sub(r"([\\`*\[\]<>|])", r"\\\1", printable(text)).replace("\n", " ")


def code(text: str) -> str:
    """Text in Markdown as it is, in one line; a backtick would end it."""
    return f"`{printable(text).translate({96: chr(39), 10: ' '})}`"

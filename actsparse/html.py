"""Tables for notebooks, which show an object by its ``_repr_html_``."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from html import escape


def table(heads: Sequence[str], rows: Iterable[Sequence[object]], caption: str = "") -> str:
    """A table in HTML; all text is escaped.

    >>> table(["block"], [["a<b"]], "1 block")
    '<table><caption>1 block</caption><tr><th>block</th></tr><tr><td>a&lt;b</td></tr></table>'
    """
    head = "".join(f"<th>{escape(each)}</th>" for each in heads)
    body = "".join(
        f"<tr>{''.join(f'<td>{escape(_text(cell))}</td>' for cell in row)}</tr>" for row in rows
    )
    above = f"<caption>{escape(caption)}</caption>" if caption else ""
    return f"<table>{above}<tr>{head}</tr>{body}</table>"


def lines(texts: Iterable[str]) -> str:
    """A paragraph for each text.

    >>> lines(["a & b"])
    '<p>a &amp; b</p>'
    """
    return "".join(f"<p>{escape(text)}</p>" for text in texts)


def _text(cell: object) -> str:
    if cell is None:
        return ""
    return f"{cell:.4g}" if isinstance(cell, float) else str(cell)

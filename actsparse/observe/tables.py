"""Tables of measures and trials for the terminal."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any


def table_of(
    columns: dict[str, tuple[str, Callable[[Any], str]]],
    summaries: Mapping[Any, dict[str, Any] | None],
) -> Any:
    """A rich table: a row for each block of each phase's summary, and one for all."""
    from rich.table import Table

    table = Table(box=None, pad_edge=False, header_style="bold")
    for title in ("phase", "block"):
        table.add_column(title, no_wrap=True)
    for title in columns:
        table.add_column(title, justify="right", overflow="fold")
    for phase, block, *cells in cells_of(columns, summaries):
        table.add_row(phase, block, *cells, end_section=block == "all")
    return table


def cells_of(
    columns: dict[str, tuple[str, Callable[[Any], str]]],
    summaries: Mapping[Any, dict[str, Any] | None],
) -> list[list[str]]:
    """Phase, block and ``columns`` of each block of each phase's summary, and of all."""
    found = []
    for phase, summary in summaries.items():
        if summary is None:
            found.append([phase, "no pass seen", *[""] * len(columns)])
            continue
        for row in [*summary["blocks"], summary | {"block": "all"}]:
            cells = [
                "" if row.get(key) is None else write(row[key]) for key, write in columns.values()
            ]
            found.append([phase, row["block"], *cells])
    return found


def table_of_rows(title: str, rows: Sequence[Mapping[str, Any]], columns: Sequence[str]) -> Any:
    """A rich table of a trial's rows."""
    from rich.table import Table

    table = Table(title=title, title_justify="left", box=None, pad_edge=False, header_style="bold")
    for column in columns:
        words = any(isinstance(row.get(column), str) for row in rows)
        table.add_column(column, justify="left" if words else "right", overflow="fold")
    for row in rows:
        table.add_row(*(_cell(row.get(column)) for column in columns))
    return table


def _cell(value: Any) -> str:
    if value is None:
        return ""
    return f"{value:.4g}" if isinstance(value, float) else str(value)

"""How a session and measures are shown: text, HTML in notebooks, a plot."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any

from actsparse import html
from actsparse.extras import needed
from actsparse.observe.registry import MEASURES
from actsparse.observe.tables import cells_of

UNLIMITED = 10_000  # columns


def text_of(tables: Iterable[Any]) -> str:
    """Tables of rich as text, as wide as they need."""
    from rich.console import Console

    console = Console(width=UNLIMITED, color_system=None)
    with console.capture() as capture:
        for table in tables:
            console.print(table)
    return capture.get().rstrip()


def html_of(measures: Iterable[str], summaries: Mapping[Any, dict[str, Any] | None]) -> str:
    """A table for each measure, of each phase's summary."""
    known = [name for name in measures if name in MEASURES]
    return "".join(
        html.table(["phase", "block", *MEASURES[name].columns], cells, name)
        for name in known
        if (cells := cells_of(MEASURES[name].columns, summaries))
    )


def plotted(summaries: Mapping[str, dict[str, Any] | None], key: str, ax: Any | None = None) -> Any:
    """A line for each phase: the number ``key`` of each block.

    Raises:
        ModuleNotFoundError: matplotlib is missing.
        ValueError: no phase has such a number.
    """
    pyplot = needed("matplotlib.pyplot", "plot()")
    lines = {
        phase: [(row["block"], row[key]) for row in summary["blocks"] if key in row]
        for phase, summary in summaries.items()
        if summary is not None
    }
    if not any(lines.values()):
        known = {k for s in summaries.values() if s for row in s["blocks"] for k in row}
        numbers = ", ".join(sorted(known - {"block"})) or "none, no pass was seen"
        raise ValueError(f"no block has a number {key!r}; known: {numbers}")
    axes = pyplot.subplots()[1] if ax is None else ax
    for phase, points in lines.items():
        axes.plot([name for name, _ in points], [value for _, value in points], "o-", label=phase)
    axes.set_ylabel(key.replace("_", " "))
    axes.set_ylim(bottom=0)
    axes.tick_params(axis="x", rotation=90)
    axes.legend()
    return axes

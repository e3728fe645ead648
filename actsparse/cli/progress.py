"""How long work shows itself: a bar and the time left in a terminal, plain lines elsewhere."""

from __future__ import annotations

import time
from types import TracebackType
from typing import Any, Self

from rich.console import Console
from rich.progress import BarColumn, Progress, TextColumn, TimeElapsedColumn, TimeRemainingColumn
from rich.text import Text

from actsparse.time_left import TimeLeft

QUIET = 10.0  # seconds between two lines of one task
PERIOD = 600.0  # seconds over which a bar takes the speed, since runs and rounds come unevenly


def bar(console: Console, transient: bool = True) -> Progress:
    """rich's bar with counts, the time that has passed and the time left; none but in a terminal.

    Args:
        console: where it is shown.
        transient: whether it goes away at the end.
    """
    return Progress(
        TextColumn("{task.description}"),
        BarColumn(),
        TextColumn("{task.completed:.0f}/{task.total:.0f}"),
        TimeElapsedColumn(),
        TextColumn("left"),
        TimeRemainingColumn(),
        console=console,
        disable=not console.is_terminal,
        transient=transient,
        speed_estimate_period=PERIOD,
    )


class Progressing:
    """Tasks one after another, counted; call it with name, number done and number in all.

    >>> import io
    >>> out = io.StringIO()
    >>> with Progressing(Console(file=out), "passes") as told:
    ...     told("density", 1, 2), told("density", 2, 2)
    (None, None)
    >>> print(out.getvalue(), end="")
    density: 2 passes
    """

    def __init__(self, console: Console, unit: str) -> None:
        self._console, self._unit, self._bar = console, unit, bar(console)
        self._tasks: dict[str, Any] = {}
        self._lefts: dict[str, TimeLeft] = {}
        self._said: dict[str, float] = {}

    def __call__(self, name: str, done: int, total: int) -> None:
        """Show how far a task is."""
        if name not in self._tasks:
            for each in self._bar.tasks:  # those before it are over: their clocks stop
                over = max(1, each.completed)
                self._bar.update(each.id, total=over, completed=over)
            self._tasks[name] = self._bar.add_task(name, total=total)
            self._lefts[name], self._said[name] = TimeLeft(), time.monotonic()
            self._line(f"{name}: {total} {self._unit}" if total > 1 else name)
        self._bar.update(self._tasks[name], total=total, completed=done)
        if time.monotonic() - self._said[name] > QUIET and done < total:
            self._said[name] = time.monotonic()
            about = self._lefts[name](done / total)
            self._line(f"{name}: {done} of {total} {self._unit}{about}")

    def _line(self, text: str) -> None:
        if not self._console.is_terminal:
            self._console.print(Text(text), soft_wrap=True)

    def __enter__(self) -> Self:
        self._bar.start()
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self._bar.stop()

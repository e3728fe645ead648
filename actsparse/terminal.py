"""Print text to the terminal as it is, never as markup or as a control sequence."""

from __future__ import annotations

import os
from collections.abc import Iterable
from typing import Any

from rich.console import Console, ConsoleOptions, RenderableType
from rich.segment import Segment
from typing_extensions import override

from actsparse.values import printable

UNLIMITED = 10_000  # columns


class Terminal(Console):
    r"""rich's console without markup; control characters in text are escaped.

    In a pipe or a file its width is that of ``COLUMNS``, or else unlimited, so that tables stay
    whole.

    >>> Terminal().print("[bold]arm[/bold] \x1b[31m")
    [bold]arm[/bold] \x1b[31m
    """

    def __init__(self, **options: Any) -> None:
        super().__init__(markup=False, emoji=False, **options)
        if not (self.is_terminal or "COLUMNS" in os.environ):
            self.width = UNLIMITED

    @override
    def render(
        self, renderable: RenderableType, options: ConsoleOptions | None = None
    ) -> Iterable[Segment]:
        """The segments of a renderable, their text escaped."""
        for segment in super().render(renderable, options):
            text, style, control = segment
            yield segment if control else Segment(printable(text), style)

"""What a run read at the ends of its training: at first, at last, and the change between."""

from __future__ import annotations

from typing import Literal

from actsparse_lab.records import Entry, Run
from actsparse_lab.report.findings import Reader, log_ratio
from actsparse_lab.report.measures import number

Lines = Literal["train", "measured"]


def change(lines: Lines, *keys: str, least_loss: float | None = None) -> Reader:
    """Reads ``ln(last / first)`` of a number over a run's lines of one kind.

    With ``least_loss`` the last line is the last whose ``loss`` is at least that. None where there
    are fewer than two lines, or the first or the last has no number above 0 there.
    """

    def read(run: Run) -> float | None:
        entries: list[Entry] = getattr(run, lines)
        if least_loss is not None:
            losses = [number(entry, "loss") for entry in entries]
            large = [at for at, loss in enumerate(losses) if loss and loss >= least_loss]
            entries = entries[: large[-1] + 1] if large else []
        if len(entries) < 2:
            return None
        first, last = number(entries[0], *keys), number(entries[-1], *keys)
        return None if first is None or last is None else log_ratio(last, first)

    return read


def final(run: Run, lines: Lines) -> Entry | None:
    """The line that a run wrote at its last step; None where there is none."""
    entries: list[Entry] = getattr(run, lines)
    done = run.result["step"] if run.result else None
    return entries[-1] if entries and entries[-1]["step"] == done else None


def at_end(lines: Lines, *keys: str) -> Reader:
    """Reads a number of a run's `final` line."""
    return lambda run: number(final(run, lines), *keys)

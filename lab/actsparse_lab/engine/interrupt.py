"""Ctrl-C and SIGTERM: a checkpoint first, then the end."""

from __future__ import annotations

import os
import signal
import threading
from pathlib import Path
from types import FrameType, TracebackType
from typing import Any, Self


class Interrupted(RuntimeError):
    """A training that a signal ended after ``step`` steps; ``checkpoint`` is where it goes on."""

    def __init__(self, step: int, checkpoint: Path) -> None:
        super().__init__(
            f"interrupted after {step} steps; the same command goes on from {checkpoint}"
        )
        self.step, self.checkpoint = step, checkpoint


class Interruption:
    """Notes a SIGINT or SIGTERM while it is entered; a second SIGINT ends the process at once.

    A second SIGTERM does not: torchrun passes on what a scheduler may have sent to all already.

    Called, it says whether one came. Signals that are ignored, and threads that get none, are left
    alone.

    >>> with Interruption() as interrupted:
    ...     signal.raise_signal(signal.SIGTERM)
    ...     interrupted()
    True
    """

    def __init__(self) -> None:
        self.came = False
        self._before: dict[int, Any] = {}

    def __call__(self) -> bool:
        """Whether a signal came."""
        return self.came

    def _note(self, number: int, frame: FrameType | None) -> None:
        self.came = True
        if number == signal.SIGINT:
            signal.signal(number, self._before.pop(number))
            said = b"\nstopping after this step, with a checkpoint; once more: at once\n"
            os.write(2, said)

    def _restore(self) -> None:
        for number, handler in self._before.items():
            signal.signal(number, handler)
        self._before.clear()

    def __enter__(self) -> Self:
        if threading.current_thread() is threading.main_thread():
            for number in (signal.SIGINT, signal.SIGTERM):
                if signal.getsignal(number) is not signal.SIG_IGN:
                    self._before[number] = signal.signal(number, self._note)
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self._restore()

"""How long work will still take."""

from __future__ import annotations

import time
from collections.abc import Callable


def in_words(seconds: float) -> str:
    """A duration, rounded for reading.

    >>> in_words(42), in_words(200), in_words(9000)
    ('42 s', '3 min', '2.5 h')
    """
    if seconds < 100:
        return f"{seconds:.0f} s"
    return f"{seconds / 60:.0f} min" if seconds < 6000 else f"{seconds / 3600:.1f} h"


class TimeLeft:
    """Estimates the time left by what is done so far, since it was made.

    >>> times = iter([0.0, 30.0])
    >>> left = TimeLeft(clock=lambda: next(times))
    >>> left(0.25)
    ', about 90 s left'
    >>> left(0.0)  # nothing is known yet
    ''
    """

    def __init__(self, clock: Callable[[], float] = time.monotonic) -> None:
        self._clock, self._began = clock, clock()

    def __call__(self, done: float) -> str:
        """What to add to a line; ``done`` is the share of the work from 0 to 1."""
        if not 0 < done < 1:
            return ""
        seconds = (self._clock() - self._began) * (1 - done) / done
        return f", about {in_words(seconds)} left"

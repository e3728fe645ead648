"""Schedules: a ramp over the first steps of training."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Annotated

from actsparse.values import Rule, check_fields

Over = Annotated[
    int | float,
    Rule(
        "a number of steps (int > 0) or a fraction of all steps (float in (0, 1])",
        lambda over: over > 0 and (isinstance(over, int) or over <= 1),
    ),
]


@dataclass(frozen=True)
class Ramp:
    """Rises linearly from 0 at step 0 to 1 at the end of ``over`` and stays there.

    ``over`` is a number of optimizer steps (int), or a fraction of all steps (float up to 1).

    >>> Ramp(over=0.5).value(step=25, steps=100)
    0.5
    >>> Ramp(over=10).value(step=25, steps=None)
    1.0
    """

    over: Over

    def __post_init__(self) -> None:
        check_fields(self, form=type(self).__name__ + "({}={})")

    def length(self, steps: int | None) -> float:
        """``over`` as a number of steps, out of ``steps``.

        Raises:
            ValueError: ``over`` is a fraction and the number of steps unknown.
        """
        if isinstance(self.over, int):
            return self.over
        if steps is None:
            raise ValueError(
                f"{self!r} needs the number of steps: call handle.attach(optimizer, steps=...)"
            )
        return self.over * steps

    def value(self, step: int, steps: int | None) -> float:
        """The ramp after ``step`` optimizer steps out of ``steps``.

        Raises:
            ValueError: ``over`` is a fraction, the number of steps unknown, and ``step`` not 0.
        """
        if step == 0:  # wherever the ramp ends
            return 0.0
        return min(1.0, step / self.length(steps))

    def __str__(self) -> str:
        share = isinstance(self.over, float)
        return f"over {self.over:.0%} of the steps" if share else f"over {self.over} steps"


def ramp_note(ramps: list[Ramp]) -> str:
    """How a modification's schedules read in a handle's table."""
    return "".join(f", {ramp}" for ramp in ramps)

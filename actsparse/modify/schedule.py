"""How far a change has come: a ramp over the first steps of training, a release over the last."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Annotated

from typing_extensions import override

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
        return self.over * self._known(steps) if isinstance(self.over, float) else self.over

    def _known(self, steps: int | None) -> int:
        if steps is None:
            raise ValueError(
                f"{self!r} needs the number of steps: handle.attach(optimizer, steps=...)"
            )
        return steps

    def value(self, step: int, steps: int | None) -> float:
        """The ramp after ``step`` optimizer steps out of ``steps``.

        Raises:
            ValueError: ``over`` is a fraction, the number of steps unknown, and ``step`` not 0.
        """
        if step == 0:  # wherever the ramp ends
            return 0.0
        return min(1.0, step / self.length(steps))

    def _steps(self) -> str:
        return (
            f"{self.over:.0%} of the steps"
            if isinstance(self.over, float)
            else f"{self.over} steps"
        )

    def __str__(self) -> str:
        return f"over {self._steps()}"


class Release(Ramp):
    """Stays at 1 and falls linearly to 0 over the last ``over`` steps of training.

    ``over`` as in :class:`Ramp`; either way the number of all steps must be known. After the last
    step it is 0, and stays there.

    >>> [Release(over=0.2).value(step, steps=100) for step in (0, 80, 90, 100)]
    [1.0, 1.0, 0.5, 0.0]
    """

    @override
    def value(self, step: int, steps: int | None) -> float:
        """The release after ``step`` optimizer steps out of ``steps``.

        Raises:
            ValueError: the number of steps is unknown, and ``step`` not 0.
        """
        if step == 0:  # wherever it begins
            return 1.0
        return min(1.0, max(0, self._known(steps) - step) / self.length(steps))

    @override
    def __str__(self) -> str:
        return f"released over the last {self._steps()}"


def ramp_note(ramps: list[Ramp]) -> str:
    """How a modification's schedules read in a handle's table."""
    return "".join(f", {ramp}" for ramp in ramps)

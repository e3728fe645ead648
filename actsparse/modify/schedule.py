"""How far a change has come: a ramp from 0 to 1 over the first steps of training."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class Ramp:
    """Rises linearly from 0 at step 0 to 1 at the end of ``over`` and stays there.

    ``over`` is a number of optimizer steps (int), or a fraction of all steps (float up to 1).

    >>> Ramp(over=0.5).value(step=25, steps=100)
    0.5
    >>> Ramp(over=10).value(step=25, steps=None)
    1.0
    """

    over: int | float

    def __post_init__(self) -> None:
        fraction = isinstance(self.over, float)
        if not self.over > 0 or (fraction and self.over > 1):
            raise ValueError(
                f"Ramp(over={self.over!r}): expected a number of steps (int > 0) "
                f"or a fraction of all steps (float in (0, 1])"
            )

    def value(self, step: int, steps: int | None) -> float:
        """The ramp after ``step`` optimizer steps out of ``steps``.

        Raises:
            ValueError: ``over`` is a fraction, the number of steps unknown, and ``step`` not 0.
        """
        if step == 0:  # wherever the ramp ends
            return 0.0
        over: float = self.over
        if isinstance(self.over, float):
            if steps is None:
                raise ValueError(
                    f"a ramp over {self.over:g} of training needs the number of steps: "
                    f"handle.attach(optimizer, steps=...)"
                )
            over = self.over * steps
        return min(1.0, step / over)


def ramp_note(ramps: list[Ramp]) -> str:
    """How a modification's schedule reads in a handle's table."""
    texts = [f"{r.over:.0%} of the" if isinstance(r.over, float) else f"{r.over}" for r in ramps]
    return f", over {texts[0]} steps" if texts else ""

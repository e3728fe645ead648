"""Choose how much to drop: the largest share whose loss on validation text is within a budget."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass

STEPS = 64  # shares are multiples of 1/64


@dataclass(frozen=True)
class Choice:
    """The share chosen, its loss, and every point that was looked at.

    Args:
        share: of activations dropped.
        loss: at this share, in nats for each token.
        dense: the loss of the dense model.
        seen: (share, loss) of all points, by share.

    >>> Choice(0.5, 3.02, 3.0, ()).excess
    0.02
    """

    share: float
    loss: float
    dense: float
    seen: tuple[tuple[float, float], ...]

    @property
    def excess(self) -> float:
        """Loss above the dense model's, in nats for each token."""
        return round(self.loss - self.dense, 12)


def nats(budget: float) -> float:
    """The excess loss that a relative budget of perplexity allows: ``ln(1 + b)``.

    Args:
        budget: b, for example 0.03.

    Returns:
        Nats for each token.

    Raises:
        ValueError: b is not a number above 0.

    >>> round(nats(0.03), 4)
    0.0296
    """
    if not (budget > 0 and math.isfinite(budget)):
        raise ValueError(f"budget {budget!r}: expected a share of perplexity above 0, as 0.03")
    return math.log1p(budget)


def choose(
    loss_at: Callable[[float], float],
    dense: float,
    budget: float,
    starts: Sequence[float] = (0.0,),
    looked: dict[float, float] | None = None,
) -> Choice | None:
    """Find by bisection the largest share of activations whose loss is within a budget.

    The loss need not grow with the share: a model that was distilled at one share may be worse
    below it. So bisection begins at the first of ``starts`` that is within the budget. The result
    is within the budget, but perhaps not the largest share that is.

    Args:
        loss_at: sets a share and returns the loss in nats for each token, on validation text.
        dense: the loss of the dense model.
        budget: of excess loss, in nats for each token.
        starts: shares to begin at, each rounded down to a multiple of 1/64.
        looked: gets the loss at each share that was looked at, also where nothing is chosen.

    Returns:
        The choice, or None if none of ``starts`` is within the budget. ``loss_at`` was not
        necessarily called with it last.

    >>> choose(lambda share: 3 + share**4, dense=3.0, budget=0.0625).share
    0.5
    """
    seen: dict[int, float] = {}

    def look(step: int) -> float:
        seen[step] = loss_at(step / STEPS)
        if looked is not None:
            looked[step / STEPS] = seen[step]
        return seen[step]

    within, beyond = -1, STEPS
    for start in starts:
        step = int(start * STEPS)
        if step not in seen:
            look(step)
        if seen[step] <= dense + budget:
            within = step
            break
        beyond = min(beyond, step) if step else beyond
    if within < 0:
        return None
    while beyond - within > 1:
        middle = (within + beyond) // 2
        if look(middle) <= dense + budget:
            within = middle
        else:
            beyond = middle
    points = tuple((step / STEPS, seen[step]) for step in sorted(seen))
    return Choice(within / STEPS, seen[within], dense, points)

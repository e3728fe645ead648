"""Every interval: 95 % t-intervals of a mean over seeds, of ratios on the log scale."""

from __future__ import annotations

import math
import statistics
from collections.abc import Iterable
from dataclasses import dataclass

from scipy.special import stdtrit


@dataclass(frozen=True)
class Estimate:
    """A mean over ``n`` seeds; ``half`` is half its 95 % t-interval, None for one seed."""

    mean: float
    half: float | None
    n: int

    @property
    def low(self) -> float | None:
        """The interval's lower end."""
        return None if self.half is None else self.mean - self.half

    @property
    def high(self) -> float | None:
        """The interval's upper end."""
        return None if self.half is None else self.mean + self.half

    def __neg__(self) -> Estimate:
        return Estimate(-self.mean, self.half, self.n)


@dataclass(frozen=True)
class Factor:
    """A ratio over ``n`` runs: geometric mean, its 95 % t-interval on the log scale, median."""

    mean: float
    low: float | None
    high: float | None
    median: float
    n: int


def t_interval(values: Iterable[float | None]) -> Estimate | None:
    """Mean and 95 % t-interval over seeds, of the values that are not None; None for no values.

    >>> one = t_interval([1.0, 2.0, 3.0])
    >>> one.mean, round(one.half, 3), one.n
    (2.0, 2.484, 3)
    """
    seen = [value for value in values if value is not None]
    n = len(seen)
    if n == 0:
        return None
    mean = math.fsum(seen) / n
    if n == 1:
        return Estimate(mean, None, 1)
    variance = math.fsum((value - mean) ** 2 for value in seen) / (n - 1)
    return Estimate(mean, float(stdtrit(n - 1, 0.975)) * math.sqrt(variance / n), n)


def factor(ratios: Iterable[float]) -> Factor | None:
    """The factor of ratios above 0; None for none.

    >>> found = factor([1.0, 2.0, 4.0])
    >>> round(found.mean, 9), found.median, found.low < 1
    (2.0, 2.0, True)
    """
    seen = list(ratios)
    found = t_interval(map(math.log, seen))
    if found is None:
        return None
    low, high = (None if end is None else math.exp(end) for end in (found.low, found.high))
    return Factor(math.exp(found.mean), low, high, statistics.median(seen), found.n)

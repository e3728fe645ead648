"""How density depends on width and tokens: a power law over runs, its intervals by bootstrap."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import numpy as np

from actsparse_lab.analysis.effects import Arms, Reader

DRAWS = 2000


@dataclass(frozen=True)
class Span:
    """A number with a 95 % interval; without one where no width has two seeds."""

    mean: float
    low: float | None
    high: float | None


@dataclass(frozen=True)
class Fit:
    """``density = at_first · (D / D₀)^width · (share of the tokens)^tokens``, and what it predicts.

    D₀ is the smallest width. ``tokens`` is None where all runs read as many. ``predicted`` is at
    the width ``at`` with all tokens.
    """

    at_first: Span
    width: Span
    tokens: Span | None
    at: int
    predicted: Span


@dataclass(frozen=True)
class Fits:
    """The fits of several arms to the same draws of seeds."""

    at: int
    draws: Mapping[str, np.ndarray]  # by arm [1 + draws, 3]: logs of `at_first`, two exponents
    first: int
    with_tokens: frozenset[str]

    def of(self, arm: str) -> Fit:
        """The fit of one arm."""
        found = self.draws[arm]
        logs = self._predicted(arm)
        return Fit(
            _span(np.exp(found[:, 0])),
            _span(found[:, 1]),
            _span(found[:, 2]) if arm in self.with_tokens else None,
            self.at,
            _span(np.exp(logs)),
        )

    def fewer(self, arm: str, other: str) -> Span:
        """The predicted share by which ``arm`` has fewer active units than ``other``."""
        return _span(1 - np.exp(self._predicted(arm) - self._predicted(other)))

    def _predicted(self, arm: str) -> np.ndarray:
        found = self.draws[arm]
        whole: np.ndarray = found[:, 0] + found[:, 1] * np.log(self.at / self.first)
        return whole


def fits(
    by_width: Mapping[int, Arms],
    arms: Mapping[str, Mapping[str, float]],
    read: Reader,
    at: int,
    draws: int = DRAWS,
) -> Fits | None:
    """Fit every arm that has runs at two widths or more.

    A draw takes, at each width, as many seeds as there are, with replacement, and the same ones for
    all arms, so that ratios of arms stay paired. A width of one seed is the same in all draws.

    Args:
        by_width: the finished runs at each width D.
        arms: of each fitted arm the names of its runs, with their share of the tokens.
        read: the number to fit; runs where it is None or 0 are left out.
        at: the width to predict at.
        draws: how many times seeds are drawn.

    Returns:
        The fits, or None where no arm has two widths.
    """
    generator = np.random.default_rng(0)
    times: dict[tuple[int, int], np.ndarray] = {}  # how often a draw has a seed; all once at first
    for width, runs in by_width.items():
        seeds = sorted({seed for arm in runs.values() for seed in arm})
        share = np.full(len(seeds), 1 / len(seeds))
        drawn = generator.multinomial(len(seeds), share, draws)
        for nth, seed in enumerate(seeds):
            times[width, seed] = np.array([1, *drawn[:, nth]], float)
    first = min(by_width)
    found, with_tokens = {}, set()
    for arm, parts in arms.items():
        points = [
            ((width, seed), np.log(width / first), np.log(share), np.log(value))
            for width, runs in by_width.items()
            for name, share in parts.items()
            for seed, run in runs[name].items()
            if (value := read(run))
        ]
        widths, shares = ({each[nth] for each in points} for nth in (1, 2))
        if len(widths) > 1:
            with_tokens |= {arm} if len(shares) > 1 else set()
            weights = np.stack([times[each[0]] for each in points], axis=1)
            table = np.array([each[1:] for each in points])
            found[arm] = _least_squares(weights, table, len(shares) > 1)
    return Fits(at, found, first, frozenset(with_tokens)) if found else None


def _least_squares(weights: np.ndarray, table: np.ndarray, tokens: bool) -> np.ndarray:
    """[draws, 3]: constant and exponents of width and tokens, NaN where a draw leaves them open.

    Args:
        weights: [draws, points].
        table: [points, 3], logs of width, share of tokens and value.
        tokens: whether shares differ.
    """
    columns = 3 if tokens else 2
    known = np.column_stack([np.ones(len(table)), table[:, : columns - 1]])
    squares = np.einsum("dp,pi,pj->dij", weights, known, known)
    right = np.einsum("dp,pi,p->di", weights, known, table[:, 2])
    answers = np.zeros((len(weights), 3))
    solved = np.linalg.matrix_rank(squares, hermitian=True) == columns
    answers[~solved] = np.nan
    answers[solved, :columns] = np.linalg.solve(squares[solved], right[solved, :, None])[..., 0]
    return answers


def _span(values: np.ndarray) -> Span:
    mean, rest = float(values[0]), values[1:][np.isfinite(values[1:])]
    low, high = np.quantile(rest, (0.025, 0.975)) if len(rest) else (mean, mean)
    if np.isclose(low, high, rtol=1e-9, atol=0):
        return Span(mean, None, None)
    return Span(mean, float(low), float(high))

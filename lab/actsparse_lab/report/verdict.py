"""What records say of a paper's claim: it *holds*, *does not hold here*, or is *undecided*.

The rule. An effect is one number for each paired seed, e.g. the density of one arm minus that of
another. A claim says that effects lie beyond a bar in one direction. It holds where both

1. the mean's two-sided 95 % t-interval over seeds lies wholly beyond the bar, and
2. so many seeds lie beyond the bar that a fair coin would give as many in fewer than 1 of 20 (sign
   test, one-sided): all of 5, 6 or 7 seeds, 7 of 8, 8 of 9, 9 of 10.

It does not hold here where both are so on the other side of the bar; else it is undecided. Fewer
than 5 seeds are undecided because 4 of 4 are no rarer than 1 in 16. Equal effects of all seeds are
undecided: seeds that change nothing are one observation, and an interval of width 0 is no interval.
Rounding decides nothing: effects within `SAME` of the largest are equal, and one so near the bar is
not beyond it (0.96 − 0.97 falls by 0.01 and not by less).

Why both. The first alone errs in at most 1 of 40 for normal effects, but a few large ones can carry
a mean: where half of all seeds give 1 and half -0.01, it calls 19 of 100 experiments of 5 seeds
*holds*. The second is exact whatever the law, as long as seeds are independent: if at most half of
all seeds would lie beyond the bar, fewer than 1 of 20 verdicts are false *holds* (at most 1 in 32
at 5 seeds, 9 in 256 at 8). Two arms that differ in nothing meet this for their difference, their
ratio and its logarithm, with the bar where nothing changes: either arm is as likely to be the
larger. The first remains so that one bad seed of 8 is weighed, not just counted.

False *holds* of 100 null effects, the bar at their median. Below, the power: *holds* of 100 where
the mean of normal effects lies d standard deviations (of one seed's effect) beyond the bar, and in
brackets what the t-interval alone would give::

    seeds                                     5         6         7         8         10
    normal                                    2.0       1.3       0.7       1.8       0.8
    Laplace                                   1.4       1.0       0.6       1.4       0.7
    Student's t, 3 degrees of freedom         1.6       1.0       0.6       1.4       0.7
    exponential, its tail short of the bar    2.9       1.6       0.8       1.4       0.6
    lognormal (σ = 1), likewise               2.8       1.5       0.8       1.4       0.5
    the same two, tail beyond, at most        1.4       1.0       0.6       2.0       0.9
    two points, each half                     0         0         0         3.1       1.0
    differences of binomial shares, at most   2.0       1.3       0.6       1.7       0.7
    1 − ratio of lognormals (σ = 0.5)         2.6       1.5       0.8       1.5       0.6

    d = 1                                     35 (40)   34 (51)   30 (60)   58 (68)   50 (80)
    d = 2                                     87 (91)   87 (97)   85 (99)   99        98
    d = 3                                     99        99        99        100       100

So a sixth or seventh seed decides no more than five do; eight decide more.

What it does not promise. Skewed effects with the bar at their *mean*: most seeds lie a little
beyond it and a few far behind. 5 seeds then give false *holds* in 9 of 100 for the exponential law,
15 for the lognormal, and 33 where one seed in five fails badly (near 1, the failures near -4).
No rule keeps an error rate for the mean of every law (Bahadur and Savage, Ann. Math. Statist. 27,
1956), so read *holds* as of the typical seed, and take logarithms of ratios. Nor may seeds be added
until the verdict pleases: looking after each of seeds 5 to 10 doubles the 2 false *holds* of 100
normal effects. Fix the number of seeds before.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Literal

from scipy.special import stdtrit

from actsparse_lab.report.comparison import Estimate, t_interval

SAME = 2.0**-40  # what float64 leaves of differences a few thousand times less than their terms
RARER_THAN = 20  # a false *holds* in fewer than 1 of so many


@dataclass(frozen=True)
class Claim:
    """Effects lie beyond a bar: above ``least`` if one ``rises``, below ``-least`` if it ``falls``.

    ``text`` is what the paper says, ``source`` where. ``least`` is the smallest effect that counts,
    in the effect's own unit and along the direction: 0.36 with ``rises`` for "at least 36 % fewer"
    of a relative improvement. Negative, it is a loss that is still allowed: -0.01 with ``rises``
    for "quality falls by less than a point".

    Raises ValueError for another direction, or a ``least`` that is not finite.
    """

    text: str
    source: str
    direction: Literal["rises", "falls"]
    least: float = 0.0

    def __post_init__(self) -> None:
        if self.direction not in ("rises", "falls"):
            raise ValueError(f"Claim(direction={self.direction!r}): expected 'rises' or 'falls'")
        if not math.isfinite(self.least):
            raise ValueError(f"Claim(least={self.least!r}): expected a finite number")

    @property
    def bar(self) -> float:
        """What effects must lie beyond, on the effects' own axis."""
        return self.least if self.direction == "rises" else 0.0 - self.least  # not -0


@dataclass(frozen=True)
class Verdict:
    """``estimate``: the mean effect and its 95 % t-interval, None for no seeds; ``why`` in words.

    The interval that ``why`` tells is the rule's own, wider where several claims are read.
    """

    word: Literal["holds", "does not hold here", "undecided"]
    estimate: Estimate | None
    why: str


def verdict(
    claim: Claim,
    effects: Sequence[float],
    claims: int = 1,
    show: Callable[[float], str] = "{:.4g}".format,
) -> Verdict:
    """The verdict on a claim from ``effects``, one for each paired seed, by the rule above.

    ``claims`` is how many are read off the same runs: then fewer than 1 of 20 such experiments
    have any false *holds* (Bonferroni: a ``claims``-th of either error for each). That takes more
    seeds, `fewest_seeds`. A finding that holds where all of its claims hold needs no correction.
    ``show`` writes effects in ``why``.

    Raises ValueError naming an effect that is NaN or infinite.

    >>> claim = Claim("P0 rises more than Pa", "§4.2", "rises")
    >>> found = verdict(claim, [0.31, 0.27, 0.35, 0.30, 0.29])
    >>> found.word
    'holds'
    >>> found.why
    '5 of 5 seeds and the 95 % interval, 0.2672 to 0.3408, lie above 0'
    >>> verdict(Claim("at least 36 % fewer", "abstract", "rises", 0.36), [0.31, 0.27, 0.35]).why
    '3 paired seeds; 5 are the fewest that can decide'
    """
    for at, effect in enumerate(effects):
        if not math.isfinite(effect):
            raise ValueError(
                f"effects[{at}] of {claim.text!r} is {effect!r}; expected a finite number"
            )
    n, bar = len(effects), claim.bar
    estimate = t_interval(effects)
    fewest = fewest_seeds(claims)
    if estimate is None or estimate.half is None or n < fewest:
        of_claims = "" if claims == 1 else f" {claims} claims"
        why = f"{n} paired seeds; {fewest} are the fewest that can decide{of_claims}"
        return Verdict("undecided", estimate, why)
    largest = max(map(abs, effects))
    if max(effects) - min(effects) <= SAME * largest:
        why = f"all {n} effects are {show(effects[0])}; seeds that change nothing count as one"
        return Verdict("undecided", estimate, why)

    wider = float(stdtrit(n - 1, 1 - 0.025 / claims) / stdtrit(n - 1, 0.975))
    low, high = estimate.mean - wider * estimate.half, estimate.mean + wider * estimate.half
    interval = f"the {100 - 5 / claims:.4g} % interval, {show(low)} to {show(high)},"
    near = SAME * max(abs(bar), largest)
    if low - bar <= near and bar - high <= near:
        return Verdict("undecided", estimate, f"{interval} does not exclude {show(bar)}")
    above = low > bar
    side = "above" if above else "below"
    agree = sum((effect - bar if above else bar - effect) > near for effect in effects)
    needed = _agreeing(n, claims)
    if agree < needed:
        why = f"{interval} lies {side} {show(bar)}, but {agree} of {n} seeds do; {needed} must"
        return Verdict("undecided", estimate, why)
    why = f"{agree} of {n} seeds and {interval} lie {side} {show(bar)}"
    as_claimed = above == (claim.direction == "rises")
    return Verdict("holds" if as_claimed else "does not hold here", estimate, why)


def fewest_seeds(claims: int = 1) -> int:
    """The fewest paired seeds that can decide each of so many claims: 2⁻ⁿ < 1 ÷ (20 · claims).

    Raises ValueError for fewer than one claim.

    >>> [fewest_seeds(claims) for claims in (1, 2, 3, 4, 6, 7, 12)]
    [5, 6, 6, 7, 7, 8, 8]
    """
    if claims < 1:
        raise ValueError(f"claims={claims!r}: expected 1 or more")
    return (RARER_THAN * claims).bit_length()  # 20 times an integer is no power of two


def _agreeing(n: int, claims: int) -> int:
    """The smallest m with P(at least m of n fair coins) < 1 ÷ (20 · claims)."""
    m, ways = n, 1  # to fall on at least m sides of one kind
    while RARER_THAN * claims * (ways + math.comb(n, m - 1)) < 2**n:
        m -= 1
        ways += math.comb(n, m)
    return m

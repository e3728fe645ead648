"""Every rule for a verdict, once; intervals are 95 % t-intervals of a mean over seeds.

*Is quality kept?* One threshold everywhere (`margin`): a loss of 0.3 points of accuracy, or of 1 %
of the reference's mean where quality is something else. Kept where the interval of the paired
change lies above that loss, lower where it lies wholly below, else not decided (`beyond`).

*Does a claim hold?* (`verdict`) An effect is one number for each paired seed, e.g. the density of
one arm minus that of another. A claim says that effects lie beyond a bar in one direction. It holds
where both

1. the mean's two-sided 95 % t-interval over seeds lies wholly beyond the bar, and
2. so many seeds lie beyond the bar that a fair coin would give as many in fewer than 1 of 20 (sign
   test, one-sided): all of 5, 6 or 7 seeds, 7 of 8, 8 of 9, 9 of 10.

It does not hold here where both are so on the other side of the bar; else it is undecided. Fewer
than 5 seeds are undecided because 4 of 4 are no rarer than 1 in 16. Equal effects of all seeds are
undecided: seeds that change nothing are one observation, and an interval of width 0 is no interval.
Rounding decides nothing: effects within `SAME` of the largest are equal, and one so near the bar is
not beyond it.

A few large effects can carry a mean past the interval alone. The sign test is exact whatever the
law, as long as seeds are independent: if at most half of all seeds would lie beyond the bar, fewer
than 1 of 20 verdicts are false *holds*. The interval remains so that one bad seed of 8 is weighed,
not just counted. No rule keeps an error rate for the mean of every law (Bahadur and Savage, Ann.
Math. Statist. 27, 1956), so read *holds* as of the typical seed, and take logarithms of ratios. Fix
the number of seeds before the runs: adding seeds until the verdict pleases raises the error rate.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from typing import Literal

from scipy.special import stdtrit

from actsparse_lab.analysis.intervals import Estimate, t_interval

POINTS = 0.003  # of accuracy: a loss of so much is none
SHARE = 0.01  # likewise of any other quality, as a share of the reference's mean
SAME = 2.0**-40  # what float64 leaves of differences a few thousand times less than their terms
RARER_THAN = 20  # a false *holds* in fewer than 1 of so many

Word = Literal["yes", "no", "undecided"]


# -- is quality kept? ---------------------------------------------------------------------------


def margin(quality_name: str, reference: Iterable[float | None]) -> float | None:
    """The loss of quality that is none, in quality's own unit; None where no reference is known.

    >>> margin("accuracy", []), margin("nats", [2.0, 4.0])
    (0.003, 0.03)
    """
    if quality_name == "accuracy":
        return POINTS
    mean = t_interval(reference)
    return None if mean is None else SHARE * abs(mean.mean)


def beyond(found: Estimate | None, bar: float | None, planned: int) -> Word:
    """Does the interval lie above the bar? Undecided for fewer seeds than 5, or than ``planned``.

    >>> beyond(Estimate(0.5, 0.1, 5), 0.3, 5), beyond(Estimate(0.5, 0.3, 5), 0.3, 5)
    ('yes', 'undecided')
    >>> beyond(Estimate(0.5, 0.1, 5), 0.7, 5), beyond(Estimate(0.5, 0.1, 4), 0.3, 5)
    ('no', 'undecided')
    """
    if found is None or bar is None or found.n < max(planned, fewest_seeds()):
        return "undecided"
    return _side(found, bar)


def quality_verdict(change: Estimate | None, loss: float, higher: bool) -> str | None:
    """``change`` of quality in words; None for none, "one seed" where there is no interval.

    "better" where the interval lies above 0, else "kept" where it lies above a loss of ``loss``,
    "lower" where it lies wholly below that, and "unclear" where neither.

    >>> [quality_verdict(Estimate(m, 0.002, 5), 0.003, True) for m in (0.1, 0, -0.002, -0.1)]
    ['better', 'kept', 'unclear', 'lower']
    """
    if change is None:
        return None
    better = change if higher else -change
    if better.low is None:
        return "one seed"
    if better.low > 0:
        return "better"
    return {"yes": "kept", "no": "lower", "undecided": "unclear"}[_side(better, -loss)]


def _side(found: Estimate, bar: float) -> Word:
    if found.low is None or found.high is None:
        return "undecided"
    if found.low >= bar:
        return "yes"
    return "no" if found.high < bar else "undecided"


def every(*words: Word) -> Word:
    """ "yes" where all are, "no" where any is; else "undecided".

    >>> every("yes", "undecided"), every("undecided", "no")
    ('undecided', 'no')
    """
    if "no" in words:
        return "no"
    return "undecided" if "undecided" in words else "yes"


# -- does a claim hold? -------------------------------------------------------------------------


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

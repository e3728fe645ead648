"""Manipulation: do pre-activations gather where the derivative is zero, or the activation?

Under ReLU the two are one, so training cannot show which of them it seeks. The S-shape
``s(z − δx) + δy`` parts them: P₀ is the share of pre-activations z where its derivative is zero,
P_a that in an interval as long around the root of the function (`actsparse.observe.occupancy` has
the equations). Four shifts, δx and δy ±1.6, put both to either side of z = 0. The papers say that
P₀ rises more in training than P_a, and is the more stable of the two (arXiv 2309.03004, "v1", and
arXiv 2605.25612, "v2").

The authors' program runs them without weight decay and with zeroth biases: the papers' claims are
asked of such arms. Beside them are arms with weight decay and without zeroth biases.

What it cannot tell. The four are two and their mirror images. Where δx and δy have one sign, z = 0,
to which weight decay draws z, lies in the interval around the root, and so do most z at the start;
where they have not, that interval begins at |z| = 2.9 and is all but empty then. That decides how
stable P_a is over the four: where z are drawn to 0 it rises under two of them and stays near 0
under the others. Zero derivative is at |z| from 0.1 to 3.1 under all four. The two have 0.24 of
their 3 in common. P₀ also counts units whose z lies there for every token.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from statistics import fmean, stdev
from typing import TypeVar

from actsparse_lab.analysis.comparison import CONTROL, REFERENCE
from actsparse_lab.analysis.effects import (
    QUALITY,
    Arms,
    Effects,
    combined,
    difference,
    log_ratio,
    number,
    within,
)
from actsparse_lab.analysis.findings import Asked
from actsparse_lab.papers.questions import POINT, mlps_matter
from actsparse_lab.records import Run

SHIFTS = {  # arm → δx, δy
    "s-1.6-1.6": (-1.6, -1.6),
    "s-1.6+1.6": (-1.6, 1.6),
    "s+1.6-1.6": (1.6, -1.6),
    "s+1.6+1.6": (1.6, 1.6),
}
DECAYED = "-decayed"  # ends the names of arms with weight decay and without zeroth biases
KEYS = ("zero_derivative", "zero_activation")  # P₀, P_a
Pair = tuple[float, float]  # of P₀, of P_a
Seen = TypeVar("Seen")


# -- what is read ---------------------------------------------------------------------------------


def occupancy(run: Run) -> dict[int, Pair]:
    """P₀ and P_a on the validation split, by step; steps that lack either are left out."""
    found = {}
    for entry in run.evals:
        shares = [number(entry, "measures", key) for key in KEYS]
        if shares[0] is not None and shares[1] is not None:
            found[int(entry["step"])] = (shares[0], shares[1])
    return found


def end(run: Run) -> Pair | None:
    """P₀ and P_a at the last validation; None where the first is not at step 0."""
    found = occupancy(run)
    return found[max(found)] if 0 in found and len(found) > 1 else None


def change(run: Run) -> Pair | None:
    """What they have risen by since step 0, when the weights were random."""
    last = end(run)
    if last is None:
        return None
    first = occupancy(run)[0]
    return last[0] - first[0], last[1] - first[1]


def _over_shifts(
    read: Callable[[Run], Seen | None],
    combine: Callable[[Sequence[Seen]], float | None],
    ending: str = "",
) -> Callable[[Arms], Effects]:
    """``combine`` of what the four shifts of a seed say; seeds that lack one are left out."""

    def effects(arms: Arms) -> Effects:
        found: Effects = {}
        for seed in set.intersection(*(set(arms[arm + ending]) for arm in SHIFTS)):
            seen = [read(arms[arm + ending][seed]) for arm in SHIFTS]
            known = [each for each in seen if each is not None]
            effect = combine(known) if len(known) == len(SHIFTS) else None
            if effect is not None:
                found[seed] = effect
        return found

    return effects


def lead(pairs: Sequence[Pair]) -> float:
    """By how much P₀ exceeds P_a, in the mean."""
    return fmean(p0 - pa for p0, pa in pairs)


def _rise(pairs: Sequence[Pair]) -> float:
    return fmean(p0 for p0, _ in pairs)


def _spread(pairs: Sequence[Pair]) -> float | None:
    return log_ratio(stdev(p0 for p0, _ in pairs), stdev(pa for _, pa in pairs))


def _quality_against(other: str, ending: str = "") -> Callable[[Arms], Effects]:
    def effects(arms: Arms) -> Effects:
        own = _over_shifts(QUALITY, fmean, ending)(arms)
        return combined(own, within(arms, other, QUALITY), difference)

    return effects


_RISE = "[P₀ at the last validation − P₀ at step 0] − [the same of P_a], mean over the four shifts"
_SPREAD = (
    "ln of the standard deviation over the four shifts (n − 1) of P₀'s change since step 0, over "
    "that of P_a's"
)
_SHAPES = "mean test accuracy of the four S-shapes"
_WITH = "arms with weight decay, without zeroth biases"
_GAINED = "P₀ at the last validation − P₀ at step 0, mean over the four shifts"
_AT_END = "P₀ − P_a at the last validation, mean over the four shifts"


def _as_good(other: str, said: str, ending: str = "", least: float = 0.0) -> Asked:
    effect = f"{_SHAPES}{said}"
    return Asked("rises", _quality_against(other, ending), effect, "points", least)


QUESTIONS = {
    "mlps-matter": mlps_matter(),
    "gain": Asked("rises", _over_shifts(change, lead), _RISE, "points"),
    "rise": Asked("rises", _over_shifts(change, _rise), _GAINED, "points"),
    "end": Asked("rises", _over_shifts(end, lead), _AT_END, "points"),
    "stable": Asked("falls", _over_shifts(change, _spread), _SPREAD, "log"),
    "quality": _as_good(REFERENCE, f" − that of ReLU ({REFERENCE})", "", -POINT),
    "use": _as_good(CONTROL, " − that of the model without MLPs"),
    "gain-decayed": Asked(
        "rises", _over_shifts(change, lead, DECAYED), f"{_RISE}; {_WITH}", "points"
    ),
    "stable-decayed": Asked(
        "falls", _over_shifts(change, _spread, DECAYED), f"{_SPREAD}; {_WITH}", "log"
    ),
    "quality-decayed": _as_good(
        REFERENCE + DECAYED, f" − that of ReLU ({REFERENCE}{DECAYED}); {_WITH}", DECAYED, -POINT
    ),
    "use-decayed": _as_good(
        CONTROL + DECAYED, f" − that of the model without MLPs; {_WITH}", DECAYED
    ),
}

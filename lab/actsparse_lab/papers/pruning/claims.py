"""Backward pruning: what zero derivatives let the backward pass skip, and small gradients besides.

Where φ′(z) = 0 the effective gradient η = g_a ⊙ φ′(z) is zero, and so are its products: leaving
them out is exact. Beyond that, training may drop entries of η up to τ times their rms (over
entries that are not zero); what that does to the gradient is measured at the start and at the end
of runs that drop nothing, and what it does to quality by runs that drop all along (arXiv
2605.25612, "v2").

What it cannot tell: seconds, for multiplications are counted and not timed. Dead units are among
the zeros; to prune them away would save the same.
"""

from __future__ import annotations

from collections.abc import Callable

from actsparse_lab.analysis.comparison import REFERENCE, SUBJECT
from actsparse_lab.analysis.effects import (
    QUALITY,
    Arms,
    Effects,
    difference,
    final,
    log_ratio,
    mean_of,
    number,
    paired,
    within,
)
from actsparse_lab.analysis.findings import Asked
from actsparse_lab.papers.questions import POINT, SPARED, mlps_matter
from actsparse_lab.records import Entry, Run

BASES = (REFERENCE, SUBJECT)
DROPPED = (0.3, 1.0, 3.0)  # multiples of rms(η) that arms drop up to
SMALL = 0.3
NONE = "vanilla-drop-all"  # its up layers get no gradient at all
TOLERATED = 0.1  # relative error of the gradient
Means = Callable[[Arms, str], Effects]


# -- what is read ---------------------------------------------------------------------------------


def dropping(base: str, threshold: float) -> str:
    """The arm that is ``base`` but for dropping entries of η."""
    plain = base.removesuffix(SPARED)
    return f"{plain}-drop-{threshold:g}{base[len(plain) :]}"


def backward(run: Run) -> float | None:
    """The share of the MLPs' backward multiplications that exact zeros make needless."""
    return number(run.result, "skippable", "backward")


def trials(entry: Entry | None) -> dict[float, Entry]:
    """The rows of a line's pruning trial, by threshold."""
    rows = ((entry or {}).get("trials") or {}).get("pruning") or []
    return {float(row["threshold"]): row for row in rows}


def at_end(run: Run) -> dict[float, Entry]:
    """The trial at the last step."""
    return trials(final(run, "measured"))


def at_start(run: Run) -> dict[float, Entry]:
    """The trial before the first step."""
    return trials(next((entry for entry in run.measured if entry["step"] == 0), None))


def _error(run: Run) -> float | None:
    return number(at_end(run).get(SMALL), "error")


def _exceeding(row: Entry | None) -> float | None:
    """Of the entries whose derivative is not zero, the share that is kept."""
    share, whole = number(row, "kept"), number(row, "derivative_density")
    return share / whole if share is not None and whole else None


def _shrinking(run: Run) -> float | None:
    first, last = (_exceeding(found(run).get(SMALL)) for found in (at_start, at_end))
    return None if first is None or last is None else log_ratio(last, first)


def quality_kept(threshold: float) -> Means:
    """Quality of the arm that drops − that of its base, for each seed."""

    def effects(arms: Arms, base: str) -> Effects:
        return paired(arms, dropping(base, threshold), base, QUALITY, difference)

    return effects


def _mean(read: Means, *bases: str) -> Callable[[Arms], Effects]:
    """The mean over ``bases`` within a seed; seeds that lack one of them are left out."""
    return lambda arms: mean_of([read(arms, base) for base in bases])


def _saves_more(arm: str, other: str) -> Asked:
    effect = (
        "share of the MLPs' four backward products that zeros spare, last fifth of training: "
        f"{arm} minus {other}"
    )
    return Asked(
        "rises", lambda arms: paired(arms, arm, other, backward, difference), effect, "points"
    )


def _kept(threshold: float, effect: str, *bases: str) -> Asked:
    return Asked("rises", _mean(quality_kept(threshold), *bases), effect, "points", -POINT)


def _kept_small(base: str) -> Asked:
    return _kept(SMALL, f"test accuracy of {dropping(base, SMALL)} − that of {base}", base)


TRAINED = (REFERENCE, SUBJECT, REFERENCE + SPARED)
_SHRINKING = (
    f"ln of the share of entries of η above {SMALL:g} rms, over derivative density, at the end, "
    f"over the same at step 0; mean over {' and '.join(BASES)}"
)
_CHANGED = (
    "norm of the change of the gradient of the MLPs' weights over its norm, at the last step; "
    f"mean over {' and '.join(BASES)}"
)
_LESS = (
    f"test accuracy of {dropping(REFERENCE, 1.0)} − that of {NONE}, in which the layers before the "
    "activation learn nothing"
)
QUESTIONS = {
    "idle": _saves_more(REFERENCE, NONE),
    "idle-paper": _saves_more(SUBJECT, NONE),
    "paper-spares": _saves_more(SUBJECT, REFERENCE),
    "paper-spares-spared": _saves_more(SUBJECT, REFERENCE + SPARED),
    "kept": _kept_small(REFERENCE),
    "kept-paper": _kept_small(SUBJECT),
    "kept-1": _kept(
        1.0,
        f"test accuracy of the arm that drops − that of its base, mean over {', '.join(TRAINED)}",
        *TRAINED,
    ),
    "less-than-all": Asked(
        "rises",
        lambda arms: paired(arms, dropping(REFERENCE, 1.0), NONE, QUALITY, difference),
        _LESS,
        "points",
    ),
    "exceed": Asked(
        "falls",
        _mean(lambda arms, base: within(arms, base, _shrinking), *BASES),
        _SHRINKING,
        "log",
    ),
    "error": Asked(
        "falls",
        _mean(lambda arms, base: within(arms, base, _error), *BASES),
        _CHANGED,
        least=-TOLERATED,
    ),
    "mlps-matter": mlps_matter(),
}

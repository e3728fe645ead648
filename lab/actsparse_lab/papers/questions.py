"""Two questions that several experiments ask: is one arm sparser than another, and is it as good?

Densities are compared by the logarithm of their ratio: a bar of "36 % fewer" lies at ln 0.64.
"""

from __future__ import annotations

import math
from typing import Literal

from actsparse_lab.analysis.comparison import CONTROL, REFERENCE
from actsparse_lab.analysis.effects import (
    INFERENCE,
    LIVING,
    QUALITY,
    TRAINING,
    difference,
    log_ratio,
    paired,
)  # fmt: skip
from actsparse_lab.analysis.findings import Asked

POINT = 0.01  # of accuracy: the bar that these claims were registered with
SPARED = "-no-1d-decay"  # ends the names of arms whose norm scales and biases do not decay
DENSITIES = {
    "inference": ("inference density, on the test split", INFERENCE),
    "training": ("training density, over the last fifth of training", TRAINING),
    "living": ("inference density of the units that are not dead", LIVING),
}


def sparser(
    arm: str,
    other: str,
    density: Literal["inference", "training", "living"] = "inference",
    by: float = 0.0,
) -> Asked:
    """Whether ``arm`` has fewer active neurons than ``other``, by at least the share ``by``.

    An effect is ``ln(density of arm / density of other)``; seeds where either is 0 drop out.

    >>> -sparser("paper", "vanilla", by=0.36).least == math.log(0.64)
    True
    """
    what, read = DENSITIES[density]
    effect = f"ln of the ratio of {what}, {arm} over {other}"
    least = -math.log(1 - by)
    return Asked(
        "falls", lambda arms: paired(arms, arm, other, read, log_ratio), effect, "log", least
    )


def quality_kept(arm: str, other: str, least: float = -POINT) -> Asked:
    """Whether ``arm`` loses less than a point of accuracy against ``other``.

    An effect is the difference of the two accuracies on the test split.
    """
    effect = f"accuracy on the test split, {arm} minus {other}"
    return Asked(
        "rises", lambda arms: paired(arms, arm, other, QUALITY, difference), effect, "points", least
    )


def mlps_matter() -> Asked:
    """Whether the task needs its MLPs: without them accuracy is lower by more than a point.

    Where it is not, density and what comes of it prove little.
    """
    return quality_kept(REFERENCE, CONTROL, POINT)

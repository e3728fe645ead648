"""Two questions that several experiments ask: is one arm sparser than another, and is it as good?

Densities are compared by the logarithm of their ratio: a bar of "36 % fewer" lies at ln 0.64.
"""

from __future__ import annotations

import math
from typing import Literal

from actsparse_lab.report.comparison import CONTROL, REFERENCE
from actsparse_lab.report.effects import (
    INFERENCE,
    LIVING,
    QUALITY,
    TRAINING,
    difference,
    log_ratio,
    paired,
)
from actsparse_lab.report.findings import OURS, Question
from actsparse_lab.report.stats import Claim

POINT = 0.01  # of accuracy: the bar that these claims were registered with
SPARED = "-no-1d-decay"  # ends the names of arms whose norm scales and biases do not decay


DENSITIES = {
    "inference": ("inference density, on the test split", INFERENCE),
    "training": ("training density, over the last fifth of training", TRAINING),
    "living": ("inference density of the units that are not dead", LIVING),
}


def sparser(
    text: str,
    source: str,
    arm: str,
    other: str,
    *,
    density: Literal["inference", "training", "living"] = "inference",
    by: float = 0.0,
) -> Question:
    """Whether ``arm`` has fewer active neurons than ``other``, by at least the share ``by``.

    An effect is ``ln(density of arm / density of other)``; seeds where either is 0 drop out.

    >>> sparser("", "", "paper", "vanilla", by=0.36).claim.bar == math.log(0.64)
    True
    """
    what, read = DENSITIES[density]
    return Question(
        Claim(text, source, "falls", -math.log(1 - by)),
        lambda arms: paired(arms, arm, other, read, log_ratio),
        f"ln of the ratio of {what}, {arm} over {other}",
        "log",
    )


def quality_kept(text: str, source: str, arm: str, other: str) -> Question:
    """Whether ``arm`` loses less than a point of accuracy against ``other``.

    An effect is the difference of the two accuracies on the test split.
    """
    return Question(
        Claim(text, source, "rises", -POINT),
        lambda arms: paired(arms, arm, other, QUALITY, difference),
        f"accuracy on the test split, {arm} minus {other}",
        "points",
    )


def mlps_matter() -> Question:
    """Whether the task needs its MLPs: without them accuracy is lower by more than a point.

    Where it is not, density and what comes of it prove little.
    """
    return Question(
        Claim(
            "The MLPs matter here: to leave them out costs more than a point", OURS, "rises", POINT
        ),
        lambda arms: paired(arms, REFERENCE, CONTROL, QUALITY, difference),
        f"accuracy on the test split, {REFERENCE} minus {CONTROL}",
        "points",
    )

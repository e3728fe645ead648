"""Sparsity against learning rate and batch size (Peng et al. 2026, arXiv 2605.25612, "v2").

v2 derives sparsity from flat minima, and flat minima from the noise of gradients. A larger learning
rate and a smaller batch have more of it, so they should end flatter and sparser. The authors'
program (cdgyp/sparsity at ae2ff7b, ``lr_and_sparsity_cifar10.sh``) trains at three learning rates,
each a tenth of the one before, and at three batch sizes. Here all nine pairs are trained, each on
as many samples. Flatness is augmented flatness at the end, on validation rows, with labels drawn
from the model.

What it cannot tell: a low learning rate also learns less from as many samples, and a network that
has learnt less is both less flat and less sparse. The accuracies say where that is so.
"""

from __future__ import annotations

import math
from itertools import product
from statistics import correlation

from actsparse_lab.analysis.effects import (
    INFERENCE,
    QUALITY,
    Arms,
    Effects,
    Reader,
    at_end,
    difference,
    log_ratio,
    mean_of,
    paired,
    within,
)  # fmt: skip
from actsparse_lab.analysis.findings import Asked
from actsparse_lab.papers.questions import POINT

RATES = (5e-3, 1.5e-3, 5e-4)  # of the quick form, from most noise to least
BATCHES = (64, 128, 256)
FLATNESS = at_end("measured", "measures", "flatness")


def arm(rate: float, batch: int) -> str:
    """How the arm of a learning rate (of the quick form) and a batch size is called.

    >>> arm(5e-3, 64)
    'rate1-batch64'
    """
    return f"rate{RATES.index(rate) + 1}-batch{batch}"


def _together(arms: Arms) -> Effects:
    """Of each seed the correlation of ln flatness and ln density over the nine arms."""
    names = [arm(*pair) for pair in product(RATES, BATCHES)]
    flat, dense = ([within(arms, name, read) for name in names] for read in (FLATNESS, INFERENCE))
    seeds = set.intersection(*(set(found) for found in (*flat, *dense)))
    return {
        seed: correlation(*([math.log(each[seed]) for each in of] for of in (flat, dense)))
        for seed in seeds
    }


_BY_RATE = [(arm(RATES[0], batch), arm(RATES[-1], batch)) for batch in BATCHES]
_BY_BATCH = [(arm(rate, BATCHES[0]), arm(rate, BATCHES[-1])) for rate in RATES]
_DENSE, _FLAT = "inference density, on the test split", "augmented flatness at the end"


def _falls(pairs: list[tuple[str, str]], read: Reader, what: str, by: str) -> Asked:
    return Asked(
        "falls",
        lambda arms: mean_of([paired(arms, *pair, read, log_ratio) for pair in pairs]),
        f"mean of ln of the ratio of {what}, {by}",
        "log",
    )


_RATE = "largest learning rate over smallest, over the batch sizes"
_BATCH = "batch of 64 over batch of 256, over the learning rates"
_FIRST, _LAST = arm(RATES[0], BATCHES[-1]), arm(RATES[-1], BATCHES[-1])
QUESTIONS = {
    "sparser-rate": _falls(_BY_RATE, INFERENCE, _DENSE, _RATE),
    "sparser-batch": _falls(_BY_BATCH, INFERENCE, _DENSE, _BATCH),
    "flatter-rate": _falls(_BY_RATE, FLATNESS, _FLAT, _RATE),
    "flatter-batch": _falls(_BY_BATCH, FLATNESS, _FLAT, _BATCH),
    "together": Asked(
        "rises", _together, "correlation of ln flatness and ln density over the nine arms", "number"
    ),
    "learnt": Asked(
        "rises",
        lambda arms: paired(arms, _LAST, _FIRST, QUALITY, difference),
        "accuracy at the smallest learning rate minus that at the largest, batch of 256",
        "points",
        -POINT,
    ),
}

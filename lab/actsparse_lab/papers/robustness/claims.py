"""Robustness at checkpoints of training (Peng et al. 2023, arXiv 2309.03004, "v1").

v1 takes sparse gradients for a step to robustness against perturbed hidden features and
parameters, as attacks on inputs perturb the former inside the net. Checkpoints are measured on
validation rows, clean and under attacks on the inputs (fgsm, pgd), noise on the hidden features
that enter (x) and leave (d) the MLPs' hidden layer, and noise on their weights; of each
disturbance the largest size is read. *Kept* is the accuracy under it over the clean one.

A net that is right more often is often the more robust, so arms are compared where they are
equally good (`matched`). That robustness and sparse gradients move together over training shows
neither to be the cause: both move with the loss and the learning rate. Attacks that find nothing
do not prove that there is nothing to be found.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from itertools import pairwise
from statistics import StatisticsError, correlation, fmean

from actsparse_lab.analysis.effects import Arms, Effects, final, mean_of, number, within
from actsparse_lab.analysis.findings import Asked
from actsparse_lab.papers.questions import POINT, SPARED
from actsparse_lab.records import Entry, Run

CONTROL = f"vanilla{SPARED}"
SPARING = f"paper{SPARED}"
TRAINED = ("vanilla", CONTROL, "paper", SPARING)  # none of them for noise or penalties
FEATURES = ("x", "d")
COVERED = {"disturbance": "fgsm", "size": 0.1, "rho": 0.1}  # of the records' rows
FEWEST = 4  # changes from checkpoint to checkpoint: ranks of 3 are in order in 1 of 6 by chance


def accuracies(entry: Entry) -> dict[str, tuple[float, float]]:
    """Size and accuracy by disturbance, of each its largest size; ``clean`` among them.

    >>> row = {"disturbance": "noise", "at": "x", "size": 0.1, "accuracy": 0.9}
    >>> accuracies({"trials": {"robustness": [row | {"size": 0.3, "accuracy": 0.7}, row]}})
    {'x': (0.3, 0.7)}
    """
    rows = (entry.get("trials") or {}).get("robustness") or []
    by_size = sorted(rows, key=lambda row: row["size"])  # what comes later stays
    return {row.get("at", row["disturbance"]): (row["size"], row["accuracy"]) for row in by_size}


def kept(entry: Entry, *disturbances: str) -> float | None:
    """The mean accuracy under the disturbances, over the clean one.

    None where one was not tried, or nothing is right to begin with.
    """
    found = {name: accuracy for name, (_, accuracy) in accuracies(entry).items()}
    if not found.get("clean") or any(name not in found for name in disturbances):
        return None
    return fmean(found[name] for name in disturbances) / found["clean"]


def matched(own: Run, other: Run) -> tuple[Entry, Entry] | None:
    """The two runs' checkpoints at which they are compared.

    Of all pairs of a checkpoint of each, in the last half of its run, whose clean accuracies differ
    by at most a point, the latest: with the largest sum of steps; of several the nearest in clean
    accuracy, then that with the later checkpoint of ``own``. None where there is no such pair.
    """
    apart = {
        (first["step"], second["step"]): (round(abs(a - b), 9), first, second)
        for first, a in _late(own)
        for second, b in _late(other)
        if round(abs(a - b), 9) <= POINT  # 0.97 − 0.96 in binary is more than 0.01
    }
    if not apart:
        return None
    _, first, second = apart[max(apart, key=lambda at: (sum(at), -apart[at][0], at))]
    return first, second


def _late(run: Run) -> list[tuple[Entry, float]]:
    """The checkpoints of the last half, with their clean accuracy."""
    done = run.result["step"] if run.result else 0
    clean = [(entry, accuracies(entry).get("clean")) for entry in run.measured]
    return [(entry, at[1]) for entry, at in clean if at and 2 * entry["step"] >= done]


def _keeps_more(arm: str, other: str, *disturbances: str) -> Callable[[Arms], Effects]:
    """By seed: what ``arm`` keeps minus what ``other`` keeps, where they are matched."""

    def effects(arms: Arms) -> Effects:
        found = {}
        for seed, run in arms[arm].items():
            pair = matched(run, arms[other][seed]) if seed in arms[other] else None
            own, others = (kept(each, *disturbances) for each in pair) if pair else (None, None)
            if own is not None and others is not None:
                found[seed] = own - others
        return found

    return effects


def sparsity(entry: Entry) -> float | None:
    """``−ln participation`` of the effective gradient: how few units share it.

    Participation is a ratio of moments of the gradient: one that is smaller everywhere has the
    same. The share of entries up to a fixed ε rises as a gradient shrinks, as it does with the
    loss, without any change of shape.
    """
    share = number(entry, "measures", "participation")
    return -math.log(share) if share else None


Moves = dict[tuple[int, int], tuple[float, float]]


def moves(run: Run) -> Moves:
    """Changes of `sparsity` and of accuracy `kept` under noise on features, from one checkpoint to
    the next; not from step 0, for an untrained net has no accuracy to lose."""
    levels = [
        (entry["step"], level, share)
        for entry in run.measured
        if entry["step"] > 0
        and (level := sparsity(entry)) is not None
        and (share := kept(entry, *FEATURES)) is not None
    ]
    return {(a[0], b[0]): (b[1] - a[1], b[2] - a[2]) for a, b in pairwise(levels)}


def goes_with(own: Moves, other: Moves) -> float | None:
    """Spearman's correlation of ``own``'s changes of sparsity with ``other``'s of robustness.

    Changes, since levels of anything that moves in training correlate; ranks, since the first
    changes are many times the later ones and would decide Pearson's alone. None for fewer than 4
    changes between the same steps, or where all are alike.
    """
    shared = sorted(own.keys() & other.keys())
    if len(shared) < FEWEST:
        return None
    changes = [own[at][0] for at in shared], [other[at][1] for at in shared]
    try:
        return correlation(*map(_ranks, changes))
    except StatisticsError:  # no change differs from another
        return None


def _ranks(values: list[float]) -> list[float]:
    """From 1; equal ones share their mean rank. Rounding tells no two apart."""
    near = [round(value, 12) for value in values]
    return [sum(v < own for v in near) + (near.count(own) + 1) / 2 for own in near]


def beyond_the_step(arms: Arms, arm: str) -> Effects:
    """By seed: its `goes_with`, minus the mean of that with the robustness of the other seeds.

    Seeds share the schedule and nothing else that moves, so theirs is what the step alone gives.
    """
    each = {seed: moves(run) for seed, run in arms[arm].items()}
    found = {}
    for seed, own in each.items():
        whole = goes_with(own, own)
        others = [goes_with(own, theirs) for other, theirs in each.items() if other != seed]
        if whole is not None and (known := [r for r in others if r is not None]):
            found[seed] = whole - fmean(known)
    return found


def _correlations(arms: Arms) -> Effects:
    return mean_of([beyond_the_step(arms, arm) for arm in TRAINED])


def covered(run: Run) -> float | None:
    """The share of tokens at up that weight noise covers as `COVERED` says, at the run's end."""
    rows = ((final(run, "measured") or {}).get("trials") or {}).get("covering") or []
    asked = [row for row in rows if COVERED.items() <= row.items()]
    shares = [row["covered"] for row in asked if row["layer"] == "up"]
    return fmean(shares) if shares else None


_MATCHED = (
    "at their latest two checkpoints of the last half whose clean accuracies differ by at most a "
    "point (largest sum of steps, then nearest in clean accuracy, then the first arm’s later)"
)


def _compared(arm: str, other: str, under: str, *disturbances: str) -> Asked:
    effect = (
        f"accuracy under {under}, over clean accuracy (validation rows, largest size recorded), "
        f"{arm} minus {other}, {_MATCHED}"
    )
    return Asked("rises", _keeps_more(arm, other, *disturbances), effect, "points")


_ATTACK = f"FGSM ± {COVERED['size']}"
_UNDER = {
    "inputs": ("PGD", "pgd"),
    "features": ("noise, mean of that on x and on d", *FEATURES),
    "weights": ("noise on weights", "weights"),
}
_PAIRS = {
    "paper": ("paper", "vanilla", tuple(_UNDER)),
    "spared": (SPARING, CONTROL, tuple(_UNDER)),
    "against-spared": ("paper", CONTROL, ("features", "weights")),
    "weight-noise": ("weight-noise", "vanilla", ("weights",)),
}
_TOGETHER = (
    "Spearman’s correlation, over a run’s successive checkpoints from the second on, of the change "
    "of −ln participation of the effective gradient (validation rows) and the change of accuracy "
    "under noise, mean of that on x and on d, over clean accuracy; minus the mean of its "
    "correlations with those changes of accuracy in the arm’s other seeds; mean over the seed’s "
    f"runs of {', '.join(TRAINED)}"
)
_COVERS = (
    f"weight-noise: share of tokens at up whose change under {_ATTACK} on inputs (`covering` in "
    f"the records) is no longer than the noise of ρ = {COVERED['rho']} in training, mean over "
    "blocks, at the end"
)
QUESTIONS = {
    **{
        f"{pair}-{what}": _compared(arm, other, *_UNDER[what])
        for pair, (arm, other, disturbed) in _PAIRS.items()
        for what in disturbed
    },
    "go-together": Asked("rises", _correlations, _TOGETHER),
    "covered": Asked(
        "rises", lambda arms: within(arms, "weight-noise", covered), _COVERS, "share", least=0.5
    ),
}

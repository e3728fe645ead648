"""The papers' three modifications, alone, in pairs and together; with 1-D decay and without.

v2 (arXiv 2605.25612) claims that zeroth biases, the norm floor and JSReLU together leave at least
36 % fewer active neurons in inference and 50 % in training than a vanilla Transformer, at its
quality, and gives each a purpose of its own; v1 (arXiv 2309.03004) says 50 % of two of its modules.
Here all eight combinations are trained from scratch, each also without weight decay of norm scales
and biases (1-D decay): decay shrinks the norm's scale and the floor undoes that, so sparing it is
the strongest simple control. Beside them: the bias where the authors' program adds it, higher
floors, and a model without MLPs.

Accuracy is asked against both vanillas, for decay on everything may cost the plain one much: then a
gain over it is the floor undoing the decay.

What it cannot tell: whether the sizes carry over to ViT-Base and T5-Base, or to another sum of
learning rate × decay over the steps, on which the shrinking of the norms depends. Main effects are
averages over the other two modifications, so they hide what two of them do only together.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from itertools import product

from actsparse_lab.analysis.effects import INFERENCE, Arms, Effects, log_ratio, mean_of, paired
from actsparse_lab.analysis.findings import Asked
from actsparse_lab.papers.questions import SPARED, mlps_matter, quality_kept, sparser

PARTS = ("bias", "floor", "jsrelu")


def combination(chosen: Iterable[str]) -> str:
    """The arm with these modifications.

    >>> combination(["jsrelu", "bias"]), combination([]), combination(PARTS)
    ('bias+jsrelu', 'vanilla', 'paper')
    """
    taken = set(chosen)
    names = [part for part in PARTS if part in taken]
    return {0: "vanilla", len(PARTS): "paper"}.get(len(names), "+".join(names))


def main_effect(part: str, end: str = "") -> Callable[[Arms], Effects]:
    """For each seed that all eight combinations have: the mean over the four settings of the other
    two modifications of ``ln(inference density with part / without it)``; ``end`` ends the names
    of the arms."""
    others = [other for other in PARTS if other != part]

    def effects(arms: Arms) -> Effects:
        ratios = []
        for taken in product((False, True), repeat=len(others)):
            rest = [other for other, one in zip(others, taken, strict=True) if one]
            own, without = combination([part, *rest]), combination(rest)
            ratios.append(paired(arms, own + end, without + end, INFERENCE, log_ratio))
        return mean_of(ratios)

    return effects


def _lowers(part: str, end: str = "") -> Asked:
    decay = "without 1-D decay" if end else "with 1-D decay"
    effect = (
        f"mean, over the four settings of the other two modifications, of ln of the ratio of "
        f"inference density, on the test split, with {part} over without it, all eight arms "
        f"{decay}"
    )
    return Asked("falls", main_effect(part, end), effect, "log")


QUESTIONS = {
    "all-inference": sparser("paper", "vanilla", by=0.36),
    "all-training": sparser("paper", "vanilla", "training", by=0.5),
    "all-quality": quality_kept("paper", "vanilla"),
    "all-living": sparser("paper", "vanilla", "living", by=0.36),
    "all-against-spared": sparser("paper", f"vanilla{SPARED}"),
    "all-quality-against-spared": quality_kept("paper", f"vanilla{SPARED}"),
    "all-spared": sparser(f"paper{SPARED}", f"vanilla{SPARED}"),
    "bias": _lowers("bias"),
    "floor": _lowers("floor"),
    "jsrelu": _lowers("jsrelu"),
    "floor-spared": _lowers("floor", SPARED),
    "bias-at-input": sparser("bias", "bias-at-output"),
    "floor-4": sparser("floor-4", "floor"),
    "mlps-matter": mlps_matter(),
}

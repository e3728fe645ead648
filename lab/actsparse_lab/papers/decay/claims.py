"""The papers' recipe against the decay of norm scales over a whole training.

Weight decay shrinks norm scales by a share of Σ lr·decay over the steps, and the norm floor undoes
that. The sum is 2 to 6 in short trainings and about 84 in the papers' ImageNet training (arXiv
2309.03004, "v1"; 2605.25612, "v2"). So each arm is trained at several sums, by as many steps at one
learning rate and decay.

What it cannot tell: longer trainings have both more decay and more steps. The arms without decay of
norms and biases are as long, and show what the steps alone do.
"""

from __future__ import annotations

from dataclasses import replace

from actsparse_lab.analysis.findings import Asked
from actsparse_lab.papers.questions import quality_kept, sparser

LEVELS = (2, 8, 30)  # Σ lr·decay
QUICK = LEVELS[:2]
PARTS = ("bias", "floor", "jsrelu")
CONTROL = "vanilla-no-1d-decay"
QUICK_ARMS = ("vanilla", "paper", CONTROL)  # the full form has the recipe so, and its parts too


def arm(name: str, total: int) -> str:
    """How an arm is called at a sum.

    >>> arm("paper", 8)
    'paper-sum8'
    """
    return f"{name}-sum{total}"


def parts_at(total: int) -> tuple[str, ...]:
    """The parts of the recipe that the full form trains alone at a sum."""
    return PARTS if total == 8 else ()


def _asked(total: int) -> dict[str, Asked]:
    own, vanilla, control = (arm(name, total) for name in ("paper", "vanilla", CONTROL))
    found = {
        "inference": sparser(own, vanilla, by=0.36),
        "training": sparser(own, vanilla, "training", by=0.5),
        "quality": quality_kept(own, vanilla),
        "control": sparser(own, control),
        **{part: sparser(arm(part, total), vanilla) for part in parts_at(total)},
    }
    quick = ("inference", "training", "quality", "control") if total in QUICK else ()
    return {f"{key}-{total}": replace(asked, full=key not in quick) for key, asked in found.items()}


QUESTIONS = {key: asked for total in LEVELS for key, asked in _asked(total).items()}

"""The runs of backward pruning."""

from __future__ import annotations

from actsparse.modify import PruneGradient
from actsparse_lab.papers.pruning.claims import BASES, DROPPED, NONE, dropping
from actsparse_lab.papers.runs import Form, Stages, arm_of, named, sparing
from actsparse_lab.tasks.arms import ARMS

ALL = 1e6  # a threshold that no entry passes: the largest is at most √entries times the rms


def runs(form: Form) -> Stages:
    """Small effective gradients dropped in training, at several thresholds."""
    arms = {}
    for base in BASES:
        arms[base] = ARMS[base]
        for threshold in DROPPED:
            name = dropping(base, threshold)
            arms[name] = arm_of(name, *ARMS[base].recipe.modifications, PruneGradient(threshold))
    arms[NONE] = arm_of(NONE, PruneGradient(ALL))
    spared = sparing({name: arms[name] for name in ("vanilla", dropping("vanilla", 1.0))})
    return {
        "": form.runs(
            arms | spared | named("no-mlp"),
            steps=450,
            log_every=90,
            eval_every=150,
            active={"pruning": {"thresholds": [0.03, 0.1, 0.3, 1.0, 3.0]}},
        )
    }

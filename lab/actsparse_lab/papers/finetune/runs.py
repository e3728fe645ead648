"""The runs of the finetuning."""

from __future__ import annotations

from actsparse_lab.papers.finetune.claims import FROM_SPARED, HOYER, PLAIN, RECIPE
from actsparse_lab.papers.runs import Form, Stages, named, sparing


def runs(form: Form) -> Stages:
    """Trained models finetuned for sparsity, beside plain finetuning."""
    bases = named("vanilla", "vanilla-no-1d-decay")
    arms = named(PLAIN, RECIPE)
    arms |= sparing(arms) | named(HOYER)
    stages = {"base": form.runs(bases, steps=900, log_every=150, eval_every=300), "": []}
    for base, ending in zip(bases, ("", FROM_SPARED), strict=True):
        stages[""] += form.runs(
            {name + ending: arm for name, arm in arms.items()},
            "_finetune",
            steps=300,
            weight_decay=0.8,
            log_every=100,
            eval_every=150,
            start=f"{form.out}/base/runs/{base}-seed{{seed}}/weights",
        )
    return stages

"""The runs of the grid of learning rates and batch sizes."""

from __future__ import annotations

from typing import Any

from actsparse_lab.papers.learning_rate.claims import BATCHES, RATES, arm
from actsparse_lab.papers.runs import Form, Stages, named

DECAY = {
    "weight_decay": 0.05
}  # the authors' program's; Σ lr·decay stays below 0.2 in the quick form


def runs(form: Form) -> Stages:
    """A plain ReLU ViT at nine learning rates and batch sizes, each on as many samples."""
    (vanilla,) = named("vanilla").values()
    every = []
    for nth, rate in enumerate(RATES):
        for batch in BATCHES:
            steps = 1200 * BATCHES[0] // batch
            settings: dict[str, Any] = {"log_every": steps // 12, "eval_every": steps // 4}
            full = {"lr": 10.0 ** (-3 - nth), "steps": 31_200 * BATCHES[0] // batch, **DECAY}
            settings |= {"lr": rate, "batch_size": batch, "active": ("flatness",), **DECAY}
            every += form.runs({arm(rate, batch): vanilla}, "", steps, full, **settings)
    return {"": every}

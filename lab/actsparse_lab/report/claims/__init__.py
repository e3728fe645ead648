"""What each of the papers' experiments asks of its records: a file each."""

from __future__ import annotations

from actsparse_lab.report.claims import (
    ablation,
    finetune,
    manipulate,
    noise,
    pruning,
    ratio,
    robustness,
    weight_noise,
)
from actsparse_lab.report.findings import Experiment

_EACH = (ratio, ablation, manipulate, pruning, noise, robustness, weight_noise, finetune)
CLAIMS: dict[str, Experiment] = {each.EXPERIMENT.name: each.EXPERIMENT for each in _EACH}

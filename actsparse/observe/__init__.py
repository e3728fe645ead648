"""Measure a model while it runs, without changing it: one file for each measure."""

from __future__ import annotations

from actsparse.observe.attack import Attack, perturb
from actsparse.observe.coverage import covering
from actsparse.observe.disturbances import RelativeNoise, robustness
from actsparse.observe.gradient_pruning import pruning
from actsparse.observe.measuring import CURVATURES, Measures, measure, spectra_of
from actsparse.observe.registry import MEASURES
from actsparse.observe.session import Seen, observe
from actsparse.observe.skippable_work import skippable, skippable_products
from actsparse.observe.trials import TRIALS

__all__ = [
    "CURVATURES",
    "MEASURES",
    "TRIALS",
    "Attack",
    "Measures",
    "RelativeNoise",
    "Seen",
    "covering",
    "measure",
    "observe",
    "perturb",
    "pruning",
    "robustness",
    "skippable",
    "skippable_products",
    "spectra_of",
]

"""Augmented flatness, and the ratio, over the samples that a model classifies correctly.

The measures of :class:`actsparse.observe.flatness.Flatness` with the data's labels, where the mean
is over correctly classified samples alone (Peng et al. 2026, arXiv 2605.25612, augmented flatness
over training). Which they are depends on the model, so it is asked anew at each measurement: early
in training there may be none.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, ClassVar

import torch

from actsparse.observe import TRIALS
from actsparse.observe.backward_passes import correct_samples, observed
from actsparse.observe.curvature_product import LossSurface
from actsparse.observe.trials import On, Rows

NUMBERS = (
    "flatness", "coefficient", "density_from_flatness", "input_norm", "effective_gradient", "ratio"
)  # fmt: skip


@dataclass(frozen=True)
class CorrectFlatness:
    """One row: ``correct``, the share of samples that are, how many (``samples``), and `NUMBERS`.

    The numbers are None where no sample is classified correctly.
    """

    columns: ClassVar[tuple[str, ...]] = ("correct", "samples", *NUMBERS)

    def passes(self) -> int:
        """To classify, and to differentiate."""
        return 2

    def rows(self, on: On) -> Rows:
        """Measure it."""
        names = [name for name, _ in on.model.named_parameters()]
        surface = LossSurface(on.model, on.loss_fn, on.batches, names, on.reduction)
        right = correct_samples(surface)
        count, share = int(torch.cat(right).sum()), float(torch.cat(right).double().mean())
        found = None
        if count:
            flatness: dict[str, dict[str, Any]] = {"flatness": {}}
            found, _ = observed(surface, on.blocks, flatness, on.mask, "data", 1, on.seed, right)
        numbers = {name: None if found is None else found[name] for name in NUMBERS}
        return [{"correct": share, "samples": count, **numbers}]


TRIALS["flatness_correct"] = CorrectFlatness

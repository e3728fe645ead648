"""The runs of the manipulation."""

from __future__ import annotations

from actsparse.activations import shifted_s_shape
from actsparse.modify import SwapActivation
from actsparse_lab.papers.form import Form, Stages, arm_of, named, sparing, with_controls
from actsparse_lab.papers.manipulate.claims import SHIFTS


def runs(form: Form) -> Stages:
    """S-shapes that part the zeros of φ from those of φ′."""
    arms = {
        name: arm_of(name, SwapActivation(shifted_s_shape(*by).name)) for name, by in SHIFTS.items()
    }
    shapes = form.runs(
        arms | sparing(arms),
        steps=450,
        log_every=90,
        eval_every=150,
        measures=("density", "occupancy"),
    )
    plain = form.runs(with_controls(named("vanilla")), steps=450, log_every=90, eval_every=150)
    return {"": [*shapes, *plain]}

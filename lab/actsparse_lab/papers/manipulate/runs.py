"""The runs of the manipulation."""

from __future__ import annotations

from typing import Any

from actsparse.activations import shifted_s_shape
from actsparse.modify import LeaveOutMLP, Modification, SwapActivation, ZerothBias
from actsparse_lab.engine.folder import Config
from actsparse_lab.papers.manipulate.claims import DECAYED, SHIFTS
from actsparse_lab.papers.runs import Form, Stages, arm_of


def runs(form: Form) -> Stages:
    """S-shapes that part the zeros of φ from those of φ′.

    As the authors' program runs them, with zeroth biases and without weight decay; and with weight
    decay, without those biases.
    """
    none: dict[str, Any] = {"weight_decay": 0.0}
    theirs = _runs(form, "", ZerothBias(), full=none, **none)
    return {"": [*theirs, *_runs(form, DECAYED)]}


def _runs(form: Form, ending: str, *changes: Modification, **settings: Any) -> list[Config]:
    shapes = {
        name + ending: arm_of(name, *changes, SwapActivation(shifted_s_shape(*by).name))
        for name, by in SHIFTS.items()
    }
    plain = {
        f"vanilla{ending}": arm_of("vanilla"),
        f"no-mlp{ending}": arm_of("no-mlp", LeaveOutMLP()),
    }
    settings |= {"steps": 450, "log_every": 90, "eval_every": 150}
    occupied = form.runs(shapes, measures=("density", "occupancy"), **settings)
    return [*occupied, *form.runs(plain, **settings)]

"""The runs of the ablation."""

from __future__ import annotations

from itertools import product

from actsparse.modify import Modification, NormFloor, SwapActivation, ZerothBias
from actsparse_lab.papers.ablation.claims import combination
from actsparse_lab.papers.runs import Form, Stages, arm_of, with_controls


def runs(form: Form) -> Stages:
    """Each modification alone, in pairs, all; without 1-D decay too; placements and floors."""
    parts: dict[str, Modification] = {
        "bias": ZerothBias(),
        "floor": NormFloor(),
        "jsrelu": SwapActivation("jsrelu"),
    }
    arms = {}
    for chosen in product((False, True), repeat=3):
        names = [name for name, taken in zip(parts, chosen, strict=True) if taken]
        label = combination(names)
        arms[label] = arm_of(label, *(parts[name] for name in names))
    arms = with_controls(arms)
    arms["bias-at-output"] = arm_of("bias-at-output", ZerothBias(at="output"))
    for floor in (2.0, 4.0):
        arms[f"floor-{floor:g}"] = arm_of(f"floor-{floor:g}", NormFloor(floor=floor))
    return {"": form.runs(arms, steps=360, log_every=90, eval_every=120)}

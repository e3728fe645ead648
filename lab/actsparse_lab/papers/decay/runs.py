"""The runs of the papers' recipe at several sums of learning rate × weight decay."""

from __future__ import annotations

from actsparse.modify import NormFloor, SwapActivation, ZerothBias
from actsparse_lab.engine.folder import Config
from actsparse_lab.papers.decay.claims import LEVELS, QUICK, QUICK_ARMS, arm, parts_at
from actsparse_lab.papers.runs import Form, Stages, arm_of, named
from actsparse_lab.tasks import config_of

BRINGS_DATA = True  # both forms are on digits
DECAY = 1.0  # at most, so that with the learning rate of 0.005 a step takes at most 5e-3
STEPS = 400  # for each unit of Σ lr·decay: half of all steps, by the cosine and its warm-up


def runs(form: Form) -> Stages:
    """Vanilla, the papers' recipe, its parts, and both without decay of norms and biases.

    The quick form has the arms that its claims name, at the two smaller sums.
    """
    arms = named(*QUICK_ARMS, *(["paper-no-1d-decay"] if form.full else []))
    parts = {
        "bias": arm_of("bias", ZerothBias()),
        "floor": arm_of("floor", NormFloor()),
        "jsrelu": arm_of("jsrelu", SwapActivation("jsrelu")),
    }
    found: list[Config] = []
    for total in LEVELS if form.full else QUICK:
        steps = form.steps or STEPS * total
        alone = {part: parts[part] for part in parts_at(total)} if form.full else {}
        found += [
            config_of(
                "digits", arm(name, total), chosen, seed, steps=steps, weight_decay=DECAY,
                log_every=max(1, steps // 20), eval_every=max(1, steps // 4), active=("flatness",),
            )
            for seed in range(form.seeds)
            for name, chosen in (arms | alone).items()
        ]  # fmt: skip
    return {"": found}

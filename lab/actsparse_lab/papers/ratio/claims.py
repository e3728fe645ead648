"""Flatness over its coefficient, during training (Peng et al. 2026, arXiv 2605.25612, "v2").

With AF augmented flatness, T tokens in a sample and H hidden units, the ratio is
``AF / (T · H · mean ‖x‖² · mean η²)``: x the MLP's input, η the gradient before the activation
function, its mean over active units. v2 says that it falls in training and sparsity rises with it.

Under ReLU ``AF / (T · H · c) = density`` exactly, with c the mean of ‖x‖²η² taken together, so the
ratio is density times c over the product of two means. That both fall is therefore nearly one
finding, and "AF falls more than c" none. What can be false, and is asked as a check of ours, is the
sign of each part. Nothing here is a cause: AF has norm and gradient as factors.

v2 measures AF over correctly classified samples, from the first steps on. `of_correct` reads that.
"""

from __future__ import annotations

from typing import Literal

from actsparse_lab.analysis.effects import (
    Arms,
    Effects,
    at_end,
    log_ratio,
    number,
    over_run,
    paired,
    within,
)
from actsparse_lab.analysis.findings import Asked
from actsparse_lab.papers.questions import SPARED, mlps_matter
from actsparse_lab.records import Run

CONTROL = f"vanilla{SPARED}"
UNFITTED = 0.1  # training loss, in nats; below it the training data counts as fitted


def _over_training(
    arm: str,
    key: str,
    what: str,
    direction: Literal["rises", "falls"] = "falls",
    least_loss: float | None = None,
) -> Asked:
    def effects(arms: Arms) -> Effects:
        return within(arms, arm, over_run("train", "measures", key, least_loss=least_loss))

    last = "last log window"
    if least_loss is not None:
        last += f" whose training loss is at least {least_loss:g}"
    effect = f"{arm}: ln of {what}, {last} over first (train lines, data’s labels)"
    return Asked(direction, effects, effect, "log")


def _drawn(arms: Arms) -> Effects:
    return within(arms, "vanilla", over_run("measured", "measures", "flatness"))


def _norms(arms: Arms) -> Effects:
    return paired(arms, "paper", CONTROL, at_end("train", "measures", "input_norm"), log_ratio)


def of_correct(run: Run, key: str) -> dict[int, float]:
    """Step → a number over the correctly classified samples (`engine.flatness_correct`), if > 0."""
    found = {}
    for line in run.measured:
        rows = line.get("trials", {}).get("flatness_correct")
        if isinstance(rows, list) and len(rows) == 1:
            found[line["step"]] = number(rows[0], key) or 0
    return {step: value for step, value in found.items() if value > 0}


def first_epoch(run: Run) -> int:
    """The step at which the dense measurements end."""
    named = run.header.get("config", {}).get("active_at")
    steps = named if isinstance(named, list) else []
    return max([step for step in steps if isinstance(step, int)], default=0)


def _correct(key: str, what: str, in_first_epoch: bool = False) -> Asked:
    def change(run: Run) -> float | None:
        values = of_correct(run, key)
        last = first_epoch(run) if in_first_epoch else run.result and run.result["step"]
        if 0 not in values or last not in values:
            return None
        return log_ratio(values[last], values[0])

    end = "the end of the first epoch" if in_first_epoch else "the end"
    effect = (
        f"vanilla: ln of {what} over correctly classified validation rows, {end} over step 0 "
        f"(measured lines: eval mode, data’s labels)"
    )
    return Asked("falls", lambda arms: within(arms, "vanilla", change), effect, "log")


_RATIO = ("ratio", "AF ÷ (T · H · mean ‖x‖² · mean η² of active units)")
_GRADIENT = ("effective_gradient", "mean η² over active units")
_HELD_OUT = (
    "vanilla: ln of AF of the up layer, the end over step 0 (measured lines: validation rows, "
    "eval mode)"
)
_LARGER = f"ln of mean ‖x‖² in the last log window, paper over {CONTROL}"
QUESTIONS = {
    "ratio": _over_training("vanilla", *_RATIO),
    "density": _over_training("vanilla", "density", "training density"),
    "ratio-paper": _over_training("paper", *_RATIO),
    "ratio-spared": _over_training(CONTROL, *_RATIO),
    "flatness": _over_training("vanilla", "flatness", "augmented flatness AF of the up layer"),
    "flatness-held-out": Asked("falls", _drawn, _HELD_OUT, "log"),
    "flatness-correct": _correct("flatness", "AF of the up layer"),
    "ratio-correct": _correct("ratio", "the ratio"),
    "ratio-correct-epoch": _correct("ratio", "the ratio", in_first_epoch=True),
    "input-norm": _over_training("vanilla", "input_norm", "mean ‖x‖²", "rises"),
    "input-norm-paper": Asked("rises", _norms, _LARGER, "log"),
    "gradient": _over_training("vanilla", *_GRADIENT, "rises"),
    "gradient-unfitted": _over_training("vanilla", *_GRADIENT, "rises", UNFITTED),
    "gradient-unfitted-spared": _over_training(CONTROL, *_GRADIENT, "rises", UNFITTED),
    "mlps-matter": mlps_matter(),
}

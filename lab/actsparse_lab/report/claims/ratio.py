"""Flatness over its coefficient, during training (Peng et al. 2026, arXiv 2605.25612, "v2").

With AF augmented flatness, T tokens in a sample and H hidden units, the ratio is
``AF / (T · H · mean ‖x‖² · mean η²)``: x the MLP's input, η the gradient before the activation
function, its mean over active units. v2 says that it falls in training and sparsity rises with it.

Under ReLU ``AF / (T · H · c) = density`` exactly, with c the mean of ‖x‖²η² taken together, so the
ratio is density times c over the product of two means. That both fall is therefore nearly one
finding, and "AF falls more than c" none. What can be false, and is asked as a check of ours, is the
sign of each part. Nothing here is a cause: AF has norm and gradient as factors.
"""

from __future__ import annotations

import math
from statistics import geometric_mean
from typing import TYPE_CHECKING, Literal

import numpy as np

from actsparse_lab.records import Run
from actsparse_lab.report.claims.arm_questions import SPARED, mlps_matter
from actsparse_lab.report.effects import Arms, Effects, at_end, log_ratio, over_run, paired, within
from actsparse_lab.report.findings import Asked
from actsparse_lab.report.numbers import amount
from actsparse_lab.report.plots import (
    INK,
    MARKS,
    SERIES_INK,
    WIDTH,
    draw_seeds,
    label_ends,
    log_axis,
    new_figure,
    palette,
    render,
    stacked,
)
from actsparse_lab.report.prose import experiment
from actsparse_lab.report.theory_plots import training

if TYPE_CHECKING:
    pass

CONTROL = f"vanilla{SPARED}"
UNFITTED = 0.1  # training loss, in nats; below it the training data counts as fitted
SHOWN = ("vanilla", "paper", CONTROL)
NAMES = {
    "density": "density",
    "ratio": "ratio",
    "flatness": "flatness AF",
    "coefficient": "coefficient c",
    "input_norm": "input norm",
    "effective_gradient": "gradient²",
}
PARTS = {
    "ratio": None,
    "flatness": 3,
    "input_norm": 2,
    "effective_gradient": 4,
}  # colours, by number


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
    "input-norm": _over_training("vanilla", "input_norm", "mean ‖x‖²", "rises"),
    "input-norm-paper": Asked("rises", _norms, _LARGER, "log"),
    "gradient": _over_training("vanilla", *_GRADIENT, "rises"),
    "gradient-unfitted": _over_training("vanilla", *_GRADIENT, "rises", UNFITTED),
    "gradient-unfitted-spared": _over_training(CONTROL, *_GRADIENT, "rises", UNFITTED),
    "mlps-matter": mlps_matter(),
}


def parts_over_steps(arms: Arms, dark: bool = False) -> bytes | None:
    """The ratio and its parts over steps, each 1 in the first window; an arm a panel.

    Thick lines are geometric means over seeds, thin ones seeds.
    """
    known = {arm: lines for arm in SHOWN if (lines := _relative(arms[arm]))}
    if not known:
        return None
    figure, every = stacked(dark, list(known), 2.1, 0.7)
    ends = []
    for axes, lines in zip(every, known.values(), strict=True):
        if axes is not every[0]:
            axes.sharex(every[0])
            axes.sharey(every[0])
        axes.axhline(1, color=INK[dark], linewidth=0.8, linestyle=":")
        means = {}
        for key, seeds in lines.items():
            width = 3.2 if key == "ratio" else 2.2
            color = _color(key, dark)
            _, means[key] = draw_seeds(axes, seeds, color, geometric_mean, linewidth=width)
        ends.append({key: list(mean.values())[-1] for key, mean in means.items()})
    log_axis(every[0], "y", few=True)
    for axes, each in zip(every, ends, strict=True):
        label_ends(axes, each, NAMES, {key: _color(key, dark) for key in each})
    every[-1].set_xlabel("step")
    figure.supylabel("times its first value", color=INK[dark], fontsize=13)
    return render(figure, {})


def changes(arms: Arms, dark: bool = False) -> bytes | None:
    """By which factor each changed from first to last window: a mark an arm, dots for seeds."""
    figure, (axes,) = new_figure(dark, size=(WIDTH, 5.4))
    colours = palette(dark)
    marks = {}
    for place, arm in enumerate(SHOWN):
        color = SERIES_INK[dark] if arm == "vanilla" else colours[place - 1]
        for row, key in enumerate(NAMES):
            each = list(within(arms, arm, over_run("train", "measures", key)).values())
            if not each:
                continue
            y, mean = row + 0.27 * (place - 1), math.exp(sum(each) / len(each))
            axes.plot(np.exp(each), [y] * len(each), "o", color=color, alpha=0.35, markersize=4)
            (marks[arm],) = axes.plot([mean], [y], MARKS[place], color=color, markersize=9)
            text = f"× {amount(float(f'{mean:.2g}'))}"
            beside = axes.get_yaxis_transform()
            axes.text(1.02, y, text, color=color, fontsize=11, va="center", transform=beside)
    if not marks:
        return None
    log_axis(axes, "x", few=True)
    axes.axvline(1, color=INK[dark], linewidth=1.2, linestyle=":")
    axes.set_yticks(range(len(NAMES)), list(NAMES.values()))
    axes.set_ylim(len(NAMES) - 0.5, -0.5)
    axes.grid(visible=False, axis="y")
    for row in range(len(NAMES) - 1):
        axes.axhline(row + 0.5, color=INK[dark], alpha=0.2)
    axes.set_xlabel("last window over first  (left of 1: it fell)")
    return render(figure, marks)


def _relative(runs: dict[int, Run]) -> dict[str, list[dict[int, float]]]:
    """Of each part a series a seed, over its value in the run's first window."""
    lines: dict[str, list[dict[int, float]]] = {}
    for key in PARTS:
        for run in runs.values():
            points = training(key, positive=True)(run)
            first = points.get(run.train[0]["step"]) if run.train else None
            if first is not None:
                series = {step: value / first for step, value in points.items()}
                lines.setdefault(key, []).append(series)
    return lines


def _color(key: str, dark: bool) -> str:
    number = PARTS[key]
    return INK[dark] if number is None else palette(dark)[number]


EXPERIMENT = experiment(
    "ratio", QUESTIONS, {"ratio-parts": parts_over_steps, "ratio-changes": changes}
)

"""The ratio's plots: its parts over steps, and what they changed by."""

from __future__ import annotations

import math
from statistics import geometric_mean

import numpy as np

from actsparse_lab.analysis.effects import Arms, over_run, within
from actsparse_lab.analysis.numbers import amount
from actsparse_lab.analysis.plots import (
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
from actsparse_lab.analysis.theory_plots import training
from actsparse_lab.papers.ratio.claims import CONTROL, first_epoch, of_correct
from actsparse_lab.records import Run

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
    marks = {}
    for place, arm in enumerate(SHOWN):
        color = _of_arm(arm, dark)
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


def over_correct(arms: Arms, dark: bool = False) -> bytes | None:
    """AF and the ratio over correctly classified samples, and how many these are, over steps.

    Steps are on a log scale from 1 on. Thick lines are geometric means over seeds, thin ones seeds.
    """
    panels = {
        "flatness": "flatness AF of samples classified correctly",
        "ratio": "AF ÷ (norm × gradient²), the ratio",
        "correct": "share classified correctly",
    }
    series = {
        key: {arm: [of_correct(run, key) for run in arms[arm].values()] for arm in SHOWN}
        for key in panels
    }
    if not any(map(any, series["flatness"].values())):
        return None
    figure, every = stacked(dark, list(panels.values()), 1.9, 0.9)
    ends = {first_epoch(run) for arm in SHOWN for run in arms[arm].values()} - {0}
    last = max(step for own in series["flatness"].values() for seed in own for step in seed)
    ticks = [0, *(10**power for power in range(len(str(last))))]
    lines = {}
    for axes, own in zip(every, series.values(), strict=True):
        for arm, seeds in own.items():
            color = _of_arm(arm, dark)
            line, _ = draw_seeds(axes, list(filter(None, seeds)), color, geometric_mean)
            if line is not None:
                lines[arm] = line
        for end in ends:
            axes.axvline(end, color=INK[dark], linewidth=0.8, linestyle=":")
        axes.set_xscale("symlog", linthresh=1)
        axes.set_xlim(0, last)
        axes.set_xticks(ticks, [str(tick) for tick in ticks])
        log_axis(axes, "y", few=True)
    every[-1].set_xlabel("step  (dotted: the end of the first epoch)")
    return render(figure, lines)


def _of_arm(arm: str, dark: bool) -> str:
    return SERIES_INK[dark] if arm == "vanilla" else palette(dark)[SHOWN.index(arm) - 1]


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


PLOTS = {
    "ratio-parts": parts_over_steps, "ratio-changes": changes, "ratio-correct": over_correct
}  # fmt: skip

"""The robustness plots: against clean accuracy, and against sparse gradients."""

from __future__ import annotations

from collections.abc import Callable
from statistics import fmean
from typing import TYPE_CHECKING, Any

from actsparse_lab.analysis import plots
from actsparse_lab.analysis.effects import Arms, number
from actsparse_lab.analysis.plots import INK, MARKS, SERIES_INK, WIDTH, palette
from actsparse_lab.papers.robustness.claims import CONTROL, FEATURES, accuracies, kept
from actsparse_lab.records import Entry, Run

if TYPE_CHECKING:
    from matplotlib.axes import Axes

Path = dict[int, tuple[float, float]]  # by step: where on either axis
NAMES = {
    "fgsm": "inputs: FGSM ± {:g}",
    "pgd": "inputs: PGD ± {:g}",
    "x": "features in: noise × {:g}",
    "d": "features out: noise × {:g}",
    "weights": "weights: noise × {:g}",
}
SHOWN = {  # arm: number of the colour; None is grey
    "vanilla": None,
    CONTROL: 5,
    "paper": 1,
    "weight-noise": 2,
    "hoyer-no-1d-decay": 3,
}


def against_clean(arms: Arms, dark: bool = False) -> bytes | None:
    """Accuracy under each disturbance against clean accuracy: a path for each arm.

    The mean over seeds, from the first checkpoint after the start (hollow) to the last; small dots
    are the seeds there.
    """
    runs = [run for arm in SHOWN for run in arms[arm].values()]
    known = [accuracies(entry) for run in runs for entry in run.measured if entry["step"] > 0]
    sizes = {name: found[name][0] for name in NAMES for found in known if name in found}
    if not sizes:
        return None
    rows = (len(sizes) + 1) // 2
    figure, every = plots.new_figure(dark, rows, 2, (WIDTH, 0.7 + 2.05 * rows))
    lines: dict[str, Any] = {}
    for axes, (name, size) in zip(every, sizes.items(), strict=False):

        def read(entry: Entry, name: str = name) -> tuple[float, float] | None:
            found = accuracies(entry)
            return (100 * found["clean"][1], 100 * found[name][1]) if name in found else None

        lines |= _paths(axes, arms, read, dark)
        axes.set_title(NAMES[name].format(size), loc="left", fontsize=11, color=INK[dark])
        axes.tick_params(labelsize=10)
        axes.locator_params(nbins=4)
    for axes in every[len(sizes) - 2 : len(sizes)]:
        axes.set_xlabel("accuracy, clean, %", fontsize=11)
    figure.supylabel("accuracy, disturbed, %", color=INK[dark], fontsize=13)
    if len(sizes) % 2 == 0:
        return plots.render(figure, lines)
    every[-1].set_axis_off()
    words = {"frameon": False, "fontsize": 11.5, "labelcolor": "linecolor"}
    every[-1].legend(list(lines.values()), list(lines), loc="center", **words)
    return plots.render(figure, {})


def against_sparsity(arms: Arms, dark: bool = False) -> bytes | None:
    """Accuracy kept under noise on features against two measures of sparse gradients."""
    panels = (
        ("units that share a gradient, %  (right: few, sparse)", "participation"),
        ("gradients that are nearly 0, %  (right: sparse)", "gradient_sparsity"),
    )
    figure, every = plots.new_figure(dark, rows=len(panels), size=(WIDTH, 6.6))
    lines: dict[str, Any] = {}
    for axes, (label, key) in zip(every, panels, strict=True):

        def read(entry: Entry, key: str = key) -> tuple[float, float] | None:
            share, robust = number(entry, "measures", key), kept(entry, *FEATURES)
            return None if share is None or robust is None else (100 * share, 100 * robust)

        lines |= _paths(axes, arms, read, dark)
        axes.set_xlabel(label)
        if key == "participation" and axes.lines:
            plots.log_axis(axes, "x", few=True)
            axes.invert_xaxis()
    figure.supylabel("accuracy kept under noise, %", color=INK[dark], fontsize=13)
    return plots.render(figure, lines) if lines else None


def _paths(
    axes: Axes, arms: Arms, read: Callable[[Entry], tuple[float, float] | None], dark: bool
) -> dict[str, Any]:
    """A path for each arm that has one; its last marks by arm."""
    lines: dict[str, Any] = {}
    for place, (arm, number_) in enumerate(SHOWN.items()):
        color = SERIES_INK[dark] if number_ is None else palette(dark)[number_]
        paths = [path for run in arms[arm].values() if (path := _path(run, read))]
        common = sorted(set.intersection(*map(set, paths))) if paths else []
        if not common:
            continue
        mean = [tuple(map(fmean, zip(*(path[s] for path in paths), strict=True))) for s in common]
        style: dict[str, Any] = {"color": color, "marker": MARKS[place]}
        axes.plot(*zip(*mean, strict=True), color=color, linewidth=2.2)
        axes.plot(*mean[0], **style, markersize=7, markerfacecolor=axes.get_facecolor())
        ends = [path[common[-1]] for path in paths]
        axes.plot(*zip(*ends, strict=True), "o", color=color, alpha=0.35, markersize=3)
        (lines[arm],) = axes.plot(*mean[-1], **style, linestyle="", markersize=8)
    return lines


def _path(run: Run, read: Callable[[Entry], tuple[float, float] | None]) -> Path:
    """Of the checkpoints after the start."""
    points = {entry["step"]: read(entry) for entry in run.measured if entry["step"] > 0}
    return {step: point for step, point in points.items() if point is not None}


PLOTS = {"robustness-paths": against_clean, "robustness-gradients": against_sparsity}

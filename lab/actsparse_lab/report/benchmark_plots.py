"""The plots of benchmarks: dense time and memory over a program's own.

Above 1 the program is faster. Amdahl's value: where the MLPs take the share f of the dense time and
one alone is r times as fast, the whole is ``1 / (1 − f + f / r)`` times as fast, and without any
MLP ``1 / (1 − f)``.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING, Any

from actsparse_lab.analysis.numbers import decimal
from actsparse_lab.analysis.plots import (
    HEIGHT,
    INK,
    MARKS,
    PAPER,
    WIDTH,
    log_axis,
    new_figure,
    palette,
    render,
)  # fmt: skip
from actsparse_lab.analysis.prose import pictures
from actsparse_lab.report.benchmarks import PROGRAMS, Benchmarks, Ratio, Row

if TYPE_CHECKING:
    from matplotlib.axes import Axes

DASH: dict[str, Any] = dict(zip(PROGRAMS, ("--", "-", ":", "-."), strict=True))
LEGEND, PANEL = 1.7, 2.9  # inches below, and of each record's panel
BAR = 0.52  # inches of a whole model's bar
KEPT = "memory kept for backward, dense = 1"
FASTER = "dense ÷ own time  ({} is faster)"


def gains(kind: str) -> Callable[[Benchmarks, bool], bytes | None]:
    """The plot of dense time ÷ program time by density, a line for each T and program."""

    def read(row: Row) -> dict[str, Ratio]:
        return row.ratios.get(kind, {})

    def plot(measured: Benchmarks, dark: bool = False) -> bytes | None:
        return _by_density(measured, dark, read, FASTER.format("up"), kind)

    return plot


def memory(measured: Benchmarks, dark: bool = False) -> bytes | None:
    """What each program keeps for backward over what dense keeps, by density."""

    def read(row: Row) -> dict[str, Ratio]:
        return {program: Ratio(kept, kept, kept) for program, kept in row.memory.items()}

    return _by_density(measured, dark, read, KEPT)


def _by_density(
    measured: Benchmarks,
    dark: bool,
    read: Callable[[Row], dict[str, Ratio]],
    label: str,
    timed: str | None = None,
) -> bytes | None:
    """A panel for each record: lines over density, and the break-even of the kind ``timed``."""
    from matplotlib.lines import Line2D

    layers = [
        (layer, rows)
        for layer in measured.layers
        if (rows := [row for row in layer.rows if row.density > 0 and read(row)])
    ]
    if not layers:
        return None
    size = (WIDTH, LEGEND + PANEL * len(layers))
    figure, every = new_figure(dark, rows=len(layers), size=size)
    styles = _styles(measured, dark)
    for axes, (layer, rows) in zip(every, layers, strict=True):
        if axes is not every[0]:
            axes.sharex(every[0])
            axes.sharey(every[0])
        for tokens, style in styles.items():
            own = sorted((r for r in rows if r.tokens == tokens), key=lambda row: row.density)
            _draw(axes, own, read, style)
        axes.axhline(1, color=INK[dark], linestyle=":", linewidth=1.2)
        if timed:
            log_axis(axes, "y", few=True)
            _mark_break_even(axes, layer.break_even.get(timed, {}), styles, dark)
        log_axis(axes, "x", few=True)
        axes.set_title(layer.label, loc="left", fontsize=12, color=INK[dark])
    every[-1].set_xlabel("density  (left is sparser)")
    if not timed:
        every[0].set_ylim(bottom=0)
    if len(every) == 1:
        every[0].set_ylabel(label)
    else:
        figure.supylabel(label, color=INK[dark], fontsize=13)
    shown = {row.tokens for _, rows in layers for row in rows}
    drawn = {program for _, rows in layers for row in rows for program in read(row)}
    marked = [layer.break_even.get(timed or "", {}).values() for layer, _ in layers]
    lines = {f"T = {t}": Line2D([], [], **style) for t, style in styles.items() if t in shown}
    programs = {
        program: Line2D([], [], color=INK[dark], linestyle=dash, linewidth=2)
        for program, dash in DASH.items()
        if program in drawn
    }
    if any(density for found in marked for density in found):
        cross = Line2D([], [], color=INK[dark], marker="X", markersize=9, linestyle="")
        programs["break-even"] = cross
    for at in range(len(programs) - len(lines)):  # so that T has a column of its own
        lines[" " * (at + 1)] = Line2D([], [], linestyle="")
    return render(figure, {**lines, **programs})


def _draw(
    axes: Axes, rows: list[Row], read: Callable[[Row], dict[str, Ratio]], style: dict[str, Any]
) -> None:
    """The lines of one T, with their intervals."""
    for program, dash in DASH.items():
        points = [(row.density, read(row)[program]) for row in rows if program in read(row)]
        if points:
            at = [density for density, _ in points]
            axes.plot(at, [ratio.value for _, ratio in points], linestyle=dash, **style)
            low, high = [ratio.low for _, ratio in points], [ratio.high for _, ratio in points]
            axes.vlines(at, low, high, color=style["color"], linewidth=1.4)


def _mark_break_even(
    axes: Axes, found: dict[int, float | None], styles: dict[int, dict[str, Any]], dark: bool
) -> None:
    for tokens, density in found.items():
        if density is not None and tokens in styles:
            style = {**styles[tokens], "marker": "X", "markersize": 12, "linestyle": ""}
            axes.plot(density, 1, **style, markeredgecolor=PAPER[dark], zorder=3)


def _styles(measured: Benchmarks, dark: bool) -> dict[int, dict[str, Any]]:
    """Colour and mark of every T, the same in all plots."""
    colours = palette(dark)
    every = sorted({row.tokens for layer in measured.layers for row in layer.rows})
    return {
        tokens: {
            "color": colours[at % len(colours)],
            "marker": MARKS[at % len(MARKS)],
            "markersize": 6,
            "linewidth": 2,
        }
        for at, tokens in enumerate(every)
    }


def whole_models(measured: Benchmarks, dark: bool = False) -> bytes | None:
    """A bar for each model and density, beside it Amdahl's value and the model without MLPs."""
    from matplotlib.lines import Line2D

    if not measured.wholes:
        return None
    labels = list(dict.fromkeys(whole.label for whole in measured.wholes))
    lines = [(label, whole) for label in labels for whole in [None, *measured.wholes]
             if whole is None or whole.label == label]  # fmt: skip
    size = (WIDTH, max(HEIGHT, 1.6 + BAR * len(lines)))
    figure, (axes,) = new_figure(dark, size=size)
    bar, mark, ink = palette(dark)[0], palette(dark)[1], INK[dark]
    handles: dict[str, Any] = {}
    for y, (label, whole) in enumerate(lines):
        if whole is None:
            across = axes.get_yaxis_transform()
            axes.text(0.01, y + 0.2, label, transform=across, va="center", color=ink, fontsize=12)
            continue
        ratio, limit = whole.ratio, whole.limit
        axes.barh(y, ratio.value, height=0.62, color=bar, alpha=0.55)
        axes.hlines(y, ratio.low, ratio.high, color=bar, linewidth=2.4)
        axes.hlines(y, limit.low, limit.high, color=ink, linewidth=1.2)
        (handles["limit: without MLPs"],) = axes.plot(
            limit.value, y, "|", color=ink, markersize=16, markeredgewidth=2.4
        )
        if whole.amdahl is not None:
            (handles["Amdahl"],) = axes.plot(whole.amdahl, y, "D", color=mark, markersize=9)
    accelerated = Line2D([], [], color=bar, linewidth=8)
    axes.axvline(1, color=ink, linestyle=":", linewidth=1.2)
    densities = {y: decimal(whole.density) for y, (_, whole) in enumerate(lines) if whole}
    axes.set_yticks(list(densities), list(densities.values()))
    axes.grid(visible=False, axis="y")
    axes.set_ylim(len(lines) - 0.4, -0.6)  # from the top
    axes.set_xlim(left=0)
    axes.set_xlabel(FASTER.format("right"))
    axes.set_ylabel("density")
    return render(figure, {"accelerated": accelerated, **handles})


BENCHMARK_PICTURES = pictures(
    {
        "payoff-forward": gains("forward"),
        "payoff-training": gains("training"),
        "payoff-memory": memory,
        "payoff-models": whole_models,
    },
    "report/captions.md",
)

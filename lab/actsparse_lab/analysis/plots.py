"""The report's plots: each takes the table and its runs, returns a PNG; None with nothing to show.

Colours are Okabe and Ito's, apart also for colour-blind eyes; marks and dashes tell arms apart too.
"""

from __future__ import annotations

import io
import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from statistics import fmean
from typing import TYPE_CHECKING, Any, Literal

import numpy as np

from actsparse_lab.analysis.comparison import REFERENCE, Comparison
from actsparse_lab.analysis.intervals import Estimate
from actsparse_lab.analysis.numbers import amount
from actsparse_lab.records import Entry, Run

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

LIGHT = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00", "#56B4E9")
DARK = ("#5AA9E6", "#F07F3C", "#2FC49A", "#DE94BD", "#F0B429", "#A8D8F5")
FIRST = (  # arms that many pages show: each has its colour, and the rest what follows
    "paper", "vanilla-no-1d-decay", "best", "paper-no-1d-decay", "no-mlp", "l1-no-1d-decay",
)  # fmt: skip
DASHES = ("-", "--", ":")
MARKS = "osD^vPX*"
SERIES_INK = {False: "#6B6B6B", True: "#B4B4B4"}  # the reference arm
INK = {False: "#33373D", True: "#C9CDD3"}
PAPER = {False: "#FFFFFF", True: "#1B1E23"}  # as in page.html.jinja
WIDTH, HEIGHT, DPI = 5.4, 4.1, 180  # inches: large type, for it shrinks to a phone's width
ROOM = 0.13  # between two labels, of a panel's height
PANEL = 1.45  # the height of one of several above each other

Plot = Callable[[Comparison, list[Run], bool], bytes | None]
Axis = Literal["zero", "log", "fit"]


@dataclass(frozen=True)
class Picture:
    """A plot with the words beside it; ``name`` is its file's."""

    name: str
    plot: Callable[..., bytes | None]  # `Plot`, or of what another section shows
    title: str
    caption: str


@dataclass(frozen=True)
class Panel:
    """A number over steps; ``read`` gives step → value.

    The axis begins at zero, or is a log axis where no value is zero, or fits the values. ``level``
    is where a dotted line goes.
    """

    label: str
    read: Callable[[Run], dict[int, float]]
    axis: Axis = "zero"
    level: float | None = None


def density_by_block(table: Comparison, runs: list[Run], dark: bool = False) -> bytes | None:
    """Inference density of every block at the end, by depth: a mark a seed, a line for the mean."""
    figure, (axes,) = new_figure(dark)
    deepest = 0
    for name, style in styles(table, dark):
        profiles = [
            [block["density"] for block in run.result["inference"]["blocks"]]
            for run in runs
            if run.arm == name and run.result and run.result["inference"]
        ]
        profiles = [profile for profile in profiles if len(profile) == len(profiles[0])]
        if not profiles or not profiles[0]:
            continue
        depth = range(1, len(profiles[0]) + 1)
        deepest = max(deepest, len(profiles[0]))
        mean = [sum(column) / len(column) for column in zip(*profiles, strict=True)]
        axes.plot(depth, mean, **style, linewidth=2.4, markersize=7, label=name)
        for profile in profiles:
            axes.plot(depth, profile, **{**style, "linestyle": ""}, alpha=0.4, markersize=4)
    if not deepest:
        return None
    axes.set_xticks(range(1, deepest + 1, max(1, deepest // 12)))
    axes.set_xlim(0.7, deepest + 0.3)
    axes.set_ylim(bottom=0)
    axes.set_xlabel("block, input to output")
    axes.set_ylabel("inference density")
    return png(figure, table)


def quality_against_density(table: Comparison, runs: list[Run], dark: bool = False) -> bytes | None:
    """Each arm's quality against its inference density, with 95 % intervals; small marks are seeds.

    An arm without MLPs has no density and is drawn as a line. The axes fit the seeds, so that the
    wide intervals of two seeds run off the plot rather than flatten it.
    """
    figure, (axes,) = new_figure(dark)
    seen: list[tuple[float, float]] = []
    for name, style in styles(table, dark):
        arm = table.arm(name)
        if arm is None or arm.quality is None:
            continue
        if arm.inference_density is None:
            axes.axhline(arm.quality.mean, color=style["color"], linestyle="--", label=name)
            seen.append((0.0, arm.quality.mean))
            continue
        seeds = [
            (float(run.result["inference"]["density"]), float(run.result["quality"]))
            for run in runs
            if run.arm == name and run.result and run.result["inference"]
        ]
        seen += seeds
        across, up = zip(*seeds, strict=True)
        mark = {"color": style["color"], "marker": style["marker"], "linestyle": ""}
        axes.plot(across, up, **mark, markersize=4, alpha=0.4)
        axes.errorbar(
            arm.inference_density.mean,
            arm.quality.mean,
            xerr=_bar(arm.inference_density),
            yerr=_bar(arm.quality),
            **mark,
            markersize=10,
            elinewidth=1.4,
            label=name,
        )
    if not any(density for density, _ in seen):
        return None
    highest, low, high = max(x for x, _ in seen), min(y for _, y in seen), max(y for _, y in seen)
    axes.set_xlim(0, 1.12 * highest)
    margin = 0.12 * (high - low) or 0.01 * (abs(high) or 1)
    axes.set_ylim(low - margin, high + margin)
    axes.set_xlabel("inference density  (left is sparser)")
    better = "up" if table.higher_is_better else "down"
    axes.set_ylabel(f"{table.quality_name}  ({better} is better)")
    return png(figure, table)


def over_steps(table: Comparison, runs: list[Run], dark: bool, *panels: Panel) -> bytes | None:
    """Panels above each other over the same steps; those with nothing to show are left out.

    Thin lines are seeds. Thick ones are the mean over an arm's finished seeds, with a gap at a step
    that some of them lack, which would bend it.
    """
    read = [(panel, [(run, panel.read(run)) for run in runs]) for panel in panels]
    shown = [(panel, series) for panel, series in read if any(points for _, points in series)]
    if not shown:
        return None
    size = (WIDTH, max(HEIGHT, 0.7 + PANEL * len(shown)))
    figure, every = new_figure(dark, rows=len(shown), size=size)
    for axes, (panel, series) in zip(every, shown, strict=True):
        if axes is not every[0]:
            axes.sharex(every[0])
        axes.tick_params(labelbottom=axes is every[-1])
        _draw(axes, table, series, dark)
        lowest = min(min(points.values()) for _, points in series if points)
        if panel.axis == "log" and lowest > 0:
            log_axis(axes, "y", few=len(shown) > 1)
        elif panel.axis != "fit":
            axes.set_ylim(bottom=min(0, lowest))
            if len(shown) > 1:  # a thick line at the top of a low panel would be cut
                axes.set_ylim(top=1.08 * axes.get_ylim()[1])
        if panel.level is not None:
            axes.axhline(panel.level, color=INK[dark], linestyle=":", linewidth=1.2)
        if len(shown) == 1:
            axes.set_ylabel(panel.label)
        else:
            heading(axes, panel.label, dark)
    every[-1].set_xlabel("step")
    return png(figure, table)


def steps(*panels: Panel) -> Plot:
    """The plot of panels over steps, see `over_steps`."""

    def plot(table: Comparison, runs: list[Run], dark: bool = False) -> bytes | None:
        return over_steps(table, runs, dark, *panels)

    return plot


def _draw(
    axes: Axes, table: Comparison, series: list[tuple[Run, dict[int, float]]], dark: bool
) -> None:
    for name, style in styles(table, dark):
        line = {"color": style["color"], "linestyle": style["linestyle"]}
        own = [(run.finished, points) for run, points in series if run.arm == name and points]
        for _, points in own:
            axes.plot(list(points), list(points.values()), **line, alpha=0.3, linewidth=1)
        finished = [points for done, points in own if done]
        mean = {
            step: sum(points.get(step, math.nan) for points in finished) / len(finished)
            for step in sorted({step for points in finished for step in points})
        }
        if own:
            axes.plot(list(mean), list(mean.values()), **line, linewidth=2.4, label=name)


def draw_seeds(
    axes: Axes,
    seeds: Sequence[Mapping[Any, float]],
    color: str,
    mean: Callable[[list[float]], float] = fmean,
    *,
    alpha: float = 0.3,
    linestyle: str = "-",
    **thick: Any,
) -> tuple[Any, dict[Any, float]]:
    """A thin line for each seed, and a thick one for their mean; that line, and the mean."""
    style: dict[str, Any] = {"color": color, "linestyle": linestyle}
    for line in seeds:
        axes.plot(list(line), list(line.values()), **style, alpha=alpha, linewidth=1)
    found = mean_line(seeds, mean)
    if not found:
        return None, found
    thick = {"linewidth": 2.4} | thick
    (drawn,) = axes.plot(list(found), list(found.values()), **style, **thick)
    return drawn, found


def mean_line(
    seeds: Sequence[Mapping[Any, float]], mean: Callable[[list[float]], float] = fmean
) -> dict[Any, float]:
    """The mean over seeds at each place that all of them have: others would bend the line."""
    common = sorted(set.intersection(*map(set, seeds))) if seeds else []
    return {at: mean([line[at] for line in seeds]) for at in common}


def stacked(dark: bool, titles: Sequence[str], height: float, more: float) -> Any:
    """A figure and its axes above each other, each under its title, over one kind of x.

    ``height`` is that of each, ``more`` what the figure has besides, in inches.
    """
    size = (WIDTH, more + height * len(titles))
    figure, every = new_figure(dark, rows=len(titles), size=size)
    for axes, title in zip(every, titles, strict=True):
        heading(axes, title, dark)
        axes.tick_params(labelbottom=axes is every[-1])
    return figure, every


def heading(axes: Axes, title: str, dark: bool, size: float = 12) -> None:
    """A title at the left."""
    axes.set_title(title, loc="left", fontsize=size, color=INK[dark])


def label_ends(
    axes: Axes, ends: Mapping[Any, float], names: Mapping[Any, str], colors: Mapping[Any, str]
) -> None:
    """Names right of where lines end, in their colours, apart from each other."""
    order = sorted(ends, key=ends.__getitem__)
    points = axes.transData.transform([(axes.get_xlim()[1], ends[key]) for key in order])
    places = spread(np.asarray(axes.transAxes.inverted().transform(points))[:, 1])
    for key, y in zip(order, places - max(places[-1] - 1, 0), strict=True):  # none above the top
        text = axes.text(1.02, float(y), names[key], transform=axes.transAxes, va="center")
        text.set(color=colors[key], fontsize=11.5)


def spread(places: np.ndarray, room: float = ROOM) -> np.ndarray:
    """Ascending places moved apart, so that two are ``room`` apart at least.

    >>> spread(np.array([0.5, 0.5, 0.9]), room=0.2).round(2).tolist()
    [0.4, 0.6, 0.9]
    """
    steps = room * np.arange(len(places))
    over = np.maximum.accumulate(places - steps)
    under = np.minimum.accumulate((places - steps)[::-1])[::-1]
    return (over + under) / 2 + steps


def palette(dark: bool) -> tuple[str, ...]:
    """The colours, in their order."""
    return DARK if dark else LIGHT


def _densities(entries: list[Entry]) -> dict[int, float]:
    return {entry["step"]: entry["measures"]["density"] for entry in entries if entry["measures"]}


inference_density = steps(Panel("inference density", lambda run: _densities(run.evals)))
training_density = steps(Panel("training density", lambda run: _densities(run.train)))
loss = steps(Panel("validation loss", lambda run: {e["step"]: e["loss"] for e in run.evals}, "log"))


def _bar(estimate: Estimate) -> float:
    return estimate.half or 0.0


def styles(table: Comparison, dark: bool) -> Iterator[tuple[str, dict[str, Any]]]:
    """Colour, mark and dash of every arm; of those in `FIRST` the same on all pages."""
    colours = palette(dark)
    names = [*FIRST, *(arm.name for arm in table.arms if arm.name not in FIRST)]
    for arm in table.arms:
        if arm.name == REFERENCE:
            yield arm.name, {"color": SERIES_INK[dark], "marker": "o", "linestyle": "-"}
            continue
        at = names.index(arm.name)
        dash = DASHES[(at // len(colours)) % len(DASHES)]
        mark = MARKS[1 + at % (len(MARKS) - 1)]
        yield arm.name, {"color": colours[at % len(colours)], "marker": mark, "linestyle": dash}


def new_figure(
    dark: bool, rows: int = 1, columns: int = 1, size: tuple[float, float] = (WIDTH, HEIGHT)
) -> tuple[Figure, list[Axes]]:
    """A figure of ``size`` in inches, and its axes row by row."""
    # Figure without pyplot: no global state, no window, safe in threads.
    from matplotlib.figure import Figure

    figure = Figure(figsize=size, dpi=DPI, facecolor=PAPER[dark], layout="constrained")
    every = []
    for index in range(rows * columns):
        axes = figure.add_subplot(rows, columns, index + 1, facecolor=PAPER[dark])
        axes.spines[["top", "right"]].set_visible(False)
        axes.spines[["left", "bottom"]].set_color(INK[dark])
        axes.tick_params(colors=INK[dark], labelsize=12)
        axes.grid(axis="y", color=INK[dark], alpha=0.15)
        axes.set_axisbelow(True)
        for side in (axes.xaxis.label, axes.yaxis.label):
            side.set(color=INK[dark], fontsize=13)
        every.append(axes)
    return figure, every


def log_axis(axes: Axes, which: Literal["x", "y"], few: bool = False) -> None:
    """A log scale with labels in plain numbers; ``few`` for an axis too short for many."""
    from matplotlib.ticker import (
        FuncFormatter,
        LogLocator,
        MaxNLocator,
        NullFormatter,
        NullLocator,
    )

    axes.set(**{f"{which}scale": "log"})
    axis = axes.yaxis if which == "y" else axes.xaxis
    low, high = axis.get_data_interval()
    if few:
        ratio = high / low
        within = (1, 2, 5) if ratio < 20 else (1, 3) if ratio < 200 else (1,)
        narrow = MaxNLocator(4, steps=[1, 2, 5, 10])
        axis.set_major_locator(narrow if ratio < 4 else LogLocator(subs=within, numticks=5))
        axis.set_minor_locator(NullLocator())
    else:
        axis.set_major_locator(LogLocator(subs=(1, 2, 5)))
    axis.set_major_formatter(FuncFormatter(lambda value, _: amount(value)))
    axis.set_minor_formatter(NullFormatter())


def png(figure: Figure, table: Comparison) -> bytes:
    """The figure with a legend of its arms, as a PNG."""
    lines: dict[str, Any] = {}
    for axes in figure.axes:
        lines |= {name: line for line, name in zip(*axes.get_legend_handles_labels(), strict=True)}
    return render(figure, {arm.name: lines[arm.name] for arm in table.arms if arm.name in lines})


def render(figure: Figure, lines: dict[str, Any]) -> bytes:
    """The figure with a legend of ``lines`` by name, as a PNG."""
    if lines:
        figure.legend(
            list(lines.values()),
            list(lines),
            loc="outside lower center",
            ncols=max(1, int(figure.get_figwidth() / 2.4)),  # more long names would run off
            frameon=False,
            fontsize=12,
            labelcolor="linecolor",
        )
    buffer = io.BytesIO()
    figure.savefig(buffer, format="png")
    return compact(buffer.getvalue())


def compact(png: bytes) -> bytes:
    """A picture in its 256 main colours: a third of the bytes, and looks the same."""
    from PIL import Image

    with Image.open(io.BytesIO(png)) as picture:
        main = picture.convert("RGB").quantize()
        buffer = io.BytesIO()
        main.save(buffer, "png", optimize=True, dpi=picture.info.get("dpi"))
    return buffer.getvalue()

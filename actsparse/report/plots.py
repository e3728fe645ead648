"""The report's plots: each takes the table and its runs, returns a PNG; None with nothing to show.

Colours are Okabe and Ito's, apart also for colour-blind eyes; marks and dashes tell arms apart too.
"""

from __future__ import annotations

import io
from collections import defaultdict
from collections.abc import Callable, Iterator
from typing import TYPE_CHECKING, Any

from actsparse.records import Entry, Run
from actsparse.report.compare import Estimate, Table

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

LIGHT = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00", "#56B4E9")
DARK = ("#5AA9E6", "#F07F3C", "#2FC49A", "#DE94BD", "#F0B429", "#A8D8F5")
DASHES = ("-", "--", ":")
MARKS = "osD^vPX*"
SERIES_INK = {False: "#6B6B6B", True: "#B4B4B4"}  # the reference arm
INK = {False: "#33373D", True: "#C9CDD3"}
PAPER = {False: "#FFFFFF", True: "#1B1E23"}  # as in page.html.jinja
WIDTH, HEIGHT, DPI = 5.4, 4.1, 180  # inches: large type, for it shrinks to a phone's width


def inference_density(table: Table, runs: list[Run], dark: bool = False) -> bytes | None:
    """Density on held-out data in eval mode, over steps: a line a seed, thick for their mean."""
    return _over_steps(table, runs, dark, lambda run: _densities(run.evals), "inference density")


def training_density(table: Table, runs: list[Run], dark: bool = False) -> bytes | None:
    """Density on training batches in train mode, over steps."""
    return _over_steps(table, runs, dark, lambda run: _densities(run.train), "training density")


def loss(table: Table, runs: list[Run], dark: bool = False) -> bytes | None:
    """Validation loss over steps, on a log axis."""

    def losses(run: Run) -> dict[int, float]:
        return {entry["step"]: entry["loss"] for entry in run.evals}

    return _over_steps(table, runs, dark, losses, "validation loss", log=True)


def density_by_block(table: Table, runs: list[Run], dark: bool = False) -> bytes | None:
    """Inference density of every block at the end, by depth: a mark a seed, a line for the mean."""
    figure, axes = _figure(dark)
    deepest = 0
    for name, style in _styles(table, dark):
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
    return _png(figure, axes, table)


def quality_against_density(table: Table, runs: list[Run], dark: bool = False) -> bytes | None:
    """Each arm's quality against its inference density, with 95 % intervals; small marks are seeds.

    An arm without MLPs has no density and is drawn as a line. The axes fit the seeds, so that the
    wide intervals of two seeds run off the plot rather than flatten it.
    """
    figure, axes = _figure(dark)
    seen: list[tuple[float, float]] = []
    for name, style in _styles(table, dark):
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
    return _png(figure, axes, table)


Plot = Callable[[Table, list[Run], bool], bytes | None]


def _over_steps(
    table: Table,
    runs: list[Run],
    dark: bool,
    read: Callable[[Run], dict[int, float]],
    label: str,
    log: bool = False,
) -> bytes | None:
    figure, axes = _figure(dark)
    lowest = float("inf")
    for name, style in _styles(table, dark):
        line = {"color": style["color"], "linestyle": style["linestyle"]}
        by_step: dict[int, list[float]] = defaultdict(list)
        own = [run for run in runs if run.arm == name]
        series = [(run.finished, read(run)) for run in own]
        for _, points in series:
            if points:
                axes.plot(list(points), list(points.values()), **line, alpha=0.3, linewidth=1)
                lowest = min(lowest, *points.values())
        finished = [points for done, points in series if done and points]
        for points in finished:
            for step, value in points.items():
                by_step[step].append(value)
        mean = {
            step: sum(values) / len(values)
            for step, values in sorted(by_step.items())
            if len(values) == len(finished)  # a step some seeds lack would bend the mean
        }
        if mean or any(points for _, points in series):
            axes.plot(list(mean), list(mean.values()), **line, linewidth=2.4, label=name)
    if lowest == float("inf"):
        return None
    if log and lowest > 0:
        _log_axis(axes)
    else:
        axes.set_ylim(bottom=min(0, lowest))
    axes.set_xlabel("step")
    axes.set_ylabel(label)
    return _png(figure, axes, table)


def _densities(entries: list[Entry]) -> dict[int, float]:
    return {entry["step"]: entry["measures"]["density"] for entry in entries if entry["measures"]}


def _bar(estimate: Estimate) -> float:
    return estimate.half or 0.0


def _styles(table: Table, dark: bool) -> Iterator[tuple[str, dict[str, Any]]]:
    """Colour, mark and dash of every arm, the same in all plots."""
    palette = DARK if dark else LIGHT
    others = 0
    for arm in table.arms:
        if arm.name == table.reference:
            yield arm.name, {"color": SERIES_INK[dark], "marker": "o", "linestyle": "-"}
            continue
        dash = DASHES[(others // len(palette)) % len(DASHES)]
        mark = MARKS[1 + others % (len(MARKS) - 1)]
        yield arm.name, {"color": palette[others % len(palette)], "marker": mark, "linestyle": dash}
        others += 1


def _figure(dark: bool) -> tuple[Figure, Axes]:
    # Figure without pyplot: no global state, no window, safe in threads.
    from matplotlib.figure import Figure

    figure = Figure(figsize=(WIDTH, HEIGHT), dpi=DPI, facecolor=PAPER[dark], layout="constrained")
    axes = figure.add_subplot(facecolor=PAPER[dark])
    axes.spines[["top", "right"]].set_visible(False)
    axes.spines[["left", "bottom"]].set_color(INK[dark])
    axes.tick_params(colors=INK[dark], labelsize=12)
    axes.grid(axis="y", color=INK[dark], alpha=0.15)
    axes.set_axisbelow(True)
    for side in (axes.xaxis.label, axes.yaxis.label):
        side.set(color=INK[dark], fontsize=13)
    return figure, axes


def _log_axis(axes: Axes) -> None:
    from matplotlib.ticker import FuncFormatter, LogLocator, NullFormatter

    axes.set_yscale("log")
    axes.yaxis.set_major_locator(LogLocator(subs=(1, 2, 5)))
    axes.yaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:g}"))
    axes.yaxis.set_minor_formatter(NullFormatter())


def _png(figure: Figure, axes: Axes, table: Table) -> bytes:
    lines = {name: line for line, name in zip(*axes.get_legend_handles_labels(), strict=True)}
    names = [arm.name for arm in table.arms if arm.name in lines]
    figure.legend(
        [lines[name] for name in names],
        names,
        loc="outside lower center",
        ncols=min(2, len(names)),  # three long names would run off the picture
        frameon=False,
        fontsize=12,
        labelcolor="linecolor",
    )
    buffer = io.BytesIO()
    figure.savefig(buffer, format="png")
    return buffer.getvalue()

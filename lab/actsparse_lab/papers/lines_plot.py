"""A plot of numbers of runs over what their arms differ in: a panel a number, a line a kind."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from statistics import fmean, geometric_mean
from typing import Any

from actsparse_lab.analysis.effects import Arms, Reader, within
from actsparse_lab.analysis.plots import draw_seeds, log_axis, palette, render, stacked

Panel = tuple[str, Reader, bool]  # title, number, whether on a log axis


def lines_plot(
    arms: Arms,
    panels: Sequence[Panel],
    kinds: Mapping[Any, str],
    arm: Callable[[Any, Any], str],
    ticks: Sequence[float],
    label: str,
    dark: bool,
) -> bytes:
    """``arm`` names the arm of a kind at a tick; ``kinds`` are shown by their names."""
    figure, every = stacked(dark, [title for title, *_ in panels], 1.75, 1.3)
    lines = {}
    for axes, (_, read, log) in zip(every, panels, strict=True):
        for (kind, name), colour in zip(kinds.items(), palette(dark), strict=False):
            seeds = by_tick(arms, kind, arm, ticks, read)
            mean = geometric_mean if log else fmean
            line, _ = draw_seeds(axes, seeds, colour, mean, marker="o")
            if line is not None:
                lines[name] = line
        axes.set_xscale("log")
        if log:
            log_axis(axes, "y", few=True)
        axes.set_xticks(ticks, [f"{tick:g}" for tick in ticks])
        axes.minorticks_off()
    every[-1].set_xlabel(label)
    return render(figure, lines)


def by_tick(
    arms: Arms, kind: Any, arm: Callable[[Any, Any], str], ticks: Sequence[float], read: Reader
) -> list[dict[float, float]]:
    """Of each seed its values by tick, those above 0."""
    found: dict[int, dict[float, float]] = {}
    for tick in sorted(ticks):
        for seed, value in within(arms, arm(kind, tick), read).items():
            if value > 0:
                found.setdefault(seed, {})[tick] = value
    return list(found.values())

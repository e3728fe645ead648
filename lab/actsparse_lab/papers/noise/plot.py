"""The plots of accumulated moments: anisotropy by width, concentration over steps."""

from __future__ import annotations

import math
from collections.abc import Mapping
from statistics import fmean, geometric_mean
from typing import TYPE_CHECKING

from actsparse_lab.analysis.effects import Arms, number
from actsparse_lab.analysis.plots import (
    INK,
    SERIES_INK,
    draw_seeds,
    label_ends,
    log_axis,
    mean_line,
    palette,
    render,
    stacked,
)
from actsparse_lab.papers.noise.claims import SEEN, Line, Runs, at_end, grid, layers_of, mean_log
from actsparse_lab.records import Run

if TYPE_CHECKING:
    from matplotlib.axes import Axes


def against_width(arms: Arms, dark: bool = False) -> bytes | None:
    """Anisotropy at the end over the most possible, against width: a line for each decay.

    Thick lines are means over seeds, thin ones seeds, dotted ones what Gaussian rows have.
    """
    cells = grid(arms)
    colors = _colors(cells, dark)

    def lines(key: str, decay: float) -> list[Line]:
        """Of each seed, by width."""
        found: dict[int, Line] = {}
        for (width, own), runs in cells.items():
            for seed, run in runs.items() if own == decay else ():
                if (value := _of_most(run, key)) is not None:
                    found.setdefault(seed, {})[width] = value
        return list(found.values())

    known = {
        of: {decay: seeds for decay in colors if (seeds := lines(f"{of}_anisotropy", decay))}
        for of in SEEN
    }
    known = {of: by_decay for of, by_decay in known.items() if by_decay}
    if not known:
        return None
    figure, every = stacked(dark, [f"{of}s  (dotted: Gaussian rows)" for of in known], 2.3, 0.9)
    for axes, (of, by_decay) in zip(every, known.items(), strict=True):
        ends = _draw(axes, by_decay, colors)
        for decay in by_decay:
            dotted = mean_line(lines(f"{of}_random_anisotropy", decay))
            axes.plot(
                list(dotted), list(dotted.values()), color=colors[decay], linestyle=":", linewidth=2
            )
        axes.set_ylim(0, 1.04)
        log_axis(axes, "x")
        widths = sorted({width for seeds in by_decay.values() for line in seeds for width in line})
        axes.set_xticks(widths, [f"{width:g}" for width in widths])
        axes.minorticks_off()
        label_ends(axes, ends, {decay: f"decay {decay:g}" for decay in ends}, colors)
    every[-1].set_xlabel("width p")
    figure.supylabel("anisotropy, of the most possible", color=INK[dark], fontsize=13)
    return render(figure, {})


def concentration_over_steps(arms: Arms, dark: bool = False) -> bytes | None:
    """W's spectral concentration, geometric mean over layers: a panel a width, a line a decay."""
    cells = grid(arms)
    colors = _colors(cells, dark)
    known: dict[int, dict[float, list[Line]]] = {}
    for (width, decay), runs in cells.items():
        if seeds := [line for run in runs.values() if (line := _concentrations(run))]:
            known.setdefault(width, {})[decay] = seeds
    if not known:
        return None
    figure, every = stacked(dark, [f"width {width}" for width in known], 1.75, 0.8)
    ends = []
    for axes, by_decay in zip(every, known.values(), strict=True):
        if axes is not every[0]:
            axes.sharex(every[0])
            axes.sharey(every[0])
        ends.append(_draw(axes, by_decay, colors))
    for axes, each in zip(every, ends, strict=True):
        log_axis(axes, "y", few=True)
        label_ends(axes, each, {decay: f"decay {decay:g}" for decay in each}, colors)
    every[-1].set_xlabel("step")
    figure.supylabel("largest over smallest eigenvalue", color=INK[dark], fontsize=13)
    return render(figure, {})


def _of_most(run: Run, key: str) -> float | None:
    """The mean over layers of a kind of anisotropy over ``anisotropy_limit`` at the end."""
    pairs = [(number(row, key), number(row, "anisotropy_limit")) for row in at_end(run)]
    shares = [own / most for own, most in pairs if own is not None and most]
    return fmean(shares) if shares and len(shares) == len(pairs) else None


def _concentrations(run: Run) -> Line:
    found = {e["step"]: mean_log(layers_of(e), "concentration") for e in run.measured}
    return {step: math.exp(value) for step, value in found.items() if value is not None}


def _colors(cells: Mapping[tuple[int, float], Runs], dark: bool) -> dict[float, str]:
    """Of each decay, ascending; none is grey."""
    colours = palette(dark)
    decays = sorted({decay for _, decay in cells})
    some = [decay for decay in decays if decay]
    return {
        decay: colours[some.index(decay) % len(colours)] if decay else SERIES_INK[dark]
        for decay in decays
    }


def _draw(axes: Axes, by_decay: dict[float, list[Line]], colors: dict[float, str]) -> Line:
    """Seeds thin, their geometric mean thick; returns where each decay's line ends."""
    means = {
        decay: draw_seeds(axes, seeds, colors[decay], geometric_mean)[1]
        for decay, seeds in by_decay.items()
    }
    return {decay: list(mean.values())[-1] for decay, mean in means.items() if mean}


PLOTS = {"noise-anisotropy": against_width, "noise-concentration": concentration_over_steps}

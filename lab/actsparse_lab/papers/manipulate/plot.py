"""The S-shapes' plots: P₀ and P_a over training, and what they gained."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

from actsparse_lab.analysis.effects import Arms
from actsparse_lab.analysis.numbers import minus
from actsparse_lab.analysis.plots import (
    INK,
    WIDTH,
    draw_seeds,
    heading,
    new_figure,
    palette,
    render,
)
from actsparse_lab.papers.manipulate.claims import (
    DECAYED,
    KEYS,
    SHIFTS,
    Pair,
    change,
    lead,
    occupancy,
)

if TYPE_CHECKING:
    from matplotlib.axes import Axes

NAMES = ("z where φ′ = 0: P₀", "z around φ = 0: Pₐ")
SHORT = ("P₀", "Pₐ")


def over_training(arms: Arms, dark: bool = False) -> bytes | None:
    """P₀ and P_a over steps, a panel for each shift: thick the mean over seeds, thin the seeds."""
    series = {arm: [occupancy(run) for run in arms[arm].values()] for arm in SHIFTS}
    pairs = [pair for own in series.values() for points in own for pair in points.values()]
    if not pairs:
        return None
    top = 112 * max(map(max, pairs)) or 1
    figure, every = new_figure(dark, 2, 2, (WIDTH, 5.2))
    colours = palette(dark)[: len(KEYS)]
    lines: dict[str, Any] = {}
    for axes, (arm, own) in zip(every, series.items(), strict=True):
        heading(axes, _shift(arm, ", "), dark)
        own = [points for points in own if points]
        ends = []
        for at, colour in enumerate(colours):
            seeds = [{step: 100 * pair[at] for step, pair in points.items()} for points in own]
            line, mean = draw_seeds(axes, seeds, colour, linewidth=2.6)
            if mean:
                lines[NAMES[at]] = line
                last, height = list(mean.items())[-1]
                ends.append((height, at))
        axes.sharex(every[0])
        axes.sharey(every[0])
        if ends:
            _label_ends(axes, last, ends, top, colours)
    every[0].set_ylim(0, top)
    for at, axes in enumerate(every):
        axes.tick_params(labelbottom=at > 1, labelleft=at % 2 == 0)
        axes.locator_params(axis="both", nbins=4)
        axes.set_xlabel("step" if at > 1 else "")
        axes.set_ylabel("" if at % 2 else "share of z, %")
    return render(figure, lines)


def _label_ends(
    axes: Axes, step: int, ends: list[tuple[float, int]], top: float, colours: Sequence[str]
) -> None:
    """Each line's short name: the upper one's above its end, the lower one's below if there is
    room above the axis."""
    lower = min(ends)
    for height, at in ends:
        below = (height, at) == lower and height > 0.15 * top
        axes.annotate(
            SHORT[at], (step, height), (0, -3 if below else 3), color=colours[at],
            textcoords="offset points", ha="right", va="top" if below else "bottom",
            fontsize=13, fontweight="bold",
        )  # fmt: skip


def changes(arms: Arms, dark: bool = False) -> bytes | None:
    """What P₀ and P_a gained, a pair of dots for each shift and seed."""
    panels = {
        title: {arm: _changes(arms, arm + ending) for arm in SHIFTS}
        for title, ending in (("no decay, zeroth biases", ""), ("decay, none", DECAYED))
    }
    panels = {title: found for title, found in panels.items() if any(found.values())}
    if not panels:
        return None
    figure, every = new_figure(dark, 1, len(panels), (WIDTH, 5.2))
    colours = palette(dark)[: len(KEYS)]
    lines: dict[str, Any] = {}
    for axes, (title, found) in zip(every, panels.items(), strict=True):
        axes.grid(visible=False)
        axes.axvline(0, color=INK[dark], linewidth=1.2)
        for row, own in enumerate(found.values()):
            axes.axhspan(row - 0.42, row + 0.42, color=INK[dark], alpha=0.06, linewidth=0)
            for place, pair in enumerate(own):
                y = row + 0.66 * ((place + 0.5) / len(own) - 0.5)
                axes.plot([100 * p for p in pair], [y, y], color=INK[dark], alpha=0.35, linewidth=1)
                for at, colour in enumerate(colours):
                    (lines[NAMES[at]],) = axes.plot(
                        100 * pair[at], y, "oD"[at], color=colour, markersize=6, linestyle=""
                    )
        shown = [own for own in found.values() if own]
        more = sum(lead(own) > 0 for own in shown)
        title += f":\nP₀ gains more in {more} of {len(shown)}"
        heading(axes, title, dark)
        axes.set_yticks(range(len(SHIFTS)), [_shift(arm, "\n") for arm in SHIFTS])
        axes.set_ylim(len(SHIFTS) - 0.5, -0.5)
        axes.tick_params(axis="y", length=0, labelleft=axes is every[0])
        axes.locator_params(axis="x", nbins=4)
        axes.sharex(every[0])
        axes.set_xlabel("end − start, points")
    return render(figure, lines)


def _changes(arms: Arms, arm: str) -> list[Pair]:
    found = [change(run) for _, run in sorted(arms[arm].items())]
    return [pair for pair in found if pair is not None]


def _shift(arm: str, between: str) -> str:
    dx, dy = SHIFTS[arm]
    return minus(f"δx {dx:+g}{between}δy {dy:+g}")


PLOTS = {"occupancy": over_training, "occupancy-change": changes}

"""A plot of arms as rows, density and accuracy beside each other: large marks are means over
seeds, small ones seeds."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING

from actsparse_lab.analysis.effects import INFERENCE, QUALITY, Arms, number
from actsparse_lab.analysis.plots import INK, PAPER, WIDTH, new_figure, palette, render
from actsparse_lab.records import Run

if TYPE_CHECKING:
    from matplotlib.axes import Axes

Named = Sequence[tuple[str, str]]  # how it is called, and an arm or how an arm's name ends
Pair = tuple[float | None, float]  # before finetuning (None: no finetuning), and at the end
MARKS = ("o", "D")
APART = 0.19  # of a row: its two colours from its middle
SPREAD = 0.22  # of a row: the lines of seeds beside each other
LINE = 0.46  # inches of a row


def rows_plot(
    rows: Named, colours: Named, aside: str | None = None
) -> Callable[[Arms, bool], bytes | None]:
    """The plot of ``rows``, each an arm, in two ``colours``, each an ending of the arm's name.

    Of finetuned runs a line leads from their checkpoint's number, a hollow mark, and the axis of
    density fits all rows but the arm ``aside``: where its mean lies left of them, it is printed at
    the axis's edge. Else the axis begins at zero.
    """

    def plot(arms: Arms, dark: bool = False) -> bytes | None:
        shown = [run for _, arm in rows for _, end in colours for run in arms[arm + end].values()]
        if not any(INFERENCE(run) for run in shown):
            return None
        figure, (density, accuracy) = new_figure(
            dark, columns=2, size=(WIDTH, 1.3 + LINE * len(rows))
        )

        def draw(axes: Axes, read: Callable[[Run], Pair | None], *, late: bool) -> None:
            for at, (_, arm) in enumerate(rows):
                if (arm == aside) != late:
                    continue
                for nth, (name, end) in enumerate(colours):
                    pairs = [found for run in arms[arm + end].values() if (found := read(run))]
                    _draw(axes, at, nth, pairs, name, dark)

        for axes in (density, accuracy):
            axes.set_ylim(len(rows) - 0.5, -0.5)
            axes.tick_params(axis="y", length=0)
            axes.grid(axis="x", color=INK[dark], alpha=0.15)
            axes.margins(x=0.08)
            axes.locator_params(axis="x", nbins=4)
        draw(density, _density, late=False)
        limits = density.get_xlim()
        if not any("before" in (run.result or {}) for run in shown):
            limits = 0, 1.04 * limits[1]
        density.set_xlim(limits)
        draw(density, _density, late=True)
        for late in (False, True):
            draw(accuracy, _accuracy, late=late)
        density.set_yticks(range(len(rows)), [name for name, _ in rows])
        accuracy.set_yticks(range(len(rows)), [""] * len(rows))
        density.set_xlabel("inference density\n(left is sparser)")
        accuracy.set_xlabel("accuracy, %\n(right is better)")
        lines, names = accuracy.get_legend_handles_labels()
        return render(figure, dict(zip(names, lines, strict=True)))

    return plot


def _draw(axes: Axes, row: int, nth: int, pairs: list[Pair], name: str, dark: bool) -> None:
    """A row's marks in one colour, the first above the row's middle and the second below."""
    if not pairs:
        return
    colour, mark = palette(dark)[nth], MARKS[nth]
    middle = row + (2 * nth - 1) * APART
    for index, (before, now) in enumerate(pairs):
        at = middle
        if before is not None:
            at += SPREAD * ((index + 0.5) / len(pairs) - 0.5)
            axes.plot([before, now], [at, at], color=colour, alpha=0.4, linewidth=1)
        axes.plot(now, at, mark, color=colour, markersize=3.5, alpha=0.45)
    begun = [before for before, _ in pairs if before is not None]
    mean = math.fsum(now for _, now in pairs) / len(pairs)
    if begun:
        start = math.fsum(begun) / len(begun)
        axes.plot([start, mean], [middle, middle], color=colour, linewidth=2.4)
        axes.plot(start, middle, mark, color=colour, markerfacecolor=PAPER[dark], markersize=6)
    axes.plot(mean, middle, mark, color=colour, markersize=8, label=name)
    if mean < axes.get_xlim()[0]:  # of the rows drawn before, which the axis fits
        axes.text(
            0.02,
            middle,
            f"← {mean:.2g}",
            transform=axes.get_yaxis_transform(),
            verticalalignment="center",
            color=colour,
            fontsize=10.5,
            bbox={"facecolor": PAPER[dark], "edgecolor": "none", "pad": 0.5},
        )


def _density(run: Run) -> Pair | None:
    now, before = INFERENCE(run), number(run.result, "before", "inference", "density")
    return None if now is None else (before, now)


def _accuracy(run: Run) -> Pair | None:
    now, before = QUALITY(run), number(run.result, "before", "quality")
    return None if now is None else (None if before is None else 100 * before, 100 * now)

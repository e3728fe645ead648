"""The plot of the frontier."""

from __future__ import annotations

from actsparse_lab.analysis import plots
from actsparse_lab.analysis.comparison import HALF, Comparison
from actsparse_lab.analysis.prose import pictures
from actsparse_lab.report.frontier import Board

WIDE = (9.6, 4.6)  # inches: as wide as the page


def frontier_plot(of: Board, table: Comparison, dark: bool = False) -> bytes | None:
    """Quality against inference density on a log axis: means with 95 % intervals over seeds.

    The control without MLPs is a line; shaded is what lies within noise of the best vanilla's
    mean. ``table`` gives arms their colours.
    """
    rows = [row for row in of.rows if row.quality is not None and row.name != HALF]
    densities = [row.inference_density.mean for row in rows if row.inference_density]
    best = of.row(of.best)
    if not densities or best is None or best.quality is None or of.margin is None:
        return None
    figure, (axes,) = plots.new_figure(dark, size=WIDE)
    middle = best.quality.mean
    axes.axhspan(middle - of.margin, middle + of.margin, color=plots.INK[dark], alpha=0.12)
    smallest = min(filter(None, densities), default=1e-4)
    values = [middle]
    for name, style in plots.styles(table, dark):
        row = next((row for row in rows if row.name == name), None)
        if row is None or row.quality is None:
            continue
        values.append(row.quality.mean)
        if row.inference_density is None:
            axes.axhline(row.quality.mean, color=style["color"], linestyle="--", label=name)
            continue
        x, half = max(row.inference_density.mean, smallest / 2), row.inference_density.half or 0.0
        axes.errorbar(
            x, row.quality.mean, xerr=[[min(half, 0.9 * x)], [half]], yerr=row.quality.half or 0.0,
            color=style["color"], marker=style["marker"], linestyle="", markersize=8,
            elinewidth=1.2, label=name,
        )  # fmt: skip
    plots.log_axis(axes, "x", few=True)
    space = max(0.12 * (max(values) - min(values)), 2 * of.margin)
    axes.set_ylim(min(values) - space, max(values) + space)
    axes.set_xlabel("inference density  (left is sparser)")
    axes.set_ylabel(f"{of.quality_name}  ({'up' if of.higher_is_better else 'down'} is better)")
    return plots.png(figure, table)


(FRONTIER_PLOT,) = pictures({"frontier": frontier_plot}, "report/captions.md")

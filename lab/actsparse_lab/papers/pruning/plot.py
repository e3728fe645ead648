"""The pruning's plots: what thresholds cost, and the products that zeros spare."""

from __future__ import annotations

import math
from collections.abc import Iterable
from statistics import fmean
from typing import TYPE_CHECKING, Any

from actsparse_lab.analysis.comparison import CONTROL, REFERENCE, SUBJECT
from actsparse_lab.analysis.effects import (
    QUALITY,
    TRAINING,
    Arms,
    Effects,
    difference,
    number,
    paired,
    within,
)
from actsparse_lab.analysis.numbers import decimal, minus
from actsparse_lab.analysis.plots import (
    INK,
    SERIES_INK,
    WIDTH,
    draw_seeds,
    new_figure,
    palette,
    render,
    stacked,
)
from actsparse_lab.papers.pruning.claims import (
    BASES,
    DROPPED,
    NONE,
    TOLERATED,
    TRAINED,
    at_end,
    dropping,
    quality_kept,
)
from actsparse_lab.papers.questions import POINT, SPARED
from actsparse_lab.records import Entry, Run

if TYPE_CHECKING:
    from matplotlib.axes import Axes


def against_threshold(arms: Arms, dark: bool = False) -> bytes | None:
    """Quality, error of the gradient and share of η kept against the threshold, stacked."""
    tried = {base: [at_end(run) for run in arms[base].values()] for base in BASES}
    thresholds = {0.0, *DROPPED, *(t for own in tried.values() for rows in own for t in rows)}
    places = {threshold: at for at, threshold in enumerate(sorted({*thresholds, math.inf}))}
    quality = {base: _qualities(arms, base) for base in BASES}
    error = {base: _curves(tried[base], "error", 0.0) for base in BASES}
    kept = {base: _curves(tried[base], "kept") for base in BASES}
    active = {base: _densities(arms, base) for base in BASES}
    panels = [
        (label, level, found)
        for label, level, found in (
            ("change of accuracy, points", -100 * POINT, quality),
            ("error of the gradient", TOLERATED, error),
            ("η kept, % of all entries", None, kept),
            ("training density, % of units", None, active),
        )
        if any(found.values())
    ]
    if not panels:
        return None
    figure, every = stacked(dark, [label for label, *_ in panels], 1.75, 0.9)
    lines: dict[str, Any] = {}
    for axes, (_, level, found) in zip(every, panels, strict=True):
        for base, curves in found.items():
            seeds = [{places[t]: value for t, value in curve.items()} for curve in curves]
            line, _ = draw_seeds(
                axes, seeds, _colours(dark)[base], alpha=0.35,
                marker="o" if base == REFERENCE else "s", markersize=6, linewidth=2.6,
            )  # fmt: skip
            if line is not None:
                lines[base] = line
        if level is not None:
            axes.axhline(level, color=INK[dark], linestyle=":", linewidth=1.4)
        if found is quality:
            _costs(axes, arms, places, dark)
        else:
            axes.set_ylim(bottom=0)
        axes.set_xticks(range(len(places)), [_tick(threshold) for threshold in places])
        axes.set_xlim(-0.25, len(places) - 0.75)
    every[-1].set_xlabel("entries dropped up to, multiples of rms(η)")
    return render(figure, lines)


def _costs(axes: Axes, arms: Arms, places: dict[float, int], dark: bool) -> None:
    """What to drop all of η costs, and to have no MLPs; an axis that shows a point and thirty."""
    losses = [100 * own for own in paired(arms, NONE, REFERENCE, QUALITY, difference).values()]
    at, colour = places[math.inf], _colours(dark)[REFERENCE]
    axes.plot([at] * len(losses), losses, "o", color=colour, alpha=0.35, markersize=3)
    if losses:
        axes.plot([at], [fmean(losses)], "o", color=colour, markersize=6)
    if without := paired(arms, CONTROL, REFERENCE, QUALITY, difference).values():
        said = f"without MLPs: {decimal(100 * fmean(without), 1, signed=True)}"
        axes.set_title(said, loc="right", fontsize=11, color=INK[dark])
    low, high = axes.get_ylim()
    axes.set_yscale("symlog", linthresh=2, linscale=0.9)
    ticks = [tick for tick in (-100, -30, -10, -3, -1, 0, 1, 3, 10) if low <= tick <= high]
    axes.set_yticks(ticks, [minus(f"{tick:g}") for tick in ticks])
    axes.minorticks_off()
    axes.set_ylim(low, high)


def _tick(threshold: float) -> str:
    return {0.0: "none", math.inf: "all"}.get(threshold, f"{threshold:g}")


def _per_cent(each: dict[float, Effects]) -> list[dict[float, float]]:
    """For each seed a share by threshold, in per cent, where it has all of them."""
    seeds = sorted(set.intersection(*map(set, each.values())))
    return [{t: 100 * own[seed] for t, own in each.items()} for seed in seeds]


def _qualities(arms: Arms, base: str) -> list[dict[float, float]]:
    """The change of accuracy by threshold, in points."""
    each = {threshold: quality_kept(threshold)(arms, base) for threshold in DROPPED}
    return [{0.0: 0.0} | found for found in _per_cent(each)]


def _densities(arms: Arms, base: str) -> list[dict[float, float]]:
    """Training density by the threshold of training, in per cent."""
    trained = {0.0: base} | {threshold: dropping(base, threshold) for threshold in DROPPED}
    return _per_cent({t: within(arms, arm, TRAINING) for t, arm in trained.items()})


def _curves(
    tried: Iterable[dict[float, Entry]], key: str, none: float | None = None
) -> list[dict[float, float]]:
    """For each seed a number of its trial by threshold; ``none``: where nothing is dropped."""
    curves = []
    for rows in tried:
        unit = 100 if key == "kept" else 1
        found = {t: value for t, row in rows.items() if (value := number(row, key)) is not None}
        first = none if none is not None else _whole(rows.values())
        if found and first is not None:
            found = {0.0: first} | found
        if found:
            curves.append({t: unit * value for t, value in sorted(found.items())})
    return curves


def _whole(rows: Iterable[Entry]) -> float | None:
    """The share of entries whose derivative is not zero."""
    return next((number(row, "derivative_density") for row in rows), None)


def products(arms: Arms, dark: bool = False) -> bytes | None:
    """The exact shares as bars: each product, or forward and backward where records hold no more.

    Dots are seeds.
    """
    found = {arm: [_shares(run) for run in arms[arm].values()] for arm in (*TRAINED, NONE)}
    found = {arm: [each for each in own if each] for arm, own in found.items()}
    found = {arm: own for arm, own in found.items() if own}
    if not found:
        return None
    every = [shares for own in found.values() for shares in own]
    names = [name for name in every[0] if all(name in shares for shares in every)]
    figure, (axes,) = new_figure(dark, size=(WIDTH, 1.4 + 0.28 * len(found) * len(names)))
    thick = 0.84 / len(found)
    lines: dict[str, Any] = {}
    for at, (arm, own) in enumerate(found.items()):
        colour = _colours(dark)[arm]
        for row, name in enumerate(names):
            values = [100 * shares[name] for shares in own]
            y, mean = row + thick * (at - (len(found) - 1) / 2), fmean(values)
            lines[arm] = axes.barh(y, mean, 0.88 * thick, color=colour, alpha=0.85)
            axes.plot(values, [y] * len(values), ".", color=INK[dark], markersize=3, alpha=0.7)
            axes.annotate(
                decimal(mean, 0, unit=" %"), (max(values), y), (5, 0), textcoords="offset points",
                va="center", fontsize=10, color=INK[dark],
            )  # fmt: skip
    axes.grid(visible=False)
    axes.set_xlim(0, 109)
    axes.set_xticks(range(0, 101, 25))
    axes.set_yticks(range(len(names)), names)
    axes.tick_params(axis="y", length=0)
    axes.set_ylim(len(names) - 0.5, -0.5)
    axes.set_xlabel("multiplications by zero, %")
    return render(figure, lines)


def _shares(run: Run) -> dict[str, float]:
    skippable = (run.result or {})["skippable"] or {}
    given = skippable.get("products") or {
        key: skippable[key] for key in ("forward", "backward") if key in skippable
    }
    return {name: share for name in given if (share := number(given, name)) is not None}


def _colours(dark: bool) -> dict[str, str]:
    colours = palette(dark)
    rest = {SUBJECT: colours[0], REFERENCE + SPARED: colours[2], NONE: colours[4]}
    return {REFERENCE: SERIES_INK[dark]} | rest


PLOTS = {"pruning-threshold": against_threshold, "pruning-exact": products}

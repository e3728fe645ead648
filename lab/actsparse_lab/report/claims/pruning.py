"""Backward pruning: what zero derivatives let the backward pass skip, and small gradients besides.

Where φ′(z) = 0 the effective gradient η = g_a ⊙ φ′(z) is zero, and so are its products: leaving
them out is exact. Beyond that, training may drop entries of η up to τ times their rms (over
entries that are not zero); what that does to the gradient is measured at the start and at the end
of runs that drop nothing, and what it does to quality by runs that drop all along (arXiv
2605.25612, "v2").

What it cannot tell: seconds, for multiplications are counted and not timed. Dead units are among
the zeros; to prune them away would save the same.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable
from statistics import fmean
from typing import TYPE_CHECKING, Any

from actsparse_lab.records import Entry, Run
from actsparse_lab.report.claims.arm_questions import POINT, SPARED, mlps_matter
from actsparse_lab.report.comparison import CONTROL, REFERENCE, SUBJECT
from actsparse_lab.report.effects import (
    QUALITY,
    TRAINING,
    Arms,
    Effects,
    difference,
    final,
    log_ratio,
    number,
    paired,
    within,
)
from actsparse_lab.report.findings import Asked
from actsparse_lab.report.numbers import decimal, minus
from actsparse_lab.report.plots import (
    INK,
    SERIES_INK,
    WIDTH,
    draw_seeds,
    new_figure,
    palette,
    render,
    stacked,
)
from actsparse_lab.report.prose import experiment

if TYPE_CHECKING:
    from matplotlib.axes import Axes

BASES = (REFERENCE, SUBJECT)
DROPPED = (0.3, 1.0, 3.0)  # multiples of rms(η) that arms drop up to
SMALL = 0.3
NONE = "vanilla-drop-all"  # its up layers get no gradient at all
TOLERATED = 0.1  # relative error of the gradient
Means = Callable[[Arms, str], Effects]


# -- what is read ---------------------------------------------------------------------------------


def dropping(base: str, threshold: float) -> str:
    """The arm that is ``base`` but for dropping entries of η."""
    plain = base.removesuffix(SPARED)
    return f"{plain}-drop-{threshold:g}{base[len(plain) :]}"


def backward(run: Run) -> float | None:
    """The share of the MLPs' backward multiplications that exact zeros make needless."""
    return number(run.result, "skippable", "backward")


def trials(entry: Entry | None) -> dict[float, Entry]:
    """The rows of a line's pruning trial, by threshold."""
    rows = ((entry or {}).get("trials") or {}).get("pruning") or []
    return {float(row["threshold"]): row for row in rows}


def at_end(run: Run) -> dict[float, Entry]:
    """The trial at the last step."""
    return trials(final(run, "measured"))


def at_start(run: Run) -> dict[float, Entry]:
    """The trial before the first step."""
    return trials(next((entry for entry in run.measured if entry["step"] == 0), None))


def _error(run: Run) -> float | None:
    return number(at_end(run).get(SMALL), "error")


def _exceeding(row: Entry | None) -> float | None:
    """Of the entries whose derivative is not zero, the share that is kept."""
    share, whole = number(row, "kept"), number(row, "derivative_density")
    return share / whole if share is not None and whole else None


def _shrinking(run: Run) -> float | None:
    first, last = (_exceeding(found(run).get(SMALL)) for found in (at_start, at_end))
    return None if first is None or last is None else log_ratio(last, first)


def quality_kept(threshold: float) -> Means:
    """Quality of the arm that drops − that of its base, for each seed."""

    def effects(arms: Arms, base: str) -> Effects:
        return paired(arms, dropping(base, threshold), base, QUALITY, difference)

    return effects


def _mean(read: Means, *bases: str) -> Callable[[Arms], Effects]:
    """The mean over ``bases`` within a seed; seeds that lack one of them are left out."""

    def effects(arms: Arms) -> Effects:
        each = [read(arms, base) for base in bases]
        seeds = set.intersection(*map(set, each))
        return {seed: fmean(own[seed] for own in each) for seed in seeds}

    return effects


def _saves_more(arm: str, other: str) -> Asked:
    effect = (
        "share of the MLPs' four backward products that zeros spare, last fifth of training: "
        f"{arm} minus {other}"
    )
    return Asked(
        "rises", lambda arms: paired(arms, arm, other, backward, difference), effect, "points"
    )


def _kept(threshold: float, effect: str, *bases: str) -> Asked:
    return Asked("rises", _mean(quality_kept(threshold), *bases), effect, "points", -POINT)


def _kept_small(base: str) -> Asked:
    return _kept(SMALL, f"test accuracy of {dropping(base, SMALL)} − that of {base}", base)


_THREE = (REFERENCE, SUBJECT, REFERENCE + SPARED)
_SHRINKING = (
    f"ln of the share of entries of η above {SMALL:g} rms, over derivative density, at the end, "
    f"over the same at step 0; mean over {' and '.join(BASES)}"
)
_CHANGED = (
    "norm of the change of the gradient of the MLPs' weights over its norm, at the last step; "
    f"mean over {' and '.join(BASES)}"
)
_LESS = (
    f"test accuracy of {dropping(REFERENCE, 1.0)} − that of {NONE}, in which the layers before the "
    "activation learn nothing"
)
QUESTIONS = {
    "idle": _saves_more(REFERENCE, NONE),
    "idle-paper": _saves_more(SUBJECT, NONE),
    "paper-spares": _saves_more(SUBJECT, REFERENCE),
    "paper-spares-spared": _saves_more(SUBJECT, REFERENCE + SPARED),
    "kept": _kept_small(REFERENCE),
    "kept-paper": _kept_small(SUBJECT),
    "kept-1": _kept(
        1.0,
        f"test accuracy of the arm that drops − that of its base, mean over {', '.join(_THREE)}",
        *_THREE,
    ),
    "less-than-all": Asked(
        "rises",
        lambda arms: paired(arms, dropping(REFERENCE, 1.0), NONE, QUALITY, difference),
        _LESS,
        "points",
    ),
    "exceed": Asked(
        "falls",
        _mean(lambda arms, base: within(arms, base, _shrinking), *BASES),
        _SHRINKING,
        "log",
    ),
    "error": Asked(
        "falls",
        _mean(lambda arms, base: within(arms, base, _error), *BASES),
        _CHANGED,
        least=-TOLERATED,
    ),
    "mlps-matter": mlps_matter(),
}


# -- pictures -------------------------------------------------------------------------------------


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
    found = {arm: [_shares(run) for run in arms[arm].values()] for arm in (*_THREE, NONE)}
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


EXPERIMENT = experiment(
    "pruning", QUESTIONS, {"pruning-threshold": against_threshold, "pruning-exact": products}
)

"""Manipulation: do pre-activations gather where the derivative is zero, or the activation?

Under ReLU the two are one, so training cannot show which of them it seeks. The S-shape
``s(z − δx) + δy`` parts them: P₀ is the share of pre-activations z where its derivative is zero,
P_a that in an interval as long around the root of the function (`actsparse.observe.occupancy` has
the equations). Four shifts, δx and δy ±1.6, put both to either side of z = 0. The papers say that
P₀ rises more in training than P_a, and is the more stable of the two (arXiv 2309.03004, "v1", and
arXiv 2605.25612, "v2").

What it cannot tell. The four are two and their mirror images. Where δx and δy have one sign, z = 0,
to which weight decay draws z, lies in the interval around the root, and so do most z at the start;
where they have not, that interval begins at |z| = 2.9 and is all but empty then. That decides how
stable P_a is over the four: where z are drawn to 0 it rises under two of them and stays near 0
under the others. Zero derivative is at |z| from 0.1 to 3.1 under all four. The two have 0.24 of
their 3 in common. P₀ also counts units whose z lies there for every token.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from statistics import fmean, stdev
from typing import TYPE_CHECKING, Any, TypeVar

from actsparse_lab.records import Run
from actsparse_lab.report.claims.arm_questions import POINT, SPARED, mlps_matter
from actsparse_lab.report.comparison import CONTROL, REFERENCE
from actsparse_lab.report.effects import QUALITY, Arms, Effects, log_ratio, number, within
from actsparse_lab.report.findings import Asked
from actsparse_lab.report.numbers import minus
from actsparse_lab.report.plots import INK, WIDTH, draw_seeds, heading, new_figure, palette, render
from actsparse_lab.report.prose import experiment

if TYPE_CHECKING:
    from matplotlib.axes import Axes

SHIFTS = {  # arm → δx, δy
    "s-1.6-1.6": (-1.6, -1.6),
    "s-1.6+1.6": (-1.6, 1.6),
    "s+1.6-1.6": (1.6, -1.6),
    "s+1.6+1.6": (1.6, 1.6),
}
KEYS = ("zero_derivative", "zero_activation")  # P₀, P_a
NAMES = ("z where φ′ = 0: P₀", "z around φ = 0: Pₐ")
SHORT = ("P₀", "Pₐ")
Pair = tuple[float, float]  # of P₀, of P_a
Seen = TypeVar("Seen")


# -- what is read ---------------------------------------------------------------------------------


def occupancy(run: Run) -> dict[int, Pair]:
    """P₀ and P_a on the validation split, by step; steps that lack either are left out."""
    found = {}
    for entry in run.evals:
        shares = [number(entry, "measures", key) for key in KEYS]
        if shares[0] is not None and shares[1] is not None:
            found[int(entry["step"])] = (shares[0], shares[1])
    return found


def end(run: Run) -> Pair | None:
    """P₀ and P_a at the last validation; None where the first is not at step 0."""
    found = occupancy(run)
    return found[max(found)] if 0 in found and len(found) > 1 else None


def change(run: Run) -> Pair | None:
    """What they have risen by since step 0, when the weights were random."""
    last = end(run)
    if last is None:
        return None
    first = occupancy(run)[0]
    return last[0] - first[0], last[1] - first[1]


def _over_shifts(
    read: Callable[[Run], Seen | None],
    combine: Callable[[Sequence[Seen]], float | None],
    ending: str = "",
) -> Callable[[Arms], Effects]:
    """``combine`` of what the four shifts of a seed say; seeds that lack one are left out."""

    def effects(arms: Arms) -> Effects:
        found: Effects = {}
        for seed in set.intersection(*(set(arms[arm + ending]) for arm in SHIFTS)):
            seen = [read(arms[arm + ending][seed]) for arm in SHIFTS]
            known = [each for each in seen if each is not None]
            effect = combine(known) if len(known) == len(SHIFTS) else None
            if effect is not None:
                found[seed] = effect
        return found

    return effects


def _lead(pairs: Sequence[Pair]) -> float:
    return fmean(p0 - pa for p0, pa in pairs)


def _rise(pairs: Sequence[Pair]) -> float:
    return fmean(p0 for p0, _ in pairs)


def _spread(pairs: Sequence[Pair]) -> float | None:
    return log_ratio(stdev(p0 for p0, _ in pairs), stdev(pa for _, pa in pairs))


def _quality_against(other: str, ending: str = "") -> Callable[[Arms], Effects]:
    def effects(arms: Arms) -> Effects:
        own, others = _over_shifts(QUALITY, fmean, ending)(arms), within(arms, other, QUALITY)
        return {seed: own[seed] - others[seed] for seed in own if seed in others}

    return effects


_RISE = "[P₀ at the last validation − P₀ at step 0] − [the same of P_a], mean over the four shifts"
_SPREAD = (
    "ln of the standard deviation over the four shifts (n − 1) of P₀'s change since step 0, over "
    "that of P_a's"
)
_SHAPES = "mean test accuracy of the four S-shapes"
_SPARING = "arms without decay of 1-D parameters"
_GAINED = "P₀ at the last validation − P₀ at step 0, mean over the four shifts"
_AT_END = "P₀ − P_a at the last validation, mean over the four shifts"


def _as_good(other: str, said: str, ending: str = "", least: float = 0.0) -> Asked:
    effect = f"{_SHAPES}{said}"
    return Asked("rises", _quality_against(other, ending), effect, "points", least)


QUESTIONS = {
    "mlps-matter": mlps_matter(),
    "gain": Asked("rises", _over_shifts(change, _lead), _RISE, "points"),
    "gain-spared": Asked(
        "rises", _over_shifts(change, _lead, SPARED), f"{_RISE}; {_SPARING}", "points"
    ),
    "rise": Asked("rises", _over_shifts(change, _rise), _GAINED, "points"),
    "end": Asked("rises", _over_shifts(end, _lead), _AT_END, "points"),
    "stable": Asked("falls", _over_shifts(change, _spread), _SPREAD, "log"),
    "stable-spared": Asked(
        "falls", _over_shifts(change, _spread, SPARED), f"{_SPREAD}; {_SPARING}", "log"
    ),
    "quality": _as_good(REFERENCE, f" − that of ReLU ({REFERENCE})", "", -POINT),
    "quality-spared": _as_good(
        REFERENCE + SPARED, f" − that of ReLU ({REFERENCE}{SPARED}); {_SPARING}", SPARED, -POINT
    ),
    "use": _as_good(CONTROL, " − that of the model without MLPs"),
    "use-spared": _as_good(
        CONTROL,
        f", {_SPARING}, − that of the model without MLPs, whose 1-D parameters decay",
        SPARED,
    ),
}


# -- pictures -------------------------------------------------------------------------------------


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
        for title, ending in (("all weights decay", ""), ("1-D ones do not", SPARED))
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
        more = sum(_lead(own) > 0 for own in shown)
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


EXPERIMENT = experiment(
    "manipulate", QUESTIONS, {"occupancy": over_training, "occupancy-change": changes}
)

"""Second moments accumulated over training (Peng et al. 2023, arXiv 2309.03004, "v1").

Nets of four residual layers ``x + ReLU(W·LN(x))`` of several widths p are trained by plain SGD with
several weight decays, arms ``p{width}-decay{wd}``. The second moments of the features LN(x) and of
the gradients at W's output are summed as weight decay sums W's updates. v1 argues by random
matrices that W's eigenvalues stay concentrated: what these sums are made of would be close to
random. Widths and decays are read from the arms' names.

Of v1 only the abstract and the authors' program were at hand, so the bars are ours. Anisotropy A is
``√p ‖αC − I‖_F``, at most ``√(p(p − 1))``; it is compared with that of Gaussian rows, not with a
power of width: that of random gradients grows faster than width, a single direction's as fast.
Accepted fits do not show that anything is random, and weights that follow the law may still be
those of the start.
"""

from __future__ import annotations

import math
import re
from collections.abc import Callable, Mapping, Sequence
from statistics import fmean, geometric_mean
from typing import TYPE_CHECKING

from actsparse_lab.records import Entry, Run
from actsparse_lab.report.effects import Arms, Effects, Reader, final, number
from actsparse_lab.report.findings import Asked
from actsparse_lab.report.plots import (
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
from actsparse_lab.report.prose import experiment

if TYPE_CHECKING:
    from matplotlib.axes import Axes

SEEN = ("feature", "gradient")
MIDDLE = 0.1  # a weight decay of both forms
TWICE = math.log(2)
ARM = re.compile(r"p(\d+)-decay([\d.e-]+)")

Runs = dict[int, Run]  # by seed
Line = dict[float, float]  # of one seed or of the mean: across → up


def grid(arms: Mapping[str, Runs]) -> dict[tuple[int, float], Runs]:
    """The runs by width and weight decay, ascending, as the arms' names say.

    >>> list(grid({"p64-decay0": {}, "p16-decay0.1": {}, "vanilla": {}}))
    [(16, 0.1), (64, 0.0)]
    """
    named = [(found, runs) for arm, runs in arms.items() if (found := ARM.fullmatch(arm))]
    cells = {(int(found[1]), float(found[2])): runs for found, runs in named}
    return {cell: cells[cell] for cell in sorted(cells)}


# -- one number of a run ----------------------------------------------------------------------


def _layers(entry: Entry) -> list[Entry]:
    return list((entry["measures"] or {}).get("layers") or [])


def _at_end(run: Run) -> list[Entry]:
    """The layers of the line of the last step; none where there is no such line."""
    entry = final(run, "measured")
    return [] if entry is None else _layers(entry)


def _mean_log(layers: Sequence[Entry], key: str) -> float | None:
    """The mean of ln over layers; None where a layer has no number above 0."""
    known = [value for layer in layers if (value := number(layer, key)) and value > 0]
    return fmean(map(math.log, known)) if known and len(known) == len(layers) else None


def anisotropy(run: Run) -> float | None:
    """The mean over layers of ln A of accumulated gradients at the end."""
    return _mean_log(_at_end(run), "gradient_anisotropy")


def over(key: str, other: str) -> Reader:
    """Reads the mean over layers of ln (``key`` / ``other``) at the end."""

    def read(run: Run) -> float | None:
        own, others = (_mean_log(_at_end(run), each) for each in (key, other))
        return None if own is None or others is None else own - others

    return read


def concentration_peak(run: Run) -> float | None:
    """The largest, over the lines, of the mean over layers of ln (concentration / the first)."""
    means = [_mean_log(_layers(entry), "concentration") for entry in run.measured]
    known = [mean for mean in means if mean is not None]
    if len(known) < len(means) or len(means) < 2 or not _at_end(run):
        return None
    return max(known) - known[0]


# -- effects ----------------------------------------------------------------------------------


def _mean(cells: Sequence[Runs], read: Reader) -> Effects:
    """The mean over cells, for the seeds that have a number in every one."""
    found: Effects = {}
    for seed in set.intersection(*map(set, cells)) if cells else ():
        values = [value for cell in cells if (value := read(cell[seed])) is not None]
        if len(values) == len(cells):
            found[seed] = fmean(values)
    return found


def _at(decay: float, read: Reader) -> Callable[[Arms], Effects]:
    """The mean over widths, at one weight decay."""
    return lambda arms: _mean([r for (_, d), r in grid(arms).items() if d == decay], read)


def _by_decay(arms: Arms) -> Effects:
    cells = grid(arms)
    most = max((decay for _, decay in cells), default=0.0)
    both = [
        (runs, cells[w, 0.0]) for (w, d), runs in cells.items() if d == most and (w, 0) in cells
    ]
    if not both or most == 0:
        return {}
    own, without = (_mean(each, anisotropy) for each in zip(*both, strict=True))
    return {seed: own[seed] - without[seed] for seed in own if seed in without}


def _as_random(of: str) -> Asked:
    effect = (
        f"ln of the anisotropy A of accumulated {of}s over that of as many Gaussian rows of the "
        "same rank; mean over layers and widths; no weight decay, last step"
    )
    found = _at(0.0, over(f"{of}_anisotropy", f"{of}_random_anisotropy"))
    return Asked("falls", found, effect, "log", -TWICE)


def _follows(key: str, of: str, decay: float = 0.0) -> Asked:
    effect = (
        f"ln of the Kolmogorov–Smirnov distance of the eigenvalues of {of} from Marchenko and "
        f"Pastur’s law over the largest that 99 of 100 random matrices have; mean over layers and "
        f"widths; weight decay {decay:g}, last step"
    )
    return Asked("falls", _at(decay, over(f"{key}_ks", f"{key}_ks_limit")), effect, "log")


_PERSISTS = (
    "mean over layers of ln (W Wᵀ’s largest over its smallest non-zero eigenvalue), the most that "
    "it is at a measured step minus the first, after step 1; mean over widths"
)
_LESS = (
    "ln of the anisotropy A of accumulated gradients, largest weight decay over none; mean over "
    "layers and widths, last step"
)
QUESTIONS = {
    **{f"{of}-random": _as_random(of) for of in SEEN},
    **{
        f"{of}-law": _follows(f"{of}_equal", f"the accumulated second moment of {of}s")
        for of in SEEN
    },
    "concentration": Asked("falls", _at(0.0, concentration_peak), _PERSISTS, "log", -TWICE),
    "concentration-decay": Asked(
        "falls", _at(MIDDLE, concentration_peak), _PERSISTS, "log", -TWICE
    ),
    "decay": Asked("falls", _by_decay, _LESS, "log"),
    "weights-law": _follows("weight", "W Wᵀ"),
    "weights-law-decay": _follows("weight", "W Wᵀ", MIDDLE),
}


# -- pictures ---------------------------------------------------------------------------------


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
    pairs = [(number(row, key), number(row, "anisotropy_limit")) for row in _at_end(run)]
    shares = [own / most for own, most in pairs if own is not None and most]
    return fmean(shares) if shares and len(shares) == len(pairs) else None


def _concentrations(run: Run) -> Line:
    found = {e["step"]: _mean_log(_layers(e), "concentration") for e in run.measured}
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


EXPERIMENT = experiment(
    "noise",
    QUESTIONS,
    {"noise-anisotropy": against_width, "noise-concentration": concentration_over_steps},
)

"""The plots of why it is sparse: density taken apart by its identity with flatness, the effective
gradient, its noise, and the spectra of the weights. Each is drawn where records hold its numbers.

The identity, with AF augmented flatness and c the coefficient: ``density = AF / (T · H · c)``
(Peng et al. 2026, arXiv 2605.25612). The measures themselves are defined in `actsparse.observe`.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING

import numpy as np

from actsparse_lab.analysis.comparison import Comparison
from actsparse_lab.analysis.effects import number
from actsparse_lab.analysis.measures import read_spectra
from actsparse_lab.analysis.numbers import counted
from actsparse_lab.analysis.plots import (
    INK,
    WIDTH,
    Axis,
    Panel,
    Plot,
    heading,
    log_axis,
    new_figure,
    over_steps,
    png,
    steps,
    styles,
)
from actsparse_lab.analysis.prose import pictures
from actsparse_lab.records import Entry, Run

if TYPE_CHECKING:
    from matplotlib.axes import Axes

LAYERS = ("up", "gate", "down")
ROW = 2.1  # inches of a row of spectra
BAR = {False: "#9CC4E4", True: "#2D5F87"}  # as in page.html.jinja
LAW = {False: "#D55E00", True: "#F07F3C"}
FAR = 5  # times the law's upper edge: outliers that need a log axis
SPECTRAL: tuple[tuple[str, str, Axis], ...] = (
    ("spectral concentration", "concentration", "log"),
    ("KS distance from random entries", "ks", "zero"),
)
SIDES = {"outliers": "↑", "below": "↓"}  # of the law's edges


def training(key: str, positive: bool = False) -> Callable[[Run], dict[int, float]]:
    """Reads a measure of the training lines, step → value; ``positive`` ones alone."""

    def read(run: Run) -> dict[int, float]:
        found = {entry["step"]: number(entry["measures"], key) for entry in run.train}
        return {s: v for s, v in found.items() if v is not None and (v > 0 or not positive)}

    return read


def _over_blocks(key: str) -> Callable[[Run], dict[int, float]]:
    """Reads the mean over blocks of what their rows alone hold."""

    def read(run: Run) -> dict[int, float]:
        rows = {e["step"]: e["measures"]["blocks"] for e in run.train if e["measures"]}
        found = {step: [number(row, key) for row in each] for step, each in rows.items()}
        known = {step: [v for v in each if v is not None] for step, each in found.items()}
        return {step: sum(each) / len(each) for step, each in known.items() if each}

    return read


def _panel(label: str, key: str, axis: Axis = "zero") -> Panel:
    return Panel(label, training(key, positive=axis == "log"), axis)


_PARTS = (
    _panel("numerator: flatness AF  (down is sparser)", "flatness", "log"),
    _panel("denominator: coefficient c  (up is sparser)", "coefficient", "log"),
    _panel("part of c: input norm ‖x‖²", "input_norm", "log"),
    _panel("part of c: effective gradient η², active units", "effective_gradient", "log"),
)


def what_moves(table: Comparison, runs: list[Run], dark: bool = False) -> bytes | None:
    """Density, then numerator and denominator of the identity, and what the latter is made of."""
    if not any(part.read(run) for part in _PARTS for run in runs):
        return None
    return over_steps(table, runs, dark, _panel("density, measured", "density"), *_PARTS)


def flatness_and_density(table: Comparison, runs: list[Run], dark: bool = False) -> bytes | None:
    """Training density against flatness: a path for each arm, from a hollow to a filled mark."""
    figure, (axes,) = new_figure(dark)
    flatness, density = training("flatness", positive=True), training("density")
    for name, style in styles(table, dark):
        line = {"color": style["color"], "linestyle": style["linestyle"]}
        paths = []
        for run in runs:
            if run.arm != name:
                continue
            up = density(run)
            path = {step: (value, up[step]) for step, value in flatness(run).items() if step in up}
            if path:
                axes.plot(*zip(*path.values(), strict=True), **line, alpha=0.3, linewidth=1)
                paths += [path] if run.finished else []
        common = sorted(set.intersection(*map(set, paths))) if paths else []
        if not common:
            continue
        mean = np.mean([[path[step] for step in common] for path in paths], axis=0).T
        axes.plot(*mean, **line, linewidth=2.4, label=name)
        mark = {"color": style["color"], "marker": style["marker"], "markersize": 9}
        axes.plot(*mean[:, :1], **mark, markerfacecolor=axes.get_facecolor(), markeredgewidth=2)
        axes.plot(*mean[:, -1:], **mark)
    if not axes.lines:
        return None
    log_axis(axes, "x", few=True)
    axes.set_ylim(0, 1.05 * axes.get_ylim()[1])
    axes.set_xlabel("flatness AF  (left is flatter)")
    axes.set_ylabel("training density")
    return png(figure, table)


def _over_density(run: Run) -> dict[int, float]:
    of = training("derivative_density")(run)
    found = training("ratio")(run)
    return {step: value / of[step] for step, value in found.items() if of.get(step)}


def _measured(name: str) -> Callable[[Run], dict[int, float]]:
    """Reads a curvature, where positive, of where a run stopped to measure it."""

    def read(run: Run) -> dict[int, float]:
        found = {e["step"]: number(e, "curvature", name, "value") for e in run.measured}
        return {step: value for step, value in found.items() if value is not None and value > 0}

    return read


# AF over the product of mean input norm and mean gradient, and how far that is density.
separable_ratio = steps(
    Panel("ratio: AF / (T · H · mean ‖x‖² · mean η²)", training("ratio")),
    Panel("ratio / density  (dotted: they agree)", _over_density, "fit", level=1.0),
)
# How sparse the effective gradient is, and where the gradient gathers.
effective_gradient = steps(
    _panel("gradient sparsity: share of η that is 0", "gradient_sparsity"),
    _panel("concentration: share of g² on active units", "concentration"),
    _panel("participation: share of units that carry η²", "participation"),
)
noise = steps(
    _panel("anisotropy of effective gradients", "gradient_anisotropy", "fit"),
    _panel("anisotropy of features", "feature_anisotropy", "fit"),
    _panel("noise scale: samples", "noise_scale", "log"),
)
# How far apart the weights' eigenvalues lie, and how far they are from those of noise.
concentration = steps(
    *(
        Panel(f"{label} of {layer}", _over_blocks(f"{layer}_{key}"), axis)
        for label, key, axis in SPECTRAL
        for layer in LAYERS
    )
)
curvature = steps(
    Panel("Gauss–Newton trace", _measured("gauss_newton"), "log"),
    Panel("Gauss–Newton trace, a weight for each token", _measured("token_copies"), "log"),
    Panel("Hessian trace, where positive", _measured("hessian"), "log"),
    Panel("largest eigenvalue", _measured("top_eigenvalue"), "log"),
)


def spectra(which: Callable[[Comparison], str | None]) -> Plot:
    """The plot of the eigenvalues of the weights, in the arm that ``which`` picks: one seed, and of
    its blocks the first, one in the middle and the last."""

    def plot(table: Comparison, runs: list[Run], dark: bool = False) -> bytes | None:
        own = [run for run in runs if run.finished and run.arm == which(table)]
        run, entries = next(((r, found) for r in own if (found := read_spectra(r))), (None, []))
        if run is None:
            return None
        shown = {(entry["block"], entry["layer"]): entry for entry in entries}
        blocks = list(dict.fromkeys(block for block, _ in shown))
        rows = sorted({0, len(blocks) // 2, len(blocks) - 1})
        layers = [layer for layer in LAYERS if any(own == layer for _, own in shown)]
        size = (WIDTH, 0.6 + ROW * len(rows))
        figure, every = new_figure(dark, len(rows), len(layers), size)
        places = [(row, layer) for row in rows for layer in layers]
        for axes, (row, layer) in zip(every, places, strict=True):
            entry = shown.get((blocks[row], layer))
            if entry is None:
                axes.set_axis_off()
                continue
            _spectrum(axes, entry, f"{layer}, block {row + 1}", dark)
        figure.supxlabel("eigenvalue of WWᵀ", color=INK[dark], fontsize=12)
        title = f"{run.arm}, seed {run.seed}, of {counted(len(blocks), 'block')}"
        figure.suptitle(title, color=INK[dark], fontsize=12)
        return png(figure, table)

    return plot


def _spectrum(axes: Axes, entry: Entry, title: str, dark: bool) -> None:
    """The share of eigenvalues per unit, and the law of Marchenko and Pastur over it."""
    bins, counts = np.array(entry["bins"]), np.array(entry["counts"])
    law = entry["marchenko_pastur"]
    lower, upper = law["lower"], law["upper"]
    # Of few eigenvalues, wider bins up to the edge; beyond it each bin is an outlier or two.
    merged = max(1, round(len(counts) / (2 * np.sqrt(counts.sum()))))
    edge = int(np.searchsorted(bins[:-1], upper * (1 - 1e-4)))
    starts = np.r_[0:edge:merged, edge : len(counts)]
    wide = np.append(bins[starts], bins[-1])
    x, law_at = marchenko_pastur(lower, upper)
    widths = np.diff(wide)
    far = bins[-1] > FAR * upper  # the law would be a spike at the left
    if far:
        wide[0] = wide[0] if wide[0] > 0 else x[0]
        widths, law_at = np.diff(np.log(wide)), law_at * x
    heights = np.add.reduceat(counts, starts) / counts.sum() / widths
    axes.stairs(heights, wide, fill=True, color=BAR[dark])
    axes.plot(x, law_at, color=LAW[dark], linewidth=2)
    for limit in (x[0], x[-1]):
        axes.axvline(limit, color=LAW[dark], linestyle=":", linewidth=1.2)
    outliers = (counts[::-1].cumsum()[::-1] <= law["outliers"]) & (counts > 0)
    at = ((bins[1:] + bins[:-1]) / 2)[outliers]
    if at.size:  # of no points and not clipped, the layout would see one in the figure's corner
        axes.plot(at, np.zeros_like(at), "v", color=INK[dark], markersize=7, clip_on=False)
    axes.tick_params(labelsize=10)
    axes.set_yticks([])  # their places are too narrow for two scales
    if far:
        log_axis(axes, "x", few=True)
        axes.locator_params(axis="x", numticks=3)
    else:
        axes.locator_params(axis="x", nbins=3)
    verdict = "fits" if law["accepted"] else "no fit"
    beyond = " ".join(f"{mark}{law[side]}" for side, mark in SIDES.items() if law[side])
    title += f"\n{verdict}, KS {law['ks']:.2f}" + (f"\n{beyond}" if beyond else "")
    heading(axes, title, dark, 11)


def marchenko_pastur(lower: float, upper: float) -> tuple[np.ndarray, np.ndarray]:
    """The law's density between its edges: points x and ``f(x) = √((upper − x)(x − lower)) /
    (2π p σ² x)``, whose integral is 1; ``p σ²`` follows from the edges ``σ² (√N ∓ √p)²``.

    >>> x, f = marchenko_pastur(1.0, 9.0)  # p σ² = 1
    >>> round(float(f.mean()) * (9.0 - 1.0), 2)
    1.0
    """
    x = np.linspace(lower, upper, 402)[1:-1]
    scale = (np.sqrt(upper) - np.sqrt(lower)) ** 2 / 4
    return x, np.sqrt((upper - x) * (x - lower)) / (2 * np.pi * scale * x)


THEORY = pictures(
    {
        "what-moves": what_moves,
        "flatness-and-density": flatness_and_density,
        "separable-ratio": separable_ratio,
        "effective-gradient": effective_gradient,
        "noise": noise,
        "curvature": curvature,
        "spectral-concentration": concentration,
        "spectra-reference": spectra(lambda table: table.reference),
        "spectra-subject": spectra(lambda table: table.subject),
    },
    "analysis/captions.md",
)

"""Spectrum: the eigenvalues of W Wᵀ beside those that a random matrix would have.

``spectral concentration = largest / smallest non-zero eigenvalue`` of U Uᵀ for the up weight
U [H, D] (Peng et al. 2023, arXiv 2309.03004), where "non-zero" is above a threshold. The random
baseline is the law of Marchenko and Pastur (1967). A matrix with p rows and N ≥ p columns of
independent entries with mean 0 and variance σ² has eigenvalues λ in σ² (√N ∓ √p)², with density

``f(λ) = √((upper − λ)(λ − lower)) / (2π p σ² λ)``.

What the comparison does not mean. Acceptance is no proof of randomness: it looks at eigenvalues
only, so any rotation of a random matrix passes, and so does a weight whose learnt part is of low
rank and below σ (pN)^¼ in spectral norm (Baik, Ben Arous, Péché 2005). Usual initialisations
follow the law by construction; orthogonal ones do not. Rejection says that entries are not
independent with one variance and light tails, not why: a mean other than zero is an outlier too,
and independent entries with heavy tails are rejected more often than Gaussian ones (at 64 × 64,
Laplace in 5 of 100 matrices, Student's t with 5 degrees in 17).
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any, ClassVar

import numpy as np
import torch
from numpy.typing import ArrayLike, NDArray
from torch import Tensor

from actsparse.blocks.block import MLPBlock
from actsparse.blocks.sharding import whole
from actsparse.blocks.site import Site

_TW = 3.2722  # 99.9 % quantile of the Tracy–Widom law of real matrices (β = 1)
_KS = 1.15  # see MarchenkoPastur.ks_limit; a slow test repeats the simulation it comes from
_BULK_BINS, _OUTLIER_BINS = 48, 16


@dataclass(frozen=True)
class MarchenkoPastur:
    """The law fitted to the p eigenvalues of a weight with p × N entries, p ≤ N, and how well.

    ``variance`` σ² is the mean square that is left once outliers are taken out: with k of them,
    ``σ² = Σ_{i>k} λ_i / ((p − k)(N − k))``, as a rank-k part takes k dimensions on each side.

    ``outliers`` k is the largest number up to p/2 such that λ_k is beyond what a Gaussian matrix
    of ``p − k + 1`` by ``N − k + 1`` reaches with the mean square of λ_k and all below it; a spike
    is thus never hidden by larger ones. Where there is no bulk (heavy tails) k is the cap, or near
    it, and the law describes the lower half only. ``below`` counts the eigenvalues beneath the
    lower edge; a square weight has none, as its edge is 0. Both edges are taken wider by the
    Tracy–Widom fluctuation at 0.1 % (Johnstone 2001; Ma 2012, arXiv 1203.0839, whose constants we
    use, for the lower edge on the scale of log λ).

    ``ks`` is the Kolmogorov–Smirnov distance, the largest difference between the share of
    eigenvalues up to λ and ``cdf(λ)``.

    ``accepted``: ks within ``ks_limit``, and no outliers on either side. Of Gaussian matrices at
    most a share ``level`` is rejected: in simulations of shapes from 2 × 2 to 768 × 76800 it was
    0.0 to 0.85 %, of which ks takes about 0.6 % at most and each edge up to 0.2 %. From p = 16 on
    this holds for uniform, truncated normal and ±1 entries as well.
    """

    variance: float
    size: tuple[int, int]
    ks: float
    outliers: int
    below: int
    level: ClassVar[float] = 0.01

    @classmethod
    def fit(cls, eigenvalues: ArrayLike, shape: tuple[int, int]) -> MarchenkoPastur:
        """Fit to the min(m, n) eigenvalues [p] of W Wᵀ, in any order, for W of ``shape`` (m, n).

        Raises ValueError if they are not that many, or none is above 0.

        >>> law = MarchenkoPastur.fit([6.5, 4.0, 2.5, 1.5], (4, 16))
        >>> law.variance, law.outliers, law.accepted
        (0.2265625, 0, True)
        """
        p, n = size = min(shape), max(shape)
        values = np.sort(np.asarray(eigenvalues, dtype=np.float64))[::-1]
        if values.shape != (p,) or not values[0] > 0:
            raise ValueError(
                f"a weight of shape {shape} has {p} eigenvalues, the largest above 0; got {values}"
            )
        left = np.arange(p)  # how many larger ones are taken out
        noise = values[::-1].cumsum()[::-1] / ((p - left) * (n - left))
        beyond = np.flatnonzero((values > noise * _highest(p - left, n - left))[: p // 2])
        k = int(beyond[-1]) + 1 if len(beyond) else 0
        # An exactly low-rank weight leaves nothing but what float64 rounds off the largest.
        variance = max(float(noise[k]), float(np.finfo(np.float64).eps ** 2 * values[0]))
        below = int((values < variance * _lowest(p, n)).sum())
        law = cls(variance, size, math.nan, k, below)
        share, steps = law.cdf(values[::-1]), np.arange(p + 1) / p
        ks = max((share - steps[:-1]).max(), (steps[1:] - share).max())
        return replace(law, ks=float(ks))

    @property
    def ratio(self) -> float:
        """Aspect ratio p / N ≤ 1."""
        return self.size[0] / self.size[1]

    @property
    def lower(self) -> float:
        """Lower edge of the law, ``σ² (√N − √p)²``."""
        p, n = self.size
        return self.variance * (math.sqrt(n) - math.sqrt(p)) ** 2

    @property
    def upper(self) -> float:
        """Upper edge of the law, ``σ² (√N + √p)²``."""
        p, n = self.size
        return self.variance * (math.sqrt(n) + math.sqrt(p)) ** 2

    @property
    def ks_limit(self) -> float:
        """The ks up to which a matrix is accepted: ``(√2/π · ln p + c) / p``.

        Eigenvalues repel each other, so ks shrinks like ln p / p, not like the 1/√p of
        independent samples, whose table would accept nearly everything. The leading term is that
        of the largest fluctuation of an eigenvalue count (Fyodorov and Le Doussal 2020, arXiv
        2001.04135, for β = 1). Beyond c = 1.15 lie about 0.6 % of Gaussian matrices at the
        worst shapes, by simulation, and fewer at others. With few rows little is rejected: for
        p = 1 nothing.
        """
        p = self.size[0]
        return (math.sqrt(2) / math.pi * math.log(p) + _KS) / p

    @property
    def accepted(self) -> bool:
        """Whether the eigenvalues could be those of a random matrix, at ``level``."""
        return self.ks <= self.ks_limit and not self.outliers and not self.below

    def density(self, x: ArrayLike) -> NDArray[np.float64]:
        """f at x, of any shape; 0 outside ``lower < x < upper``. Its integral is 1."""
        x = np.asarray(x, dtype=np.float64)
        inside = (self.lower < x) & (x < self.upper)
        at = np.where(inside, x, self.upper)
        root = np.sqrt((self.upper - at) * np.maximum(at - self.lower, 0))
        return root / (2 * math.pi * self.size[0] * self.variance * at)

    def cdf(self, x: ArrayLike) -> NDArray[np.float64]:
        """Share of the law's eigenvalues up to x, of any shape, in closed form.

        With ``λ = σ² (N + p + 2 √(pN) cos θ)`` and ``c = √(p/N)`` the integral of the density is
        ``1 − (θ + ((1 − c²) φ / c − sin θ) / c) / π``, where φ is the argument of ``1 + c e^{iθ}``.
        """
        p, n = self.size
        c = math.sqrt(p / n)
        value = np.asarray(x, dtype=np.float64) / self.variance
        cosine = (value - (n + p)) / (2 * math.sqrt(p * n))
        theta = np.arccos(np.clip(cosine, -1, 1))
        phi = np.arctan2(c * np.sin(theta), 1 + c * np.cos(theta))
        return 1 - (theta + ((1 - c * c) * phi / c - np.sin(theta)) / c) / math.pi


@dataclass(frozen=True, eq=False)
class Spectrum:
    """Eigenvalues of W Wᵀ for a weight W [m, n] of ``shape`` (m, n).

    ``eigenvalues`` [min(m, n)], float64, descending, the squared singular values; the other
    m − min(m, n) are zero by rank. ``concentration``: the largest over the smallest above the
    threshold, None if none is above. ``stable_rank`` is ``‖W‖_F² / ‖W‖₂²``, between 1 and the rank.
    """

    shape: tuple[int, int]
    eigenvalues: NDArray[np.float64]
    concentration: float | None
    stable_rank: float
    marchenko_pastur: MarchenkoPastur

    @property
    def trace(self) -> float:
        """``tr W Wᵀ = ‖W‖_F²``, the sum of the squares of all entries."""
        return float(self.eigenvalues.sum())

    def to_json(self, *, eigenvalues: bool = False) -> dict[str, Any]:
        """For a record: plain numbers; all the eigenvalues only if asked for.

        ``bins`` are at most 65 edges: 48 equal bins up to where outliers begin and, if any are
        there, 16 of equal ratio up to the largest. ``counts`` says how many eigenvalues are in
        each, and ``expected`` how many the law puts there, so that a plot needs nothing else.
        """
        law, values = self.marchenko_pastur, self.eigenvalues
        top = law.variance * _highest(*np.subtract(law.size, law.outliers))
        bins = np.linspace(min(values[-1], law.lower), top, _BULK_BINS + 1)
        if values[0] > bins[-1]:
            bins = np.append(bins, np.geomspace(bins[-1], values[0], _OUTLIER_BINS + 1)[1:])
        record: dict[str, Any] = {
            "shape": list(self.shape),
            "concentration": self.concentration,
            "stable_rank": self.stable_rank,
            "trace": self.trace,
            "largest": float(values[0]),
            "smallest": float(values[-1]),
            "marchenko_pastur": {
                "variance": law.variance,
                "ratio": law.ratio,
                "lower": law.lower,
                "upper": law.upper,
                "ks": law.ks,
                "ks_limit": law.ks_limit,
                "outliers": law.outliers,
                "below": law.below,
                "level": law.level,
                "accepted": law.accepted,
            },
            "bins": _short(bins),
            "counts": np.histogram(values, bins)[0].tolist(),
            "expected": _short(len(values) * np.diff(law.cdf(bins))),
        }
        return record | ({"eigenvalues": values.tolist()} if eigenvalues else {})


@torch.no_grad()
def spectrum(weight: Tensor, *, zero: float = 0.1) -> Spectrum:
    """The spectrum of W Wᵀ for ``weight`` W [m, n], of any dtype and on any device.

    ``zero``: an eigenvalue counts as non-zero above ``zero`` × the mean of all m, those that are
    zero by rank among them: ``mean = ‖W‖_F² / m``. So W is to have the dimension asked about as
    its rows: the up weight U [H, D] as it is for U Uᵀ and a mean over H. Transposing changes the
    concentration by that mean and nothing else. The authors use 0.1 while training and 10 for
    finished models; a random U reaches ``(1 + √(H/D))²`` times the mean, which is 9 at H = 4 D,
    so with 10 it has none.

    Computed in float64 whatever the dtype: the smallest singular value carries an error of about
    eps · ‖W‖₂, which in float32 would be seen in the concentration of a nearly singular weight.
    Singular values up to ``max(m, n) · eps · ‖W‖₂`` are rounding, and returned as 0. A weight of
    3072 × 768 takes 0.2 s on one CPU core.

    Raises ValueError for a weight that is not 2-D, is empty, has NaN or infinite entries or none
    but zeros, and for a ``zero`` that is negative or not finite.

    >>> made = spectrum(torch.tensor([[2.0, 0.0], [0.0, 1.0], [0.0, 0.0]]))
    >>> made.eigenvalues.tolist(), made.concentration, made.stable_rank
    ([4.0, 1.0], 4.0, 1.25)
    >>> made.marchenko_pastur.accepted
    True
    """
    if weight.ndim != 2 or not weight.numel():
        raise ValueError(f"weight must be 2-D and not empty, got shape {tuple(weight.shape)}")
    if not (math.isfinite(zero) and zero >= 0):
        raise ValueError(f"zero must be a finite number of at least 0, got {zero}")
    bad = weight.numel() - int(weight.isfinite().sum())
    if bad:
        raise ValueError(f"weight must be finite, but {bad} of {weight.numel()} entries are not")
    m, n = weight.shape
    # LAPACK takes tall matrices three times as fast as wide ones.
    tall = weight.detach().double() if m >= n else weight.detach().double().mT
    singular = torch.linalg.svdvals(tall).cpu().numpy()
    singular[singular <= max(m, n) * np.finfo(np.float64).eps * singular[0]] = 0
    values = np.square(singular)
    if not values[0]:
        raise ValueError("weight must have an entry that is not zero: all singular values are 0")
    values.setflags(write=False)
    total = float(values.sum())
    above = values[values > zero * total / m]
    return Spectrum(
        shape=(m, n),
        eigenvalues=values,
        concentration=float(above[0] / above[-1]) if len(above) else None,
        stable_rank=total / float(values[0]),
        marchenko_pastur=MarchenkoPastur.fit(values, (m, n)),
    )


class WeightSpectrum:
    """The spectra of a block's weights, as they are when the summary is read, after any pass.

    ``zero`` as in :func:`spectrum`. Time: an SVD of every weight for each summary. Sharded weights
    are gathered for it: read the summary in every process.
    """

    columns: ClassVar[dict[str, tuple[str, Callable[[Any], str]]]] = {
        f"{letter} {title}": (f"{layer}_{key}", write)
        for layer, letter in (("up", "U"), ("down", "V"))
        for title, key, write in (
            ("conc.", "concentration", "{:.3g}".format),
            ("stable", "stable_rank", "{:.3g}".format),
            ("KS", "ks", "{:.2g}".format),
            ("out", "outliers", str),
        )
    }

    def __init__(self, block: MLPBlock, zero: float = 0.1) -> None:
        self.block, self.zero = block, zero
        self.passes = torch.zeros(())

    @staticmethod
    def stages(site: Site) -> tuple[str, ...]:
        """Any, to know of passes."""
        return ("y",)

    def update(self, site: Site, stages: dict[str, Tensor], keep: Tensor | None) -> None:
        """A pass."""
        self.passes.fill_(1)

    def reset(self) -> None:
        """Wait for a pass again."""
        self.passes.zero_()

    def state(self) -> list[Tensor]:
        """None: processes share their weights."""
        return []

    def load(self, state: list[Tensor]) -> None:
        """Nothing: weights are read where they are."""

    @staticmethod
    def summary(parts: dict[str, WeightSpectrum]) -> dict[str, Any] | None:
        """Of each block, under ``blocks``, numbers of its layers called ``up_ks`` and so on.

        ``random``: whether Marchenko and Pastur's law is accepted. A weight that is all zeros has
        none.
        """
        rows = [
            {"block": name, **part.numbers()} for name, part in parts.items() if bool(part.passes)
        ]
        return {"blocks": rows} if rows else None

    def numbers(self) -> dict[str, Any]:
        """The row of one block."""
        row: dict[str, Any] = {}
        for layer, found in spectra(self.block, self.zero).items():
            law = found.marchenko_pastur
            row |= {
                f"{layer}_concentration": found.concentration,
                f"{layer}_stable_rank": found.stable_rank,
                f"{layer}_trace": found.trace,
                f"{layer}_ks": law.ks,
                f"{layer}_outliers": law.outliers,
                f"{layer}_random": law.accepted,
            }
        return row


def spectra(block: MLPBlock, zero: float = 0.1) -> dict[str, Spectrum]:
    """Of a block's layers ``up``, ``gate`` (if any) and ``down``, all with the H units as rows.

    A weight that is all zeros is left out.
    """
    layers = {"up": block.up, "gate": block.gate, "down": block.down}
    weights = {
        name: whole(layer.weight.detach()) for name, layer in layers.items() if layer is not None
    }
    weights["down"] = weights["down"].mT
    return {name: spectrum(w, zero=zero) for name, w in weights.items() if bool(w.any())}


def _highest(p: NDArray[np.int64], n: NDArray[np.int64]) -> NDArray[np.float64]:
    """What λ₁ / σ² of p × n Gaussian matrices exceeds once in a thousand."""
    a, b = np.sqrt(n - 0.5), np.sqrt(p - 0.5)
    return (a + b) ** 2 + _TW * (a + b) * (1 / a + 1 / b) ** (1 / 3)


def _lowest(p: int, n: int) -> float:
    """What λ_p / σ² stays under once in a thousand; 0 for square matrices."""
    if p == n:
        return 0.0
    a, b = math.sqrt(n - 0.5), math.sqrt(p - 0.5)
    centre, scale = (a - b) ** 2, (a - b) * (1 / b - 1 / a) ** (1 / 3)
    tau = scale / centre
    return centre * math.exp(tau**2 / 8 - _TW * tau)


def _short(numbers: NDArray[np.float64]) -> list[float]:
    """Six digits, enough for a plot."""
    return [float(f"{number:.6g}") for number in numbers]

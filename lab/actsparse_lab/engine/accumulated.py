"""Second moments accumulated over training steps, as weight decay accumulates a weight's updates.

SGD with weight decay λ multiplies a weight by ``r = 1 − lr·λ`` before each update, so what a step
t added counts as ``r^(k−t)`` after step k. The uncentred second moments of the rows v of each
batch, of hidden features or of gradients, are accumulated alike (Peng et al. 2023, arXiv
2309.03004, the experiment on gradient noise):

``C_k = r · C_{k−1} + Σ_{rows v of batch k} v vᵀ``.

It is a **sum** over rows, not a mean: rows with independent entries of mean 0 and variance σ² give
at r = 1 the matrix X Xᵀ of p × N entries that `MarchenkoPastur` describes. The anisotropy, the
share of outliers and the KS distance do not change when C is multiplied by a number.
"""

from __future__ import annotations

import math
from typing import ClassVar

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from actsparse.observe.gradient_noise import anisotropy
from actsparse.observe.spectrum import MarchenkoPastur


class Accumulated:
    """``C_k = r·C_{k−1} + Σ v vᵀ`` [p, p] for rows v of p entries and ``decay`` r in (0, 1].

    Two numbers of samples that C stands for, both the number of rows at r = 1:

    - ``samples``, the paper's: rows of a batch × ``min(k, window)`` with
      ``window = ln(τ(1 − r)) / ln r − 1`` batches, so that all older ones together weigh
      τ = 1e-3 times the newest (∞ at r = 1, and 1 at least);
    - ``equal_samples = (Σ w)² / Σ w²`` over the weights w of the rows: so many rows of equal weight
      have a mean of the same variance (Kish 1965), and the same ``E tr C² / (E tr C)²``.

    When r < 1 and k is large the first is several times the second: a row that weighs a thousandth
    of another is counted as one. See `marchenko_pastur` for what that does to the fit.

    C is held in float64. With the unit roundoff u = 2⁻⁵³ and γ_n = nu/(1 − nu), the result is
    within ``‖Ĉ − C‖_F ≤ γ_{B+2k} · tr C`` of exact arithmetic on the same rows: a product's B terms
    are rounded B times, and each later step rounds what is there twice. Time: a product of p² B for
    each batch; memory p² numbers.

    Raises ValueError for ``p`` below 1 and a ``decay`` that is not in (0, 1].

    >>> seen = Accumulated(2, decay=0.5)
    >>> seen.add(torch.tensor([[2.0, 0.0]]))
    >>> seen.add(torch.tensor([[0.0, 1.0]]))
    >>> seen.moment.tolist()
    [[2.0, 0.0], [0.0, 1.0]]
    """

    tau: ClassVar[float] = 1e-3

    def __init__(self, p: int, decay: float = 1.0) -> None:
        if p < 1:
            raise ValueError(f"p={p!r}: expected a number of features, 1 or more")
        if not 0 < decay <= 1:
            raise ValueError(f"decay={decay!r}: expected r above 0 and up to 1, as in 1 − lr·wd")
        self.decay = decay
        self.moment = torch.zeros(p, p, dtype=torch.float64)
        self.batches = self.rows = 0
        self._weights = self._squares = 0.0  # Σ w and Σ w² over the rows

    @torch.no_grad()
    def add(self, rows: Tensor) -> None:
        """Take in a batch [B, p] of any floating dtype; NaN stays in C.

        Raises ValueError for another shape, or no rows.
        """
        p = len(self.moment)
        if rows.ndim != 2 or rows.shape[1] != p or not len(rows):
            raise ValueError(f"rows must be [B, {p}] with B ≥ 1, got shape {tuple(rows.shape)}")
        v = rows.to(self.moment)
        self.moment.addmm_(v.T, v, beta=self.decay)
        self.batches += 1
        self.rows += len(v)
        self._weights = self.decay * self._weights + len(v)
        self._squares = self.decay**2 * self._squares + len(v)

    @property
    def window(self) -> float:
        """``T_eff = ln(τ(1 − r)) / ln r − 1`` batches, at least 1; ∞ at r = 1.

        >>> round(Accumulated(4, decay=0.99).window)
        1145
        """
        if self.decay == 1:
            return math.inf
        return max(math.log(self.tau * (1 - self.decay)) / math.log(self.decay) - 1, 1.0)

    @property
    def samples(self) -> float:
        """Rows of a batch (their mean, where batches differ) × min(k, window); 0 at first."""
        if not self.batches:
            return 0.0
        return self.rows / self.batches * min(self.batches, self.window)

    @property
    def equal_samples(self) -> float:
        """``(Σ w)² / Σ w²`` over the weights of all rows; 0 at first."""
        return self._weights**2 / self._squares if self._squares else 0.0

    def mean_square(self) -> float:
        """``tr C / Σ w``, the weighted mean of ‖v‖² over rows; 0 at first."""
        return float(self.moment.trace()) / self._weights if self.rows else 0.0

    def anisotropy(self) -> float | None:
        """``√p ‖αC − I‖_F``, ``α = tr C / ‖C‖_F²``: 0 to ``√(p(p − 1))``; None if C is 0.

        >>> seen = Accumulated(2)
        >>> seen.add(torch.eye(2))
        >>> seen.anisotropy()
        0.0
        """
        return anisotropy(self.moment)

    def random_anisotropy(self, *, rank: int | None = None) -> float:
        """What Gaussian rows without any preferred direction have, about.

        ``√(p (p − q / (1 + c)))`` with ``c = (q + 1) / N``, N `equal_samples` and q the ``rank``
        (`marchenko_pastur`), from ``E ‖C‖_F² / E (tr C)² ≈ (1 + c) / q``: a finite sample is never
        isotropic.

        >>> seen = Accumulated(7)
        >>> seen.add(torch.randn(24, 7))
        >>> round(seen.random_anisotropy(), 12)
        3.5
        """
        p, q = len(self.moment), len(self.moment) if rank is None else rank
        if not self.rows:
            return math.sqrt(p * (p - 1))
        return math.sqrt(p * (p - q / (1 + (q + 1) / self.equal_samples)))

    def eigenvalues(self) -> NDArray[np.float64]:
        """Of C, [p], descending; those within rounding (p · eps · the largest) of 0 are 0."""
        values = torch.linalg.eigvalsh(self.moment).flip(0).cpu().numpy()
        values[values <= len(values) * np.finfo(np.float64).eps * values[0]] = 0
        return values

    def marchenko_pastur(
        self, *, samples: float | None = None, rank: int | None = None
    ) -> MarchenkoPastur | None:
        """The law fitted to the eigenvalues as if of ``samples`` rows; None if C is 0.

        ``samples`` is rounded; None: the paper's. Its ratio is ``p / samples``. If that is above 1
        the roles swap: the ``p − samples`` smallest eigenvalues, zero at r = 1, are left out, and
        the others are those of the Gram matrix of the rows.

        ``rank``: how many dimensions rows can lie in, where fewer than p; the zeros of the others
        are left out too. Layer norm without scale and bias leaves p − 1, as its rows add up to 0.

        **With r < 1 the law is not that of Gaussian rows**, as unequal weights give another one.
        Gaussian rows at p = 64, B = 32, r = 0.99, k = 2000 (36,625 `samples`, 6,368
        `equal_samples`), simulated 60 times: with `samples` ks was 0.53 (limit 0.047), half of the
        eigenvalues counted as outliers and every matrix was rejected; with
        ``samples=equal_samples`` ks was 0.031 and 1 matrix was rejected. With r = 0.9 it was 0.50,
        and 0.037 (4 of 100 rejected; at p = 256 all, ks 0.055). So for r < 1 a rejection with
        `samples` tells nothing, and one with `equal_samples` little where p is above about a tenth
        of them.

        >>> seen = Accumulated(4)
        >>> seen.add(torch.randn(64, 4, generator=torch.Generator().manual_seed(0)))
        >>> seen.marchenko_pastur().accepted
        True
        """
        rank = len(self.moment) if rank is None else rank
        count = max(round(self.samples if samples is None else samples), 1)
        values = self.eigenvalues()
        if not values[0] > 0:
            return None
        return MarchenkoPastur.fit(values[: min(rank, count)], (rank, count))

"""Magnitudes: the share of small activations in each token's Σ a², and what thresholds drop.

A threshold t drops each a whose *score* is at most t. The score is z (gated blocks: the gate's),
the rule of :func:`actsparse.calibrate_thresholds`, where a is 0 at every z ≤ 0 that was seen, as
under ReLU. Else it is ``abs(a)`` (gated blocks: a = φ(z) ⊙ u): under GELU and SiLU much of Σ a²
is at z ≤ 0. What is dropped, as a mean over the tokens t that have an a ≠ 0, is

``dropped(t) = mean_t (Σ_{h: score ≤ t} a_th² / Σ_h a_th²)``

so that a token counts the same whatever its scale, and the density that is left is
``Σ_{score > t} 1[a ≠ 0] / (tokens · H)``: on the data seen, as long as nothing before the block
changes. Thresholds by the distribution of activations: on φ(z) CATS (Lee et al. 2024, arXiv
2404.08763), on a TEAL (Liu et al. 2024, arXiv 2408.14690).

Of each score a histogram is kept: in each bin how many a ≠ 0 and their shares of Σ a². Bins are the
same for all: 32 of equal width to each power of two from 2⁻²⁴ to 2²⁴, right end included, so that a
threshold at an end is off by 3 % of itself at most from the best one. What is above 2²⁴ is never
dropped.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any, ClassVar, Literal

import torch
from torch import Tensor
from typing_extensions import override

from actsparse.blocks.block import MLPBlock
from actsparse.blocks.site import Site
from actsparse.observe.unit_counts import Counts

_PART = 5  # bits of the mantissa that tell bins apart: 2⁵ to each power of two
_LOW, _HIGH = -24, 24  # smaller scores > 0 are in the first bin, larger ones in one behind the last
_BINS = (_HIGH - _LOW) << _PART
_SHIFT = 52 - _PART
_BEFORE = (1023 + _LOW) << _PART  # bins of float64 below the first
_TINY = torch.finfo(torch.float64).tiny  # of a token without any a ≠ 0
_CHUNK = 512  # rows that stay in a CPU's cache with their temporaries: 4 times as fast


def ends() -> Tensor:
    """The right ends of the bins, increasing, after 0, that of scores ≤ 0: float64 [1 + bins].

    >>> ends()[:3] * 2**24
    tensor([0.0000, 1.0312, 1.0625], dtype=torch.float64)
    """
    part = 1 << _PART
    steps = torch.arange(1, _BINS + 1)
    mantissa = 1 + (steps % part).double() / part
    right = torch.ldexp(mantissa, torch.div(steps, part, rounding_mode="floor") + _LOW)
    return torch.cat([right.new_zeros(1), right])


def bins_of(score: Tensor) -> Tensor:
    """The bin of each score, 0 for those ≤ 0 and NaN: int64 of the same shape.

    A positive float64, read as an integer, has its power of two and the first bits of its mantissa
    in front: no logarithm, and no rounding at the ends.
    """
    above = score.double().view(torch.int64) - 1  # − 1: the right end belongs to the bin
    inner = ((above >> _SHIFT) - (_BEFORE - 1)).clamp_(1, _BINS + 1)
    return torch.where(score > 0, inner, 0)


class Magnitudes(Counts):
    """The histograms of one block in one phase.

    The state is three tensors on the block's device: ``active``, int64 [2, 2 + bins], how many
    a ≠ 0, by z and by ``abs(a)``; ``energy``, float64 like it, the sum of their shares of their
    token's Σ a²; and ``tokens`` []. The first bin is of scores ≤ 0, the last of those above 2²⁴.
    ``share`` is what the threshold in summaries drops at most.

    Raises:
        ValueError: ``share`` is not from 0 to 1.
    """

    columns: ClassVar[dict[str, tuple[str, Callable[[Any], str]]]] = {
        "threshold": ("threshold", lambda t: f"{t:.3g}"),
        "of": ("score", str),
        "sparsity above it": ("density_above", lambda density: f"{1 - density:.2%}"),
    }

    counters: ClassVar[dict[str, bool]] = {"active": False, "energy": False, "tokens": False}
    active: Tensor
    energy: Tensor

    def __init__(self, block: MLPBlock, share: float = 0.01) -> None:
        if not 0 <= share <= 1:
            raise ValueError(f"share must be from 0 to 1, got {share!r}")
        super().__init__(block)
        self.share = share
        with torch.inference_mode(False):
            self.active = self.active.new_zeros(2, 2 + _BINS)
            self.energy = torch.zeros_like(self.active, dtype=torch.float64)

    @staticmethod
    def stages(site: Site) -> tuple[str, ...]:
        """z and a, whatever the φ."""
        return ("a", "z")

    def update(self, site: Site, stages: dict[str, Tensor], keep: Tensor | None) -> None:
        """Take in one pass. ``keep`` [B, T] is False at tokens to leave out; None: none."""
        a, z = (stages[name].reshape(-1, stages[name].shape[-1]) for name in ("a", "z"))
        self.follow(a.device)
        if keep is None:
            kept = torch.ones_like(a[:, :1], dtype=torch.bool)
        else:
            kept = site.tokens.restore(keep.unsqueeze(-1), like=stages["a"][..., :1]).reshape(-1, 1)
        self.tokens.add_(kept.sum())
        # compilers and GPUs are better off with one piece
        whole = a.device.type != "cpu" or torch.compiler.is_compiling()
        size = max(len(a), 1) if whole else _CHUNK
        for start in range(0, len(a), size):
            rows = slice(start, start + size)
            value = torch.where(kept[rows], a[rows], 0).double()
            energy = value.square()
            energy = energy / energy.sum(-1, keepdim=True).clamp_(min=_TINY)
            for by, score in enumerate((z[rows], value.abs())):
                index = bins_of(score).flatten()
                self.active[by].scatter_add_(0, index, (value != 0).long().flatten())
                self.energy[by].scatter_add_(0, index, energy.flatten())

    @property
    def score(self) -> Literal["z", "abs(a)"]:
        """What thresholds are of: ``"z"`` where each a ≠ 0 that was seen has z > 0."""
        return "abs(a)" if int(self.active[0, 0]) else "z"

    def dropped(self, threshold: float) -> float:
        """The share of a token's Σ a², its mean, whose score is at most ``threshold``.

        Exact at :func:`ends`, between them an upper bound.
        """
        energy = self.energy[self._by]
        total = float(energy.sum())
        return float(energy[self._below(threshold)].sum()) / total if total else 0.0

    def density(self, threshold: float) -> float:
        """The share of tokens × units where a ≠ 0 and the score is above ``threshold``.

        Exact at :func:`ends`, between them a lower bound.
        """
        active = self.active[self._by]
        left = int(active.sum()) - int(active[self._below(threshold)].sum())
        return left / (self.units * int(self.tokens))

    @property
    def _by(self) -> int:
        return 0 if self.score == "z" else 1

    def _below(self, threshold: float) -> Tensor:
        """The bins that reach below a threshold."""
        left = torch.cat([torch.tensor([-math.inf], dtype=torch.float64), ends()])
        return left.to(self.energy.device) < threshold

    def threshold(self, share: float) -> float:
        """That of :func:`ends` which drops the most, but at most ``share``.

        Of those that drop the same the smallest, so 0.0 where nothing that was seen may go; and
        where Σ a² is not finite.
        """
        energy = self.energy[self._by].cumsum(0)
        below = energy[:-1]
        last = int((below <= share * energy[-1]).sum()) - 1  # all bins up to it may go
        if last < 0 or not bool(energy[-1].isfinite()):
            return 0.0
        first = int(torch.searchsorted(below, below[last]))  # bins between hold nothing
        return float(ends()[first])

    @staticmethod
    @override
    def shares(parts: list[Any]) -> dict[str, Any]:
        """Each block at its own threshold; the density pooled over all units and tokens.

        ``threshold`` and its ``score`` are None for several blocks, whose scales differ.
        """
        thresholds = [part.threshold(part.share) for part in parts]
        sizes = [part.units * int(part.tokens) for part in parts]
        active = [
            part.density(t) * size for part, t, size in zip(parts, thresholds, sizes, strict=True)
        ]
        return {
            "threshold": thresholds[0] if len(parts) == 1 else None,
            "score": parts[0].score if len(parts) == 1 else None,
            "density_above": sum(active) / sum(sizes),
        }

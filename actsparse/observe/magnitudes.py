"""Magnitudes: how much of Σ a² comes from small pre-activations, and what a threshold would drop.

Of each block a histogram over z > 0 (gated blocks: the gate's z): in each bin how many a ≠ 0 and
their Σ a². A threshold t on z, ``a = 0 where z ≤ t``, then drops

``dropped(t) = Σ_{z ≤ t} a² / Σ a²``

and leaves the density ``Σ_{z > t} 1[a ≠ 0] / (tokens · H)``: on the data seen, as long as nothing
before the block changes. Thresholds by the distribution of activations: CATS (Lee et al. 2024,
arXiv 2404.08763), TEAL (Liu et al. 2024, arXiv 2408.14690).

Bins are the same for all: 32 of equal width to each power of two from 2⁻²⁴ to 2²⁴, right end
included, so that a threshold at an end is off by 3 % of itself at most from the best one.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, ClassVar

import torch
from torch import Tensor
from typing_extensions import override

from actsparse.blocks.block import MLPBlock
from actsparse.blocks.site import Site
from actsparse.observe.counts import Counts

_PART = 5  # bits of the mantissa that tell bins apart: 2⁵ to each power of two
_LOW, _HIGH = -24, 24  # smaller and larger z > 0 are in the first and the last bin
_BINS = (_HIGH - _LOW) << _PART
_SHIFT = 52 - _PART
_BEFORE = (1023 + _LOW) << _PART  # bins of float64 below the first
_CHUNK = 512  # rows that stay in a CPU's cache with their temporaries: 4 times as fast


def ends() -> Tensor:
    """The right ends of the bins, increasing, with 0, the end of all z ≤ 0: float64 [1 + bins].

    >>> ends()[:3] * 2**24
    tensor([0.0000, 1.0312, 1.0625], dtype=torch.float64)
    """
    part = 1 << _PART
    steps = torch.arange(1, _BINS + 1)
    mantissa = 1 + (steps % part).double() / part
    right = torch.ldexp(mantissa, torch.div(steps, part, rounding_mode="floor") + _LOW)
    return torch.cat([right.new_zeros(1), right])


def bins_of(z: Tensor) -> Tensor:
    """The bin of each z, 0 for z ≤ 0 and NaN: int64 of the same shape.

    A positive float64, read as an integer, has its power of two and the first bits of its mantissa
    in front: no logarithm, and no rounding at the ends.
    """
    above = z.double().view(torch.int64) - 1  # − 1: the right end belongs to the bin
    inner = ((above >> _SHIFT) - (_BEFORE - 1)).clamp_(1, _BINS)
    return torch.where(z > 0, inner, 0)


class Magnitudes(Counts):
    """The histogram of one block in one phase.

    The state is three tensors on the block's device: ``active``, int64 [1 + bins], how many a ≠ 0;
    ``energy``, float64 [1 + bins], their Σ a²; and ``tokens`` []. The first entry is of z ≤ 0.
    ``share`` is the share of Σ a² that the threshold in summaries drops at most.

    Raises:
        ValueError: ``share`` is not from 0 to 1.
    """

    columns: ClassVar[dict[str, tuple[str, Callable[[Any], str]]]] = {
        "threshold": ("threshold", lambda t: f"{t:.3g}"),
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
            self.active = self.active.new_zeros(1 + _BINS)
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
            value = torch.where(kept[rows], a[rows], 0).double().flatten()
            index = bins_of(z[rows]).flatten()
            self.active.scatter_add_(0, index, (value != 0).long())
            self.energy.scatter_add_(0, index, value.square())

    def dropped(self, threshold: float) -> float:
        """The share of Σ a² where z ≤ ``threshold``, which is one of :func:`ends`."""
        total = float(self.energy.sum())
        return float(self.energy[self._below(threshold)].sum()) / total if total else 0.0

    def density(self, threshold: float) -> float:
        """The share of tokens × units where a ≠ 0 and z > ``threshold``, one of :func:`ends`."""
        active = int(self.active.sum()) - int(self.active[self._below(threshold)].sum())
        return active / (self.units * int(self.tokens))

    def _below(self, threshold: float) -> Tensor:
        return ends().to(self.energy.device) <= threshold

    def threshold(self, share: float) -> float:
        """That of :func:`ends` which drops the most, but at most ``share`` of Σ a².

        Of those that drop the same the smallest, so 0.0 where nothing that was seen may go; and
        where Σ a² is not finite.
        """
        below = self.energy.cumsum(0)
        last = int((below <= share * below[-1]).sum()) - 1  # all bins up to it may go
        if last < 0 or not bool(below[-1].isfinite()):
            return 0.0
        first = int(torch.searchsorted(below, below[last]))  # bins between hold nothing
        return float(ends()[first])

    @staticmethod
    @override
    def shares(parts: list[Any]) -> dict[str, Any]:
        """Each block at its own threshold; the density pooled over all units and tokens."""
        thresholds = [part.threshold(part.share) for part in parts]
        sizes = [part.units * int(part.tokens) for part in parts]
        active = [
            part.density(t) * size for part, t, size in zip(parts, thresholds, sizes, strict=True)
        ]
        return {
            "threshold": thresholds[0] if len(parts) == 1 else None,
            "density_above": sum(active) / sum(sizes),
        }

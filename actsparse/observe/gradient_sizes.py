"""Histograms of the gradient at φ's output: log₁₀ |g_f| over all units, and over active ones.

``g_f`` is the per-sample gradient at φ's output (g_a; in gated blocks g_a ⊙ u), at every token and
unit. The second histogram is of units with φ′(z) ≠ 0 (Peng et al. 2026, arXiv 2605.25612, where the
activation gradient is a factor of density).
"""

from __future__ import annotations

import math
from collections.abc import Callable
from functools import partial
from typing import Any, ClassVar

import torch
from torch import Tensor

from actsparse.blocks.site import Site
from actsparse.observe.gradient_measure import GradientMeasure, sloped

_LOW, _HIGH, _PER_DECADE = -12, 4, 4
_BINS = (_HIGH - _LOW) * _PER_DECADE + 2  # and what lies below, zeros too, and above
_NAMES = tuple(f"{kind}{at}" for kind in ("all", "active") for at in range(_BINS))


def edges() -> list[float]:
    """The edges between the bins, as log₁₀ |g_f|: the first bin lies below all of them.

    >>> edges()[:3], edges()[-1], len(edges())
    ([-12.0, -11.75, -11.5], 4.0, 65)
    """
    return [_LOW + at / _PER_DECADE for at in range(_BINS - 1)]


class GradientSizes(GradientMeasure):
    """How often |g_f| has which size, in one block."""

    columns: ClassVar[dict[str, tuple[str, Callable[[Any], str]]]] = {
        "median |g|": ("gradient_median", "{:.1g}".format),
        "of active": ("gradient_median_active", "{:.1g}".format),
    }
    readings: ClassVar[dict[str, tuple[str, tuple[str, ...]]]] = {"phi": ("f", _NAMES)}

    @staticmethod
    def needs(site: Site, reading: str) -> tuple[str, ...]:
        """What tells where φ′ ≠ 0."""
        return ("f",) if site.function == "relu" else ("z",)

    def read(self, site: Site, reading: str) -> Callable[..., list[Tensor]]:
        """The counts."""
        return partial(_counts, None if site.function == "relu" else site.derivative)

    @staticmethod
    def summary(parts: dict[str, GradientSizes]) -> dict[str, Any] | None:
        """Of the blocks called ``parts`` together and, under ``blocks``, of each.

        ``gradient_sizes`` and ``gradient_sizes_active``: counts for each bin of `edges`, one more
        than edges. ``gradient_median`` and ``gradient_median_active``: the upper edge of the bin
        that holds the median; None above all edges, and where no unit is active. None where no
        gradient has come.
        """
        sums = {name: part.sums("phi") for name, part in parts.items()}
        seen = {name: each for name, each in sums.items() if each and sum(each.values())}
        if not seen:
            return None
        rows = [{"block": name, **_numbers([each])} for name, each in seen.items()]
        return {**_numbers(list(seen.values())), "blocks": rows}


def _numbers(parts: list[dict[str, float]]) -> dict[str, Any]:
    found: dict[str, Any] = {}
    for kind, ending in (("all", ""), ("active", "_active")):
        counts = [int(sum(part[f"{kind}{at}"] for part in parts)) for at in range(_BINS)]
        found[f"gradient_sizes{ending}"] = counts
        found[f"gradient_median{ending}"] = _median(counts)
    return found


def _median(counts: list[int]) -> float | None:
    below = 0
    for count, edge in zip(counts, edges(), strict=False):
        below += count
        if 2 * below >= sum(counts) > 0:
            return math.pow(10, edge)
    return None


def _counts(
    derivative: Callable[[Tensor], Tensor] | None,
    g_f: Tensor,
    weight: Tensor,
    samples: Tensor,
    stage: Tensor,
) -> list[Tensor]:
    size = (g_f.double() * weight.double().unsqueeze(-1)).abs()
    place = ((size.log10() - _LOW) * _PER_DECADE).floor().clamp(-1, _BINS - 2).long() + 1
    counted = (weight != 0).unsqueeze(-1).expand_as(size)
    active = counted & sloped(derivative, stage)
    sums = []
    for chosen in (counted, active):
        counts = torch.zeros(_BINS, dtype=torch.float64, device=g_f.device)
        counts = counts.scatter_add(0, place.flatten(), chosen.double().flatten())
        sums += list(counts.unbind())
    return sums

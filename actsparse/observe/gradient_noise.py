"""Gradient noise: its spread over directions, that of hidden features, and its scale.

Second moments, uncentred, of the inputs x_t and of the effective gradients η_t = g_z,t of the
layer whose output enters φ, ``C = Σ_t v_t v_tᵀ``, with the anisotropy
``√p ‖αC − I‖_F, α = tr C / ‖C‖_F²`` (Peng et al. 2023, arXiv 2309.03004): 0 where all p directions
are alike, ``√(p(p − 1))`` where there is one.

The **noise scale** of that layer's weight W, ``tr Σ / ‖ḡ‖²`` with ḡ the mean and Σ the covariance
over samples of the per-sample gradients ∇_W ℓ_b: the batch size at which noise and signal weigh
alike (McCandlish et al. 2018, arXiv 1812.06162, the simple noise scale), both estimated without
bias from n samples: ``tr Σ = (mean ‖∇ℓ_b‖² − ‖ḡ‖²) · n/(n−1)``, ``‖ḡ‖² − tr Σ / n``.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from functools import partial
from typing import Any, ClassVar

import torch
from torch import Tensor

from actsparse.blocks.read_gradients import Reading
from actsparse.blocks.site import Site
from actsparse.observe.gradient_measure import GradientMeasure, Rows, Total


class Noise(GradientMeasure):
    """Anisotropy of features and gradients, and the gradient noise scale, of one block.

    Over several steps of training the parameters move, and the scale is that of the whole window.
    Memory: D² + H² + D·H float64 numbers, and x until backward where the model itself does not
    keep it (under autocast, at frozen layers); time: matrix products of D·H, D² and H² for each
    token.
    """

    columns: ClassVar[dict[str, tuple[str, Callable[[Any], str]]]] = {
        "anisotropy of x": ("feature_anisotropy", "{:.3g}".format),
        "anisotropy of η": ("gradient_anisotropy", "{:.3g}".format),
        "noise scale": ("noise_scale", "{:.3g}".format),
    }
    readings: ClassVar[dict[str, tuple[str, tuple[str, ...]]]] = {
        "samples": ("z", ("squares", "samples")),
        "mean": ("z", ()),
        "features": ("z", ()),
        "gradients": ("z", ()),
    }

    @staticmethod
    def needs(site: Site, reading: str) -> tuple[str, ...]:
        """x, but for the gradients' own moment."""
        return () if reading == "gradients" else ("x",)

    def size(self, name: str) -> int:
        """Matrices are summed flat, [H·D], [D·D] and [H·H]."""
        d, h = self.block.d_model, self.block.d_hidden
        return {"samples": 3, "mean": h * d, "features": d * d, "gradients": h * h}[name]

    def reading(self, site: Site, name: str, rows: Rows, stages: dict[str, Tensor]) -> Reading:
        """Of a pass; ``samples`` sorts rows by sample."""
        leaf = self.leaf(name, rows.weight.device)
        kept = tuple(stages[stage] for stage in self.needs(site, name))
        if name != "samples":
            return Reading(leaf, partial(_moment, name), (rows.weight, *kept))
        order = rows.sample.flatten().argsort(stable=True)
        read = Total(partial(_sample_norms, rows.batch))
        return Reading(leaf, read, (rows.weight, rows.samples, order, *kept))

    @staticmethod
    def summary(parts: dict[str, Noise]) -> dict[str, Any] | None:
        """Of the blocks called ``parts`` together and, under ``blocks``, of each.

        Scales are pooled over blocks as if their layers were one, anisotropies are the mean over
        blocks. None where a number has no meaning: fewer than two samples, a mean gradient that is
        lost in its own noise, no feature or gradient at all; and the scale of a block that is
        called several times in a pass.
        """
        seen = {
            name: part
            for name, part in parts.items()
            if (part.sums("samples") or {}).get("samples")  # zeros: pooled, or all passes skipped
        }
        if not seen:
            return None
        rows = []
        noise = signal = 0.0
        for name, part in seen.items():
            row, own_noise, own_signal = part._numbers()
            rows.append({"block": name, **row})
            noise, signal = noise + own_noise, signal + own_signal
        whole = {key: _mean([row[key] for row in rows]) for key in rows[0] if "anisotropy" in key}
        skipped = max(row["skipped"] for row in rows)
        return {**whole, "noise_scale": _scale(noise, signal), "skipped": skipped, "blocks": rows}

    def _numbers(self) -> tuple[dict[str, Any], float, float]:
        d, h = self.block.d_model, self.block.d_hidden
        sums = self.sums("samples")
        assert sums is not None
        count = sums["samples"]
        noise = signal = math.nan
        # a sample's gradient is summed over the calls of a shared block, which come one by one
        if count > 1 and self.block.calls == 1:
            mean = float(self._matrix("mean", h * d).norm() ** 2) / count**2
            noise = (sums["squares"] / count - mean) * count / (count - 1)
            signal = mean - noise / count
        row = {
            "feature_anisotropy": anisotropy(self._matrix("features", d, d)),
            "gradient_anisotropy": anisotropy(self._matrix("gradients", h, h)),
            "noise_scale": _scale(noise, signal),
            "skipped": int(sums["skipped"]),
        }
        return row, noise, signal

    def _matrix(self, name: str, *shape: int) -> Tensor:
        grad = self._sums[name].grad
        return torch.zeros(shape) if grad is None else grad.view(shape)


def anisotropy(moment: Tensor) -> float | None:
    """``√p ‖αC − I‖_F`` with ``α = tr C / ‖C‖_F²`` of a second moment C [p, p]; None if C = 0.

    >>> anisotropy(3 * torch.eye(4))
    0.0
    """
    c = moment.double()
    square = float(c.square().sum())
    if square == 0:
        return None
    p = len(c)
    # ‖αC − I‖² = α²‖C‖² − 2α tr C + p = p − (tr C)² / ‖C‖²
    return math.sqrt(max(p * (p - float(c.trace()) ** 2 / square), 0.0))


def _scale(noise: float, signal: float) -> float | None:
    return noise / signal if signal > 0 and noise >= 0 else None


def _mean(values: list[float | None]) -> float | None:
    known = [value for value in values if value is not None]
    return math.fsum(known) / len(known) if known else None


def _sample_norms(
    batch: int, g_z: Tensor, weight: Tensor, samples: Tensor, order: Tensor, x: Tensor
) -> list[Tensor]:
    """``Σ_b ‖∇_W ℓ_b‖²``, and the number of samples."""
    g = _flat(g_z, weight)[order].unflatten(0, (batch, -1))  # [B, T, H]
    x = _flat(x, weight != 0)[order].unflatten(0, (batch, -1))
    squares = torch.stack([_product(a, b).square().sum() for a, b in zip(g, x, strict=True)])
    return [squares.sum(), samples]


def _moment(name: str, g_z: Tensor, weight: Tensor, *x: Tensor) -> Tensor:
    """``Σ_t left_t right_tᵀ``, flat; 0 in passes whose gradient is not finite."""
    g = _flat(g_z, weight)
    entering = _flat(x[0], weight != 0) if x else g
    left = entering if name == "features" else g
    right = g if name == "gradients" else entering
    total = _product(left, right).flatten()
    return torch.where(g.isfinite().all() & total.isfinite().all(), total, 0)


def _product(left: Tensor, right: Tensor) -> Tensor:
    """``leftᵀ right`` in float64, of factors in their own precision: [p, q]."""
    with torch.autocast(left.device.type, enabled=False):  # backward may run under it
        return (left.T @ right).double()


def _flat(stage: Tensor, weight: Tensor) -> Tensor:
    """Rows times their weights, [N, features], in float32 at least; 0 at those left out."""
    dtype, weight = torch.promote_types(stage.dtype, torch.float32), weight.unsqueeze(-1)
    return torch.where(weight != 0, stage.to(dtype) * weight.to(dtype), 0).flatten(0, -2)

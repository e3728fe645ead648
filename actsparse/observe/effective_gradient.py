"""Effective gradients: the part of the gradient that passes φ, and its concentration.

``η = g_z = g_f ⊙ φ′(z)`` of the per-sample loss, at every token and hidden unit (Peng et al. 2023,
arXiv 2309.03004; g_f is the gradient at φ's output, in gated blocks g_a ⊙ u).
"""

from __future__ import annotations

import math
from collections.abc import Callable
from functools import partial
from typing import Any, ClassVar

import torch
from torch import Tensor

from actsparse.blocks.block import MLPBlock
from actsparse.blocks.site import Site
from actsparse.observe.gradient_measure import GradientMeasure, row_squares, sloped


class Gradient(GradientMeasure):
    """Sparsity, sizes and concentration of the effective gradient of one block.

    ``epsilon`` is the size up to which an entry of η counts as zero, in the units of the
    per-sample gradient; 0 counts exact zeros.
    """

    columns: ClassVar[dict[str, tuple[str, Callable[[Any], str]]]] = {
        "η sparsity": ("gradient_sparsity", "{:.2%}".format),
        "mean |η|": ("gradient_l1", "{:.3g}".format),
        "‖η_t‖": ("gradient_l2", "{:.3g}".format),
        "particip.": ("participation", "{:.2%}".format),
        "on active": ("concentration", "{:.2%}".format),
        "η > 0": ("gradient_positive", "{:.2%}".format),
    }
    readings: ClassVar[dict[str, tuple[str, tuple[str, ...]]]] = {
        "effective": (
            "z",
            ("small", "l1", "positive", "squares", "participation", "alive", "tokens"),
        ),
        "phi": ("f", ("active", "all")),
    }

    def __init__(self, block: MLPBlock, epsilon: float = 0.0) -> None:
        super().__init__(block)
        if not epsilon >= 0:
            raise ValueError(f"epsilon={epsilon!r}: expected 0 or more")
        self.epsilon = epsilon

    @staticmethod
    def needs(site: Site, reading: str) -> tuple[str, ...]:
        """At φ what tells where φ′ ≠ 0."""
        if reading == "effective":
            return ()
        return ("f",) if site.function == "relu" else ("z",)

    def read(self, site: Site, reading: str) -> Callable[..., list[Tensor]]:
        """The sums of one reading."""
        if reading == "effective":
            return partial(_effective, self.epsilon)
        return partial(_concentration, None if site.function == "relu" else site.derivative)

    @staticmethod
    def summary(parts: dict[str, Gradient]) -> dict[str, Any] | None:
        """Of the blocks called ``parts`` together and, under ``blocks``, of each.

        ``gradient_sparsity``: the share of |η| ≤ ε; ``gradient_l1``: the mean of |η|;
        ``gradient_l2``: the root of the mean over tokens of ‖η_t‖²; ``participation``: the mean
        over tokens of ``(Σ_h η²)² / (H Σ_h η⁴)``, 1 where all units share alike and 1/H where one
        has all, over tokens with any gradient; ``concentration``: the share of ``Σ g_f²`` that
        falls on units with φ′ ≠ 0; ``gradient_positive``: the share of ``Σ |η|`` that is at η > 0;
        ``hidden_gradient``: the mean over tokens of ‖g_f,t‖², the trace of its second moment;
        ``skipped``: how many passes were left out, as not finite. None where no gradient has come.
        """
        sums = {name: part.gathered() for name, part in parts.items()}
        seen = {name: each for name, each in sums.items() if each is not None}
        if not seen:
            return None
        rows = [{"block": name, **_numbers([each])} for name, each in seen.items()]
        return {**_numbers(list(seen.values())), "blocks": rows}

    def gathered(self) -> dict[str, float] | None:
        """The sums of both readings, with the number of entries of η; None: none."""
        effective, phi = self.sums("effective"), self.sums("phi")
        if not effective or not effective["tokens"]:
            return None
        entries = effective["tokens"] * self.block.d_hidden
        return {"active": 0.0, "all": 0.0, **(phi or {}), **effective, "entries": entries}


def _numbers(parts: list[dict[str, float]]) -> dict[str, Any]:
    def total(key: str) -> float:
        return math.fsum(part[key] for part in parts)

    return {
        "gradient_sparsity": total("small") / total("entries"),
        "gradient_l1": total("l1") / total("entries"),
        "gradient_l2": math.sqrt(total("squares") / total("tokens")),
        "participation": total("participation") / total("alive") if total("alive") else None,
        "concentration": total("active") / total("all") if total("all") else None,
        "gradient_positive": total("positive") / total("l1") if total("l1") else None,
        "hidden_gradient": total("all") / total("tokens") if total("all") else None,
        "skipped": int(max(part["skipped"] for part in parts)),
    }


def _effective(epsilon: float, g_z: Tensor, weight: Tensor, samples: Tensor) -> list[Tensor]:
    counted, weight = weight != 0, weight.double()
    dtype = torch.promote_types(g_z.dtype, torch.float32)
    size = g_z.abs()
    small = size * weight.to(dtype).unsqueeze(-1) if epsilon else size
    l1, positive = (
        torch.linalg.vector_norm(each, ord=1, dim=-1, dtype=dtype).double()
        for each in (size, g_z.clamp(min=0))
    )
    # of η over its largest entry, whose fourth powers neither overflow nor vanish
    peak = size.amax(-1).to(dtype)
    unit = size / torch.where(peak > 0, peak, 1).unsqueeze(-1)
    two, four = row_squares(unit).double(), row_squares(unit.square()).double()
    alive = (peak > 0) & counted
    return [
        ((small <= epsilon).sum(-1) * counted).sum(),
        torch.where(counted, l1 * weight, 0).sum(),
        torch.where(counted, positive * weight, 0).sum(),
        torch.where(counted, two * (peak.double() * weight).square(), 0).sum(),
        torch.where(alive, two.square() / (four * g_z.shape[-1]), 0).sum(),
        alive.sum(),
        counted.sum(),
    ]


def _concentration(
    derivative: Callable[[Tensor], Tensor] | None,
    g_f: Tensor,
    weight: Tensor,
    samples: Tensor,
    stage: Tensor,
) -> list[Tensor]:
    on = sloped(derivative, stage)
    scale = weight.double().square()
    squares = [row_squares(rows).double() for rows in (torch.where(on, g_f, 0), g_f)]
    return [torch.where(weight != 0, each * scale, 0).sum() for each in squares]

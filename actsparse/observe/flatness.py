"""Augmented flatness, and its identity with density.

Give every token its own copy of a linear layer's weight; augmented flatness is the mean over
samples of the squared gradient of the per-sample loss with respect to all copies,

    ``AF = mean_b Σ_t ‖g_out,t‖² ‖x_in,t‖²``

with x_in the layer's real input and g_out the gradient at its output (Peng et al. 2026, arXiv
2605.25612). At the layer whose output enters φ (up, or the gate) ``g_z = g_f ⊙ φ′(z)``, where g_f
is the gradient at φ's output (g_a; in gated blocks g_a ⊙ u), so with

    ``c = mean over (t, h) with φ′ ≠ 0 of g_f² φ′² ‖x_t‖²``

the **identity** holds exactly: ``derivative density = AF / (T · H · c)``, with T the mean number of
tokens in a sample; under ReLU it is density. Silence comes with a flatness that falls or a
coefficient that grows. The sums on its two sides are gathered apart: AF from the gradient at z
as autograd computed it, c from the gradient at φ's output and φ′(z).
"""

from __future__ import annotations

import math
from collections.abc import Callable
from functools import partial
from typing import Any, ClassVar

from torch import Tensor

from actsparse.blocks.site import Site
from actsparse.observe.gradients import GradientMeasure, row_squares


class Flatness(GradientMeasure):
    """Augmented flatness of up, gate and down, the coefficient of the identity, and its parts."""

    columns: ClassVar[dict[str, tuple[str, Callable[[Any], str]]]] = {
        "flatness": ("flatness", "{:.3g}".format),
        "of down": ("flatness_down", "{:.3g}".format),
        "coefficient": ("coefficient", "{:.3g}".format),
        "‖x‖²": ("input_norm", "{:.3g}".format),
        "g² active": ("activation_gradient", "{:.3g}".format),
        "ratio": ("ratio", "{:.3g}".format),
    }
    readings: ClassVar[dict[str, tuple[str, tuple[str, ...]]]] = {
        "entry": ("z", ("flatness", "input", "effective", "tokens", "samples")),
        "phi": ("f", ("weighted", "gradient", "sloped")),
        "up": ("u", ("flatness",)),
        "down": ("y", ("flatness", "input")),
    }

    @staticmethod
    def needs(site: Site, reading: str) -> tuple[str, ...]:
        """x at the entry; at φ also what tells where φ′ ≠ 0; d at down."""
        if reading == "phi":  # what the model keeps for backward anyway: ReLU its output, others z
            return ("x", "f") if site.function == "relu" else ("x", "z")
        return ("d",) if reading == "down" else ("x",)

    def read(self, site: Site, reading: str) -> Callable[..., list[Tensor]]:
        """The sums of one reading."""
        if reading == "entry":
            return _entry
        if reading == "phi":
            return _phi_of_relu if site.function == "relu" else partial(_phi, site.derivative)
        return _layer

    @staticmethod
    def summary(parts: dict[str, Flatness]) -> dict[str, Any] | None:
        """Of the blocks called ``parts`` together and, under ``blocks``, of each.

        Flatness adds up over blocks, as a trace does; the rest are means over all their tokens and
        units. None where no gradient has come.
        """
        sums = {name: part.gathered() for name, part in parts.items()}
        seen = {name: each for name, each in sums.items() if each is not None}
        if not seen:
            return None
        rows = [{"block": name, **_numbers([each])} for name, each in seen.items()]
        return {**_numbers(list(seen.values())), "blocks": rows}

    def gathered(self) -> dict[str, float] | None:
        """The sums of all readings under ``reading.sum``, with the block's sizes; None: none."""
        if not (self.sums("entry") or {}).get("samples"):
            return None
        found = {"hidden": float(self.block.d_hidden), "gated": float(self.block.gated)}
        for name in self.readings:
            sums = self.sums(name) or dict.fromkeys(self.readings[name][1], 0.0)
            found |= {f"{name}.{key}": value for key, value in sums.items()}
        found["flatness.up"] = found["up.flatness" if self.block.gated else "entry.flatness"]
        found["flatness.gate"] = found["entry.flatness"] if self.block.gated else 0.0
        return found


def _numbers(parts: list[dict[str, float]]) -> dict[str, Any]:
    def total(key: str, per: str | None = None) -> float:
        return math.fsum(part[key] / (part[per] if per else 1) for part in parts)

    flatness = total("entry.flatness", per="entry.samples")
    gated = any(part["gated"] for part in parts)
    tokens, sloped = total("entry.tokens"), total("phi.sloped")
    slots = math.fsum(  # T·H
        part["entry.tokens"] / part["entry.samples"] * part["hidden"] for part in parts
    )
    norm = _share(total("entry.input"), tokens)
    effective = _share(total("entry.effective"), sloped)
    coefficient = _share(total("phi.weighted"), sloped)
    return {
        "flatness": flatness,
        "flatness_up": total("flatness.up", per="entry.samples"),
        **({"flatness_gate": total("flatness.gate", per="entry.samples")} if gated else {}),
        "flatness_down": total("down.flatness", per="entry.samples"),
        "coefficient": coefficient,
        "density_from_flatness": _share(flatness, slots * (coefficient or 0)),
        "input_norm": norm,
        "activation_gradient": _share(total("phi.gradient"), sloped),
        "effective_gradient": effective,
        "ratio": _share(flatness, slots * (norm or 0) * (effective or 0)),
        "down_input_norm": _share(total("down.input"), tokens),
        "samples": int(max(part["entry.samples"] for part in parts)),
        "tokens_per_sample": tokens / total("entry.samples"),
        "skipped": int(max(part["entry.skipped"] for part in parts)),
    }


def _share(part: float, of: float) -> float | None:
    return part / of if of else None


def _entry(g_z: Tensor, weight: Tensor, samples: Tensor, x: Tensor) -> list[Tensor]:
    squares, norms, counted = _squares(g_z, weight), _norms(x, weight), weight != 0
    return [(squares * norms).sum(), norms.sum(), squares.sum(), counted.sum(), samples]


def _layer(g: Tensor, weight: Tensor, samples: Tensor, entering: Tensor) -> list[Tensor]:
    norms = _norms(entering, weight)
    return [(_squares(g, weight) * norms).sum(), norms.sum()]


def _phi_of_relu(
    g_f: Tensor, weight: Tensor, samples: Tensor, x: Tensor, f: Tensor
) -> list[Tensor]:
    sloped = f != 0
    squares = _squares(g_f * sloped, weight)
    count = (sloped.sum(-1) * (weight != 0)).sum()
    return [(squares * _norms(x, weight)).sum(), squares.sum(), count]


def _phi(
    derivative: Callable[[Tensor], Tensor],
    g_f: Tensor,
    weight: Tensor,
    samples: Tensor,
    x: Tensor,
    z: Tensor,
) -> list[Tensor]:
    slope = derivative(z)
    sloped = slope != 0
    weighted = _squares(g_f * slope, weight) * _norms(x, weight)
    count = (sloped.sum(-1) * (weight != 0)).sum()
    return [weighted.sum(), _squares(g_f * sloped, weight).sum(), count]


def _squares(gradient: Tensor, weight: Tensor) -> Tensor:
    """‖g_t‖² of the per-sample loss, 0 at tokens left out: [...]."""
    return row_squares(gradient).double() * weight.double().square()


def _norms(entering: Tensor, weight: Tensor) -> Tensor:
    """‖x_t‖², 0 at tokens left out: [...]."""
    return row_squares(entering).double() * (weight != 0)

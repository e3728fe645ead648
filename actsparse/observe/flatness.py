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

import torch
from torch import Tensor

from actsparse.blocks.site import Site
from actsparse.observe.gradient_measure import GradientMeasure, row_squares


class Flatness(GradientMeasure):
    """Augmented flatness of up, gate and down, the coefficient of the identity, and its parts."""

    columns: ClassVar[dict[str, tuple[str, Callable[[Any], str]]]] = {
        "flatness": ("flatness", "{:.3g}".format),
        "of down": ("flatness_down", "{:.3g}".format),
        "c": ("coefficient", "{:.3g}".format),
        "‖x‖²": ("input_norm", "{:.3g}".format),
        "g² active": ("activation_gradient", "{:.3g}".format),
        "ratio": ("ratio", "{:.3g}".format),
    }
    readings: ClassVar[dict[str, tuple[str, tuple[str, ...]]]] = {
        "entry": ("z", ("flatness", "input", "tokens", "samples", "effective")),
        "phi": ("f", ("weighted", "gradient", "sloped")),
        "up": ("u", ("flatness", "input", "tokens", "samples")),
        "down": ("y", ("flatness", "input", "tokens", "samples")),
    }

    @staticmethod
    def needs(site: Site, reading: str) -> tuple[str, ...]:
        """x at the entry; at φ also what tells where φ′ ≠ 0; d at down."""
        if reading == "phi":  # what the model keeps for backward anyway: ReLU its output, others z
            return ("x", "f") if site.function == "relu" else ("x", "z")
        return ("d",) if reading == "down" else ("x",)

    @staticmethod
    def kept(stage: str, value: Tensor) -> Tensor:
        """Of what enters a layer its norms, which nothing overwrites and which are small."""
        return row_squares(value.detach()) if stage in "xd" else value

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

        ``flatness``: AF of the layer whose output enters φ; ``flatness_up``, ``flatness_gate``,
        ``flatness_down``: of each layer; ``coefficient``: c; ``density_from_flatness``: the
        identity's ``AF / (T·H·c)``. Means: ``input_norm`` of ‖x_t‖² over tokens,
        ``down_input_norm`` of ‖d_t‖², ``activation_gradient`` of g_f² and ``effective_gradient``
        of η² over (t, h) with φ′ ≠ 0. ``ratio``: ``AF / (T·H·input_norm·effective_gradient)``, what
        the identity would give if ‖x_t‖² and η² were independent.

        Flatness adds up over blocks, as a trace does; the rest are means over all their tokens and
        units. A block that is called several times in a pass (ALBERT) has the tokens of all its
        calls in each sample. A number is None where no gradient has come that tells it, as at
        frozen layers that nothing before them needs a gradient of; None where none has come at all.
        """
        sums = {name: part.gathered() for name, part in parts.items()}
        seen = {name: each for name, each in sums.items() if each is not None}
        if not seen:
            return None
        rows = [{"block": name, **_numbers([each])} for name, each in seen.items()]
        return {**_numbers(list(seen.values())), "blocks": rows}

    def gathered(self) -> dict[str, float] | None:
        """The sums of all readings under ``reading.sum``, with the block's sizes; None: none."""
        found = {"hidden": float(self.block.d_hidden), "gated": float(self.block.gated)}
        for name, (_, keys) in self.readings.items():
            sums = self.sums(name) or dict.fromkeys((*keys, "skipped"), 0.0)
            found |= {f"{name}.{key}": value for key, value in sums.items()}
        layers = [name for name in ("entry", "up", "down") if found[f"{name}.samples"]]
        for name in layers:  # each call counted its samples
            found[f"{name}.samples"] /= self.block.calls
        if not layers:
            return None
        found |= {key: found[f"{layers[0]}.{key}"] for key in ("tokens", "samples")}
        return found | {"skipped": max(found[f"{name}.skipped"] for name in self.readings)}


def _numbers(parts: list[dict[str, float]]) -> dict[str, Any]:
    def total(key: str) -> float:
        return math.fsum(part[key] for part in parts)

    def flatness(layer: str, parts: list[dict[str, float]]) -> float | None:
        known = [part for part in parts if part[f"{layer}.samples"]]
        each = [part[f"{layer}.flatness"] / part[f"{layer}.samples"] for part in known]
        return math.fsum(each) if each else None

    gated = [part for part in parts if part["gated"]]
    plain = [part for part in parts if not part["gated"]]
    up = [flatness("up", gated), flatness("entry", plain)]
    entry, sloped = flatness("entry", parts), total("phi.sloped")
    slots = math.fsum(  # T·H
        part["entry.tokens"] / part["entry.samples"] * part["hidden"]
        for part in parts
        if part["entry.samples"]
    )
    norm = _share(total("entry.input"), total("entry.tokens"))
    effective = _share(total("entry.effective"), sloped)
    coefficient = _share(total("phi.weighted"), sloped)
    return {
        "flatness": entry,
        "flatness_up": None if up == [None, None] else math.fsum(each or 0 for each in up),
        **({"flatness_gate": flatness("entry", gated)} if gated else {}),
        "flatness_down": flatness("down", parts),
        "coefficient": coefficient,
        "density_from_flatness": _share(entry, slots * (coefficient or 0)),
        "input_norm": norm,
        "activation_gradient": _share(total("phi.gradient"), sloped),
        "effective_gradient": effective,
        "ratio": _share(entry, slots * (norm or 0) * (effective or 0)),
        "down_input_norm": _share(total("down.input"), total("down.tokens")),
        "samples": round(max(part["samples"] for part in parts)),
        "tokens_per_sample": total("tokens") / total("samples"),
        "skipped": int(max(part["skipped"] for part in parts)),
    }


def _share(part: float | None, of: float) -> float | None:
    return part / of if part is not None and of else None


def _layer(g: Tensor, weight: Tensor, samples: Tensor, norms: Tensor) -> list[Tensor]:
    norms, counted = _counted(norms, weight), weight != 0
    return [(_squares(g, weight) * norms).sum(), norms.sum(), counted.sum(), samples]


def _entry(g_z: Tensor, weight: Tensor, samples: Tensor, norms: Tensor) -> list[Tensor]:
    return [*_layer(g_z, weight, samples, norms), _squares(g_z, weight).sum()]


def _phi_of_relu(
    g_f: Tensor, weight: Tensor, samples: Tensor, norms: Tensor, f: Tensor
) -> list[Tensor]:
    sloped = f != 0
    squares = _squares(torch.where(sloped, g_f, 0), weight)
    count = (sloped.sum(-1) * (weight != 0)).sum()
    return [(squares * _counted(norms, weight)).sum(), squares.sum(), count]


def _phi(
    derivative: Callable[[Tensor], Tensor],
    g_f: Tensor,
    weight: Tensor,
    samples: Tensor,
    norms: Tensor,
    z: Tensor,
) -> list[Tensor]:
    slope = derivative(z)
    sloped = slope != 0
    g_f = torch.where(sloped, g_f, 0)
    weighted = _squares(g_f * slope, weight) * _counted(norms, weight)
    count = (sloped.sum(-1) * (weight != 0)).sum()
    return [weighted.sum(), _squares(g_f, weight).sum(), count]


def _squares(gradient: Tensor, weight: Tensor) -> Tensor:
    """‖g_t‖² of the per-sample loss, 0 at tokens left out: [...]."""
    return _counted(row_squares(gradient), weight) * weight.double().square()


def _counted(rows: Tensor, weight: Tensor) -> Tensor:
    """``rows`` [...] in float64, 0 at tokens left out, also where these are NaN."""
    return torch.where(weight != 0, rows.double(), 0)

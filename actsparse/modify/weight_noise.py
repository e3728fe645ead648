"""Weight noise: in training every token has its own random draw of the weights."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Annotated, Literal

import torch
from torch import Tensor
from typing_extensions import override

from actsparse.blocks.block import Layer, MLPBlock
from actsparse.blocks.sharding import whole
from actsparse.blocks.site import Site, site_of
from actsparse.modify.modification import Attached, Modification
from actsparse.values import Above0, Rule


@dataclass(frozen=True)
class WeightNoise(Modification):
    """Add noise of standard deviation ``ρ · rms(W) · ‖x_t‖`` to the outputs of linear layers.

    This equals independent Gaussian noise of standard deviation ``ρ·rms(W)`` on each weight, drawn
    anew for every token. It acts in training mode only, and the noise is a constant for the
    gradient. Source: arXiv 2309.03004, synapse noise, ρ = 0.1; there ViT has it on up and down, T5
    on up only.

    Args:
        rho: ρ, above 0.
        layers: which layers: ``"up"`` (gate with it), ``"down"`` or both.

    >>> from actsparse import sparsify
    >>> mlp = torch.nn.Sequential(torch.nn.Linear(8, 32), torch.nn.ReLU(), torch.nn.Linear(32, 8))
    >>> x = torch.randn(4, 8)
    >>> handle = sparsify(mlp, WeightNoise(rho=0.1), inputs=x)
    >>> torch.equal(mlp(x), mlp(x)), torch.equal(mlp.eval()(x), mlp(x))
    (False, True)
    """

    rho: Above0 = 0.1
    layers: Annotated[
        Sequence[Literal["up", "down"]], Rule("'up', 'down' or both, in a list", bool)
    ] = ("up", "down")

    @override
    def apply(self, block: MLPBlock) -> Attached:
        site = site_of(block)
        return _Noisy(site, f"ρ = {self.rho:g} on {' and '.join(self.layers)}", self)


class _Noisy(Attached):
    def __init__(self, site: Site, note: str, config: WeightNoise) -> None:
        super().__init__(site, note)
        self.rho = config.rho
        if "up" in config.layers:
            site.transform_layers(self.disturb)
        if "down" in config.layers:
            site.transform_output(self.disturb)

    def disturb(self, site: Site, output: Tensor, x: Tensor, layer: Layer) -> Tensor:
        if not layer.module.training:
            return output
        with torch.no_grad():
            weight = layer.weight
            # in float32: squares of small half-precision weights vanish
            dtype = torch.promote_types(weight.dtype, torch.float32)
            norm = whole(torch.linalg.vector_norm(weight, dtype=dtype))
            rms = norm / weight.numel() ** 0.5
            std = self.rho * rms * torch.linalg.vector_norm(x, dim=-1, keepdim=True)
            noise = torch.randn_like(output) * std.to(output.dtype)
        return output + noise

    @override
    def remove(self) -> None:
        self.site.release(self.disturb)

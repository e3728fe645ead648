"""Weight noise: in training every token has its own random draw of the weights."""

from __future__ import annotations

import sys
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Annotated, Any, Literal

import torch
from torch import Tensor, nn
from typing_extensions import override

from actsparse.blocks.block import Layer, MLPBlock
from actsparse.blocks.sharding import whole
from actsparse.blocks.site import Site, site_of
from actsparse.modify.attention_layers import attention_layers
from actsparse.modify.effective_weight import effective_weight
from actsparse.modify.modification import Attached, Modification, NotApplicable
from actsparse.values import Above0, Rule


@dataclass(frozen=True)
class WeightNoise(Modification):
    """Add noise of standard deviation ``ρ · rms(W) · ‖x_t‖`` to the outputs of linear layers.

    This equals independent Gaussian noise of standard deviation ``ρ·rms(W)`` on each weight, drawn
    anew for every token. It acts in training mode only, and the noise is a constant for the
    gradient. W is the effective weight, ``W + scale·B A`` where the layer has LoRA adapters of
    peft. Source: arXiv 2309.03004, synapse noise, ρ = 0.1; there ViT has it on up and down, T5 on
    up only. In finetuning the authors' program (cdgyp/sparsity at ae2ff7b) has ρ = 0.05, on the
    adapted layers of attention too.

    Args:
        rho: ρ, above 0.
        layers: which layers: ``"up"`` (gate with it), ``"down"``, and ``"attention"``, the linear
            layers (query, key, value, output) of the attention beside the block; each of these has
            the noise once, also where several blocks share it.

    >>> from actsparse import sparsify
    >>> mlp = torch.nn.Sequential(torch.nn.Linear(8, 32), torch.nn.ReLU(), torch.nn.Linear(32, 8))
    >>> x = torch.randn(4, 8)
    >>> handle = sparsify(mlp, WeightNoise(rho=0.1), inputs=x)
    >>> torch.equal(mlp(x), mlp(x)), torch.equal(mlp.eval()(x), mlp(x))
    (False, True)
    """

    rho: Above0 = 0.1
    layers: Annotated[
        Sequence[Literal["up", "down", "attention"]],
        Rule("'up', 'down', 'attention' or several, in a list", bool),
    ] = ("up", "down")

    @override
    def apply(self, block: MLPBlock) -> Attached:
        attention = attention_layers(block) if "attention" in self.layers else []
        layers = [*attention, block.down if "down" in self.layers else None]
        layers += [block.up, block.gate] if "up" in self.layers else []
        for layer in layers:
            if layer is not None:
                effective_weight(layer)  # says now what cannot be read
        free = [layer for layer in attention if not _has_noise(layer.module)]
        if attention and not free and len(set(self.layers)) == 1:
            raise NotApplicable(f"{attention[0].name} and its like have the noise already")
        return _Noisy(site_of(block), self, free)


class _Noisy(Attached):
    def __init__(self, site: Site, config: WeightNoise, attention: list[Layer]) -> None:
        names: list[str] = [name for name in config.layers if name != "attention"]
        count = len(attention)
        names += [f"{count} layer{'s' * (count != 1)} of attention"] if count else []
        super().__init__(site, f"ρ = {config.rho:g} on {' and '.join(names)}")
        self.rho, self.elsewhere = config.rho, attention
        if "up" in config.layers:
            site.transform_layers(self.disturb)
        if "down" in config.layers:
            site.transform_output(self.disturb)
        self.hooks = [layer.module.register_forward_hook(self.hook) for layer in attention]
        self._recompile()

    def hook(self, module: nn.Module, args: tuple[Any, ...], output: Tensor) -> Tensor:
        """Of a layer of the attention."""
        (layer,) = (layer for layer in self.elsewhere if layer.module is module)
        if not args:
            raise TypeError(f"{layer.name}: it must be called with its input as an argument")
        return self.disturb(self.site, output, args[0], layer)

    def disturb(self, site: Site, output: Tensor, x: Tensor, layer: Layer) -> Tensor:
        if not layer.module.training:
            return output
        with torch.no_grad():
            weight = effective_weight(layer)
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
        for hook in self.hooks:
            hook.remove()
        self._recompile()

    def _recompile(self) -> None:
        if self.hooks and "torch._dynamo" in sys.modules:  # which does not notice hooks by itself
            torch._dynamo.reset()


def _has_noise(module: nn.Module) -> bool:
    return any(
        isinstance(getattr(hook, "__self__", None), _Noisy)
        for hook in module._forward_hooks.values()
    )

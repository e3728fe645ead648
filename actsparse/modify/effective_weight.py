"""The weight that a layer multiplies by: its own, and what adapters of peft add to it."""

from __future__ import annotations

from typing import Any

from torch import Tensor

from actsparse.blocks.block import Layer, base_layer


def effective_weight(layer: Layer) -> Tensor:
    """``W + Σ scale·B A`` over the active LoRA adapters; W where the layer has none.

    Adapters that are merged are in W already. The dropout of an adapter's input is left out.

    Args:
        layer: the layer, of the model's own class or of peft's.

    Returns:
        The weight [out, in].

    Raises:
        ValueError: the weight cannot be read, or an active adapter is no plain LoRA (DoRA, IA³), so
            that what it does to the weight is another thing.

    >>> import peft, torch
    >>> model = peft.get_peft_model(
    ...     torch.nn.Sequential(torch.nn.Linear(4, 3)),
    ...     peft.LoraConfig(r=2, target_modules=["0"], init_lora_weights=False),
    ... )
    >>> layer = Layer("0", model.base_model.model[0])
    >>> merged = model.merge_and_unload()[0].weight
    >>> torch.equal(effective_weight(layer), merged)
    True
    """
    weight, module = layer.weight, layer.module
    peft_layer: Any = module
    if base_layer(module) is module or peft_layer.disable_adapters or peft_layer.merged:
        return weight
    for adapter in peft_layer.active_adapters:
        known = {name for kind in peft_layer.adapter_layer_names for name in getattr(module, kind)}
        if adapter not in known:
            continue
        variants = getattr(module, "lora_variant", {})
        if adapter not in getattr(module, "lora_A", ()) or adapter in variants:
            raise ValueError(
                f"layer {layer.name!r}: its adapter {adapter!r} ({type(module).__module__}) is no "
                f"plain LoRA, so the layer has no effective weight W + scale·B A"
            )
        delta = peft_layer.get_delta_weight(adapter)
        delta = delta.T if layer.layout == "Conv1D" else delta
        weight = weight + (delta if layer.rows is None else delta[layer.rows]).to(weight.dtype)
    return weight

"""The attention beside an MLP block: its linear layers, found by the names of classes."""

from __future__ import annotations

from collections.abc import Iterator

from torch import nn

from actsparse.blocks.block import Layer, MLPBlock, base_layer
from actsparse.blocks.trace import is_linear
from actsparse.modify.modification import NotApplicable


def attention_layers(block: MLPBlock) -> list[Layer]:
    """The linear layers of the attention in the smallest module that holds the block and any.

    Attention is every module whose class has "Attention" in its name. Its linear layers are those
    of query, key, value and output, however they are fused; a layer with adapters is one layer.

    Args:
        block: the block.

    Returns:
        The layers, in the order of the model's modules.

    Raises:
        NotApplicable: there is no attention, or a part of it multiplies by a weight that is no
            linear layer's (``nn.MultiheadAttention``, convolutions).

    >>> import torch
    >>> from actsparse import find_mlp_blocks
    >>> class Attention(torch.nn.Module):
    ...     def __init__(self):
    ...         super().__init__()
    ...         self.qkv, self.out = torch.nn.Linear(8, 24), torch.nn.Linear(8, 8)
    ...
    ...     def forward(self, x):
    ...         q, k, v = self.qkv(x).chunk(3, -1)
    ...         return self.out(torch.nn.functional.scaled_dot_product_attention(q, k, v))
    >>> mlp = torch.nn.Sequential(torch.nn.Linear(8, 32), torch.nn.ReLU(), torch.nn.Linear(32, 8))
    >>> blocks = find_mlp_blocks(torch.nn.Sequential(Attention(), mlp), torch.randn(2, 5, 8))
    >>> [layer.name for layer in attention_layers(blocks[0])]
    ['0.qkv', '0.out']
    """
    names = {module: name for name, module in block.path[0].named_modules()} if block.path else {}
    for around in reversed(block.path):
        found: dict[nn.Module, None] = {}
        for module in around.modules():
            if "Attention" in type(module).__name__:
                found.update(dict.fromkeys(_linear(module, names)))
        for part in (block.up, block.gate, block.down):
            found.pop(part.module, None) if part is not None else None
        if found:
            return [_layer(names[module], module) for module in found]
    raise NotApplicable("no attention (a module whose class says so) is beside it")


def _linear(module: nn.Module, names: dict[nn.Module, str]) -> Iterator[nn.Module]:
    if is_linear(module):
        yield module
        return
    held = [name for name, p in module.named_parameters(recurse=False) if p.ndim > 1]
    if any(name.endswith("weight") for name in held) and not isinstance(module, nn.Embedding):
        raise NotApplicable(
            f"{names[module]} ({type(module).__name__}) multiplies by {held[0]} itself, and noise "
            f"reaches linear layers alone"
        )
    for child in module.children():
        yield from _linear(child, names)


def _layer(name: str, module: nn.Module) -> Layer:
    conv1d = type(base_layer(module)).__name__ == "Conv1D"
    return Layer(name, module, "Conv1D" if conv1d else "Linear")

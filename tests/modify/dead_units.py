"""MLPs with dead units, and models pruned of them."""

from __future__ import annotations

from typing import Any

import torch
from torch import nn

from actsparse import handle_of, observe
from actsparse.blocks import MLPBlock, find_mlp_blocks
from actsparse.modify.prune_units import Pruned, prune_dead_units
from tests.observe.brute import D, Mlp
from tests.zoo import call

X = torch.randn(8, 16, D, generator=torch.Generator().manual_seed(1))  # wakes all that can


@torch.no_grad()
def kill(block: MLPBlock, units: Any) -> None:
    """Make z of these units 0 everywhere, so that φ(z) is, for any φ with φ(0) = 0."""
    layer = block.pre_activation
    layer.weight[units] = 0
    if layer.bias is not None:
        layer.bias[units] = 0


def mlps(*functions: str, gated: bool = False, dead: Any = slice(2, 7)) -> nn.Module:
    """Blocks with five dead units each: not the first ones, not the last ones."""
    model = nn.Sequential(*(Mlp(name, gated) for name in functions or ("relu",))).eval()
    for block in find_mlp_blocks(model, X):
        kill(block, dead)
    return model


def pruned(model: nn.Module, inputs: Any = X, **options: Any) -> Pruned:
    known = {} if handle_of(model) else {"inputs": inputs}
    with observe(model, **known) as seen, torch.no_grad():
        call(model, inputs)
    return prune_dead_units(model, seen, **options)


def widths(model: nn.Module, inputs: Any = X) -> list[int]:
    """As a fresh look at the model finds them."""
    return [block.d_hidden for block in find_mlp_blocks(model, inputs)]

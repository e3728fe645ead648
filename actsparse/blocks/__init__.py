"""Find the MLP blocks of a model, and attach to them; only this package adds hooks to a model."""

from __future__ import annotations

from actsparse.blocks.block import Activation, Between, Blocks, Layer, MLPBlock, Norm
from actsparse.blocks.find import find_mlp_blocks
from actsparse.blocks.refused import NoMLPFound, Refused

__all__ = [
    "Activation",
    "Between",
    "Blocks",
    "Layer",
    "MLPBlock",
    "NoMLPFound",
    "Norm",
    "Refused",
    "find_mlp_blocks",
]

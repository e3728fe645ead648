"""Where a model's MLP blocks are, and the one place where a model is touched."""

from __future__ import annotations

from actsparse.blocks.block import (
    Activation,
    Between,
    Blocks,
    Layer,
    MLPBlock,
    NoMLPFound,
    Norm,
    Refused,
)
from actsparse.blocks.find import find_mlp_blocks

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

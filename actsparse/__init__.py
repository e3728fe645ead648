"""actsparse: Transformers whose MLP neurons stay mostly silent.

``find_mlp_blocks`` says where the MLP blocks of a model are, ``sparsify`` modifies them in place,
``observe`` measures how silent they are while the model runs, ``accelerate`` turns it into time.
"""

from __future__ import annotations

from actsparse.blocks import Blocks, MLPBlock, NoMLPFound, find_mlp_blocks
from actsparse.kernels import Accelerated, accelerate
from actsparse.modify import (
    ActivationPenalty,
    Handle,
    LeaveOutMLP,
    NormFloor,
    PruneGradient,
    Recipe,
    SwapActivation,
    TopK,
    WeightNoise,
    ZerothBias,
    calibrate_thresholds,
    decay_groups,
    handle_of,
    load,
    load_adapter,
    lora_config,
    merge_adapter,
    prune_dead_units,
    save,
    save_adapter,
    sparsify,
    thresholds_of,
)
from actsparse.observe import Measures, Seen, measure, observe, skippable

__version__ = "0.1.0.dev0"

__all__ = [
    "Accelerated",
    "ActivationPenalty",
    "Blocks",
    "Handle",
    "LeaveOutMLP",
    "MLPBlock",
    "Measures",
    "NoMLPFound",
    "NormFloor",
    "PruneGradient",
    "Recipe",
    "Seen",
    "SwapActivation",
    "TopK",
    "WeightNoise",
    "ZerothBias",
    "accelerate",
    "calibrate_thresholds",
    "decay_groups",
    "find_mlp_blocks",
    "handle_of",
    "load",
    "load_adapter",
    "lora_config",
    "measure",
    "merge_adapter",
    "observe",
    "prune_dead_units",
    "save",
    "save_adapter",
    "skippable",
    "sparsify",
    "thresholds_of",
]

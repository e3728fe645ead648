"""Modifications of a model, one file each, and saving and loading of modified models."""

from __future__ import annotations

from actsparse.modify.adapters import load_adapter, lora_config, merge_adapter, save_adapter
from actsparse.modify.apply import sparsify
from actsparse.modify.drop_small import DropSmall, set_thresholds
from actsparse.modify.handle import Handle, handle_of
from actsparse.modify.modification import Modification, NotApplicable
from actsparse.modify.no_mlp import LeaveOutMLP
from actsparse.modify.norm_floor import NormFloor
from actsparse.modify.penalty import ActivationPenalty
from actsparse.modify.prune_gradient import PruneGradient
from actsparse.modify.prune_units import Pruned, prune_dead_units
from actsparse.modify.recipe import RECIPES, Recipe, recipe_named
from actsparse.modify.saving import load, save
from actsparse.modify.swap_activation import SwapActivation
from actsparse.modify.thresholds import Thresholds, calibrate_thresholds, thresholds_of
from actsparse.modify.top_k import TopK
from actsparse.modify.weight_decay import decay_groups
from actsparse.modify.weight_noise import WeightNoise
from actsparse.modify.zeroth_bias import ZerothBias

__all__ = [
    "RECIPES",
    "ActivationPenalty",
    "DropSmall",
    "Handle",
    "LeaveOutMLP",
    "Modification",
    "NormFloor",
    "NotApplicable",
    "PruneGradient",
    "Pruned",
    "Recipe",
    "SwapActivation",
    "Thresholds",
    "TopK",
    "WeightNoise",
    "ZerothBias",
    "calibrate_thresholds",
    "decay_groups",
    "handle_of",
    "load",
    "load_adapter",
    "lora_config",
    "merge_adapter",
    "prune_dead_units",
    "recipe_named",
    "save",
    "save_adapter",
    "set_thresholds",
    "sparsify",
    "thresholds_of",
]

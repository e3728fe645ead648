"""actsparse: activation sparsity in the MLPs of Transformers, made, measured and used.

``find_mlp_blocks`` finds the MLP blocks of a model, ``sparsify`` modifies them so that fewer
neurons are active, ``observe`` measures how many are, ``accelerate`` skips the work of the others.
"""

from __future__ import annotations

import importlib
import sys
from types import ModuleType
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from actsparse.blocks import Blocks, MLPBlock, NoMLPFound, find_mlp_blocks
    from actsparse.kernels.accelerated import Accelerated, accelerate
    from actsparse.modify import (
        ActivationPenalty,
        DropSmall,
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
        set_thresholds,
        thresholds_of,
    )
    from actsparse.modify.apply import sparsify
    from actsparse.observe import Measures, Seen, measure, observe, skippable

__version__ = "0.1.0"

__all__ = [
    "Accelerated",
    "ActivationPenalty",
    "Blocks",
    "DropSmall",
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
    "set_thresholds",
    "skippable",
    "sparsify",
    "thresholds_of",
]


if not TYPE_CHECKING:  # or checkers would take every name for a module

    def __getattr__(name: str) -> Any:
        """A public name, when it is first asked for: the commands' help need not wait for torch."""
        if name in __all__:
            for room in ("blocks", "modify", "kernels", "observe"):
                module = importlib.import_module(f"actsparse.{room}")
                if name in module.__all__:
                    value = globals()[name] = getattr(module, name)
                    return value
        raise AttributeError(f"module 'actsparse' has no attribute {name!r}")


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})


class _Package(ModuleType):
    def __setattr__(self, name: str, value: Any) -> None:
        # importing the room actsparse.observe would hide the function of that name
        if not (name == "observe" and isinstance(value, ModuleType)):
            super().__setattr__(name, value)


sys.modules[__name__].__class__ = _Package

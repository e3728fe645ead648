"""A callback that trains a sparsified model with Hugging Face's Trainer.

``from actsparse.train import SparsityCallback``. Names are imported when they are first used,
because transformers takes seconds to import.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

from actsparse.extras import needed

if TYPE_CHECKING:
    from actsparse.train.callback import SparsityCallback
    from actsparse.train.loss import TrainingFailed

__all__ = ["SparsityCallback", "TrainingFailed"]

_HOMES = {"SparsityCallback": "callback", "TrainingFailed": "loss"}


def __getattr__(name: str) -> Any:
    if name not in _HOMES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    needed("transformers", f"actsparse.train.{name}")
    return getattr(importlib.import_module(f"{__name__}.{_HOMES[name]}"), name)

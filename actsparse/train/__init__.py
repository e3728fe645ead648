"""Training on Hugging Face's Trainer: a callback for anyone's Trainer, and one run of one arm.

``from actsparse.train import SparsityCallback``; the built-in tasks are in ``train.tasks``, one
run of one arm is ``train.run.run``. Names are imported when first used: transformers takes
seconds, and telling whether a run is done needs none of it.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from actsparse.train.callback import SparsityCallback
    from actsparse.train.config import RunConfig
    from actsparse.train.loss import TrainingFailed

__all__ = ["RunConfig", "SparsityCallback", "TrainingFailed"]

_HOMES = {"RunConfig": "config", "SparsityCallback": "callback", "TrainingFailed": "loss"}


def __getattr__(name: str) -> Any:
    if name not in _HOMES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(importlib.import_module(f"{__name__}.{_HOMES[name]}"), name)

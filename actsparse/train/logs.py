"""Density in Trainer's logs, where trackers such as TensorBoard find it."""

from __future__ import annotations

import sys
from typing import Any

from transformers import TrainerCallback, TrainerState
from transformers.trainer_callback import CallbackHandler


def go_first(callback: TrainerCallback) -> None:
    """Move a callback before those that read logs; to be called in one of its events.

    Trainer calls its trackers first, so what a callback adds to the logs would come too late. An
    event is not told which list its callback is in, so the list is taken from who calls it.
    """
    frame = sys._getframe(1)
    while not isinstance(frame.f_locals.get("self"), CallbackHandler):
        if frame.f_back is None:  # called by hand
            return
        frame = frame.f_back
    callbacks = frame.f_locals["self"].callbacks
    place = next((i for i, each in enumerate(callbacks) if each is callback), 0)
    for i, each in enumerate(callbacks[:place]):
        if type(each).on_log is not TrainerCallback.on_log:
            callbacks.insert(i, callbacks.pop(place))
            return


def into_logs(
    logs: dict[str, Any], state: TrainerState, measures: dict[str, Any] | None, prefix: str = ""
) -> None:
    """Add density and dead units to what is logged, and to the history; nothing is replaced.

    >>> logs = {"loss": 2.0}
    >>> into_logs(logs, TrainerState(), {"density": 0.5, "dead": 3})
    >>> logs
    {'loss': 2.0, 'density': 0.5, 'dead_units': 3}
    """
    if measures is None or "density" not in measures:
        return
    found = {f"{prefix}density": measures["density"], f"{prefix}dead_units": measures["dead"]}
    for kept in (logs, *state.log_history[-1:]):
        for name, value in found.items():
            kept.setdefault(name, value)

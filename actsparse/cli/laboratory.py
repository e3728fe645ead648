"""The verbs that actsparse-lab adds to the command, if it is installed."""

from __future__ import annotations

from functools import cache
from importlib.metadata import entry_points
from typing import Any

VERBS = ("demo", "train", "compare", "reproduce", "frontier", "report")


@cache
def laboratory() -> Any:
    """The laboratory's module for the commands (``actsparse_lab.cli``), or None.

    Its functions: ``add_verbs`` (train, compare, …), ``task_model`` (the model of a task),
    ``task_batches`` (a task's data), ``run_at`` (a run's record and weights) and ``trained_of``.
    """
    for found in entry_points(group="actsparse", name="laboratory"):
        return found.load()
    return None

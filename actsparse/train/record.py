"""The record of a training: where its lines go, and the last evaluation."""

from __future__ import annotations

import math
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any, Protocol

from actsparse.train.loss import TrainingFailed


class Record(Protocol):
    """Where lines of a training go: the laboratory's ``RecordWriter``, or anything alike."""

    def write(self, kind: str, **fields: Any) -> None:
        """Keep one line, of kind ``train``, ``eval`` or ``measured``."""


@dataclass(frozen=True)
class Evaluation:
    """What the last evaluation gave; ``measures`` is None where nothing is observed."""

    step: int
    loss: float
    quality: float
    measures: dict[str, Any] | None


def metrics_named(metrics: Iterable[str], *names: str) -> tuple[str, list[str]]:
    """Trainer's prefix of an evaluation's metrics, and ``names`` with that prefix.

    >>> metrics_named({"test_loss": 0.5, "test_runtime": 3.0}, "loss")
    ('test', ['test_loss'])
    """
    runtime = next((name for name in metrics if name.endswith("_runtime")), "eval_runtime")
    prefix = runtime.removesuffix("_runtime")
    return prefix, [f"{prefix}_{name}" for name in names]


def scores(
    metrics: dict[str, float], loss: str, quality: str, step: int, needed: bool
) -> tuple[str, float, float] | None:
    """The prefix, loss and quality of an evaluation; None if they are missing and not ``needed``.

    Raises:
        ValueError: a metric that is ``needed`` is missing.
        TrainingFailed: one is not finite.

    >>> scores({"eval_loss": 0.5, "eval_runtime": 3.0}, "loss", "loss", 10, needed=True)
    ('eval', 0.5, 0.5)
    """
    prefix, names = metrics_named(metrics, loss, quality)
    if missing := set(names) - set(metrics):
        if not needed:
            return None
        raise ValueError(
            f"evaluation gives no metric {' or '.join(missing)}, which the record needs; "
            f"it gives {', '.join(metrics)}"
        )
    found = [float(metrics[name]) for name in names]
    if not all(map(math.isfinite, found)):
        reason = f"at evaluation the loss is {found[0]}, the quality {found[1]}"
        raise TrainingFailed(step, reason)
    return prefix, found[0], found[1]

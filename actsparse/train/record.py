"""The record of a training: where its lines go, and the last evaluation."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any, Protocol


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

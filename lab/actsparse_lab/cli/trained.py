"""What `actsparse bench` times of a run: its trained model, on its own data."""

from __future__ import annotations

import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

from actsparse.cli.measure import saved_model
from actsparse_lab.cli.runs import record_at, task_batches, trained_at, weights_in


def trained_of(folder: Path, rows: int = sys.maxsize) -> tuple[dict[str, Any], dict[str, Any]]:
    """What ``bench_trained`` takes, from a run's folder, and where it is from.

    Inference is timed and scored on so many ``rows`` of the test split.
    """
    import torch
    from transformers import EvalPrediction

    from actsparse import handle_of
    from actsparse_lab.engine.config import recorded_config
    from actsparse_lab.engine.tasks import task_of

    run = record_at(folder)
    model = saved_model(weights_in(folder))
    task, size = task_of(run.task), recorded_config(run).batch_size
    predict, test, *_ = task_batches(model, run, None, "test", rows, size)
    _, (batch, *_), *_ = task_batches(model, run, None, "train", size, size)

    def infer(model: Any) -> None:
        for each in test:
            predict(model, each)

    def loss(model: Any) -> Any:
        penalty = (handle.penalty() for handle in [handle_of(model)] if handle is not None)
        return sum(penalty, start=model(**batch).loss)

    def score(model: Any) -> dict[str, float]:
        kept = [task.reduce(model(**each).logits, each["labels"]) for each in test]
        return task.score(EvalPrediction(torch.cat(kept).numpy(), None))

    trained = {
        "model": model,
        "inputs": batch,
        "loss": loss,
        "infer": infer,
        "score": score,
    }
    where = {"task": run.task, "arm": run.arm, "seed": run.seed, "quality_name": task.quality_name}
    return trained, where | {"batch": size, "rows": sum(len(each["labels"]) for each in test)}


def speed_of(folder: Path, rounds: int, told: Callable[[str], None]) -> dict[str, Any] | None:
    """A run's row of ``speed.json``; None where it cannot be timed, and ``told`` is why."""
    from actsparse_lab.bench.trained import bench_speed
    from actsparse_lab.engine.config import recorded_config

    found = trained_at(folder, told)
    if found is None:
        return None
    model, run = found
    told(f"{run.task}, {run.arm}, seed {run.seed}")
    size = recorded_config(run).batch_size
    predict, (batch, *_), *_ = task_batches(model, run, None, "test", size, size)
    row = bench_speed(model, batch, lambda model: predict(model, batch), rounds)
    return {"task": run.task, "arm": run.arm, "seed": run.seed, "rows": size, **row}

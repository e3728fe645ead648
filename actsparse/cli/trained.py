"""What `actsparse bench` times of a run: its trained model, on its own data."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any


def trained_of(folder: Path) -> tuple[dict[str, Any], dict[str, Any]]:
    """What ``bench_trained`` takes, from a run's folder, and where it is from."""
    import sys

    import torch
    from transformers import EvalPrediction

    from actsparse.cli import measure
    from actsparse.train.config import recorded_config
    from actsparse.train.tasks import task_of

    model, run = measure.model_at(folder)
    if run is None:
        raise ValueError(f"{folder} holds no record.jsonl: --run takes the folder of a run")
    task, size = task_of(run.task), recorded_config(run).batch_size
    predict, test, *_ = measure.batches_of(model, run, None, None, "test", sys.maxsize, size)
    _, (batch, *_), *_ = measure.batches_of(model, run, None, None, "train", size, size)

    def infer(model: Any) -> None:
        for each in test:
            predict(model, each)

    def score(model: Any) -> dict[str, float]:
        kept = [task.reduce(model(**each).logits, each["labels"]) for each in test]
        return task.score(EvalPrediction(torch.cat(kept).numpy(), None))

    trained = {
        "model": model,
        "inputs": batch,
        "loss": lambda model: model(**batch).loss,
        "infer": infer,
        "score": score,
    }
    where = {"task": run.task, "arm": run.arm, "seed": run.seed, "quality_name": task.quality_name}
    return trained, where | {"batch": size, "rows": sum(len(each["labels"]) for each in test)}


def speed_of(folder: Path, rounds: int, told: Callable[[str], None]) -> dict[str, Any] | None:
    """A run's row of ``speed.json``; None where it cannot be timed, and ``told`` is why."""
    from actsparse.bench.trained import bench_speed
    from actsparse.cli import measure
    from actsparse.train.config import recorded_config

    try:
        model, found = measure.model_at(folder)
    except ValueError as error:
        told(f"passed over: {error}")
        return None
    if found is None:
        raise ValueError(f"{folder} holds no record.jsonl: give the folders of runs")
    told(f"{found.task}, {found.arm}, seed {found.seed}")
    size = recorded_config(found).batch_size
    predict, (batch, *_), *_ = measure.batches_of(model, found, None, None, "test", size, size)
    row = bench_speed(model, batch, lambda model: predict(model, batch), rounds)
    return {"task": found.task, "arm": found.arm, "seed": found.seed, "rows": size, **row}

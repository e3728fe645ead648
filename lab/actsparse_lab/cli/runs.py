"""A run's folder, and a task's data, as the commands take them."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import AbstractContextManager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from actsparse.cli.measure import saved_model
from actsparse_lab.packed import RECORD
from actsparse_lab.records import NoRecord, Run, read_run, run_measures_path


@dataclass(frozen=True)
class RunFolder:
    """The folder of one run: its record, its weights and its measures."""

    folder: Path
    record: Run

    @property
    def weights(self) -> Path:
        """The folder of the trained model."""
        return weights_in(self.folder)

    @property
    def measures(self) -> Path:
        """Where its measures are kept."""
        return run_measures_path(self.folder)

    @property
    def said(self) -> dict[str, Any]:
        """What a record of measures says of the run."""
        return {"task": self.record.task, "arm": self.record.arm, "seed": self.record.seed}

    def alone(self) -> AbstractContextManager[None]:
        """Keeps other processes out of the folder."""
        from actsparse_lab.engine.folder import alone

        return alone(self.folder)


def run_at(folder: Path) -> RunFolder | None:
    """The run in a folder, or None where there is none; its record may be packed."""
    try:
        return RunFolder(folder, read_run(folder / RECORD)) if folder.is_dir() else None
    except NoRecord:
        return None


def weights_in(folder: Path) -> Path:
    """The folder of a run's trained model.

    Raises:
        ValueError: the run kept none.
    """
    weights = folder / "weights"
    if not weights.is_dir():
        raise ValueError(f"{folder} has no weights/: nothing to measure")
    return weights


def record_at(folder: Path) -> Run:
    """The record of the run in a folder.

    Raises:
        ValueError: the folder holds none.
    """
    run = run_at(folder)
    if run is None:
        raise ValueError(f"{folder} holds no record.jsonl: give the folder of a run")
    return run.record


def trained_at(folder: Path, told: Callable[[str], None]) -> tuple[Any, Run] | None:
    """The trained model of a run and its record; None where it cannot be had, and ``told`` is why.

    Raises:
        ValueError: the folder holds no record.
    """
    run = record_at(folder)
    try:
        return saved_model(weights_in(folder)), run
    except ValueError as error:
        told(f"passed over: {error}")
        return None


def task_batches(
    model: Any, run: Run | None, task: str | None, split: str, rows: int, batch_size: int
) -> tuple[Any, Any, dict[str, Any], dict[str, Any]]:
    """A loss function, batches of a task's split, what they are in words, and what the data say.

    Raises:
        ValueError: no such task or split, or the model does not run on its data.
    """
    if run is None and task is None:
        raise ValueError("a checkpoint does not say on what to measure it: give --task or --data")
    from torch import no_grad

    from actsparse_lab.engine.config import recorded_config
    from actsparse_lab.engine.run import batches_of
    from actsparse_lab.engine.tasks import task_of
    from actsparse_lab.tasks import run_config

    name = task or run.task  # type: ignore[union-attr]
    chosen = task_of(name)
    start = {"start": "-"} if name.endswith("_finetune") else {}
    config = run_config(name, "vanilla", 0, **start)  # type: ignore[arg-type]
    if run is not None and run.task == config.task:
        config = recorded_config(run)
    if split not in ("train", "validation", "test"):
        raise ValueError(f"unknown split {split!r}; known: train, validation, test")
    splits = chosen.splits(config)
    batches = batches_of(getattr(splits, split), rows, batch_size)
    try:
        with no_grad():
            chosen.predict(model, batches[0])
    except Exception as error:  # whatever a model does with data that are not its own
        raise ValueError(f"the model does not run on the data of {config.task}: {error}") from error
    return chosen.predict, batches, {"data": config.task, "split": split}, splits.info

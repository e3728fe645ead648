"""The clock of ``eval`` lines: since training began, and going on where a run is resumed."""

from __future__ import annotations

import signal
import time
from pathlib import Path
from typing import Any

import pytest

from actsparse.values import check
from actsparse_lab.engine.interrupt import Interrupted
from actsparse_lab.engine.run import run
from actsparse_lab.record_schema import SCHEMA
from actsparse_lab.records import Run, read_run, run_path
from actsparse_lab.tasks import run_config

TINY: dict[str, Any] = {"steps": 6, "batch_size": 8, "log_every": 2, "eval_every": 2}
TINY |= {"save_every": 2, "validate_on": 16}
PAUSE = 3.0  # s; longer than the run itself takes


def clock(done: Run, kind: str) -> dict[int, float]:
    entries = done.evals if kind == "eval" else done.train
    return {entry["step"]: entry["time"]["seconds"] for entry in entries}


def test_evaluations_have_the_clock_of_training(tmp_path: Path) -> None:
    began = time.perf_counter()
    done = run(run_config("digits", "vanilla", 0, **TINY), tmp_path)
    spent = time.perf_counter() - began
    evals, train = clock(done, "eval"), clock(done, "train")
    assert list(evals) == [0, 2, 4, 6]
    assert list(evals.values()) == sorted(evals.values())
    assert evals[0] > 0
    assert evals[6] < spent
    # a log comes before the evaluation of its step, and after that of the one before
    for step in (2, 4, 6):
        assert evals[step - 2] < train[step] < evals[step]


def test_the_pause_of_a_resumed_run_does_not_count(tmp_path: Path) -> None:
    config = run_config("digits", "vanilla", 0, **TINY)
    began = time.perf_counter()

    def tell(done: int) -> None:
        if done == 3:
            signal.raise_signal(signal.SIGTERM)

    with pytest.raises(Interrupted):
        run(config, tmp_path, on_step=tell)
    stopped = read_run(run_path(tmp_path, "vanilla", 0))
    first = time.perf_counter() - began
    time.sleep(PAUSE)
    began = time.perf_counter()
    evals = clock(run(config, tmp_path), "eval")
    assert list(evals) == [0, 2, 4, 6]
    assert {step: evals[step] for step in (0, 2)} == clock(stopped, "eval")
    assert list(evals.values()) == sorted(evals.values())
    assert evals[6] < first + time.perf_counter() - began


def test_records_without_it_stay_valid() -> None:
    entry = {"split": "validation", "step": 1, "loss": 1.0, "quality": 0.5, "measures": None}
    check("eval", entry, SCHEMA["eval"])
    check("eval", {**entry, "time": {"seconds": 2.0}}, SCHEMA["eval"])
    with pytest.raises(Exception, match=r"eval\.time\.seconds must be a finite number"):
        check("eval", {**entry, "time": {"seconds": "2"}}, SCHEMA["eval"])

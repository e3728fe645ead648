"""Kills runs at random moments and resumes them; a script, since children are made by fork.

``python killed.py FOLDER KILLS TASK`` prints JSON: for each kill where it struck, and what
differs from the undisturbed run (nothing, if all is well).
"""

from __future__ import annotations

import hashlib
import json
import os
import random
import signal
import sys
import threading
from collections.abc import Callable
from pathlib import Path
from typing import Any

import safetensors.torch
import torch

from actsparse.data.text import load_documents
from actsparse.experiments import run_config
from actsparse.records import run_path
from actsparse.train import trainer as trainer_module
from actsparse.train.config import RunConfig
from actsparse.train.run import run

ARMS = ("paper", "weight-noise", "hoyer")
WRITES = ("replace", "save", "save_file", "fsync")  # of os, torch, safetensors, os


def config_of(arm: str, task: str, data: Path) -> RunConfig:
    """Everything that has a state: dropout, noise, accumulation, schedules, observers."""
    shared: dict[str, Any] = {
        "steps": 40, "batch_size": 32, "micro_batch": 16, "log_every": 7, "eval_every": 10,
        "save_every": 3, "validate_on": 32, "measures": ("flatness",),
    }  # fmt: skip
    if task == "t5_c4":
        return run_config(
            task, arm, 0, quick=True, **(shared | {"batch_size": 8, "micro_batch": 4}),
            workers=2 if arm == "paper" else 0,
            data={"shards": str(data), "tokenizer": str(data), "length": 32, "rows": 16},
            model={"d_model": 32, "d_ff": 64, "dropout_rate": 0.1},
        )  # fmt: skip
    return run_config(task, arm, 0, **shared, model={"hidden_dropout_prob": 0.1})


def in_child(job: Callable[[], object]) -> int:
    """Run in a forked process; its exit status, negative where a signal ended it."""
    sys.stdout.flush()
    child = os.fork()
    if child == 0:
        code = 1
        try:
            job()
            code = 0
        except BaseException as error:  # a forked process must never come back
            print(f"{type(error).__name__}: {error}", file=sys.stderr, flush=True)
        finally:
            os._exit(code)
    _, status = os.waitpid(child, 0)
    return os.waitstatus_to_exitcode(status)


def after(seconds: float) -> None:
    threading.Timer(seconds, die).start()


def at_write(name: str, count: int) -> None:
    """Die at the count-th call that writes, before it or after half of its work."""
    place: Any = {"replace": os, "fsync": os, "save": torch, "save_file": trainer_module}[name]
    own, left = getattr(place, name), [count]

    def write(*args: Any, **options: Any) -> Any:
        left[0] -= 1
        if left[0] == 0 and count % 2:
            die()
        done = own(*args, **options)
        if left[0] == 0:
            for path in [each for each in args if isinstance(each, str | Path)]:
                os.truncate(path, os.path.getsize(path) // 2)
            die()
        return done

    setattr(place, name, write)


def die() -> None:
    os.kill(os.getpid(), signal.SIGKILL)


def left_behind(config: RunConfig, out: Path) -> tuple[str, list[dict[str, Any]]]:
    """What must be the same: a hash of the weights, and the record without time and run_id."""
    record = run_path(out, config.arm, config.seed)
    weights = safetensors.torch.load_file(record.parent / "weights" / "model.safetensors")
    digest = hashlib.sha256()
    for name in sorted(weights):
        digest.update(name.encode() + weights[name].numpy().tobytes())
    lines = [json.loads(line) for line in record.read_text().splitlines()]
    return digest.hexdigest(), [
        {key: value for key, value in line.items() if key not in ("time", "run_id")}
        for line in lines
    ]


def main(folder: Path, kills: int, task: str) -> list[dict[str, Any]]:
    torch.set_num_threads(1)
    draw = random.Random(5)
    whole = {}
    for arm in ARMS[: min(kills, len(ARMS))]:
        config = config_of(arm, task, folder / "data")
        assert in_child(lambda config=config: run(config, folder / "whole")) == 0
        whole[arm] = left_behind(config, folder / "whole")
    found = []
    for number in range(kills):
        arm = ARMS[number % len(ARMS)]
        config = config_of(arm, task, folder / "data")
        out = folder / f"killed-{number}"
        struck, ends = [], []
        for _ in range(2):  # a run may be killed again where it goes on
            if number % 2:
                name, count = draw.choice(WRITES), draw.randint(1, 40)
                where = f"{name} {count}"
                aim = lambda name=name, count=count: at_write(name, count)  # noqa: E731
            else:
                seconds = draw.uniform(0.1, 1.5)
                where = f"{seconds:.2f} s"
                aim = lambda seconds=seconds: after(seconds)  # noqa: E731
            ends.append(in_child(lambda aim=aim, config=config, out=out: (aim(), run(config, out))))
            struck.append(where)
        last = in_child(lambda config=config, out=out: run(config, out))
        weights, lines = left_behind(config, out) if last == 0 else ("", [])
        other = [pair for pair in zip(lines, whole[arm][1], strict=False) if pair[0] != pair[1]]
        found.append(
            {
                "struck": struck,
                "ends": ends,
                "last": last,
                "same_weights": weights == whole[arm][0],
                "lines": [len(lines), len(whole[arm][1])],
                "first_difference": other[:1],
            }
        )
    return found


if __name__ == "__main__":
    load_documents()
    print(json.dumps(main(Path(sys.argv[1]), int(sys.argv[2]), sys.argv[3])))

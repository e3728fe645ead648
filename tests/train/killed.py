"""Kills commands at their file operations, or at random moments, and has them go on.

``python killed.py FOLDER COMMAND ACT POINTS …`` prints a line of JSON for each three of these: how
many operations there are, at how many of them it struck, and what was lost. ``ACT`` is as
`Operations` has it, or "random": killed at so many moments. A script, as its children are made by
fork.
"""

from __future__ import annotations

import gc
import hashlib
import json
import multiprocessing
import os
import random
import shutil
import signal
import sys
import time
from collections.abc import Callable, Iterable
from dataclasses import dataclass, replace
from pathlib import Path
from tempfile import TemporaryDirectory
from threading import Timer
from typing import Any

import safetensors.torch
import torch

from actsparse import files, load, save, sparsify
from actsparse.modify import weights as weights_module
from actsparse_lab import records
from actsparse_lab.campaigns import compare as compare_module
from actsparse_lab.campaigns.compare import compare
from actsparse_lab.data.text import load_documents
from actsparse_lab.engine import trainer as trainer_module
from actsparse_lab.engine.checkpoint import newest_whole
from actsparse_lab.engine.config import RunConfig
from actsparse_lab.engine.run import run
from actsparse_lab.engine.run_gradient_noise import GradientNoiseConfig, run_gradient_noise
from actsparse_lab.records import RecordWriter, run_path
from actsparse_lab.tasks import run_config
from tests.train.crash import Operations, announced, in_child, lose_power

LOSSES = (None, "all", "content", "half")


@dataclass(frozen=True)
class Command:
    """``end`` is what must be the same however often it was killed."""

    job: Callable[[Path], object]
    end: Callable[[Path], Any]
    start: Callable[[Path], object] = lambda out: None  # makes what is there before
    second: Callable[[Path], object] | None = None  # meanwhile; None: the same
    intact: Callable[[Path], object] = lambda out: None  # before it goes on
    reads: bool = False
    swaps: bool = True  # whether the system can exchange two folders


def config_of(arm: str, task: str = "digits", **more: Any) -> RunConfig:
    """Everything that has a state: dropout, noise, accumulation, schedules, observers."""
    settings: dict[str, Any] = {
        "steps": 4, "batch_size": 16, "micro_batch": 8, "log_every": 2, "eval_every": 2,
        "save_every": 2, "keep": 1, "validate_on": 16, "measures": ("flatness",),
    }  # fmt: skip
    return run_config(task, arm, 0, quick=True, **{**settings, **more})


SMALL = {"hidden_dropout_prob": 0.1, "num_hidden_layers": 1, "intermediate_size": 64}


def left_behind(config: Any, out: Path) -> Any:
    """The weights' hash, and the record without time and run_id."""
    record = run_path(out, config.arm, config.seed)
    lines = [json.loads(line) for line in record.read_text().splitlines()]
    weights = record.with_name("weights")
    found = [weights_in(weights)] if weights.exists() else []
    return found + [
        {key: value for key, value in line.items() if key not in ("time", "run_id")}
        for line in lines
    ]


def weights_in(folder: Path) -> str:
    tensors = safetensors.torch.load_file(folder / "model.safetensors")
    digest = hashlib.sha256()
    for name in sorted(tensors):
        digest.update(name.encode() + tensors[name].numpy().tobytes())
    return digest.hexdigest()


def model_of(seed: int) -> Any:
    torch.manual_seed(seed)
    model = torch.nn.Sequential(
        torch.nn.LayerNorm(8), torch.nn.Linear(8, 32), torch.nn.ReLU(), torch.nn.Linear(32, 8)
    )
    sparsify(model, "paper", inputs=torch.zeros(2, 5, 8))
    return model


def plain() -> Any:
    return torch.nn.Sequential(
        torch.nn.LayerNorm(8), torch.nn.Linear(8, 32), torch.nn.ReLU(), torch.nn.Linear(32, 8)
    )


def command_of(name: str, data: Path) -> Command:
    """``data``: where shards lie, for t5_c4."""
    if name in ("train", "t5_c4"):
        if name == "train":
            config = config_of("paper", model=SMALL)
        else:
            config = config_of(
                "paper", name, workers=2,
                data={"shards": str(data), "tokenizer": str(data), "length": 32, "rows": 16},
                model={"d_model": 32, "d_ff": 64, "dropout_rate": 0.1},
            )  # fmt: skip
        return Command(lambda out: run(config, out), lambda out: left_behind(config, out))
    if name == "train again":
        once = command_of("train", data)
        return replace(once, start=lambda out: half_done(once, out))
    if name == "compare":
        configs = (
            config_of("weight-noise", model=SMALL),
            config_of("hoyer", model=SMALL, save_every=None),
        )
        return Command(
            lambda out: [check(event) for event in compare(configs, out, workers=1)],
            lambda out: [left_behind(config, out) for config in configs],
        )
    if name == "noise":
        noise = GradientNoiseConfig(arm="p4", seed=0, width=4, steps=6, log_every=2, eval_every=3)
        return Command(
            lambda out: run_gradient_noise(noise, out), lambda out: left_behind(noise, out)
        )
    swaps = not name.endswith("without exchange")
    if name.startswith("save"):
        return Command(
            saves(1), loaded, start=saves(0), second=saves(0), intact=one_of_two, swaps=swaps
        )
    assert name.startswith("load"), name
    start = saves(1) if swaps else half_saved
    return Command(one_of_two, one_of_two, start=start, second=saves(0), reads=True, swaps=swaps)


def saves(seed: int) -> Callable[[Path], object]:
    return lambda out: save(model_of(seed), out / "m")


def loaded(out: Path) -> list[float]:
    return sums(load(out / "m", plain()))


def sums(model: Any) -> list[float]:
    return [float(each.double().sum()) for each in model.state_dict().values()]


def one_of_two(out: Path) -> None:
    assert loaded(out) in [sums(model_of(seed)) for seed in (0, 1)]


def half_done(command: Command, out: Path) -> None:
    """A run that was killed when it had written a checkpoint and a half."""
    with TemporaryDirectory() as kept:
        in_child(lambda: watched(command, out, Path(kept), 105, "kill"))


def check(event: Any) -> None:
    if event.kind == "failed":
        raise ValueError(event.reason)


def half_saved(out: Path) -> None:
    """As a save leaves it that was killed between its two renames."""
    save(model_of(1), out / "m")
    work, lock = files._work(out / "m")
    assert lock is not None
    os.close(lock)
    (out / "m").rename(work / "old")


def watched(command: Command, out: Path, kept: Path, at: int, act: Any) -> None:
    """Do the command, until it is struck."""
    compare_module._PROCESSES = multiprocessing.get_context("fork")
    if not command.swaps:
        files._exchange = lambda one, two: False
    found = Operations(out, kept, 0 if act == "random" else at, act, command.reads)
    for place, name, half in (
        (torch, "save", 1),
        (trainer_module, "save_model", 1),
        (trainer_module, "save_file", 1),
        (weights_module, "save_file", 1),
        (files, "_exchange", None),
    ):
        found.wrap(place, name, half)
    records._git = lambda _: None  # takes longer than the run
    if act == "random":
        Timer(at / 1000, os.killpg, (0, signal.SIGKILL)).start()
    found.announce(
        RecordWriter, "write", lambda self, kind, **_: [kind, str(self.path), self._size]
    )
    found.announce(trainer_module, "seal", lambda folder, **facts: ["sealed", str(folder), 0])
    command.job(out)
    with open(kept / "announced", "a") as file:
        file.write('["done"]\n')
    found.step("the end")


def steps_of(checkpoint: Path) -> int:
    return int(checkpoint.name.rpartition("-")[2])


def missing(said: list[Any], out: Path, place: Path) -> list[Any]:
    """What was announced, when the command wrote to ``out``, and is not there in ``place``."""
    lost = []
    last = {}  # what was said last of a record's lines, and of its checkpoints
    for kind, path, size in (each for each in said if each != ["done"]):
        path = place / Path(path).relative_to(out)
        record = path if kind != "sealed" else path.with_name("record.jsonl")
        last[record, kind == "sealed"] = kind, path, size
    for (record, sealed), (kind, path, size) in last.items():
        if sealed:
            finished = last.get((record, False), ("",))[0] == "result"  # they may be gone then
            newest = newest_whole(path.parent, record=record)
            there = finished or (newest is not None and steps_of(newest) >= steps_of(path))
        else:
            line = record.read_bytes()[:size].splitlines()[-1]
            there = json.loads(line)["kind"] == kind and record.stat().st_size >= size
        if not there:
            lost.append([kind, str(path)])
        if (record.parent / "weights").exists():
            load(record.parent / "weights")
        elif kind == "eval" and record.parent.name != "p4-seed0":
            lost.append(["weights", str(path)])
    return lost


def strike(command: Command, start: Path, whole: Any, folder: Path, at: int, act: Any,
           losses: Iterable[str | None]) -> tuple[str, list[Any]]:  # fmt: skip
    """What the command was at, and what was lost."""
    out, kept = folder / "out", folder / "kept"
    shutil.copytree(start, out)
    problems: list[Any] = []

    def meanwhile() -> None:
        ended = in_child(lambda: (command.second or command.job)(out))
        if ended not in (0, 3):
            problems.append(f"the second ended with {ended}")

    ended = in_child(lambda: watched(command, out, kept, at, act), meanwhile)
    said = [] if act == "stop" else announced(kept)
    struck = (kept / "struck").read_text() if (kept / "struck").exists() else "nothing"
    if ended not in (0, 3) and -ended != {"kill": 9, "random": 9}.get(act, act):
        problems.append(f"ended with {ended}")
    for how in losses:
        place = folder / "again" / "out"
        lose_power(out, kept, how, place)
        if in_child(lambda how=how, place=place: goes_on(command, place, whole, out, said, how)):
            problems.append(f"power lost: {how}" if how else "lost")
        shutil.rmtree(place.parent)
    shutil.rmtree(folder)
    return struck, problems


def goes_on(
    command: Command, place: Path, whole: Any, out: Path, said: list[Any], how: str | None
) -> None:
    """What was announced is there; the same command comes to the same end, and leaves no rest."""
    command.intact(place)
    if ["done"] in said:
        same(command, place, whole)
    lost = missing(said, out, place)
    assert lost == [], lost
    compare_module._PROCESSES = multiprocessing.get_context("fork")
    command.job(place)
    same(command, place, whole)
    left = [] if command.reads or how else [each.name for each in place.rglob(".*.tmp")]
    assert left == [], left


def same(command: Command, out: Path, whole: Any) -> None:
    found = command.end(out)
    assert found == whole, f"{found}\n{whole}"


def main(folder: Path, name: str, act: str, points: str) -> dict[str, Any]:
    torch.set_num_threads(1)
    records._git = lambda _: None
    compare_module._PROCESSES = multiprocessing.get_context("fork")
    command = command_of(name, folder.parent / "data")
    start, once, twice = folder / "start", folder / "once", folder / "twice"
    start.mkdir(parents=True)
    assert in_child(lambda: command.start(start)) == 0
    shutil.copytree(start, once)
    shutil.copytree(start, twice)
    command.job(once)  # here, so that children need not import again
    whole = command.end(once)
    gc.collect()
    gc.freeze()
    kept = folder / "kept"
    began = time.perf_counter()
    assert in_child(lambda: watched(command, twice, kept, 0, "kill")) == 0
    took = time.perf_counter() - began
    count = max(map(int, (kept / "counts").read_text().split()))
    draw = random.Random(5)
    if act == "random":  # milliseconds instead of operations
        at = [draw.randrange(1, int(1000 * took)) for _ in range(int(points))]
    else:
        at = list(range(1, count + 1))
        at = at if points == "all" else sorted(draw.sample(at, min(int(points), count)))
    act_of: Any = int(act) if act.isdigit() else act
    lost = []
    struck: dict[str, int] = {}
    for turn, number in enumerate(at):
        losses: Iterable[str | None] = (None,)
        if act in ("kill", "random"):
            few = name in ("train", "train again", "compare", "t5_c4")
            losses = {None, LOSSES[turn % len(LOSSES)]} if few else LOSSES
        what, problems = strike(command, start, whole, folder / str(turn), number, act_of, losses)
        struck[what] = struck.get(what, 0) + 1
        lost += [[number, what, problem] for problem in problems]
    return {"operations": count, "points": len(at), "struck": struck, "lost": lost}


if __name__ == "__main__":
    load_documents()
    place, *words = sys.argv[1:]
    for number, what in enumerate(zip(words[::3], words[1::3], words[2::3], strict=True)):
        print(json.dumps({"what": what, **main(Path(place) / str(number), *what)}))

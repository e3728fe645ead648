"""Synthetic runs, so that the report is tested without training anything."""

from __future__ import annotations

import math
import random
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import pytest

from actsparse.records import Entry, RecordWriter, Run, environment, read_runs, run_path

# arm: accuracy, inference density at the end, share of dead units
ARMS: dict[str, tuple[float, float | None, float]] = {
    "vanilla": (0.967, 0.266, 0.0),
    "paper": (0.972, 0.192, 0.01),
    "no-norm-decay": (0.972, 0.197, 0.01),
    "hoyer": (0.976, 0.036, 0.56),
    "no-mlp": (0.871, None, 0.0),
}
UNITS = 192


def measures(density: float | None, dead: float = 0.0, blocks: int = 2) -> Entry | None:
    """Measures of equal blocks, the first a little denser."""
    if density is None:
        return None

    def one(value: float) -> Entry:
        units = round(dead * UNITS)
        living = min(1.0, value * UNITS / (UNITS - units)) if units < UNITS else None
        return {
            "density": value,
            "derivative_density": value,
            "dead": units,
            "units": UNITS,
            "living_density": living,
        }

    slope = [1 + 0.2 * (0.5 - i / max(1, blocks - 1)) if blocks > 1 else 1.0 for i in range(blocks)]
    per_block = [{"block": f"blocks.{i}.mlp", **one(density * slope[i])} for i in range(blocks)]
    whole = one(density) | {"dead": blocks * round(dead * UNITS), "units": blocks * UNITS}
    return {**whole, "blocks": per_block}


def header(arm: str, seed: int, **more: Any) -> Entry:
    config = {"arm": arm, "seed": seed, "steps": 1500, "optimizer": {"lr": 5e-3}}
    if arm == "paper":
        config["modify"] = {"zeroth_bias": 0.1, "norm_floor": 1.0, "activation": "jsrelu"}
    return {
        "task": "digits",
        "arm": arm,
        "seed": seed,
        "config": config,
        "command": "actsparse compare --task digits --seeds 3",
        **environment(threads=1),
        **more,
    }


def result(**changed: Any) -> Entry:
    return {
        "split": "test",
        "step": 1500,
        "loss": 0.2,
        "quality": 0.97,
        "quality_name": "accuracy",
        "higher_is_better": True,
        "inference": measures(0.2),
        "training": measures(0.21),
        "skippable": {"forward": 0.4, "backward": 0.6},
        "seconds": 40.0,
        "baselines": {},
        **changed,
    }


def write_run(out: Path, arm: str, seed: int, losses: Sequence[float] = (), **changed: Any) -> Run:
    """One finished run with given validation losses and a result changed as told."""
    with RecordWriter(run_path(out, arm, seed), header(arm, seed)) as record:
        steps = [round(1500 * (i + 1) / len(losses)) for i in range(len(losses))]
        for step, loss in zip(steps, losses, strict=True):
            shown = measures(0.2)
            record.write(
                "eval", split="validation", step=step, loss=loss, quality=0.9, measures=shown
            )
        record.write("result", **result(**changed))
    return next(run for run in read_runs(out) if (run.arm, run.seed) == (arm, seed))


def write_comparison(out: Path, seeds: int = 3) -> None:
    """Five arms, 20 validations each; curves that look like those of a real digits run."""
    for arm, (accuracy, density, dead) in ARMS.items():
        for seed in range(seeds):
            draw = random.Random(f"{arm}{seed}")
            shift = draw.gauss(0, 1)
            end = None if density is None else density * (1 + 0.03 * shift)
            with RecordWriter(run_path(out, arm, seed), header(arm, seed)) as record:
                for i in range(1, 21):
                    step = 75 * i
                    decay = math.exp(-step / 180)
                    loss = (1 - accuracy) * 4 + 2.1 * decay + 0.004 * draw.random()
                    now = None if end is None else end + (0.5 - end) * math.exp(-step / 400)
                    record.write(
                        "train",
                        step=step,
                        loss=loss,
                        lr=5e-3,
                        seconds=2.0,
                        penalty=0.1 if arm == "hoyer" else None,
                        measures=measures(None if now is None else 1.02 * now, dead),
                    )
                    record.write(
                        "eval",
                        split="validation",
                        step=step,
                        loss=loss,
                        quality=accuracy - 0.8 * decay,
                        measures=measures(now, dead),
                    )
                record.write(
                    "result",
                    **result(
                        loss=(1 - accuracy) * 4,
                        quality=accuracy + 0.004 * draw.gauss(0, 1),
                        inference=measures(end, dead),
                        training=measures(None if end is None else 1.02 * end, dead),
                        skippable=None
                        if end is None
                        else {"forward": (1 - end) / 2, "backward": 1 - end},
                    ),
                )


@pytest.fixture(scope="session")
def comparison(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder of five arms and three seeds. Read it; do not write into it."""
    out = tmp_path_factory.mktemp("comparison")
    write_comparison(out)
    return out


@pytest.fixture
def add_run(tmp_path: Path) -> Callable[..., Run]:
    """Writes a finished run into tmp_path: `add_run(arm, seed, losses=…, quality=…)`."""
    return lambda arm, seed, losses=(), **changed: write_run(tmp_path, arm, seed, losses, **changed)


@pytest.fixture
def measured() -> Callable[..., Entry | None]:
    return measures

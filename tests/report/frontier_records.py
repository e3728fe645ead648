"""Records of frontier tasks and races, made up, in a folder."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from actsparse_lab.analysis.manifest import FRONTIER
from actsparse_lab.records import Entry, RecordWriter, environment, run_path

UNITS = 1000
WHERE = environment(threads=1)  # once: it asks git


@dataclass(frozen=True)
class Made:
    """An arm: quality on the test split by seed, and what goes with it; ``density`` None: no MLPs.

    ``validation`` is as ``quality`` where not given. ``jitter`` moves density from seed to seed.
    """

    quality: Sequence[float]
    density: float | None = 0.2
    validation: Sequence[float] = ()
    training: float | None = None
    dead: int = 0
    jitter: float = 0.0


def measures(density: float | None, dead: int = 0) -> Entry | None:
    """As observe sums them up."""
    if density is None:
        return None
    living = density * UNITS / (UNITS - dead) if dead < UNITS else None
    row = {"density": density, "derivative_density": density, "dead": dead, "units": UNITS}
    row |= {"living_density": living}
    return {**row, "blocks": [{"block": "mlp", **row}]}


def write_run(
    out: Path,
    arm: str,
    seed: int,
    curve: Sequence[tuple[float, float]],
    *,
    quality: float,
    density: float | None = 0.2,
    training: float | None = None,
    dead: int = 0,
    name: str = "accuracy",
    accelerate: bool = False,
    clock: bool = True,
    resumed_at: int | None = None,
    settings: Mapping[str, Any] | None = None,
) -> None:
    """One finished run; ``curve`` is (seconds, quality) of each validation, a step apart."""
    config = {"accelerate": accelerate, "steps": len(curve), **(settings or {})}
    header = {"task": "digits", "arm": arm, "seed": seed, "config": config, **WHERE}
    with RecordWriter(run_path(out, arm, seed), header) as record:
        for step, (seconds, value) in enumerate(curve):
            more: Entry = {"time": {"seconds": seconds}} if clock else {}
            record.write(
                "eval", split="validation", step=step, loss=2.0 / (1 + step), quality=value,
                measures=measures(density, dead), **more,
            )  # fmt: skip
        record.write(
            "result",
            split="test",
            step=len(curve) - 1,
            loss=0.2,
            quality=quality,
            quality_name=name,
            higher_is_better=name == "accuracy",
            inference=measures(density, dead),
            training=measures(density if training is None else training),
            skippable=None,
            baselines={},
            time={"seconds": 1.0, "resumed_at": resumed_at},
        )


def write_task(
    out: Path,
    arms: Mapping[str, Made],
    *,
    task: str = "digits",
    name: str = "accuracy",
    seeds: int = 5,
    settings: Mapping[str, Any] | None = None,
) -> Path:
    """A task's folder in ``out``: manifest and records."""
    place = out / task
    for arm, made in arms.items():
        validation = made.validation or made.quality
        for seed, quality in enumerate(made.quality):
            density = None if made.density is None else made.density + made.jitter * seed
            curve = [(1.0, 0.1 if name == "accuracy" else 9.0), (2.0, validation[seed])]
            write_run(
                place, arm, seed, curve, quality=quality, density=density, training=made.training,
                dead=made.dead, name=name, settings=settings,
            )  # fmt: skip
    manifest: dict[str, Any] = {"task": task, "seeds": seeds, "steps": None}
    command = f"actsparse frontier {task}"
    FRONTIER.write(place, **manifest, command=command, time={"seconds": 60.0})
    return place


def ordinary() -> dict[str, Made]:
    """A task that counts, an arm that reaches both targets, one that costs too much."""
    base = [0.960, 0.962, 0.964, 0.966, 0.968]
    return {
        "vanilla": Made([q - 0.01 for q in base], 0.25, jitter=0.01),
        "vanilla-no-1d-decay": Made(base, 0.20, jitter=0.01),
        "half-steps": Made([q - 0.004 for q in base], 0.22),
        "no-mlp": Made([q - 0.05 for q in base], None),
        "sparse": Made([q - 0.001 for q in base], 0.02, training=0.025, dead=400, jitter=0.0005),
        "costly": Made([q - 0.02 for q in base], 0.01),
        "dense": Made(base, 0.19),
    }

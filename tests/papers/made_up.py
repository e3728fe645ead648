"""Finished runs made up of the numbers that claims read."""

from __future__ import annotations

from collections.abc import Iterable
from pathlib import Path

from actsparse.values import check
from actsparse_lab.analysis.findings import Experiment, Finding, findings
from actsparse_lab.record_schema import SCHEMA, Entry
from actsparse_lab.records import Run

MANIFEST: Entry = {"full": False, "seeds": 5, "command": "actsparse reproduce", "time": {}}
UNITS = 1000


def measures(density: float, dead: int = 0) -> Entry:
    """As observe sums them up; ``dead`` of `UNITS` units."""
    alive = UNITS - dead
    return {
        "density": density,
        "derivative_density": density,
        "dead": dead,
        "units": UNITS,
        "living_density": density * UNITS / alive if alive else None,
        "blocks": [],
    }


def made_up(
    arm: str,
    seed: int,
    density: float | None,
    quality: float = 0.95,
    *,
    training: float | None = None,
    dead: int = 0,
    before: tuple[float, float] | None = None,
) -> Run:
    """A run; ``density`` None has no MLPs, ``training`` is as ``density`` where not given,
    ``before`` is density and quality of the checkpoint."""
    trained = density if training is None else training
    result: Entry = {
        "split": "test",
        "step": 300,
        "loss": 0.2,
        "quality": quality,
        "quality_name": "accuracy",
        "higher_is_better": True,
        "inference": None if density is None else measures(density, dead),
        "training": None if trained is None else measures(trained),
        "skippable": None,
        "baselines": {},
        "time": {"seconds": 1.0},
    }
    if before is not None:
        result["before"] = {"loss": 0.3, "quality": before[1], "inference": measures(before[0])}
    check("result", result, SCHEMA["result"])
    header = {"task": "digits", "arm": arm, "seed": seed}
    return Run(Path("record.jsonl"), header, [], [], [], result, None, False)


def answers(experiment: Experiment, runs: Iterable[Run]) -> list[Finding]:
    """The experiment's questions answered, in their order."""
    return list(findings(experiment, list(runs), MANIFEST).findings)


def density_of(run: Run) -> float | None:
    """Its inference density, read as plainly as can be."""
    assert run.result is not None
    found = run.result["inference"]
    return None if found is None else float(found["density"])

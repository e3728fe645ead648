"""Finished runs made up of the numbers that claims read, and what experiments say of them."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import replace
from pathlib import Path
from types import ModuleType

import pytest
from matplotlib.figure import Figure

from actsparse.values import check
from actsparse_lab.analysis.effects import Arms, Effects
from actsparse_lab.analysis.findings import Experiment, Finding, findings
from actsparse_lab.record_schema import SCHEMA, Entry
from actsparse_lab.records import Run

MANIFEST: Entry = {"full": False, "seeds": 5, "command": "actsparse reproduce", "time": {}}
UNITS = 1000
Plot = Callable[..., bytes | None]  # of `Arms` and whether the ground is dark


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
    skippable: Entry | None = None,
    evals: Iterable[Entry] = (),
    measured: Iterable[Entry] = (),
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
        "skippable": skippable,
        "baselines": {},
        "time": {"seconds": 1.0},
    }
    if before is not None:
        result["before"] = {"loss": 0.3, "quality": before[1], "inference": measures(before[0])}
    lines = {"result": [result], "eval": list(evals), "measured": list(measured)}
    for kind, entries in lines.items():
        for entry in entries:
            check(kind, entry, SCHEMA[kind])
    header = {"task": "digits", "arm": arm, "seed": seed}
    path = Path("record.jsonl")
    return Run(path, header, [], lines["eval"], lines["measured"], result, None, False)


def with_measures(run: Run, measures: Entry) -> Run:
    """The run with one measured line, of its last step."""
    return replace(run, measured=[{"step": 300, "measures": measures}])


def answers(experiment: Experiment, runs: Iterable[Run]) -> list[Finding]:
    """The experiment's questions answered, in their order."""
    return list(findings(experiment, list(runs), MANIFEST).findings)


def effects(experiment: Experiment, runs: Iterable[Run]) -> list[Effects]:
    """The effects of each question, by seed."""
    return [each.effects for each in answers(experiment, runs)]


def words(experiment: Experiment, runs: Iterable[Run]) -> list[str]:
    """The verdict on each question."""
    return [each.verdict.word for each in answers(experiment, runs)]


def run_of(runs: Iterable[Run], arm: str, seed: int) -> Run:
    """The run of an arm and a seed."""
    return next(run for run in runs if (run.arm, run.seed) == (arm, seed))


def assert_drawn(plot: Plot, runs: Iterable[Run]) -> None:
    """The runs are drawn as two PNGs, one on light ground and one on dark."""
    arms = Arms(list(runs))
    light, dark = plot(arms, False), plot(arms, True)
    assert light is not None
    assert dark is not None
    assert light.startswith(b"\x89PNG")
    assert dark.startswith(b"\x89PNG")
    assert light != dark


def figure_of(
    monkeypatch: pytest.MonkeyPatch, module: ModuleType, plot: Plot, runs: Iterable[Run]
) -> Figure:
    """What ``plot`` gives ``render`` of its module to draw."""
    drawn: list[Figure] = []
    monkeypatch.setattr(module, "render", lambda figure, _: drawn.append(figure) or b"kept")
    assert plot(Arms(list(runs)), False) == b"kept"
    (figure,) = drawn
    return figure


def density_of(run: Run) -> float | None:
    """Its inference density, read as plainly as can be."""
    assert run.result is not None
    found = run.result["inference"]
    return None if found is None else float(found["density"])

"""Many runs side by side: what each event says, and what happens when something goes wrong."""

from __future__ import annotations

import json
import os
import signal
from pathlib import Path
from typing import Any

import pytest

from actsparse.modify import Recipe
from actsparse_lab.campaigns.compare import Event, compare
from actsparse_lab.engine.config import RunConfig
from actsparse_lab.records import RecordError, read_runs
from actsparse_lab.tasks import ARMS, default_arms, run_config

TINY: dict[str, Any] = {"steps": 4, "batch_size": 8, "log_every": 2, "eval_every": 2}


def kinds(events: list[Event]) -> list[tuple[str, str, int]]:
    return [(e.kind, e.config.arm, e.config.seed) for e in events if e.kind != "step"]


def test_a_failure_a_dead_worker_and_the_runs_after_them(tmp_path: Path) -> None:
    good = [run_config("digits", "vanilla", seed, **TINY) for seed in (0, 1)]
    bad = run_config("digits", "paper", 0, **TINY | {"lr": 1e30, "steps": 40})
    killed = run_config("digits", "norm-floor", 0, **TINY | {"steps": 4000})
    configs = [bad, killed, *good]
    events = []
    for event in compare(configs, tmp_path, workers=1):
        events.append(event)
        if event.kind == "step" and event.config is not bad and event.config.arm == "norm-floor":
            from multiprocessing import active_children

            for child in active_children():
                os.kill(child.pid or 0, signal.SIGKILL)
    assert kinds(events) == [
        ("started", "paper", 0),
        ("failed", "paper", 0),
        ("started", "norm-floor", 0),
        ("failed", "norm-floor", 0),
        ("started", "vanilla", 0),
        ("finished", "vanilla", 0),
        ("started", "vanilla", 1),
        ("finished", "vanilla", 1),
    ]
    reasons = {e.config.arm: e.reason for e in events if e.kind == "failed"}
    assert "stopped after" in reasons["paper"]
    assert reasons["norm-floor"] == "its process ended by signal 9"
    again = list(compare(good, tmp_path))
    assert kinds(again) == [("skipped", "vanilla", 0), ("skipped", "vanilla", 1)]
    assert [(run.arm, run.finished) for run in read_runs(tmp_path)] == [
        ("norm-floor", False), ("paper", False), ("vanilla", True), ("vanilla", True),
    ]  # fmt: skip


def test_closing_the_events_stops_the_workers(tmp_path: Path) -> None:
    from multiprocessing import active_children

    config = run_config("digits", "vanilla", 0, **TINY | {"steps": 100_000})
    events = compare([config], tmp_path, workers=1)
    assert next(events).kind == "started"
    assert active_children()
    events.close()  # type: ignore[attr-defined]
    assert not active_children()


@pytest.mark.parametrize("name", ARMS)
def test_an_arm_survives_its_way_through_json(name: str) -> None:
    config = run_config("digits", name, 0)
    assert Recipe.from_json(config.recipe) == ARMS[name].recipe
    assert RunConfig(**config.to_json()).to_json() == config.to_json()
    assert json.loads(json.dumps(config.to_json())) == config.to_json()  # a record's own config


def test_the_default_arms_are_the_five_that_the_question_needs() -> None:
    assert default_arms("digits") == (
        "vanilla", "paper", "vanilla-no-1d-decay", "best", "no-mlp",
    )  # fmt: skip
    assert {*default_arms("digits"), *default_arms("lm_finetune")} <= set(ARMS)


def test_measures_of_both_kinds_go_where_they_belong() -> None:
    asked = ("flatness", "token_copies", "flatness", "hessian")
    config = run_config("digits", "vanilla", 0, measures=asked)
    assert config.measures == ("density", "flatness")
    assert config.active == ("token_copies", "hessian")
    both = run_config("digits", "vanilla", 0, measures=asked, active=("gradient", "hessian"))
    assert both.active == ("gradient", "hessian", "token_copies")
    plain = run_config("digits", "vanilla", 0)
    assert (plain.measures, plain.active, plain.active_every) == (("density",), (), None)
    with pytest.raises(ValueError, match="measures holds 'flatnes'; known: density, flatness"):
        run_config("digits", "vanilla", 0, measures=("flatnes",))
    with pytest.raises(ValueError, match=r"active holds 'flatnes'; known: .*token_copies"):
        run_config("digits", "vanilla", 0, active=("flatnes",))
    with pytest.raises(ValueError, match="active_every=0: expected a whole number, 1 or more"):
        run_config("digits", "vanilla", 0, active_every=0)
    with pytest.raises(ValueError, match=r"active_at=\(0,\): expected"):
        run_config("digits", "vanilla", 0, active_at=(0,))


def test_what_cannot_be_is_said_before_any_run(tmp_path: Path) -> None:
    config = run_config("digits", "vanilla", 0, **TINY)
    with pytest.raises(ValueError, match="unknown task 'dogs'; known: digits, text, lm"):
        run_config("dogs", "vanilla", 0)
    with pytest.raises(ValueError, match="unknown arm 'vanila'; known: vanilla, paper"):
        run_config("digits", "vanila", 0)
    with pytest.raises(ValueError, match="same arm and seed twice"):
        compare([config, config], tmp_path)
    with pytest.raises(ValueError, match="no runs"):
        compare([], tmp_path)
    with pytest.raises(ValueError, match="workers=0"):
        compare([config], tmp_path, workers=0)
    (tmp_path / "file").touch()
    with pytest.raises(RecordError, match="cannot"):
        compare([config], tmp_path / "file")
    assert not (tmp_path / "runs").exists()


def test_a_models_settings_can_be_changed_one_by_one() -> None:
    own = run_config("digits", "paper", 0).model
    wide = run_config("digits", "paper", 0, model={"hidden_size": 96}).model
    assert wide == {**own, "hidden_size": 96}
    assert run_config("digits", "paper", 0).model == own

"""The frontier's runs: paired, with their controls, and in the form that was asked for."""

from __future__ import annotations

from typing import Any

import pytest

from actsparse_lab.analysis.comparison import CONTROL, HALF, HALVES, VANILLAS, WHOLE
from actsparse_lab.campaigns import frontier as plans
from actsparse_lab.campaigns.frontier import (
    CONTROLS,
    RACE,
    RECIPES,
    TASKS,
    WIDTHS,
    frontier,
    race,
)
from actsparse_lab.tasks import ARMS, TASK_SETTINGS


def given(task: str) -> dict[str, str]:
    return {"data": "place"} if TASKS[task].reads_data else {}


def test_there_are_recipes_to_compare() -> None:
    assert len({*VANILLAS, *RECIPES}) >= 8
    assert {*CONTROLS, *RECIPES, WHOLE, RACE.fast, *RACE.dense} <= {*ARMS}
    assert not {*HALVES} & {*ARMS}
    assert {*HALVES.values()} <= {*ARMS}
    assert all(TASKS[task].task in TASK_SETTINGS for task in TASKS)
    assert all(each.seeds >= 5 for each in (*TASKS.values(), RACE))


@pytest.mark.parametrize("task", TASKS)
def test_every_arm_has_every_seed_once_and_controls_are_among_them(task: str) -> None:
    runs = frontier(task, **given(task))
    pairs = [(run.arm, run.seed) for run in runs]
    assert len(set(pairs)) == len(pairs)
    seeds = {seed for _, seed in pairs}
    assert seeds == set(range(TASKS[task].seeds))
    arms = {arm for arm, _ in pairs}
    assert arms == set(TASKS[task].arms or (*CONTROLS, HALF, *RECIPES))
    assert arms >= {WHOLE, CONTROL, HALF, "best"}
    assert len(pairs) == len(arms) * len(seeds)
    assert {run.task for run in runs} == {TASKS[task].task}


@pytest.mark.parametrize(
    ("task", "arm"),
    [(task, arm) for task in TASKS for arm in HALVES if arm in (TASKS[task].arms or HALF)],
)
def test_half_the_steps_is_all_that_an_arm_of_half_the_steps_changes(task: str, arm: str) -> None:
    half, whole = frontier(task, arms=[arm, HALVES[arm]], seeds=1, **given(task))
    own, other = half.to_json(), whole.to_json()
    assert {key for key in own if own[key] != other[key]} == {"arm", "steps"}
    assert half.steps == whole.steps // 2


def test_settings_of_a_task_win_over_the_experiments_own(monkeypatch: pytest.MonkeyPatch) -> None:
    settings: dict[str, Any] = {"steps": 200, "lr": 0.01, "model": {"hidden_size": 96}}
    settings |= {"data": {"crop": 2}}
    monkeypatch.setitem(
        TASKS, "images", plans.FrontierTask("cifar10", settings, quick=True, reads_data=True)
    )
    own = TASK_SETTINGS["cifar10"](True)
    (run,) = frontier("images", arms=["vanilla"], seeds=1, data="place")
    assert (run.steps, run.lr, run.model["hidden_size"]) == (200, 0.01, 96)
    assert run.model == own["model"] | {"hidden_size": 96}
    assert run.data == own["data"] | {"crop": 2, "path": "place"}


def test_widths_differ_in_their_width_and_what_follows_from_it() -> None:
    runs = [frontier(f"width-{d}", arms=["best"], seeds=1, data="place")[0] for d in WIDTHS]
    for d, run in zip(WIDTHS, runs, strict=True):
        assert (run.model["n_embd"], run.model["n_inner"]) == (d, 4 * d)
        assert run.lr * run.weight_decay == pytest.approx(8e-4)
        assert run.lr**2 * d == pytest.approx(runs[0].lr ** 2 * WIDTHS[0])
        own, other = run.to_json(), runs[0].to_json()
        differing = {key for key in own if own[key] != other[key]}
        assert differing <= {"lr", "weight_decay", "precision", "model"}


def test_fewer_steps_keep_lines_at_the_same_shares() -> None:
    (run,) = frontier("digits", arms=["paper"], seeds=1, steps=150)
    whole = TASK_SETTINGS["digits"](False)
    assert run.steps == 150
    assert run.eval_every == TASKS["digits"].settings["eval_every"] * 150 // whole["steps"]
    assert run.log_every == whole["log_every"] * 150 // whole["steps"]
    assert frontier("digits", arms=[HALF], seeds=1, steps=1)[0].steps == 1


def test_text_of_the_user_goes_where_its_task_reads_it() -> None:
    (run,) = frontier("web", arms=["vanilla"], seeds=1, **given("web"))
    assert (run.data["shards"], run.data["tokenizer"]) == ("place", "bytes")


def test_a_race_is_dense_arms_and_an_accelerated_one_in_turning_order() -> None:
    runs = race(seeds=3, **given(RACE.task))
    assert {run.arm for run in runs if run.accelerate} == {RACE.fast}
    assert {run.arm for run in runs if not run.accelerate} == {*RACE.dense}
    assert {*RACE.dense} <= {*VANILLAS}
    assert [run.seed for run in runs] == sorted(run.seed for run in runs)
    first = [runs[at].arm for at in range(0, len(runs), len(RACE.dense) + 1)]
    assert set(first) == {run.arm for run in runs}  # so each arm is once the first


@pytest.mark.parametrize(
    ("task", "words", "message"),
    [
        ("magic", {}, "unknown frontier task 'magic'; known: digits, text, cifar10, web"),
        ("digits", {"arms": ["magic"]}, "unknown arm 'magic' of digits; known: vanilla"),
        ("cifar10", {}, "cifar10 reads data of yours: give --data"),
        ("web", {}, "give --data web=PATH"),
        ("digits", {"data": "x"}, "digits takes no --data, got 'x'"),
    ],
    ids=["task", "arm", "images", "text", "data of its own"],
)
def test_mistakes_are_named(task: str, words: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        frontier(task, **words)

"""The frontier as a user types it: what is missing is done, what lacks data is passed over."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
from typer.testing import CliRunner

from actsparse.cli.main import app
from actsparse_lab.analysis.comparison import VANILLAS
from actsparse_lab.campaigns import frontier as plans
from actsparse_lab.packed import pack
from actsparse_lab.records import read_runs

ARMS = "vanilla,vanilla-no-1d-decay,half-steps,l1-no-1d-decay,no-mlp"
SMALL = ["--steps", "4", "--seeds", "1", "--workers", "1"]


def call(*words: str | Path) -> tuple[int, str, str]:
    done = CliRunner().invoke(app, [str(word) for word in words])
    return done.exit_code, done.stdout, done.stderr


@pytest.fixture(scope="module")
def ran(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, str, str]:
    """A short frontier of digits: its folder, stdout, stderr."""
    out = tmp_path_factory.mktemp("frontier")
    code, said, told = call(
        "frontier", "digits", "cifar10", "web", "--arms", ARMS, *SMALL, "--out", out, "--json"
    )
    assert code == 0, told
    return out, said, told


def test_it_trains_and_judges_and_passes_over_what_has_no_data(
    ran: tuple[Path, str, str],
) -> None:
    out, said, told = ran
    assert "cifar10: passed over, it needs --data cifar10=PATH" in told
    assert "web: passed over, it needs --data web=PATH" in told
    (task,) = json.loads(said).values()
    assert (task["task"], task["counts"], task["best"] in VANILLAS) == (
        "digits", "undecided", True,
    )  # fmt: skip
    assert {row["name"] for row in task["rows"]} == {*ARMS.split(",")}
    assert task["command"] == "actsparse frontier digits --seeds 1 --steps 4"
    assert (out / "digits" / "plots" / "frontier.png").exists()
    assert (out / "digits" / "report.html").exists()
    assert "## digits" in (out / "scoreboard.md").read_text()
    steps = {run.arm: run.header["config"]["steps"] for run in read_runs(out / "digits")}
    assert steps == dict.fromkeys(ARMS.split(","), 4) | {"half-steps": 2}


@pytest.mark.usefixtures("undrawn")
def test_what_is_done_is_not_repeated_and_what_is_missing_is_done(
    ran: tuple[Path, str, str], tmp_path: Path
) -> None:
    out = Path(shutil.copytree(ran[0], tmp_path / "copy"))
    shutil.rmtree(out / "digits" / "runs" / "half-steps-seed0")
    packed = pack(out / "digits", [f"{arm}-seed0" for arm in ARMS.split(",")])
    shutil.rmtree(out / "digits" / "runs")  # a checkout holds records alone, and those packed
    records = packed.read_bytes()
    before = json.loads((out / "digits" / "frontier.json").read_text())
    words = ["frontier", "digits", "--arms", ARMS, *SMALL, "--out", out]
    code, said, _ = call(*words)
    assert code == 0
    assert said.count("done before") == 4
    assert "half-steps seed 0: started" in said
    assert packed.read_bytes() == records
    assert [each.name for each in (out / "digits" / "runs").iterdir()] == ["half-steps-seed0"]
    assert len(read_runs(out / "digits")) == 5
    after = json.loads((out / "digits" / "frontier.json").read_text())
    assert after["time"]["seconds"] > before["time"]["seconds"]
    assert before | {"time": None} == after | {"time": None}
    # nothing left: not even the manifest changes
    assert call(*words)[0] == 0
    assert json.loads((out / "digits" / "frontier.json").read_text()) == after


def test_another_form_is_refused(ran: tuple[Path, str, str]) -> None:
    code, _, told = call("frontier", "digits", "--seeds", "1", "--out", ran[0])
    assert code == 2
    assert "holds runs of `actsparse frontier digits --seeds 1 --steps 4`" in told


def test_trained_checkpoints_are_timed_and_join_the_scoreboard(
    ran: tuple[Path, str, str], tmp_path: Path
) -> None:
    out = Path(shutil.copytree(ran[0], tmp_path / "copy"))
    place = out / "digits"
    runs = sorted(place.glob("runs/*-seed0"))
    words = ["bench", "run", *runs, "--rounds", "1", "--out", place / "speed.json", "--json"]
    code, said, told = call(*words)
    assert code == 0, told
    assert "passed over" in told
    record = json.loads(said)
    assert record == json.loads((place / "speed.json").read_text())
    assert (record["benchmark"], record["threads"]) == ("speed", 1)
    timed = {row["arm"]: row for row in record["runs"]}
    assert timed.keys() == {*ARMS.split(",")} - {"no-mlp"}
    finished = {run.arm: run.result for run in read_runs(place)}
    for arm, row in timed.items():
        result = finished[arm]
        assert result is not None
        # of the first of its test rows, where the record's is of all
        assert row["density"] == pytest.approx(result["inference"]["density"], rel=0.2)
        assert row["why"].startswith("2 of 2 blocks dense: too small: ")
        assert row["mlps"]["value"] == 1.0
        assert {each["to"] for each in row["blocks"][0]["ratios"]} >= {"sparse"}
    page = call("report", out, "--markdown")[1]
    assert "Blocks in inference: " in page
    assert "too small" in page


@pytest.mark.usefixtures("undrawn")
def test_a_race_runs_dense_and_accelerated(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(plans, "RACE", plans.Race("digits", ("vanilla",), "paper", {}, seeds=5))
    words = ["frontier", "race", "--steps", "4", "--seeds", "2", "--out", tmp_path]
    code, said, told = call(*words)
    assert code == 0, told
    assert said.index("vanilla seed 0: started") < said.index("paper seed 0: started")
    assert said.index("paper seed 1: started") < said.index("vanilla seed 1: started")
    runs = read_runs(tmp_path / "digits" / "race")
    assert {(run.arm, run.header["config"]["accelerate"]) for run in runs} == {
        ("vanilla", False), ("paper", True),
    }  # fmt: skip
    for run in runs:
        clock = [entry["time"]["seconds"] for entry in run.evals]
        assert clock == sorted(clock)
    assert "no run of a frontier task is finished" in said
    html = (tmp_path / "digits" / "race" / "report.html").read_text()
    assert "paper, accelerated, against dense vanilla" in html


def test_a_failed_run_is_told(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    bad: dict[str, Any] = {"lr": 1e30, "steps": 40}
    monkeypatch.setitem(plans.TASKS, "digits", plans.FrontierTask("digits", bad))
    words = ["frontier", "digits", "--arms", "vanilla", "--seeds", "1", "--out", tmp_path]
    code, said, told = call(*words)
    assert code == 1
    assert "1 runs failed; to try them again" in told
    assert "nothing to judge" in said


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (["magic"], "unknown task 'magic'; known: digits, text, cifar10, web, demo, text-long"),
        (["digits", "--arms", "magic"], "unknown arm 'magic'"),
        (["cifar10"], "nothing to do: no task that was asked for has its data"),
        (["cifar10", "web", "--data", "x"], "say for which task, as TASK=x"),
        (["digits", "--data", "cifar10=x"], "no task 'cifar10' that is asked for reads data"),
        (["cifar10", "--data", "nowhere"], "nowhere"),
        (["race", "--arms", "paper"], "--arms is not for race"),
        (["digits", "--seeds", "0"], "--seeds"),
    ],
    ids=["task", "arm", "no data", "whose data", "not asked", "no such data", "race", "seeds"],
)
def test_mistakes_are_named(words: list[str], said: str, tmp_path: Path) -> None:
    code, _, told = call("frontier", *words, "--out", tmp_path / "out")
    assert code == 2
    assert said in told
    assert not list(tmp_path.rglob("record.jsonl"))


def test_a_folder_of_other_runs_is_refused(ran: tuple[Path, str, str], tmp_path: Path) -> None:
    shutil.copytree(ran[0] / "digits" / "runs", tmp_path / "digits" / "runs")
    code, _, told = call("frontier", "digits", *SMALL, "--out", tmp_path)
    assert code == 2
    assert "holds other runs, without frontier.json" in told

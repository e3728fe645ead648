"""An experiment of the papers, as a user types it."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
from typer.testing import CliRunner

from actsparse.cli.main import app
from actsparse_lab.papers.experiments import EXPERIMENTS

SMALL = ["--seeds", "1", "--steps", "8"]


def call(*words: str) -> tuple[int, str, str]:
    done = CliRunner().invoke(app, ["reproduce", *words])
    return done.exit_code, done.stdout, done.stderr


def test_without_a_name_it_lists_what_there_is() -> None:
    code, said, _ = call()
    assert code == 0
    assert [line.split()[0] for line in said.splitlines()] == list(EXPERIMENTS)


@pytest.fixture(scope="module")
def ran(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, dict[str, Any]]:
    """A short `noise`: its folder, and what it told."""
    out = tmp_path_factory.mktemp("noise")
    code, said, told = call("noise", *SMALL, "--out", str(out), "--json")
    assert code == 0, told
    (found,) = json.loads(said)
    return out, found


@pytest.mark.usefixtures("undrawn")
def test_an_experiment_runs_and_is_not_repeated(ran: tuple[Path, dict[str, Any]]) -> None:
    out, found = ran
    assert found["name"] == "noise"
    assert found["command"] == "actsparse reproduce noise --seeds 1 --steps 8"
    assert {claim["verdict"] for claim in found["claims"]} == {"undecided"}  # one seed
    assert (out / "report.html").exists()
    records = {path: path.read_bytes() for path in out.glob("runs/*/record.jsonl")}
    code, again, told = call("noise", *SMALL, "--out", str(out), "--json")
    assert code == 0
    assert told.count("done before") == len(records) == 9
    assert {path: path.read_bytes() for path in records} == records
    assert json.loads(again)[0]["claims"] == found["claims"]


@pytest.mark.usefixtures("undrawn")
def test_a_folder_of_another_form_is_refused_and_left_as_it_was(
    ran: tuple[Path, dict[str, Any]], tmp_path: Path
) -> None:
    out = Path(shutil.copytree(ran[0], tmp_path / "copy"))
    words = ["noise", "--seeds", "1", "--out", str(out)]
    before = (out / "reproduction.json").read_bytes()
    for other in (words, ["ratio", *words[1:]], [*words, "--steps", "3"]):
        code, _, told = call(*other)
        assert code == 2
        assert "holds runs of `actsparse reproduce noise --seeds 1 --steps 8`" in told
        assert (out / "reproduction.json").read_bytes() == before
    shutil.rmtree(out / "runs" / "p16-decay0-seed0")
    code, said, told = call(*words, "--steps", "8", "--json")
    assert code == 0
    assert told.count("done before") == 8
    (found,) = json.loads(said)
    assert (found["failed"], found["page"]) == (0, str(out / "report.html"))
    seconds = [
        json.loads(each)["time"]["seconds"]
        for each in (before, (out / "reproduction.json").read_bytes())
    ]
    assert seconds[1] > seconds[0]


def test_what_failed_is_told_and_no_later_stage_begins(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from actsparse_lab.papers.noise import runs

    bad = runs.GradientNoiseConfig("p4-decay0", 0, 4, lr=1e25, steps=3)
    good = runs.GradientNoiseConfig("p8-decay0", 0, 8, lr=0.1, steps=3)
    monkeypatch.setattr(runs, "runs", lambda form: {"base": [bad], "": [good]})
    code, said, told = call("noise", "--seeds", "1", "--out", str(tmp_path), "--json")
    assert code == 1
    assert "1 runs failed; to try them again" in told
    (found,) = json.loads(said)
    assert (found["failed"], found["page"]) == (1, None)
    assert not (tmp_path / "runs").exists()


@pytest.mark.slow
@pytest.mark.parametrize("name", [name for name in EXPERIMENTS if name != "noise"])
def test_every_experiment_runs(name: str, tmp_path: Path) -> None:
    code, said, told = call(name, *SMALL, "--out", str(tmp_path), "--json")
    assert code == 0, told
    (found,) = json.loads(said)
    assert {claim["verdict"] for claim in found["claims"]} == {"undecided"}
    measured = [claim["claim"] for claim in found["claims"] if not claim["effects"]]
    assert len(measured) < len(found["claims"])  # something was read off


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (["magic"], "unknown experiment 'magic'; known: ratio"),
        (["ratio", "--full"], "--full needs --data FOLDER"),
        (["ratio", "--seeds", "0"], "--seeds"),
        (["ratio", "--data", "images"], "--data images is for --full"),
        (["noise", "--full", "--data", "nowhere"], "nowhere"),
    ],
    ids=["name", "data", "seeds", "no --full", "no such data"],
)
def test_mistakes_are_named(words: list[str], said: str) -> None:
    code, _, told = call(*words)
    assert code == 2
    assert said in told

"""An experiment of the papers, as a user types it."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from typer.testing import CliRunner

from actsparse.cli.main import app
from actsparse.report import CLAIMS

SMALL = ["--seeds", "1", "--steps", "8"]


def call(*words: str) -> tuple[int, str, str]:
    done = CliRunner().invoke(app, ["reproduce", *words])
    return done.exit_code, done.stdout, done.stderr


def test_without_a_name_it_lists_what_there_is() -> None:
    code, said, _ = call()
    assert code == 0
    assert [line.split()[0] for line in said.splitlines()] == list(CLAIMS)


def test_an_experiment_runs_and_is_not_repeated(tmp_path: Path) -> None:
    words = ["noise", *SMALL, "--out", str(tmp_path), "--json"]
    code, said, told = call(*words)
    assert code == 0, told
    (found,) = json.loads(said)
    assert found["name"] == "noise"
    assert found["command"] == "actsparse reproduce noise --seeds 1 --steps 8"
    assert {claim["verdict"] for claim in found["claims"]} == {"undecided"}  # one seed
    assert (tmp_path / "report.html").exists()
    records = {path: path.read_bytes() for path in tmp_path.glob("runs/*/record.jsonl")}
    code, again, told = call(*words)
    assert code == 0
    assert told.count("done before") == len(records) == 9
    assert {path: path.read_bytes() for path in records} == records
    assert json.loads(again)[0]["claims"] == found["claims"]


@pytest.mark.slow
@pytest.mark.parametrize("name", [name for name in CLAIMS if name != "noise"])
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
        (["ratio", "--seeds", "0"], "seeds=0"),
    ],
    ids=["name", "data", "seeds"],
)
def test_mistakes_are_named(words: list[str], said: str) -> None:
    code, _, told = call(*words)
    assert code == 2
    assert said in told

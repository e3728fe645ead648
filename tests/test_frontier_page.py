"""docs/frontier.md is what the records say, and README shows its scoreboard."""

from __future__ import annotations

from pathlib import Path

import pytest
from typer.testing import CliRunner

from actsparse.cli.main import app
from actsparse_lab.records import read_runs
from actsparse_lab.report.frontier_page import markdown_scoreboard

ROOT = Path(__file__).parents[1]
RECORDS = Path("benchmarks/frontier")
QUICK = ("digits", "text", "cifar10", "web")  # all recipes; the others are for the few that matter


def test_the_page_is_made_of_the_records(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(ROOT)
    done = CliRunner().invoke(app, ["report", str(RECORDS), "--markdown"])
    assert done.exit_code == 0, done.output
    assert done.stdout == (ROOT / "docs" / "frontier.md").read_text(encoding="utf-8")


def test_the_readme_shows_the_scoreboard() -> None:
    readme = (ROOT / "README.md").read_text(encoding="utf-8")
    assert markdown_scoreboard(ROOT / RECORDS).strip() in readme


def test_five_paired_seeds_of_one_clean_commit_a_task() -> None:
    tasks = {path.parent.name for path in (ROOT / RECORDS).glob("*/frontier.json")}
    assert tasks == {*QUICK, "text-long", "web-long"}
    for task in tasks:
        runs = read_runs(ROOT / RECORDS / task)
        assert all(run.finished for run in runs)
        seeds: dict[str, set[int]] = {}
        for run in runs:
            seeds.setdefault(run.arm, set()).add(run.seed)
            assert not run.header["git"]["dirty"]
        assert all(each == {0, 1, 2, 3, 4} for each in seeds.values())
        recipes = seeds.keys() - {"no-mlp", "half-steps"}
        assert len(recipes) >= (8 if task in QUICK else 3)

"""docs/frontier.md is what the records say, and README says the same."""

from __future__ import annotations

from pathlib import Path

import pytest
from typer.testing import CliRunner

from actsparse.cli.main import app
from actsparse_lab.analysis.verdicts import beyond
from actsparse_lab.records import read_runs
from actsparse_lab.report.frontier import FEWER, board

ROOT = Path(__file__).parents[1]
RECORDS = Path("benchmarks/frontier")
DEMO = RECORDS / "demo"
QUICK = ("digits", "text", "cifar10", "web")  # all recipes; the others are for the few that matter


def test_the_page_is_made_of_the_records(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(ROOT)
    done = CliRunner().invoke(app, ["report", str(RECORDS), "--markdown"])
    assert done.exit_code == 0, done.output
    assert done.stdout == (ROOT / "docs" / "frontier.md").read_text(encoding="utf-8")


def test_the_readme_says_what_the_task_that_counts_says() -> None:
    readme = " ".join((ROOT / "README.md").read_text(encoding="utf-8").split())
    of = board(ROOT / RECORDS / "text-long")
    assert of is not None
    assert of.counts == "yes"
    best, vanilla = of.row("best"), of.row(of.best)
    assert best is not None
    assert vanilla is not None
    fewer = best.inference_improvement
    assert f"has {100 * fewer.mean:.0f} ± {100 * (fewer.half or 0):.0f} % fewer active" in readme
    lower = -best.change.mean / vanilla.quality.mean
    share = 100 * best.inference_density.mean
    assert f"{share:.1f} % of all, at a loss that is lower by {100 * lower:.0f} %" in readme


def test_five_paired_seeds_of_one_clean_commit_a_task() -> None:
    tasks = {path.parent.name for path in (ROOT / RECORDS).glob("*/frontier.json")}
    assert tasks == {*QUICK, "demo", "text-long", "web-long"}
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


def test_the_demo_shows_what_it_is_for() -> None:
    """The default recipe against the best vanilla, and the papers' claim, in its full form."""
    of = board(ROOT / DEMO)
    assert of is not None
    assert of.needs_mlps == "yes"
    best = of.row("best")
    assert best is not None
    assert best.within_noise == "yes"
    assert best.fewer == "yes"  # at least 60 % in inference and in training
    assert beyond(best.living_improvement, FEWER, of.seeds) == "yes"
    assert of.claim is not None
    assert of.claim.holds == "yes"

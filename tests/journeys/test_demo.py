"""The demo as a user types it: trained, timed, filled in, and all on one page."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from matplotlib.figure import Figure
from typer.testing import CliRunner

from actsparse.cli.main import app
from actsparse_lab.campaigns.demo import LIVE
from actsparse_lab.cli import demo
from actsparse_lab.records import RecordError, read_runs
from actsparse_lab.report import write_report
from actsparse_lab.report.benchmarks import read_benchmark


@pytest.fixture(scope="module")
def ran(tmp_path_factory: pytest.TempPathFactory, pixel: bytes) -> tuple[Path, str]:
    """A short demo: timed on fewer rows, and its plots are made but saved as one pixel."""
    out = tmp_path_factory.mktemp("demo")
    threads = torch.get_num_threads()
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(demo, "TIMED", 64)
        patch.setattr(Figure, "savefig", lambda figure, file, **_: file.write(pixel))
        done = CliRunner().invoke(
            app, ["demo", "--steps", "4", "--rounds", "1", "--workers", "1", "--out", str(out)]
        )
    torch.set_num_threads(threads)
    assert done.exit_code == 0, done.output
    return out, done.stdout


def test_the_page_leads_with_the_default_recipe(ran: tuple[Path, str]) -> None:
    out, said = ran
    assert {run.arm for run in read_runs(out)} == set(LIVE)
    page = (out / "report.html").read_text(encoding="utf-8")
    title = page[page.index("<h1>") : page.index("</h1>")]
    assert "best has" in title
    assert "1 seed, on your machine" in title
    assert page.index('class="tiles"') < page.index('id="frontier"') < page.index('id="filled-in"')
    assert "as fast in a training step as the best dense" in page
    assert "less memory kept for backward" in page
    told = page[: page.index("<h2>What it fills in</h2>")]
    assert "undecided" not in told
    assert "best has" in said


def test_the_timed_network_is_the_trained_one(ran: tuple[Path, str]) -> None:
    out, _ = ran
    record = read_benchmark(out / "best.json")
    assert (record["task"], record["arm"], record["seed"]) == ("text", "best", 0)
    for phase in ("inference", "training"):
        assert {each["to"] for each in record[phase]["ratios"]} == {
            "accelerated", "without MLPs", "bfloat16",
        }  # fmt: skip
    kept = record["training"]["kept"]
    assert 0 < kept["accelerated"] < 1.1 * kept["dense"]  # no block is sparse after 4 steps


def test_dense_and_sparse_fill_in_the_same(ran: tuple[Path, str]) -> None:
    rows = json.loads((ran[0] / "filled-in.json").read_text())["rows"]
    assert len(rows) == 3
    assert all(row["dense"] == row["sparse"] for row in rows)
    assert all("⟨1⟩" in row["given"] for row in rows)


def test_a_torn_file_is_named(ran: tuple[Path, str]) -> None:
    path = ran[0] / "filled-in.json"
    whole = path.read_text()
    path.write_text('{"rows": [{"given": 3}]}')
    with pytest.raises(RecordError, match=r"filled-in.*given"):
        write_report(ran[0])
    path.write_text(whole)

"""`actsparse bench here`: a table and its JSON, of both dtypes."""

from __future__ import annotations

import json
from functools import partial

import pytest
from typer.testing import CliRunner

from actsparse.bench import here
from actsparse.cli.main import app


@pytest.fixture(autouse=True)
def _small(monkeypatch: pytest.MonkeyPatch) -> None:
    sizes = {"d": 16, "h": 64, "densities": [0.1, 0.3], "tokens": [2, 197], "rounds": 1}
    monkeypatch.setattr(here, "bench_here", partial(here.bench_here, **sizes))


def test_the_table_and_its_json_twin() -> None:
    runner = CliRunner()
    shown = runner.invoke(app, ["bench", "here"])
    assert shown.exit_code == 0, shown.output
    assert all(word in shown.output for word in ("float32", "bfloat16", "training", "GB/s"))
    told = json.loads(runner.invoke(app, ["bench", "here", "--json"]).stdout)
    kinds = [(2, "forward"), (197, "forward"), (197, "training")]
    found = [(row["dtype"], row["tokens"], row["kind"]) for row in told["rows"]]
    assert found == [(dtype, *kind) for dtype in ("float32", "bfloat16") for kind in kinds]
    assert all(row["gflops"] > 0 and row["gain"] > 0 for row in told["rows"])
    assert [mlp["sizes"]["dtype"] for mlp in told["mlps"]] == ["float32", "bfloat16"]

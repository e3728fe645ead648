"""The README says what the records say, and its example runs."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

import pytest

from actsparse.bench.model import CUT
from actsparse_lab.analysis.measures import theory_of
from actsparse_lab.records import read_runs
from actsparse_lab.report import compare, markdown_benchmarks, markdown_table, markdown_theory
from actsparse_lab.report.benchmarks import benchmarks_of

ROOT = Path(__file__).parents[1]
README = (ROOT / "README.md").read_text(encoding="utf-8")


@pytest.mark.parametrize("task", ["digits", "text", "lm"])
def test_the_tables_are_the_records(task: str) -> None:
    page = ROOT / "docs" / "results.md"
    table = markdown_table(compare(read_runs(ROOT / "benchmarks" / task))).strip()
    assert table in page.read_text(encoding="utf-8")


def test_the_theory_is_the_record() -> None:
    runs = read_runs(ROOT / "benchmarks" / "digits-measures")
    page = (ROOT / "docs" / "results.md").read_text(encoding="utf-8")
    assert markdown_theory(runs).strip() in page
    table = compare(runs)
    theory = theory_of(table, runs)
    assert theory is not None
    assert theory.identity is not None
    said = re.search(r"The identity held to (\S+) over (\S+) pairs", page)
    assert said
    assert said[1] == f"{theory.identity.gap:.1e}"
    assert said[2] == str(theory.identity.count)


def test_the_cost_of_measures_is_the_record() -> None:
    record = json.loads((ROOT / "benchmarks" / "measures.json").read_text(encoding="utf-8"))
    page = (ROOT / "docs" / "measures.md").read_text(encoding="utf-8")
    plain = record["memory"]["plain"]["peak_mib"]
    for row in record["ratios"]:
        peak = record["memory"][row["of"]]["peak_mib"] / plain
        times = f"{row['value']:.3f} | {row['low']:.3f} … {row['high']:.3f}"
        assert f"| {row['of']} | {times} | {peak:.3f} |" in page
    trace = record["gauss_newton"]
    assert f"{trace['probes']} probes" in page
    assert f"{trace['seconds']:.1f} s" in page


MLPS = ["mlp-1-thread", "mlp-bfloat16", "mlp-2-threads", "mlp-zipf", "mlp-d-2048", "mlp-jsrelu"]
MODELS = [
    f"model-{name}{dtype}"
    for name in ("vit-b", "gpt2", "t5-base", "llama-135m")
    for dtype in ("", "-bfloat16")
]


def record(name: str) -> dict[str, Any]:
    found: dict[str, Any] = json.loads((ROOT / "benchmarks" / f"{name}.json").read_text("utf-8"))
    return found


def gains(names: list[str]) -> str:
    return markdown_benchmarks(
        benchmarks_of([ROOT / "benchmarks" / f"{name}.json" for name in names])
    )


def test_the_gains_are_the_records() -> None:
    page = (ROOT / "docs" / "sparse-execution.md").read_text(encoding="utf-8")
    assert gains(MLPS).strip() in page
    assert gains(MODELS).strip() in page
    for name in MODELS:
        (row,) = (row for row in record(name)["rows"] if 0.04 < row["density"] < 0.06)
        ours, limit = ({q["to"]: q for q in row["ratios"]}[to] for to in ("accelerated", CUT))
        interval = f"{ours['value']:.2f} ({ours['low']:.2f} to {ours['high']:.2f})"
        assert f"| {interval} | {limit['value']:.2f} | `actsparse bench model" in README
    (row,) = (
        row
        for row in record("mlp-1-thread")["rows"]
        if row["tokens"] == 1576 and 0.04 < row["density"] < 0.06
    )
    memory = row["memory"]
    assert f"{memory['sparse'] / memory['dense']:.3f} of the dense hidden layer" in page


@pytest.mark.parametrize("name", ["auto", "auto-bfloat16"])
def test_auto_is_the_record(name: str) -> None:
    page = (ROOT / "docs" / "sparse-execution.md").read_text(encoding="utf-8")
    rows = record(name)["rows"]
    worst = min(rows, key=lambda row: row["ratio"]["value"])
    ratio = worst["ratio"]
    found = f"{ratio['value']:.3f} [{ratio['low']:.3f} … {ratio['high']:.3f}]"
    at = f"T = {worst['tokens']}, density {worst['density']:.2f}"
    words = " ".join(page.split())
    assert f"the lowest of {len(rows)} was {found}, at {at} (`benchmarks/{name}.json`)" in words
    missed = sum(row["ratio"]["value"] < 0.97 for row in rows)
    assert f"{missed} {'cells in float32' if name == 'auto' else 'in bfloat16'}" in words


def test_the_costs_are_the_record() -> None:
    record = json.loads((ROOT / "benchmarks" / "training_step.json").read_text(encoding="utf-8"))
    page = (ROOT / "docs" / "training.md").read_text(encoding="utf-8")
    found = re.search("<!-- costs: .*? -->\n(.*?)<!-- end of costs -->", page, re.DOTALL)
    assert found
    for row in record["ratios"]:
        line = f"| {row['of']} ÷ {row['to']} | {row['value']:.3f} |"
        assert f"{line} {row['low']:.3f} … {row['high']:.3f} |" in found[1]


def test_the_readme_is_read_at_once() -> None:
    assert len(README.splitlines()) <= 150


def test_the_ten_lines_run(capsys: pytest.CaptureFixture[str]) -> None:
    code = re.search(r"```python\n(.*?)```", README, re.DOTALL)
    assert code
    exec(compile(code[1], "README.md", "exec"), {})
    assert "sparsity" in capsys.readouterr().out


@pytest.mark.parametrize(
    "page",
    [
        "README.md",
        "CONTRIBUTING.md",
        "docs/results.md",
        "docs/measures.md",
        "docs/frontier.md",
        "docs/lab-log.md",
    ],
)
def test_links_to_files_lead_somewhere(page: str) -> None:
    text = (ROOT / page).read_text(encoding="utf-8")
    local = [to for to in re.findall(r"\]\(([^)#]+)\)", text) if "://" not in to]
    assert [to for to in local if not (ROOT / page).parent.joinpath(to).exists()] == []

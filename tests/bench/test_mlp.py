"""What `bench mlp` and `bench auto` count, beside what they time."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from typer.testing import CliRunner

from actsparse.bench.mlp import Layer, bench_mlp, break_even, zipf
from actsparse.cli.main import app
from actsparse_lab.bench.auto import bench_auto


@pytest.mark.parametrize("pattern", ["even", "zipf"])
@pytest.mark.parametrize("density", [0.0, 0.02, 0.3, 1.0])
def test_a_layer_has_the_density_it_was_asked_for(pattern: str, density: float) -> None:
    layer = Layer(600, 16, 500, density, seed=0, pattern=pattern)  # type: ignore[arg-type]
    assert abs(layer.density - density) <= 0.5 / 600  # each unit's count of tokens is rounded
    z = torch.nn.functional.linear(layer.x, layer.up, layer.bias)
    shares = (z > 0).float().mean(0).sort(descending=True).values
    if pattern == "zipf" and density == 0.02:
        assert shares[0] > 0.99  # c ÷ rank with c = 0.02 · 500 ÷ (1 + ln 500 ÷ …) > 1
        assert shares[-1] < 0.01


def test_zipf_shares_fall_as_one_over_rank() -> None:
    shares = zipf(3072, 0.05).double()
    assert float(shares.mean()) == pytest.approx(0.05, rel=1e-6)
    free = shares[shares < 1]
    ranks = torch.arange(3072 - len(free) + 1, 3073)
    assert float((free * ranks).std() / (free * ranks).mean()) < 1e-6


def test_break_even_lies_between_the_rows_where_the_gain_ends() -> None:
    def row(density: float, *values: float) -> dict[str, object]:
        names = ("sparse", "screened")
        ratios = [{"to": to, "value": v} for to, v in zip(names, values, strict=True)]
        return {"tokens": 8, "density": density, "forward": {"ratios": ratios}}

    rows = [row(0.01, 2.0, 4.0), row(0.1, 1.5, 1.0), row(0.4, 0.75, 0.2)]
    (found,) = break_even(rows, "forward").values()
    assert found is not None
    assert 0.1 < found < 0.4
    assert break_even(rows[:2], "forward") == {8: None}
    assert break_even(rows, "training") == {}


def test_what_is_kept_for_backward_is_the_packed_entries() -> None:
    h, t, density = 512, 197, 0.1
    (row,) = bench_mlp(32, h, [density], [t], rounds=3)["rows"]
    blocks = -(-h // 384)
    packed = 6 * round(row["density"] * h * t) + 8 * (t * blocks + 1)  # value, index; pointer
    assert row["memory"] == {"dense": 4 * h * t, "sparse": packed, "screened": packed}
    assert row["memory"]["sparse"] < 0.25 * row["memory"]["dense"]


def test_auto_keeps_small_blocks_dense() -> None:
    (row,) = bench_auto(8, 16, [0.1], [3], rounds=3)["rows"]
    assert row["program"] == "dense"


@pytest.mark.parametrize(
    ("words", "says"),
    [
        (["mlp", "--pattern", "odd"], "--pattern 'odd'; known: even, zipf"),
        (["mlp", "--activation", "relo"], "--activation 'relo'; known: "),
        (["mlp", "--tokens", "many"], "--tokens 'many': expected numbers, separated by commas"),
        (["mlp", "--densities", "2"], "density 2.0: expected 0 to 1"),
        (["auto", "--tokens", "0"], "0 tokens: expected 1 or more"),
    ],
    ids=lambda value: value[-1] if isinstance(value, list) else "",
)
def test_what_cannot_be_timed_says_why(words: list[str], says: str) -> None:
    result = CliRunner().invoke(app, ["bench", *words])
    assert result.exit_code != 0
    assert says in result.stderr


def test_the_table_has_a_json_twin(tmp_path: Path) -> None:
    words = [
        "--d-model",
        "16",
        "--d-hidden",
        "32",
        "--tokens",
        "2",
        "--densities",
        ".1",
        "--rounds",
        "3",
    ]
    for verb in ("mlp", "auto"):
        out = tmp_path / f"{verb}.json"
        shown = CliRunner().invoke(app, ["bench", verb, *words, "--out", str(out)])
        assert shown.exit_code == 0, shown.output
        assert "dense ÷" in shown.stdout
        asked = CliRunner().invoke(app, ["bench", verb, *words, "--json"])
        record = json.loads(out.read_text(encoding="utf-8"))
        assert record.keys() == json.loads(asked.stdout).keys()
        assert record["benchmark"] == verb

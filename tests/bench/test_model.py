"""What whole models gain: three programs on the same weights and data, and their limits."""

from __future__ import annotations

import copy
import json
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn
from typer.testing import CliRunner

import actsparse.bench.model
from actsparse.bench.model import CUT, HALF, _step, amdahl, bench_model, cut_out
from actsparse.bench.models_at_density import arranged
from actsparse.cli.main import app
from tests.bench.test_models_at_density import TINY

KEYS = {
    "density", "blocks", "after", "error", "seconds", "ratios", "ran", "mlps", "mlp_ratio",
    "mlp_share", "amdahl", "reached", "best_dense",
}  # fmt: skip
PROGRAMS = ("dense", "layers", "dense programs", "accelerated")
EPS = torch.finfo(torch.float32).eps


def called(*words: str | Path) -> Any:
    return CliRunner().invoke(app, [str(word) for word in words])


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize("name", TINY)
def test_a_row_holds_what_was_timed_and_its_limits(name: str, dtype: Any) -> None:
    told: list[str] = []
    result = bench_model(
        name, [0.1], 1, "sparse", memory=False, progress=told.append, dtype=dtype, **TINY[name]
    )
    result = json.loads(json.dumps(result, allow_nan=False))
    assert (result["benchmark"], result["model"], result["sizes"]["rounds"]) == ("model", name, 1)
    (row,) = result["rows"]
    assert row.keys() == KEYS
    single = dtype == "float32"
    assert row["density"] == pytest.approx(0.1, abs=0.005 if single else 0.03)
    assert row["after"] == pytest.approx(
        row["density"], rel=0.01 if single else 0.2
    )  # steps of 1e-8
    # sums of up to 64 products, and of 204 tokens in gradients, through up to four blocks
    assert row["error"].pop("tokens", 0) == 0 or not single
    most = 1000 * EPS if single else 16 * torch.finfo(torch.bfloat16).eps
    assert all(value <= most for value in row["error"].values())
    assert {"logits"} < row["error"].keys() or name not in ("vit-b", "gpt2")
    assert row["seconds"].keys() == {*PROGRAMS, CUT}
    dense, cut = row["seconds"]["dense"], row["seconds"][CUT]
    assert [each["to"] for each in row["ratios"]] == ["accelerated", CUT]
    assert row["mlp_share"] == pytest.approx(1 - cut / dense)
    assert row["amdahl"] == pytest.approx(amdahl(row["mlp_share"], row["mlp_ratio"]))
    assert row["reached"] * row["amdahl"] == pytest.approx(row["ratios"][0]["value"])
    assert all("sparse" in line for line in row["ran"])  # as told to, at any size
    calls = {"vit-b": [2], "gpt2": [3], "t5-base": [2, 2 * 12]}.get(name, [2, 2 * 11])
    assert [mlp["calls"] for mlp in row["mlps"]] == calls
    assert any("round 1 of 1" in line for line in told)


@pytest.mark.parametrize("name", TINY)
def test_without_mlps_their_input_goes_on(name: str) -> None:
    subject = arranged(name, 0.1, **TINY[name])
    cut, hooked = copy.deepcopy(subject.model), copy.deepcopy(subject.model)
    idle = cut_out(cut, subject.inputs)
    for block in subject.blocks(hooked):
        module = hooked.get_submodule(block.name)
        module.register_forward_hook(lambda _, args, output: args[0])
    one, two = subject.run(cut), subject.run(hooked)
    assert one[0].equal(two[0])
    assert not one[0].equal(subject.run(subject.model)[0])
    weights = {id(p) for b in subject.blocks(subject.model) for p in b.up.module.parameters()}
    weights |= {id(p) for b in subject.blocks(subject.model) for p in b.down.module.parameters()}
    gates = [b.gate for b in subject.blocks(subject.model) if b.gate is not None]
    weights |= {id(p) for gate in gates for p in gate.module.parameters()}
    assert len(idle) == len(weights)
    if subject.training:
        one[1].backward()
        two[1].backward()
        assert all(p.grad is None for p in idle)
        learning = [
            (p.grad, q.grad) for p, q in zip(cut.parameters(), hooked.parameters(), strict=True)
        ]
        assert all(p.equal(q) for p, q in learning if p is not None and q is not None)
        assert sum(p is not None for p, _ in learning) == len(learning) - len(idle)


def test_no_product_of_an_mlp_runs_without_mlps() -> None:
    subject = arranged("gpt2", 0.1, **TINY["gpt2"])
    names = {id(p) for b in subject.blocks(subject.model) for p in (b.up.module, b.down.module)}
    assert len(names) == 6

    def products(model: nn.Module) -> int:
        with torch.profiler.profile() as seen:
            subject.run(model)[1].backward()
        return sum(e.count for e in seen.key_averages() if e.key in ("aten::addmm", "aten::mm"))

    dense = products(subject.model)
    cut_out(subject.model, subject.inputs)
    assert dense - products(subject.model) == 3 * 6  # of each of three blocks


def test_the_optimizer_works_on_idle_parameters_too() -> None:
    mlp = nn.Sequential(nn.Linear(4, 8), nn.ReLU(), nn.Linear(8, 4))
    model = nn.Sequential(nn.Linear(4, 4), mlp)
    x = torch.randn(3, 4)
    idle = cut_out(model, x)
    before = [p.detach().clone() for p in idle]
    step = _step(model, lambda: model(x).sum(), idle)
    step()
    assert all(p.grad is not None and not p.grad.any() for p in idle)
    # weight decay alone moves them: lr · 0.01 of a weight, which float32 may round away
    assert all(torch.allclose(p, q, rtol=1e-6) for p, q in zip(idle, before, strict=True))
    assert model[0].weight.grad is not None
    assert model[0].weight.grad.any()


def test_sparsified_models_are_cut_out_plain() -> None:
    from actsparse import SwapActivation, ZerothBias, sparsify

    mlp = nn.Sequential(nn.LayerNorm(4), nn.Linear(4, 8), nn.ReLU(), nn.Linear(8, 4))
    x = torch.randn(3, 5, 4)
    sparsify(mlp, [ZerothBias(finetune=True), SwapActivation("jsrelu")], inputs=x)
    cut_out(mlp, x)
    assert mlp(x).equal(mlp[0](x))


def test_amdahl() -> None:
    assert amdahl(0.0, 5.0) == 1.0
    assert amdahl(1.0, 5.0) == pytest.approx(5.0)
    assert amdahl(0.6, float("inf")) == pytest.approx(1 / 0.4)


def test_no_density_is_an_error() -> None:
    with pytest.raises(ValueError, match="densities is empty"):
        bench_model("gpt2", [])


@pytest.mark.slow
def test_peaks_of_memory_are_of_processes_of_their_own() -> None:
    result = bench_model("gpt2", [0.1], 1, "sparse", **TINY["gpt2"])
    memory = result["rows"][0]["memory"]
    assert memory.keys() == {"dense", "accelerated"}
    for peak in memory.values():
        assert 0 <= peak["step_mib"] < peak["peak_mib"]


def test_cli_prints_a_table_and_keeps_the_record(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    small = partial(bench_model, mode="sparse", **TINY["gpt2"])
    monkeypatch.setattr(actsparse.bench.model, "bench_model", small)
    words = ["bench", "model", "gpt2", "--densities", ".1, .3", "--rounds", "1", "--no-memory"]
    done = called(*words, "--out", tmp_path / "gpt2.json")
    assert done.exit_code == 0, done.output
    assert json.loads(called(*words, "--json").stdout)["model"] == "gpt2"
    for word in ("Amdahl", "reached", "0.100", "0.300"):
        assert word in done.stdout
    assert "round 1 of 1" in done.stderr
    kept = json.loads((tmp_path / "gpt2.json").read_text())
    assert {"versions", "hardware", "git", "benchmark", "rows"} <= kept.keys()
    assert len(kept["rows"]) == 2


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (
            ["vit"],
            "unknown model 'vit'; known: vit-b, gpt2, t5-base, llama-135m, llama-135m-generate",
        ),
        ([], "give a model (vit-b, gpt2, t5-base, llama-135m or llama-135m-generate), or --run"),
        (
            ["gpt2", "--run", "x"],
            "give a model (vit-b, gpt2, t5-base, llama-135m or llama-135m-generate), or --run",
        ),
        (["gpt2", "--densities", "5"], "density=5.0: expected a number between 0 and 1"),
        (
            ["gpt2", "--densities", "few"],
            "--densities 'few': expected numbers, separated by commas",
        ),
        (["--run", "nowhere"], "nowhere holds no record.jsonl"),
    ],
)
def test_cli_says_what_would_be_right(words: list[str], message: str) -> None:
    done = called("bench", "model", *words)
    assert done.exit_code == 2
    assert message in done.stderr
    assert "Traceback" not in done.output


def test_a_trained_model_is_timed_as_it_is(tmp_path: Path) -> None:
    quick = ["--steps", "4"]
    for setting in ("log_every=4", "eval_every=4", "batch_size=16"):
        quick += ["--set", setting]
    done = called("train", "--arm", "paper", *quick, "--out", tmp_path)
    assert done.exit_code == 0, done.output
    folder = tmp_path / "runs" / "paper-seed0"
    out = tmp_path / "trained.json"
    done = called("bench", "model", "--run", folder, "--rounds", "1", "--out", out)
    assert done.exit_code == 0, done.output
    assert "accuracy: dense" in done.stdout
    told = json.loads(out.read_text())
    assert (told["task"], told["arm"], told["rows"], told["batch"]) == ("digits", "paper", 300, 16)
    for phase in ("inference", "training"):
        assert 0 < told[phase]["density"] < 1
        assert told[phase]["seconds"].keys() == {*PROGRAMS, CUT, HALF}
        assert [each["to"] for each in told[phase]["ratios"]] == ["accelerated", CUT, HALF]
    kept = [json.loads(line) for line in (folder / "record.jsonl").read_text().splitlines()]
    result = next(line for line in kept if line["kind"] == "result")
    for score in told["score"].values():
        assert score["quality"] == result["quality"]
        # 300 losses of order 1 in float32, in batches of other sizes
        assert score["loss"] == pytest.approx(result["loss"], rel=1e-5)
    assert told["inference"]["density"] == result["inference"]["density"]

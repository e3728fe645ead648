"""`bench gpu` without one: what it counts, keeps and passes over, by PyTorch's own operators."""

from __future__ import annotations

import ctypes
import itertools
import json
from collections.abc import Callable, Mapping
from functools import partial
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from typer.testing import CliRunner

from actsparse.cli.main import app
from actsparse_lab.bench import gpu, gpu_mlp, gpu_models
from actsparse_lab.bench.gpu import Budget, bench_gpu, chosen, targets
from actsparse_lab.bench.gpu_mlp import (
    Block,
    Place,
    by_events,
    candidates,
    decode,
    moved,
    place_at,
    train,
    tune,
)

D, H, T = 16, 32, 4
SECONDS = {"dense": 24.0, "compiled": 16.0, "sparse": 12.0, "screened": 8.0, "auto": 20.0}


def fake_timer(programs: Mapping[str, Callable[[], object]], rounds: int) -> dict[str, list[float]]:
    """A machine on which every program always takes the seconds above."""
    return {name: [SECONDS[name]] * rounds for name in programs}


def fake_place(dtype: torch.dtype = torch.float64) -> Place:
    return Place(torch.device("cpu"), dtype, fake_timer, compiled=False)


@pytest.fixture
def brief(monkeypatch: pytest.MonkeyPatch) -> None:
    """Few densities, few rounds."""
    monkeypatch.setattr(gpu_mlp, "ROUNDS", (3, 3))
    monkeypatch.setattr(gpu, "DECODE", (0.05,))
    monkeypatch.setattr(gpu, "TRAINING", (0.01, 0.5))


def test_bytes_are_those_of_the_rows_that_are_needed() -> None:
    """One token at d = 4096, H = 16384, bf16, 5 %; the screen leaves 7 %: by hand."""
    weight, row = 134_217_728, 8192
    wanted = {
        "dense": 268_435_456,
        "compiled": 268_435_456,
        "sparse": weight + 819 * row,
        "screened": 67_108_864 + (1147 + 819) * row,
    }
    assert moved(4096, 16384, 2, 819 / 16384, 1147 / 16384) == wanted
    alone = wanted["screened"] - (1147 - 819) * row
    assert moved(4096, 16384, 2, 819 / 16384)["screened"] == alone


def test_decoding_is_held_against_its_bytes() -> None:
    place = fake_place()
    blocks = [Block(place, 3, D, H, seed) for seed in range(2)]
    row = decode(place, blocks, 0.1, speed=1e3)
    active = [block.active() for block in blocks]
    assert row["density"] == sum(float(each.double().mean()) for each in active) / 2
    assert row["units"] == sum(float(each.any(0).double().mean()) for each in active) / 2
    assert row["units"] > row["density"]  # three tokens seldom need the same
    assert row["calls"] == gpu_mlp.CALLS
    assert row["bytes"] == {
        name: each for name, each in moved(D, H, 8, row["units"]).items() if name != "compiled"
    }
    for name in ("dense", "sparse", "screened"):
        assert row["seconds"][name] == SECONDS[name] / gpu_mlp.CALLS
        assert row["floor"][name] == row["bytes"][name] / 1e3
        assert row["reached"][name] == row["floor"][name] / row["seconds"][name]
    ratios = {each["to"]: each["value"] for each in row["ratios"]}
    assert ratios == {"sparse": 2.0, "screened": 3.0}
    # sums of 32 products of order 1 in float64, in another order
    assert max(row["error"].values()) < 100 * torch.finfo(torch.float64).eps


def test_a_training_step_is_held_against_float64() -> None:
    place = fake_place()
    row = train(place, Block(place, 200, D, H, 0), 0.2)
    assert list(row["error"]) == ["dense", "sparse", "auto"]
    for errors in row["error"].values():
        # the largest sums are of 200 products of order 1
        assert max(errors[what] for what in ("y", "dx", "dU")) < 1e3 * torch.finfo(float).eps
    assert row["relative_error"]["dU"]["dense"] in (1.0, None)
    for kind in ("forward", "training"):
        ratios = {each["to"]: each["value"] for each in row[kind]["ratios"]}
        assert ratios == {"sparse": 2.0, "auto": 1.2}
    assert row["memory"] == {"dense": None, "sparse": None, "auto": None}


def test_errors_of_a_wrong_product_are_seen(monkeypatch: pytest.MonkeyPatch) -> None:
    place, own = fake_place(), gpu_mlp.sparse_mlp
    monkeypatch.setattr(gpu_mlp, "sparse_mlp", lambda *args, **how: 1.5 * own(*args, **how))
    errors = train(place, Block(place, 20, D, H, 0), 0.2)["error"]
    for what in ("y", "dx", "dU"):
        assert errors["sparse"][what] > 1e6 * errors["dense"][what]


@pytest.mark.parametrize("density", [0.01, 0.5])
def test_a_block_has_the_density_it_was_arranged_for(density: float) -> None:
    block = Block(fake_place(), gpu_mlp.SAMPLE, D, H, 0)
    block.arrange(density)
    # one of a unit's tokens more or less, where two are alike
    assert abs(float(block.active().double().mean()) - density) < 1.5 / gpu_mlp.SAMPLE


def test_the_screen_leaves_what_its_bound_does_not_exclude() -> None:
    """Codes without error: only units whose z is within rounding of 0 are left beside active."""
    decoding = pytest.importorskip("actsparse.kernels.triton_decode", exc_type=ImportError)
    place = fake_place()
    block = Block(place, 2, D, H, 0)
    block.up = torch.randint(-126, 127, (H, D)).double()
    block.up[:, 0] = 127  # each row's scale is 1
    block.bias = torch.full((H,), -300.0, dtype=torch.float64)
    left = candidates(block, decoding.quantise(block.up))
    assert 0 < left == float(block.active().any(0).double().mean()) < 1
    block.up += 0.4 * torch.rand(H, D)
    assert candidates(block, decoding.quantise(block.up)) >= float(
        block.active().any(0).double().mean()
    )


def test_tuning_compares_the_same_packed_entries(monkeypatch: pytest.MonkeyPatch) -> None:
    packing = pytest.importorskip("actsparse.kernels.triton_pack", exc_type=ImportError)
    from actsparse.kernels import triton_products

    called: list[str] = []

    def pack(x: Any, up: Any, bias: Any, floor: float, fused: bool) -> tuple[Any, ...]:
        called.append(f"fused={fused}")
        return torch.zeros(1), torch.zeros(8), None

    def sample(name: str, pointer: Any, index: Any, x: Any, up: Any) -> None:
        called.append(name)
        assert x.shape == (T, D)
        assert up.shape == (H, D)

    monkeypatch.setattr(packing, "pack", pack)
    monkeypatch.setattr(packing, "sample_dense", partial(sample, "whole"))
    monkeypatch.setattr(triton_products, "sample", partial(sample, "entries"))
    place = place_at("cpu", "float32", compiled=False)
    row = tune(place, Block(place, T, D, H, 0), 0.1)
    assert row["density"] == 8 / (T * H)
    assert [each["to"] for each in row["packing"]["ratios"]] == ["fused"]
    assert [each["to"] for each in row["sampling"]["ratios"]] == ["entries"]
    assert {"fused=True", "fused=False", "whole", "entries"} == set(called)


def test_the_sizes_that_were_chosen_are_kept(monkeypatch: pytest.MonkeyPatch) -> None:
    products = pytest.importorskip("actsparse.kernels.triton_products", exc_type=ImportError)
    config = SimpleNamespace(kwargs={"BM": 16}, num_warps=4, num_stages=3)
    tuned = SimpleNamespace(configs=[config], cache={(8192, "torch.bfloat16"): config})
    monkeypatch.setattr(products, "_multiply", tuned)
    wanted = [{"key": ["8192", "torch.bfloat16"], "BM": 16, "warps": 4, "stages": 3}]
    assert chosen()["triton_products._multiply"] == wanted
    monkeypatch.setattr(products, "_multiply", (tuned, tuned))
    assert chosen()["triton_products._multiply[1]"] == wanted


def test_events_time_programs_in_turn(monkeypatch: pytest.MonkeyPatch) -> None:
    now, ran = [0.0], []

    class Event:
        def __init__(self, enable_timing: bool) -> None:
            self.at = -1.0

        def record(self) -> None:
            self.at = now[0]

        def elapsed_time(self, end: Any) -> float:
            return end.at - self.at

    def program(name: str, milliseconds: float) -> None:
        ran.append(name)
        now[0] += milliseconds

    monkeypatch.setattr(torch.cuda, "Event", Event)
    monkeypatch.setattr(torch.cuda, "synchronize", lambda: None)
    programs = {"a": partial(program, "a", 250.0), "b": partial(program, "b", 500.0)}
    assert by_events(programs, 2) == {"a": [0.25, 0.25], "b": [0.5, 0.5]}
    assert ran == ["a", "b", "b", "a"]


def test_what_does_not_fit_any_more_is_passed_over() -> None:
    now = [0.0]
    budget = Budget(200.0, clock=lambda: now[0])

    def lasting(seconds: float) -> dict[str, Any]:
        now[0] += seconds
        return {}

    assert budget.measure("training", "one", lambda: lasting(150.0)) == {"took": 150.0}
    assert budget.measure("training", "two", lambda: lasting(1.0)) is None  # the last took 150
    assert budget.measure("tuning", "three", lambda: lasting(25.0)) == {"took": 25.0}
    assert budget.measure("tuning", "four", lambda: lasting(1.0), kind="other") == {"took": 1.0}
    assert budget.measure("decode", "five", lambda: lasting(1.0)) is None
    assert budget.passed_over == ["training: two", "decode: five"]


def test_what_breaks_is_told_and_the_rest_goes_on() -> None:
    def breaks() -> dict[str, Any]:
        raise RuntimeError("no kernel image")

    budget = Budget(1e3)
    assert budget.measure("decode", "one", breaks) is None
    assert budget.measure("decode", "two", dict) is not None
    assert budget.failed == {"decode: one": "RuntimeError: no kernel image"}
    assert budget.passed_over == []


@pytest.mark.usefixtures("brief")
def test_the_record_is_kept_after_every_measurement() -> None:
    kept: list[dict[str, Any]] = []
    result = bench_gpu(
        D, H, "float32", T, sections=["training", "decode"], compiled=False, device="cpu",
        keep=lambda each: kept.append(json.loads(json.dumps(each, allow_nan=False))),
    )  # fmt: skip
    assert [(len(each["decode"]), len(each["training"])) for each in kept] == [
        (1, 0),
        (2, 0),
        (2, 1),
        (2, 2),
    ]
    assert kept[-1] == json.loads(json.dumps(result))
    assert [row["tokens"] for row in result["decode"]] == [1, 16]
    assert result["failed"] == {}
    assert result["passed_over"] == []
    assert result["bandwidth"] > 0
    assert all(each["found"] > 0 for each in result["targets"] if "0.5 %" not in each["what"])


@pytest.mark.usefixtures("brief")
def test_without_time_all_is_passed_over_and_said() -> None:
    ticks = itertools.count(step=100.0)
    result = bench_gpu(
        D, H, "float32", T, minutes=4.0, compiled=False, device="cpu", clock=lambda: next(ticks)
    )
    assert len(result["decode"]) == 1  # at 100 s of 240; it takes 100, and 140 are over
    assert "decode: T = 16, density 0.05" in result["passed_over"]
    named = sum(len(result[section]) for section in gpu.SECTIONS)
    named += len(result["passed_over"]) + len(result["failed"])
    assert named == 2 + 2 + len(gpu.TUNING) + len(gpu_models.MODELS)
    assert [each["found"] is None for each in result["targets"]] == [False] * 4 + [True] * 4


def test_targets_are_over_the_faster_form_of_dense() -> None:
    ratios = [
        {"of": of, "to": to, "value": value}
        for of, to, value in [
            ("dense", "sparse", 2.0), ("compiled", "sparse", 1.6), ("dense", "screened", 3.0),
            ("compiled", "screened", 2.4), ("dense", "auto", 1.0), ("compiled", "auto", 0.8),
        ]
    ]  # fmt: skip
    reached = {"sparse": 0.7, "screened": 0.5}
    decoding = {"tokens": 1, "wanted": 0.05, "ratios": ratios, "reached": reached}
    others = {"tokens": 16, "wanted": 0.05, "ratios": [], "reached": {}}
    training = {"tokens": 8192, "wanted": 0.01, "training": {"ratios": ratios}}
    found = targets({"decode": [decoding, others], "training": [training]})
    assert [each["found"] for each in found] == [1.6, 2.4, 0.7, 0.5, 1.6, 1.0, None, None]


LLAMA = {
    "hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2, "num_attention_heads": 2,
    "num_key_value_heads": 1, "vocab_size": 50, "prompt": 50, "written": 4,
}  # fmt: skip
VIT = {
    "hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2, "num_attention_heads": 2,
    "image_size": 8, "patch_size": 2, "num_labels": 5, "batch": 6,
}  # fmt: skip


def test_a_llama_decodes_by_each_program(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(gpu_mlp, "ROUNDS", (3, 3))
    handles, own = [], gpu_models.accelerate
    monkeypatch.setattr(
        gpu_models, "accelerate", lambda *args, **how: handles.append(own(*args, **how))
    )
    row = gpu_models.measure(place_at("cpu", "float32"), "llama", 0.2, **LLAMA)
    # 128 units of the last 4 tokens of 54: four standard deviations, were they independent
    assert abs(row["density"] - 0.2) < 4 * (0.2 * 0.8 / 512) ** 0.5
    timed = row["decoding"]
    assert timed["per_second"] == {name: 4 / each for name, each in timed["seconds"].items()}
    assert timed["joules"] == timed["memory"] == dict.fromkeys(("dense", "sparse", "screened"))
    for handle, mode in zip(handles, ("sparse", "screened"), strict=True):
        rows = handle.table()
        assert [each["program"] for each in rows] == [mode, mode]
        # two, one before a graph; then texts of 4: three to warm up, one, one round, three rounds
        assert {each["calls"][mode] for each in rows} == {2 + 1 + 4 * (3 + 1 + 1 + 3)}


def test_a_vit_is_timed_forward_and_in_training(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(gpu_mlp, "ROUNDS", (3, 3))
    row = gpu_models.measure(place_at("cpu", "bfloat16"), "vit-b", 0.2, **VIT)
    assert abs(row["density"] - 0.2) < 0.02  # bf16 has some of 102 tokens alike
    for kind in ("forward", "training"):
        timed = row[kind]
        assert timed["per_second"] == {name: 6 / each for name, each in timed["seconds"].items()}
        assert [(each["of"], each["to"]) for each in timed["ratios"]] == [("dense", "auto")]


def test_energy_is_nvmls_counter(monkeypatch: pytest.MonkeyPatch) -> None:
    asked = []

    def by_uuid(uuid: bytes, device: Any) -> int:
        asked.append(uuid)
        return 0

    def count(device: Any, target: Any) -> int:
        target._obj.value = 5250
        return 0

    library = SimpleNamespace(
        nvmlInit_v2=lambda: 0,
        nvmlDeviceGetHandleByUUID=by_uuid,
        nvmlDeviceGetTotalEnergyConsumption=count,
    )
    monkeypatch.setattr(ctypes, "CDLL", lambda name: library)
    assert gpu_models.energy("1f2e") == 5.25
    assert asked == [b"GPU-1f2e"]
    library.nvmlDeviceGetTotalEnergyConsumption = lambda device, target: 3  # not supported
    assert gpu_models.energy("1f2e") is None

    def none(name: str) -> None:
        raise OSError(name)

    monkeypatch.setattr(ctypes, "CDLL", none)
    assert gpu_models.energy("1f2e") is None


@pytest.mark.parametrize(
    ("wrong", "says"),
    [
        ({"sections": ["decoding"]}, "unknown section 'decoding'; known: decode, training"),
        ({"dtype": "int8"}, "unknown dtype 'int8'; known: bfloat16, float16, float32"),
    ],
    ids=["section", "dtype"],
)
def test_bad_input_is_named(wrong: dict[str, Any], says: str) -> None:
    with pytest.raises(ValueError, match=says):
        bench_gpu(device="cpu", **wrong)


def test_without_a_gpu_the_command_says_what_waits(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    result = CliRunner().invoke(app, ["bench", "gpu"])
    assert result.exit_code == 2
    assert "needs an NVIDIA GPU, and PyTorch sees none; benchmarks/gpu.md" in result.stderr


@pytest.mark.usefixtures("brief")
def test_the_tables_have_a_json_twin(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    on_cpu = partial(place_at, "cpu", "float32", compiled=False)
    monkeypatch.setattr(gpu_mlp, "place_at", lambda *names: on_cpu())
    monkeypatch.setattr(gpu, "place_at", lambda *names: on_cpu())
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda: "a GPU")
    out = tmp_path / "gpu.json"
    words = ["bench", "gpu", "--d-model", "16", "--d-hidden", "32", "--tokens", "4"]
    words += ["--sections", "decode,training"]
    shown = CliRunner().invoke(app, [*words, "--out", str(out)])
    assert shown.exit_code == 0, shown.output
    assert "targets" in shown.stdout
    assert "not measured" in shown.stdout
    record = json.loads(out.read_text(encoding="utf-8"))
    asked = json.loads(CliRunner().invoke(app, [*words, "--json"]).stdout)
    assert record.keys() == asked.keys()
    assert record["hardware"]["gpu"] == "a GPU"
    assert record["benchmark"] == "gpu"


@pytest.mark.usefixtures("brief")
def test_a_broken_measurement_ends_in_1_and_keeps_the_others(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def breaks(*args: Any) -> None:
        raise RuntimeError("no kernel image")

    monkeypatch.setattr(gpu, "place_at", lambda *names: place_at("cpu", "float32", False))
    monkeypatch.setattr(gpu_mlp, "place_at", lambda *names: None)
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda: "a GPU")
    monkeypatch.setattr(gpu, "train", breaks)
    out = tmp_path / "gpu.json"
    words = [
        "--d-model",
        "16",
        "--d-hidden",
        "32",
        "--tokens",
        "4",
        "--sections",
        "decode,training",
    ]
    result = CliRunner().invoke(app, ["bench", "gpu", *words, "--out", str(out)])
    assert result.exit_code == 1
    assert "failed: training: T = 4, density 0.01: RuntimeError: no kernel image" in result.stderr
    assert len(json.loads(out.read_text(encoding="utf-8"))["decode"]) == 2

"""Trained models are timed as they are: what ran how, and what is left as it was."""

from __future__ import annotations

import copy
import sys
from typing import Any

import pytest
import torch
from torch import nn

from actsparse import SwapActivation, sparsify
from actsparse_lab.bench.trained import bench_speed


def model(d: int, h: int, bias: float, function: type[nn.Module] = nn.ReLU) -> nn.Module:
    torch.manual_seed(0)
    mlp = nn.Sequential(nn.LayerNorm(d), nn.Linear(d, h), function(), nn.Linear(h, d))
    nn.init.constant_(mlp[1].bias, bias)  # type: ignore[arg-type]
    return mlp


def timed(mlp: nn.Module, x: torch.Tensor) -> dict[str, Any]:
    return bench_speed(mlp, x, lambda each: each(x), rounds=3)


def test_a_small_block_is_left_dense_and_says_why() -> None:
    mlp, x = model(8, 32, 0.0), torch.randn(4, 8)
    before = copy.deepcopy(mlp.state_dict())
    found = timed(mlp, x)
    assert found["mlps"] == {"of": "dense", "to": "chosen", "value": 1.0, "low": 1.0, "high": 1.0}
    assert found["why"] == "1 of 1 blocks dense: too small: 256 weights in up, 4 tokens"
    (block,) = found["blocks"]
    assert (block["program"], block["tried"], block["tokens"]) == ("dense", False, 4)
    assert (block["d_model"], block["d_hidden"]) == (8, 32)
    with torch.no_grad():
        z = mlp[1](mlp[0](x))  # type: ignore[index]
    assert found["density"] == block["density"] == pytest.approx(float((z > 0).float().mean()))
    assert {each["to"] for each in block["ratios"]} >= {"sparse", "screened"}  # all the same
    assert all(before[key].equal(value) for key, value in mlp.state_dict().items())
    assert "_actsparse_site" not in mlp[1].__dict__  # type: ignore[index]


def test_a_chosen_program_is_what_the_mlps_are_timed_by(monkeypatch: pytest.MonkeyPatch) -> None:
    from actsparse.kernels.choose import Trial

    module = sys.modules["actsparse.kernels.plan"]
    monkeypatch.setattr(module, "LEAST", 0)
    monkeypatch.setattr(Trial, "best", lambda self, now: "sparse")
    found = timed(model(16, 64, -2.0), torch.randn(8, 16))
    (block,) = found["blocks"]
    assert (block["program"], block["tried"]) == ("sparse", True)
    assert found["why"] == "1 of 1 blocks sparse"
    ratios = {each["to"]: each["value"] for each in block["ratios"]}
    assert found["mlps"]["value"] == pytest.approx(ratios["sparse"])
    monkeypatch.setattr(Trial, "best", lambda self, now: "dense")
    found = timed(model(16, 64, -2.0), torch.randn(8, 16))
    assert found["mlps"]["value"] == 1.0
    assert found["why"] == "1 of 1 blocks dense: no other program was clearly faster"


def test_where_no_block_can_run_sparse_the_reason_is_told() -> None:
    found = timed(model(8, 32, 0.0, nn.GELU), torch.randn(4, 8))
    assert "never exactly zero" in found["why"]
    assert found["mlps"]["value"] == 1.0
    assert "ratios" not in found["blocks"][0]


def test_the_function_in_force_of_a_sparsified_model_is_timed() -> None:
    mlp, x = model(8, 32, 0.0, nn.GELU), torch.randn(4, 8)
    sparsify(mlp, [SwapActivation("jsrelu")], inputs=x)
    found = timed(mlp, x)
    assert 0 < found["density"] < 1
    assert found["blocks"][0]["ratios"]
    assert found["why"] == "1 of 1 blocks dense: too small: 256 weights in up, 4 tokens"

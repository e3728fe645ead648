"""Density by brute force, exactly, on MLPs of every kind; the laws it obeys."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor, nn

from actsparse.activations import ACTIVATIONS
from actsparse.blocks import find_mlp_blocks
from actsparse.observe import observe
from actsparse.observe.density import _CHUNK, _sum_rows
from tests.observe.brute import D, H, Mlp, Recorder, same


def model_of(*phis: str, gated: bool = False) -> nn.Module:
    return nn.Sequential(*(Mlp(phi, gated, H + i) for i, phi in enumerate(phis)))


def check(model: nn.Module, *passes: Tensor, **options: Any) -> dict[str, Any]:
    blocks = find_mlp_blocks(model, passes[0])
    with Recorder(blocks) as brute, observe(model, blocks=blocks, **options) as seen:
        for x in passes:
            model(x)
    summary = seen.summary("train")
    assert summary is not None
    assert same(summary, brute.summary())
    for name in brute.blocks:
        assert torch.equal(seen.units(name, "train"), brute.masks(name)[0].double().mean(0))
    return summary


@pytest.mark.parametrize("gated", [False, True])
@pytest.mark.parametrize("phi", sorted(ACTIVATIONS))
def test_every_activation_agrees_with_brute_force(phi: str, gated: bool) -> None:
    model = model_of(phi, "relu", gated=gated)
    summary = check(model, torch.randn(3, 7, D), torch.randn(2, 5, D))
    assert summary["units"] == 2 * H + 1


def test_where_density_and_derivative_density_part() -> None:
    both = {}
    for phi in ("gelu", "relu6", "jsrelu"):
        row = check(model_of(phi), torch.randn(8, 9, D) * 2)
        both[phi] = row["density"], row["derivative_density"]
    assert both["jsrelu"][0] == both["jsrelu"][1] < 1
    assert both["relu6"][0] > both["relu6"][1] > 0
    assert both["gelu"] == (1.0, 1.0)


sizes = st.tuples(st.integers(1, 4), st.integers(1, 9))


@given(sizes, st.sampled_from(["relu", "relu6", "hardtanh", "jsrelu", "s_shape"]), st.booleans())
def test_laws(size: tuple[int, int], phi: str, gated: bool) -> None:
    summary = check(model_of(phi, gated=gated), torch.randn(*size, D))
    assert 0 <= summary["density"] <= summary["living_density"] <= 1
    assert 0 <= summary["derivative_density"] <= 1
    assert 0 <= summary["dead"] <= summary["units"]


@given(st.integers(0, 6), st.integers(1, 5))
def test_splitting_the_batch_changes_nothing(first: int, length: int) -> None:
    model, x = model_of("relu6", "relu"), torch.randn(6, length, D)
    whole = check(model, x)
    with observe(model, inputs=x) as seen:
        for part in (x[:first], x[first:]):
            model(part)
    assert seen.summary("train") == whole


@pytest.mark.parametrize("n", [1, _CHUNK - 1, _CHUNK, _CHUNK + 1, 3 * _CHUNK + 200])
def test_any_number_of_rows(n: int) -> None:
    check(model_of("relu", "relu6"), torch.randn(1, n, D))


@pytest.mark.parametrize("n", [0, 1, 254, 255, 256, 510, 1021])
def test_sum_rows_is_exact_whatever_the_strides(n: int) -> None:
    flags = torch.rand(n, 7) < 0.9
    for each in (flags, torch.ones_like(flags), flags.T.contiguous().T, flags[:, ::2]):
        assert torch.equal(_sum_rows(each), each.long().sum(0))


def test_an_empty_batch_counts_nothing() -> None:
    model = model_of("relu")
    with observe(model, inputs=torch.randn(2, 3, D)) as seen:
        model(torch.randn(0, 3, D))
    assert seen.summary("train") is None


def test_nan_is_active() -> None:
    model, x = model_of("relu"), torch.randn(2, 3, D)
    with observe(model, inputs=x) as seen:
        model(x * float("nan"))
    summary = seen.summary("train")
    assert summary is not None
    assert summary["density"] == summary["derivative_density"] == 1.0


def test_dead_units_and_the_density_of_the_living() -> None:
    model, x = model_of("relu"), torch.randn(4, 9, D)
    with torch.no_grad():
        model[0].up.bias[:4] = -1e3
    summary = check(model, x)
    assert summary["dead"] >= 4
    assert summary["living_density"] > summary["density"]
    with torch.no_grad():
        model[0].up.bias[:] = -1e3
    assert check(model, x)["living_density"] == 0.0


@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16, torch.float16])
def test_dtypes(dtype: torch.dtype) -> None:
    check(model_of("relu", "relu6").to(dtype), torch.randn(3, 700, D, dtype=dtype))


def test_under_autocast() -> None:
    model, x = model_of("relu", "relu6"), torch.randn(3, 300, D)
    blocks = find_mlp_blocks(model, x)
    with (
        torch.autocast("cpu", torch.bfloat16),
        Recorder(blocks) as brute,
        observe(model, blocks=blocks) as seen,
    ):
        model(x)
    assert same(seen.summary("train"), brute.summary())


@pytest.mark.parametrize("start_inside", [True, False])
def test_inference_mode_and_normal_mode_mix(start_inside: bool) -> None:
    model, x = model_of("relu", "silu").eval(), torch.randn(3, 4, D)
    with torch.inference_mode(start_inside):
        seen = observe(model, inputs=x)
    with torch.inference_mode():
        model(x)
    seen.reset()
    model(x)
    once = seen.summary("inference")
    with torch.inference_mode():
        model(x)
    twice = seen.summary("inference")
    seen.close()
    assert once is not None
    assert twice is not None
    assert twice["density"] == once["density"]
    assert twice["blocks"][0]["tokens"] == 2 * once["blocks"][0]["tokens"] == 24


# --- masks ---------------------------------------------------------------------------------------


@pytest.mark.parametrize("phi", ["relu", "relu6"])
@pytest.mark.parametrize("gated", [False, True])
def test_an_explicit_mask(phi: str, gated: bool) -> None:
    model, x = model_of(phi, phi, gated=gated), torch.randn(30, 41, D)
    blocks, keep = find_mlp_blocks(model, x), torch.rand(30, 41) < 0.6
    for mask in (keep, keep.long(), lambda b, t: keep[:b, :t]):
        with Recorder(blocks) as brute, observe(model, blocks=blocks, mask=mask) as seen:
            model(x)
        assert same(seen.summary("train"), brute.summary(keep))
    with observe(model, blocks=blocks, mask=lambda b, t: None) as seen:
        model(x)
    assert same(seen.summary("train"), brute.summary())


def test_a_mask_of_the_wrong_shape() -> None:
    model, x = model_of("relu"), torch.randn(3, 4, D)
    with (
        observe(model, inputs=x, mask=torch.ones(3, 5)),
        pytest.raises(ValueError, match=r"shape \(3, 5\), but block '0' runs on .* \(3, 4\)"),
    ):
        model(x)


def test_a_mask_that_leaves_nothing_out_or_everything() -> None:
    model, x = model_of("relu"), torch.randn(3, 4, D)
    with observe(model, inputs=x, mask=torch.zeros(3, 4, dtype=torch.bool)) as seen:
        model(x)
    assert seen.summary("train") is None
    check(model, x, mask=torch.ones(3, 4))


def test_rows_without_a_batch_are_all_counted() -> None:
    model = nn.Sequential(nn.Flatten(1, 2), Mlp(), nn.Identity())
    check(model, torch.randn(4, 2, D // 2))  # [4, D] is neither [B, T, D] nor [B·T, D]


def test_images_keep_their_axes() -> None:
    check(model_of("relu", "relu6"), torch.randn(2, 5, 4, D))


def test_gates_with_zeros_in_both_factors() -> None:
    model = model_of("relu", gated=True)
    with torch.no_grad():
        model[0].up.weight[:3] = 0
        model[0].up.bias[:3] = 0
    summary = check(model, torch.randn(4, 5, D))
    assert summary["dead"] >= 3
    assert summary["density"] < summary["derivative_density"]


@pytest.mark.parametrize("act", [nn.ReLU, nn.ReLU6, nn.Hardswish, nn.SiLU])
def test_activations_that_work_in_place(act: Any) -> None:
    x, summaries = torch.randn(4, 9, D) * 4, []
    for inplace in (False, True):
        torch.manual_seed(0)
        model = nn.Sequential(nn.Linear(D, H), act(inplace=inplace), nn.Linear(H, D))
        with observe(model, inputs=x) as seen:
            model(x)
        summaries.append(seen.summary("train"))
    assert summaries[0] == summaries[1]


def test_an_activation_without_a_known_derivative() -> None:
    class Inline(Mlp):
        def forward(self, x: Tensor) -> Tensor:
            z = self.up(self.norm(x))
            return x + self.down(z * torch.sigmoid(1.7 * z))

    model, x = nn.Sequential(Inline()), torch.randn(2, 3, D)
    with pytest.raises(ValueError, match="derivative of the activation of block '0' is unknown"):
        observe(model, inputs=x)
    assert not model[0].up._forward_hooks

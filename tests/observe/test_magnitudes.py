"""Magnitudes: the histogram against brute force in float64, and what its thresholds promise."""

from __future__ import annotations

import json
import math
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor, nn

from actsparse import observe, sparsify
from actsparse.activations import named
from actsparse.blocks import find_mlp_blocks
from actsparse.modify import SwapActivation
from actsparse.observe.magnitudes import _CHUNK, Magnitudes, bins_of, ends
from tests.observe.brute import D, H, Mlp, Recorder

X = torch.randn(3, 5, D, generator=torch.Generator().manual_seed(1))
EPS = torch.finfo(torch.float64).eps
LOW, HIGH = 2.0**-24, 2.0**24


def model_of(*functions: str, gated: bool = False) -> nn.Module:
    """Blocks of different widths, so that pooling them has to weigh."""
    return nn.Sequential(*(Mlp(name, gated, H + i) for i, name in enumerate(functions))).eval()


def parts_of(model: nn.Module, x: Tensor = X, **options: Any) -> tuple[list[Magnitudes], Recorder]:
    blocks = find_mlp_blocks(model, x)
    with Recorder(blocks) as brute, observe(model, "magnitudes", blocks=blocks, **options) as seen:
        model(x)
    return [seen.part(name, "inference", "magnitudes") for name in seen.blocks], brute


def pairs(brute: Recorder, name: str) -> tuple[Tensor, Tensor]:
    """z and a [tokens, H] of a block, as float64."""
    z = torch.cat(brute.z[name])
    a = brute.blocks[name].activation.call(z.clone())
    a = a * torch.cat(brute.u[name]) if brute.u[name] else a
    return z.double(), a.detach().double()


def shares(a: Tensor) -> Tensor:
    """Of each a its share of its token's Σ a², [tokens, H]; 0 where the token has none."""
    return (a.square() / a.square().sum(-1, keepdim=True)).nan_to_num(0.0)


def lost(a: Tensor, gone: Tensor) -> float:
    """The share of Σ a² that goes, its mean over tokens that have some."""
    some = (a != 0).any(-1)
    return float((shares(a) * gone).sum(-1)[some].mean())


# --- bins ----------------------------------------------------------------------------------------


def test_ends_increase_by_a_32nd_of_a_power_of_two() -> None:
    right = ends()
    assert right[0] == 0
    assert right[-1] == HIGH
    assert len(right) == 1 + 32 * 48
    assert right[1] == LOW * 33 / 32
    ratios = right[2:] / right[1:-1]
    assert ratios.min() > 1 + 1 / 64 - EPS
    assert ratios.max() <= 33 / 32


@given(z=st.floats(LOW, HIGH, exclude_min=True))
def test_a_bin_reaches_from_one_end_to_the_next(z: float) -> None:
    index, right = int(bins_of(torch.tensor(z, dtype=torch.float64))), ends()
    assert z <= right[index]
    assert index == 1 or right[index - 1] < z


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16], ids=str)
def test_a_right_end_belongs_to_its_bin_and_the_next_number_does_not(dtype: torch.dtype) -> None:
    right = ends()[1:-1]  # 6 bits of mantissa: the same numbers in every dtype
    exact = right.to(dtype)
    assert torch.equal(exact.double(), right)
    own = torch.arange(1, len(right) + 1)
    assert torch.equal(bins_of(exact), own)
    assert torch.equal(bins_of(torch.nextafter(exact, torch.full_like(exact, math.inf))), own + 1)


def test_what_lies_beyond_is_in_the_first_bin_and_behind_the_last_end() -> None:
    low = [-math.inf, -1.0, -0.0, 0.0, math.nan]
    z = torch.tensor([*low, 5e-324, LOW, HIGH, 1e300, math.inf], dtype=torch.float64)
    last = len(ends()) - 1
    assert bins_of(z).tolist() == [0, 0, 0, 0, 0, 1, 1, last, last + 1, last + 1]


# --- the histogram -------------------------------------------------------------------------------


@pytest.mark.parametrize("gated", [False, True], ids=["plain", "gated"])
@pytest.mark.parametrize("function", ["relu", "jsrelu", "squared_relu", "gelu"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
def test_the_histogram_is_that_of_brute_force(
    dtype: torch.dtype, function: str, gated: bool
) -> None:
    x = X.to(dtype)
    parts, brute = parts_of(model_of(function, function, gated=gated).to(dtype), x)
    for name, part in zip(brute.blocks, parts, strict=True):
        z, a = pairs(brute, name)
        assert int(part.tokens) == 15
        for by, score in enumerate((z, a.abs())):
            index = torch.bucketize(score, ends())  # ends[i − 1] < score ≤ ends[i]
            for i in range(len(ends())):
                there = index == i
                assert int(part.active[by, i]) == int((a[there] != 0).sum())
                energy = sum(shares(a)[there].tolist())
                # sums of at most 15 (H + 1) positive numbers
                assert float(part.energy[by, i]) == pytest.approx(energy, rel=400 * EPS, abs=0)
            assert int(part.active[by].sum()) > 15


def test_long_batches_and_masks_count_row_by_row() -> None:
    x = torch.randn(2, _CHUNK, D)
    mask = torch.rand(2, _CHUNK) < 0.5
    mask[0, 0], mask[0, 1] = True, False
    x[0, 1, 0] = math.nan  # left out, so nobody may see it
    model = model_of("relu")
    ((part,), brute) = parts_of(model, x, mask=mask)
    a = pairs(brute, next(iter(brute.blocks)))[1][mask.flatten()]
    assert int(part.tokens) == int(mask.sum())
    for active, energy in zip(part.active, part.energy, strict=True):
        assert int(active.sum()) == int((a != 0).sum())
        # a sum of some 5000 positive numbers
        assert float(energy.sum()) == pytest.approx(int((a != 0).any(-1).sum()), rel=5000 * EPS)


def test_a_function_with_a_threshold_counts_what_it_lets_pass() -> None:
    model = model_of("relu")
    name = "relu(threshold=0.5)"
    sparsify(model, SwapActivation(name), inputs=X)
    ((part,), brute) = parts_of(model)
    z, _ = pairs(brute, next(iter(brute.blocks)))
    a = named(name).value(z)
    assert part.score == "z"
    assert int(part.active[0].sum()) == int((a != 0).sum()) < int((z > 0).sum())
    assert int(part.active[0, bins_of(torch.tensor(0.25))]) == 0


# --- thresholds ----------------------------------------------------------------------------------


def score_of(part: Magnitudes, z: Tensor, a: Tensor) -> Tensor:
    return z if part.score == "z" else a.abs()


@pytest.mark.parametrize("gated", [False, True], ids=["plain", "gated"])
@pytest.mark.parametrize("function", ["jsrelu", "gelu", "silu"])
@pytest.mark.parametrize("share", [0.0, 1e-4, 0.01, 0.3, 1.0])
def test_threshold_dropped_and_density_are_of_one_rule(
    share: float, function: str, gated: bool
) -> None:
    ((part,), brute) = parts_of(model_of(function, gated=gated))
    z, a = pairs(brute, next(iter(brute.blocks)))
    assert part.score == ("z" if function == "jsrelu" else "abs(a)")
    t = part.threshold(share)
    below = score_of(part, z, a) <= t
    # ratios of sums of 15 H positive numbers
    assert part.dropped(t) == pytest.approx(lost(a, below), rel=400 * EPS, abs=0)
    assert lost(a, below) <= share * (1 + 400 * EPS)
    assert part.density(t) == int((a[~below] != 0).sum()) / a.numel()
    assert part.density(-math.inf) == int((a != 0).sum()) / a.numel()
    assert (t == 0) == (share == 0)


@given(t=st.floats(0, 4))
def test_between_ends_more_is_said_to_be_dropped_than_is(t: float) -> None:
    for part, z, a in SEEN:
        below = score_of(part, z, a) <= t
        assert part.dropped(t) >= lost(a, below) * (1 - 400 * EPS)
        assert part.density(t) <= int((a[~below] != 0).sum()) / a.numel()


def seen_of(function: str) -> tuple[Magnitudes, Tensor, Tensor]:
    ((part,), brute) = parts_of(model_of(function))
    return (part, *pairs(brute, next(iter(brute.blocks))))


SEEN = [seen_of("relu"), seen_of("gelu")]


@pytest.mark.parametrize("function", ["relu", "silu"])
@given(sizes=st.lists(st.sampled_from([1e-3, 1.0, 1e3]), min_size=5, max_size=5))
def test_a_token_counts_the_same_whatever_the_scale_of_its_activations(
    function: str, sizes: list[float]
) -> None:
    part = Magnitudes(BLOCK)
    scale = torch.tensor(sizes, dtype=torch.float64)[:, None]
    z = torch.randn(5, BLOCK.d_hidden, generator=torch.Generator().manual_seed(2)).double() * scale
    a = named(function).value(z)
    part.update(None, {"a": a, "z": z}, None)
    for share in (0.01, 0.1, 0.5):
        t = part.threshold(share)
        # a mean over 5 tokens of sums of H positive numbers
        assert lost(a, score_of(part, z, a) <= t) <= share * (1 + 400 * EPS)


BLOCK = find_mlp_blocks(model_of("relu"), X)[0]


@given(
    found=st.dictionaries(st.integers(1, 1536), st.floats(1e-6, 1e6), min_size=1, max_size=8),
    share=st.floats(0, 1),
)
def test_a_threshold_is_the_largest_that_may_be_and_the_smallest_that_does_as_much(
    found: dict[int, float], share: float
) -> None:
    part = Magnitudes(BLOCK)
    for index, energy in found.items():
        part.energy[0, index] = energy
    t, full = part.threshold(share), sorted(found)
    kept = [index for index in full if ends()[index] > t]
    gone = [index for index in full if ends()[index] <= t]
    total = sum(found[index] for index in full)
    rounding = 20 * EPS  # of sums of 8 positive numbers and a product
    assert sum(found[i] for i in gone) <= share * total * (1 + rounding)
    if kept:
        more = sum(found[i] for i in [*gone, kept[0]])
        assert more >= share * total * (1 - rounding)
    assert t == (float(ends()[gone[-1]]) if gone else 0.0)


def test_what_lies_above_the_last_end_is_never_dropped() -> None:
    part = Magnitudes(BLOCK)
    a = torch.full((1, BLOCK.d_hidden), 2 * HIGH)
    part.update(None, {"a": a, "z": a}, None)
    assert part.dropped(part.threshold(1.0)) == 0.0
    assert part.density(part.threshold(1.0)) == part.density(HIGH) == 1.0


@pytest.mark.parametrize("bad", [math.nan, math.inf])
def test_nothing_may_go_where_activations_are_not_finite(bad: float) -> None:
    part = Magnitudes(BLOCK)
    a = torch.rand(3, BLOCK.d_hidden)
    a[1, 2] = bad
    part.update(None, {"a": a, "z": a}, None)
    assert part.threshold(0.5) == 0.0


# --- as a measure --------------------------------------------------------------------------------


def test_a_summary_weighs_blocks_by_units_and_tokens() -> None:
    model = model_of("relu", "jsrelu", "relu")
    with observe(model, {"density": {}, "magnitudes": {"share": 0.05}}, inputs=X) as seen:
        model(X)
        model.train()(X[:1])
    summary = seen.summary("inference")
    assert json.loads(json.dumps(summary)) == summary
    parts = [seen.part(name, "inference", "magnitudes") for name in seen.blocks]
    rows = summary["blocks"]
    assert [row["threshold"] for row in rows] == [part.threshold(0.05) for part in parts]
    for row, part in zip(rows, parts, strict=True):
        assert row["density_above"] == part.density(row["threshold"]) < row["density"]
        assert part.density(-math.inf) == row["density"]
    pooled = sum(row["density_above"] * row["units"] for row in rows)
    # three products and two sums
    assert summary["density_above"] == pytest.approx(pooled / summary["units"], rel=10 * EPS)
    assert (summary["threshold"], summary["score"]) == (None, None)
    assert {row["score"] for row in rows} == {"z"}
    assert f"{rows[0]['threshold']:.3g}" in str(seen)
    assert seen.summary("train")["blocks"][0]["tokens"] == 5


def test_a_state_goes_on_where_it_was() -> None:
    model = model_of("relu")
    with observe(model, "magnitudes", inputs=X) as whole:
        model(X)
        model(2 * X)
    with observe(model, "magnitudes", inputs=X) as first:
        model(X)
    with observe(model, "magnitudes", inputs=X) as second:
        second.load_state_dict(first.state_dict())
        model(2 * X)
    for one, two in zip(whole.state_dict().values(), second.state_dict().values(), strict=True):
        assert torch.equal(one, two)
    second.reset()
    assert second.summary("inference") is None


@pytest.mark.parametrize("share", [-0.1, 1.1, math.nan])
def test_a_share_is_from_0_to_1(share: float) -> None:
    with pytest.raises(ValueError, match="share must be from 0 to 1"):
        observe(model_of("relu"), {"magnitudes": {"share": share}}, inputs=X)


def test_a_part_that_is_not_there_is_named() -> None:
    model = model_of("relu")
    with observe(model, inputs=X) as seen:
        model(X)
    name = next(iter(seen.blocks))
    with pytest.raises(ValueError, match="magnitudes is not observed; measures: density"):
        seen.part(name, "inference", "magnitudes")
    with pytest.raises(ValueError, match="unknown block 'nowhere'"):
        seen.part("nowhere", "inference", "density")
    with pytest.raises(ValueError, match="has seen no token in phase 'train'"):
        seen.part(name, "train", "density")

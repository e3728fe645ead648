"""Whose gradient flatness reads: samples and tokens, scales, passes that count, what is frozen."""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn

from actsparse import Recipe, SwapActivation, WeightNoise, ZerothBias, find_mlp_blocks, sparsify
from actsparse.observe import observe
from tests.observe.brute import D, Mlp, mlp
from tests.observe.per_token import alike, summary_of

ALL = ("density", "flatness", "gradient", "noise")
X = torch.randn(3, 4, D, dtype=torch.float64, generator=torch.Generator().manual_seed(0))


def losses(model: nn.Module, x: Tensor = X) -> Tensor:
    """Of each sample: [B]."""
    return model(x).square().sum((1, 2))


def seen_in(model: nn.Module, loss: Callable[[], Tensor], **options: Any) -> Any:
    """The summary after a pass of ``loss``."""
    return summary_of(model, loss, inputs=X, **options)


# --- what the loss is of the samples' losses ----------------------------------------------------


def test_scales_and_reductions_are_undone() -> None:
    model, scaler = mlp(gated=True), torch.amp.GradScaler("cpu", init_scale=2.0**10)
    want = seen_in(model, lambda: losses(model).mean())
    given: list[tuple[Callable[[], Tensor], dict[str, Any]]] = [
        (lambda: losses(model).sum(), {"loss_reduction": "sum"}),
        (lambda: losses(model).mean() / 8, {"loss_scale": 1 / 8}),
        (lambda: losses(model).sum() / 5, {"loss_reduction": "sum", "loss_scale": lambda: 0.2}),
        (lambda: scaler.scale(losses(model).mean()), {"loss_scale": scaler}),
    ]
    for loss, options in given:
        assert alike(seen_in(model, loss, **options), want)


def test_accumulation_is_the_mean_over_all_samples() -> None:
    model = mlp()
    with observe(model, "flatness", inputs=X, loss_scale=1 / 2) as seen:
        for part in (X[:2], X[2:] + 1):
            (losses(model, part).mean() / 2).backward()
    whole = torch.cat([X[:2], X[2:] + 1])
    assert alike(seen.summary("train"), seen_in(model, lambda: losses(model, whole).mean()))


def test_a_scaler_is_asked_in_each_pass_and_its_overflows_are_skipped() -> None:
    """Each pass has the scale it was scaled with; one that overflows counts as skipped alone."""
    model = mlp()
    want = seen_in(model, lambda: losses(model).mean(), measures=ALL)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.0)
    scaler = torch.amp.GradScaler("cpu", init_scale=2.0**10, growth_interval=1)
    with observe(model, ALL, inputs=X, loss_scale=scaler) as seen:
        for factor in (1.0, torch.inf, 1.0, torch.nan, 1.0):
            optimizer.zero_grad()
            scaler.scale(losses(model).mean() * factor).backward()
            scaler.step(optimizer)
            scaler.update()
    got = seen.summary("train")
    assert got is not None
    assert (got["skipped"], got["samples"]) == (2, 9)
    # the unbiased noise scale is of 9 samples, three times the same
    assert alike(got, want, "skipped", "samples", "noise_scale")


class Overflow(torch.autograd.Function):
    factor = 1.0

    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:
        return x.clone()

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> Tensor:
        return gradient * Overflow.factor


def test_a_gradient_that_overflows_inside_a_block_is_skipped_where_it_has(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Down's gradient was fine still, and counts with its own samples and tokens."""

    class Relu(nn.Module):
        def forward(self, z: Tensor) -> Tensor:
            return torch.relu(Overflow.apply(z))

    model = mlp()
    model.act = Relu()  # type: ignore[assignment]
    both = (X, X * 2)
    firsts = [seen_in(model, lambda x=x: losses(model, x).mean()) for x in both]  # type: ignore[misc]
    with observe(model, "flatness", inputs=X) as seen:
        losses(model, both[0]).mean().backward()
        monkeypatch.setattr(Overflow, "factor", torch.inf)
        losses(model, both[1]).mean().backward()
    got = seen.summary("train")
    assert got is not None
    assert got["skipped"] == 1
    assert alike(
        got, firsts[0], "skipped", "flatness_down", "down_input_norm", "coefficient",
        "density_from_flatness", "activation_gradient", "effective_gradient", "ratio",
    )  # fmt: skip
    for key in ("flatness_down", "down_input_norm"):
        assert got[key] == pytest.approx((firsts[0][key] + firsts[1][key]) / 2, rel=1e-12)


@pytest.mark.parametrize("as_function", [False, True])
@pytest.mark.parametrize("reduction", ["mean", "sum"])
def test_samples_left_out_count_nowhere(reduction: Any, as_function: bool) -> None:
    model, some = mlp(gated=True), torch.tensor([True, False, True])
    want = seen_in(model, lambda: losses(model, X[some]).mean())
    got = seen_in(
        model,
        lambda: getattr(losses(model)[some], reduction)(),
        sample_mask=(lambda b: some[:b]) if as_function else some,
        loss_reduction=reduction,
    )
    assert alike(got, want)
    none = seen_in(model, lambda: losses(model).sum(), sample_mask=torch.zeros(3).bool())
    assert none is None


@settings(max_examples=15)
@given(st.lists(st.booleans(), min_size=12, max_size=12))
def test_tokens_share_flatness_out_among_them(flags: list[bool]) -> None:
    model, mask = mlp(gated=True), torch.tensor(flags).reshape(3, 4)
    masks = (mask, ~mask, torch.ones(3, 4))
    part, rest, whole = (seen_in(model, lambda: losses(model).mean(), mask=each) for each in masks)
    for key in ("tokens_per_sample", "flatness", "flatness_up", "flatness_gate", "flatness_down"):
        assert part[key] + rest[key] == pytest.approx(whole[key], rel=1e-12)
    assert part["tokens_per_sample"] == sum(flags) / 3


# --- passes -------------------------------------------------------------------------------------


def test_only_what_backward_has_passed_counts() -> None:
    model = mlp()
    want = seen_in(model, lambda: losses(model).mean())
    with observe(model, "flatness", inputs=X) as seen:
        with torch.no_grad():
            model(X)
        with torch.inference_mode():
            model(X)
        model(X)  # its graph is never used
        assert seen.summary("train") is None
        losses(model).mean().backward()
        assert alike(seen.summary("train"), want)
        model.eval()
        assert seen.summary("inference") is None
        losses(model).mean().backward()
        seen.reset("train")
        assert seen.summary("train") is None
        assert alike(seen.summary("inference"), want)
        seen.reset()
        assert seen.summary("inference") is None


def test_where_no_gradient_comes_nothing_is_said() -> None:
    model = mlp(gated=True).requires_grad_(False)
    with observe(model, ALL, inputs=X) as seen:
        model(X)
    assert "flatness" not in (seen.summary("train") or {})
    model.requires_grad_()
    whole = seen_in(model, lambda: losses(model).mean())
    model.requires_grad_(False)
    model.down.requires_grad_()
    down = seen_in(model, lambda: losses(model).mean())
    model.up.requires_grad_()
    up = seen_in(model, lambda: losses(model).mean())
    for some, known in ((down, {"flatness_down"}), (up, {"flatness_down", "flatness_up"})):
        keys = {key for key in some if key.startswith("flatness")}
        assert {key for key in keys if some[key] is not None} == known
        assert {key: some[key] for key in known} == {key: whole[key] for key in known}
        assert (some["coefficient"], some["ratio"]) == (None, None)
        assert (some["samples"], some["tokens_per_sample"]) == (3, 4)


def test_copies_of_a_model_leave_its_numbers_alone() -> None:
    model = mlp()
    with observe(model, "flatness", inputs=X) as seen:
        losses(model).mean().backward()
        before = seen.summary("train")
        losses(copy.deepcopy(model), X * 3).mean().backward()
        assert seen.summary("train") == before


# --- beside modifications -----------------------------------------------------------------------


@pytest.mark.parametrize("gated", [False, True])
@pytest.mark.parametrize("observed_first", [False, True])
def test_a_zeroth_bias_and_weight_noise_are_part_of_what_is_measured(
    gated: bool, observed_first: bool
) -> None:
    model = mlp(gated=gated)
    (block,) = find_mlp_blocks(model, X)
    seen = observe(model, ["density", "flatness"], blocks=[block]) if observed_first else None
    recipe = Recipe("biased", (ZerothBias(), WeightNoise(), SwapActivation()))
    handle = sparsify(model, recipe, blocks=[block])
    (bias,) = (p for name, p in model.named_parameters() if p.shape == (4, D))
    with torch.no_grad():
        bias.normal_()
    seen = seen or observe(model, ["density", "flatness"], blocks=[block])
    losses(model).mean().backward()
    summary = seen.summary("train")
    assert summary is not None
    norm = (model.norm(X) + bias).square().sum(-1).mean().item()
    assert summary["input_norm"] == pytest.approx(norm, rel=1e-12)
    assert summary["density_from_flatness"] == pytest.approx(summary["density"], rel=1e-12)
    assert 0 < summary["density"] < 1
    handle.remove()
    seen.close()


def test_the_identity_holds_while_activations_mix() -> None:
    """From GELU to ReLU over three steps; at the end φ′ has zeros."""
    model = mlp("gelu")
    optimizer = torch.optim.SGD(model.parameters(), lr=1e-3)
    recipe = Recipe("mix", (SwapActivation("relu", mix=3),))
    sparsify(model, recipe, inputs=X, optimizer=optimizer)
    densities = []
    with observe(model, ["density", "flatness"]) as seen:
        for _ in range(6):
            optimizer.zero_grad()
            losses(model).mean().backward()
            optimizer.step()
            summary = seen.summary("train")
            assert summary is not None
            densities.append(summary["derivative_density"])
            assert summary["density_from_flatness"] == pytest.approx(densities[-1], rel=1e-12)
            seen.reset()
    assert densities[0] == 1
    assert densities[-1] < 0.9


# --- bad input ----------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"loss_reduction": "batchmean"}, "loss_reduction='batchmean': expected 'mean' or 'sum'"),
        ({"loss_scale": 0}, "loss_scale=0: expected a number above 0"),
        ({"loss_scale": torch.tensor(2.0)}, "loss_scale=tensor.* expected a number, a function"),
    ],
)
def test_bad_losses_are_refused_at_once(options: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        observe(mlp(), "flatness", inputs=X, **options)


def test_a_sample_mask_of_another_size_is_refused() -> None:
    model = mlp()
    with pytest.raises(ValueError, match=r"sample_mask has shape \(2,\), but the batch has 3 sam"):
        seen_in(model, lambda: losses(model).mean(), sample_mask=torch.ones(2))


def test_nan_at_a_token_left_out_leaves_the_others_their_numbers() -> None:
    model, x = Mlp("relu").double(), torch.randn(2, 3, D, dtype=torch.float64)
    keep = torch.tensor([[True, True, True], [True, True, False]])
    broken = x.clone()
    broken[1, 2] = torch.nan
    found = []
    for batch in (x, broken):
        with observe(model, "flatness", inputs=x, mask=keep, loss_reduction="sum") as seen:
            (model(batch) * keep[..., None]).nan_to_num().square().sum().backward()
        found.append(seen.summary("train"))
    assert found[0] is not None
    assert found[0] == found[1]

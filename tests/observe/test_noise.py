"""Gradient noise against gradients of single samples, taken one by one by autograd."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor, nn

from actsparse.observe import observe
from actsparse.observe.gradient_noise import anisotropy
from tests.observe.brute import D, H, Mlp, mlp
from tests.observe.test_gradients import losses
from tests.zoo import BY_ID

FIELDS = ("feature_anisotropy", "gradient_anisotropy", "noise_scale")
B, T = 5, 3
DRAW = torch.Generator().manual_seed(0)
# What all tokens have in common, after the norm too: a signal above the noise.
X = torch.randn(D, dtype=torch.float64, generator=DRAW) + 0.5 * torch.randn(
    B, T, D, dtype=torch.float64, generator=DRAW
)
EVERY = torch.ones(B, T, dtype=torch.bool)

# Sums of at most B·T·H = 150 terms round to 2e-14. The scale divides by ‖ḡ‖² − tr Σ/n, which
# cancels by 1 + scale/n; tests assert a scale below 100, so by at most 21: 4e-13.
CLOSE = 1e-11


def weight_gradients(model: Mlp, x: Tensor) -> Tensor:
    """Of each sample's own loss with respect to the entry's weight: [B, H, D]."""
    each = [torch.autograd.grad(losses(model(x[b : b + 1]))[0], model.pre.weight) for b in range(B)]
    return torch.stack([gradient for (gradient,) in each])


def noise_scale(gradients: Tensor) -> float | None:
    """From the covariance itself, entry by entry: [n, H, D]."""
    rows = gradients.flatten(1)
    n, mean = len(rows), rows.mean(0)
    trace = float(sum((row - mean).square().sum() for row in rows)) / (n - 1)
    signal = float(mean.square().sum()) - trace / n
    return trace / signal if signal > 0 else None


def spread(rows: Tensor) -> float:
    """``√p ‖αC − I‖_F`` of the second moment of ``rows`` [N, p], as it is written."""
    c = sum(torch.outer(row, row) for row in rows)
    assert isinstance(c, Tensor)
    alpha = c.trace() / c.square().sum()
    return math.sqrt(len(c)) * float((alpha * c - torch.eye(len(c), dtype=c.dtype)).norm())


def expected(model: Mlp, x: Tensor, keep: Tensor = EVERY) -> dict[str, float | None]:
    h = model.norm(x)
    z = model.pre(h)
    a = model.act(z) if model.gate is None else model.act(z) * model.up(h)
    (eta,) = torch.autograd.grad(losses(x + model.down(a)).sum(), z)
    return {
        "feature_anisotropy": spread(h.detach()[keep]),
        "gradient_anisotropy": spread(eta[keep]),
        "noise_scale": noise_scale(weight_gradients(model, x)),
    }


def fields(summary: dict[str, Any] | None) -> dict[str, Any]:
    assert summary is not None
    return {key: summary[key] for key in FIELDS}


@pytest.mark.parametrize("phi", ["relu", "gelu"])
@pytest.mark.parametrize("gated", [False, True])
@pytest.mark.parametrize("reduction", ["mean", "sum"])
def test_every_field_is_that_of_single_samples(phi: str, gated: bool, reduction: str) -> None:
    model = mlp(phi, gated)
    want = expected(model, X)
    assert want["noise_scale"] is not None
    assert 0.01 < want["noise_scale"] < 100
    with observe(model, "noise", inputs=X, loss_reduction=reduction) as seen:  # type: ignore[arg-type]
        getattr(losses(model(X)), reduction)().backward()
    summary = seen.summary("train")
    assert fields(summary) == pytest.approx(want, rel=CLOSE)
    assert summary is not None
    assert fields(summary["blocks"][0]) == fields(summary)


@given(sizes=st.lists(st.integers(1, 3), min_size=2, max_size=4))
def test_passes_add_up_to_one_batch(sizes: list[int]) -> None:
    torch.manual_seed(0)
    model, x = mlp("gelu"), torch.randn(sum(sizes), T, D, dtype=torch.float64) + 1
    found = []
    for parts in ([sum(sizes)], sizes):
        with observe(model, "noise", inputs=x) as seen:
            for part in x.split(parts):
                losses(model(part)).mean().backward()
        found.append(fields(seen.summary("train")))
    assert found[0] == pytest.approx(found[1], rel=CLOSE)


def test_tokens_and_samples_left_out() -> None:
    """Padding has no part in any gradient; a sample left out is as if it had not been there."""
    model, keep = mlp("gelu"), EVERY.clone()
    keep[1, 2] = keep[4] = False
    samples = torch.tensor([True, True, True, True, False])

    def loss(y: Tensor, keep: Tensor) -> Tensor:
        return ((y - 2).square() * keep[..., None]).flatten(1).sum(1).mean()

    with observe(model, "noise", inputs=X, mask=keep, sample_mask=samples) as seen:
        loss(model(X)[samples], keep[samples]).backward()
    each = [
        torch.autograd.grad(loss(model(X[b : b + 1]), keep[b : b + 1]), model.up.weight)[0]
        for b in range(B - 1)
    ]
    got = fields(seen.summary("train"))
    assert got["noise_scale"] == pytest.approx(noise_scale(torch.stack(each)), rel=CLOSE)
    features = model.norm(X).detach()[keep]
    assert got["feature_anisotropy"] == pytest.approx(spread(features), rel=CLOSE)


def test_rows_of_samples_that_lie_apart_are_brought_together() -> None:
    """Time first, a sample's rows are B apart."""
    model, inputs = BY_ID["torch-encoder-gelu-pre-time_first"].build()
    model, x = model.double().eval(), inputs.double()  # type: ignore[union-attr]
    parameters = dict(model.named_parameters())
    with observe(model, "noise", inputs=x) as seen:
        model(x).square().sum((0, 2)).mean().backward()
    summary = seen.summary("inference")
    assert summary is not None
    for row in summary["blocks"]:
        name = next(
            key for key in parameters if key.startswith(row["block"]) and "linear1.w" in key
        )
        each = [
            torch.autograd.grad(model(x[:, b : b + 1]).square().sum(), parameters[name])[0]
            for b in range(x.shape[1])
        ]
        want = noise_scale(torch.stack(each))
        if want is not None:
            assert row["noise_scale"] == pytest.approx(want, rel=CLOSE)
    assert any(row["noise_scale"] is not None for row in summary["blocks"])


def test_scales_are_pooled_as_of_one_layer_and_anisotropies_are_means() -> None:
    model = nn.Sequential(mlp("relu"), mlp("gelu")).double()
    x = X
    with observe(model, "noise", inputs=x) as seen:
        losses(model(x)).mean().backward()
    weights = [model[0].up.weight, model[1].up.weight]
    each = [torch.autograd.grad(losses(model(x[b : b + 1]))[0], weights) for b in range(B)]
    together = torch.stack([torch.cat([g.flatten() for g in gradients]) for gradients in each])
    summary = seen.summary("train")
    assert summary is not None
    want = noise_scale(together)
    assert want is not None
    assert want < 100
    assert summary["noise_scale"] == pytest.approx(want, rel=CLOSE)
    rows = summary["blocks"]
    for key in ("feature_anisotropy", "gradient_anisotropy"):
        assert summary[key] == pytest.approx((rows[0][key] + rows[1][key]) / 2, rel=CLOSE)


def test_noise_and_signal_are_estimated_without_bias() -> None:
    """Gradients made to order: ∇ℓ_b = a_b eᵀ with a_b ~ N(μ, σ²) has tr Σ = σ² and ‖ḡ‖² = μ²."""
    mu, sigma, n, trials = 0.5, 1.5, 2, 700
    model = nn.Sequential(nn.Linear(1, 2), nn.ReLU(), nn.Linear(2, 1)).double()
    with torch.no_grad():
        # unit 0 is the identity on x = 1, unit 1 is silent
        model[0].weight.copy_(torch.tensor([[1.0], [-1.0]]))
        model[0].bias.zero_()
        model[2].weight.copy_(torch.tensor([[1.0, 0.0]]))
    x = torch.ones(n, 1, 1, dtype=torch.float64)
    noise, signal = [], []
    with observe(model, "noise", inputs=x) as seen:
        (watch,) = seen._watches.values()
        for _ in range(trials):
            a = mu + sigma * torch.randn(n, dtype=torch.float64)
            (model(x).flatten() * a).mean().backward()
            _, each_noise, each_signal = watch.measures["train"]["noise"]._numbers()
            noise.append(each_noise)
            signal.append(each_signal)
            seen.reset()
    for got, want in ((noise, sigma**2), (signal, mu**2)):
        values = torch.tensor(got, dtype=torch.float64)
        error = float(values.std()) / math.sqrt(trials)
        # 4 standard errors: one seed in 16000 would miss. A biased estimate would: dividing by n
        # rather than n − 1 is off by σ²/2, the signal without its correction by σ²/n, 1.1 each.
        assert float(values.mean()) == pytest.approx(want, abs=4 * error)
        assert 4 * error < 0.55


def test_anisotropy_is_zero_where_directions_are_alike_and_largest_where_there_is_one() -> None:
    p = 7
    assert anisotropy(torch.eye(p) * 3) == 0
    one = torch.zeros(p, p)
    one[2, 2] = 5
    # √p·‖αC − I‖ with α = 1/5: one direction is right and p − 1 are missing
    assert anisotropy(one) == pytest.approx(math.sqrt(p * (p - 1)))
    assert anisotropy(torch.zeros(p, p)) is None


@given(seed=st.integers(0, 2**16), scale=st.sampled_from([1e-6, 1.0, 1e6]))
def test_anisotropy_is_the_distance_it_says_and_blind_to_size(seed: int, scale: float) -> None:
    rows = torch.randn(9, 4, dtype=torch.float64, generator=torch.Generator().manual_seed(seed))
    # p − (tr C)²/‖C‖² cancels; the rows' spread keeps it above 1e-3, so 2⁻⁵³·p·10³ is left
    assert anisotropy(scale * rows.T @ rows) == pytest.approx(spread(rows), rel=1e-11)


def test_numbers_without_meaning_are_none() -> None:
    model = mlp("gelu")
    with observe(model, "noise", inputs=X) as seen:
        assert seen.summary("train") is None
        losses(model(X[:1])).mean().backward()
        one = fields(seen.summary("train"))
        assert one["noise_scale"] is None  # of one sample nobody knows the noise
        assert one["feature_anisotropy"] is not None
        seen.reset()
        (model(X) * 0).sum().backward()
        assert fields(seen.summary("train"))["gradient_anisotropy"] is None
        seen.reset()
        (losses(model(X)).mean() * math.inf).backward()
        assert seen.summary("train") is None  # skipped
    aims = torch.tensor([1.0, -1.0]).double()
    with observe(model, "noise", inputs=X) as seen:
        (model(X[:1].expand(2, -1, -1)).sum((1, 2)) * aims).mean().backward()
    # opposite gradients: all noise, no signal
    assert fields(seen.summary("train"))["noise_scale"] is None


def test_a_block_that_a_pass_calls_several_times_has_no_scale() -> None:
    """Its samples' gradients are sums over the calls, which come one after the other."""
    model, inputs = BY_ID["albert-one-layer-used-four-times"].build()
    with observe(model, "noise", inputs=inputs) as seen:
        model.train()(**inputs)[0].square().mean().backward()  # type: ignore[arg-type]
    summary = seen.summary("train")
    assert summary is not None
    assert summary["noise_scale"] is None
    assert summary["feature_anisotropy"] > 0


def test_products_keep_their_precision_where_backward_runs_under_autocast() -> None:
    model, x = Mlp("gelu", h=4 * H), X.float()
    found = []
    for inside in (False, True):
        with observe(model, "noise", inputs=x) as seen:
            with torch.autocast("cpu", torch.bfloat16):
                loss = losses(model(x)).mean()
                if inside:
                    loss.backward()
            if not inside:
                loss.backward()
        found.append(fields(seen.summary("train")))
    # the same operations on the same numbers; in bfloat16 products they would be off by 2⁻⁹
    assert found[0] == pytest.approx(found[1], rel=1e-12)

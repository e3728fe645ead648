"""The measure of effective gradients, field by field, against η kept whole and looked at."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor, nn

from actsparse.activations import ACTIVATIONS
from actsparse.blocks import find_mlp_blocks
from actsparse.observe import observe
from tests.observe.brute import D, H, Mlp, mlp

FIELDS = (
    "gradient_sparsity", "gradient_l1", "gradient_l2", "participation", "concentration",
    "gradient_positive", "hidden_gradient",
)  # fmt: skip
B, T = 4, 3
X = torch.randn(B, T, D, dtype=torch.float64)
AIM = torch.randn(B, T, D, dtype=torch.float64)

# Sums of at most B·T·H = 120 terms, each from fewer than 10 roundings of 2⁻⁵³: 1.5e-13.
CLOSE = 1e-12


def losses(y: Tensor) -> Tensor:
    """Of each sample: [B]."""
    return (y - AIM[: len(y)]).square().flatten(1).mean(1)


def stages(model: Mlp, x: Tensor, loss: Any = losses) -> tuple[Tensor, Tensor, Tensor]:
    """z, and the per-sample gradients at z and at φ's output, one sample after the other."""
    rows: list[tuple[Tensor, ...]] = []
    for b in range(len(x)):
        h = model.norm(x[b : b + 1])
        z = model.pre(h)
        f = model.act(z)
        a = f if model.gate is None else f * model.up(h)
        own = loss(torch.cat([x[:b], x[b : b + 1] + model.down(a), x[b + 1 :]]))[b]
        rows.append((z.detach(), *torch.autograd.grad(own, (z, f))))
    return tuple(map(torch.cat, zip(*rows, strict=True)))  # type: ignore[return-value]


def expected(
    z: Tensor, g_z: Tensor, g_f: Tensor, phi: str, keep: Tensor, epsilon: float = 0.0
) -> dict[str, float | None]:
    """The definitions, in loops over tokens; ``keep``: bool, one for each."""
    small = l1 = positive = squares = part = active = whole = 0.0
    tokens = alive = 0
    slope = ACTIVATIONS[phi].derivative(z)
    for t in keep.flatten().nonzero().flatten().tolist():
        eta, f, sloped = g_z.flatten(0, -2)[t], g_f.flatten(0, -2)[t], slope.flatten(0, -2)[t] != 0
        tokens += 1
        small += float((eta.abs() <= epsilon).sum())
        l1 += float(eta.abs().sum())
        positive += float(eta[eta > 0].sum())
        squares += float(eta.square().sum())
        active += float(f[sloped].square().sum())
        whole += float(f.square().sum())
        if eta.any():
            alive += 1
            part += float(eta.square().sum() ** 2 / (len(eta) * eta.pow(4).sum()))
    h = z.shape[-1]
    return {
        "gradient_sparsity": small / (tokens * h),
        "gradient_l1": l1 / (tokens * h),
        "gradient_l2": math.sqrt(squares / tokens),
        "participation": part / alive if alive else None,
        "concentration": active / whole if whole else None,
        "gradient_positive": positive / l1 if l1 else None,
        "hidden_gradient": whole / tokens if whole else None,
    }


def fields(summary: dict[str, Any] | None) -> dict[str, Any]:
    assert summary is not None
    return {key: summary[key] for key in FIELDS}


@pytest.mark.parametrize("phi", ["relu", "relu6", "jsrelu", "gelu", "silu"])
@pytest.mark.parametrize("gated", [False, True])
@pytest.mark.parametrize("epsilon", [0.0, 0.01])
def test_every_field_is_that_of_the_gradient_kept_whole(
    phi: str, gated: bool, epsilon: float
) -> None:
    model = mlp(phi, gated)
    with observe(model, {"gradient": {"epsilon": epsilon}}, inputs=X) as seen:
        losses(model(X)).mean().backward()
    everything = torch.ones(B, T, dtype=torch.bool)
    want = expected(*stages(model, X), phi, everything, epsilon)
    # the threshold has to part the entries, and φ′ = 0 has to occur, or nothing is tested
    if epsilon or phi in ("relu", "relu6", "jsrelu"):
        assert 0.05 < (want["gradient_sparsity"] or 0) < 0.95
    summary = seen.summary("train")
    assert fields(summary) == pytest.approx(want, rel=CLOSE)
    assert summary is not None
    assert fields(summary["blocks"][0]) == fields(summary)


@pytest.mark.parametrize("reduction", ["mean", "sum"])
@pytest.mark.parametrize("epsilon", [0.0, 0.01])
def test_epsilon_is_in_units_of_the_per_sample_gradient(reduction: str, epsilon: float) -> None:
    model = mlp("gelu", False)
    want = expected(*stages(model, X), "gelu", torch.ones(B, T, dtype=torch.bool), epsilon)
    given = {"gradient": {"epsilon": epsilon}}
    with observe(model, given, inputs=X, loss_reduction=reduction, loss_scale=1 / 8) as seen:  # type: ignore[arg-type]
        (getattr(losses(model(X)), reduction)() / 8).backward()
    assert fields(seen.summary("train")) == pytest.approx(want, rel=CLOSE)


@pytest.mark.parametrize("phi", ["relu", "gelu"])
def test_tokens_and_samples_left_out_count_for_nothing(phi: str) -> None:
    model = mlp(phi, False)
    keep = torch.tensor([[1, 1, 0], [1, 0, 0], [1, 1, 1], [0, 1, 1]]).bool()
    samples = torch.tensor([True, True, False, True])
    with observe(model, "gradient", inputs=X, mask=keep, sample_mask=samples) as seen:
        losses(model(X))[samples].mean().backward()
    counted = keep & samples[:, None]
    want = expected(*stages(model, X), phi, counted)
    assert fields(seen.summary("train")) == pytest.approx(want, rel=CLOSE)


def test_tokens_left_out_may_hold_anything() -> None:
    model, x = mlp("relu", False), X.clone()
    keep = torch.ones(B, T, dtype=torch.bool)
    keep[1, 2] = False
    want = expected(*stages(model, x), "relu", keep)
    x[1, 2] = math.nan
    with observe(model, "gradient", inputs=X, mask=keep) as seen:
        y = model(x)
        losses(torch.where(keep[..., None], y, X)).mean().backward()
    # the sample's loss has lost a token, the gradient of the others has not changed
    assert fields(seen.summary("train")) == pytest.approx(want, rel=CLOSE)


def test_blocks_weigh_by_their_entries_and_tokens_without_gradient_have_no_participation() -> None:
    model = nn.Sequential(Mlp("relu"), Mlp("gelu", h=2 * H)).double()
    kept: dict[int, list[Tensor]] = {0: [], 1: []}
    with observe(model, "gradient", inputs=X) as seen:
        handles = []
        for i, part in enumerate(model):
            hook = kept[i].append
            handles.append(part.up.register_forward_hook(lambda m, a, o, hook=hook: hook(o)))  # type: ignore[union-attr,misc]
        y = model(X)
        kept = {i: [z[0].retain_grad() or z[0]] for i, z in kept.items()}  # type: ignore[func-returns-value]
        losses(y)[:2].sum().div(B).backward()  # two of four samples have no gradient
    whole, entries = 0.0, 0
    summary = seen.summary("train")
    assert summary is not None
    for i, row in enumerate(summary["blocks"]):
        eta = kept[i][0].grad
        assert eta is not None
        eta = eta * B
        whole, entries = whole + float((eta == 0).sum()), entries + eta.numel()
        assert row["gradient_sparsity"] == pytest.approx(float((eta == 0).double().mean()))
        alive = eta[:2].flatten(0, 1)
        share = alive.square().sum(-1).square() / (alive.shape[-1] * alive.pow(4).sum(-1))
        assert row["participation"] == pytest.approx(float(share.mean()), rel=CLOSE)
    assert summary["gradient_sparsity"] == pytest.approx(whole / entries, rel=CLOSE)


@given(exponent=st.integers(-70, 70))
def test_the_scale_of_the_loss_changes_nothing_even_where_squares_would_vanish(
    exponent: int,
) -> None:
    """2^exponent is exact, so the entries of η are the same to the last bit, in float32 as well."""
    torch.manual_seed(0)
    model, x = Mlp("gelu"), X.float()
    found = []
    for scale in (1.0, 2.0**exponent):
        with observe(model, "gradient", inputs=x, loss_reduction="sum", loss_scale=scale) as seen:
            ((model(x) - AIM.float()).square().sum() * scale).backward()
        summary = fields(seen.summary("train"))
        del summary["concentration"], summary["hidden_gradient"]  # squares: float32's range
        found.append(summary)
    # rounding differs only in weights 1/scale, which are exact too
    assert found[0] == pytest.approx(found[1], rel=1e-12)


def test_without_a_gradient_there_is_nothing() -> None:
    model = mlp("relu", False)
    with observe(model, "gradient", inputs=X) as seen:
        model(X)
        with torch.no_grad():
            model(X)
        assert seen.summary("train") is None
        (model(X) * 0).sum().backward()
    assert fields(seen.summary("train")) == {
        "gradient_sparsity": 1.0,
        "gradient_l1": 0.0,
        "gradient_l2": 0.0,
        "participation": None,
        "concentration": None,
        "gradient_positive": None,
        "hidden_gradient": None,
    }
    assert "on active" in str(seen)


@pytest.mark.parametrize("epsilon", [-1.0, math.nan])
def test_a_wrong_epsilon_is_named(epsilon: float) -> None:
    model = mlp("relu", False)
    blocks = find_mlp_blocks(model, X)
    with pytest.raises(ValueError, match=r"epsilon=.*: expected 0 or more"):
        observe(model, {"gradient": {"epsilon": epsilon}}, blocks=blocks)

"""Activations cut at a threshold for each unit are those of the dense layers that cut them."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor
from torch.autograd import forward_ad

from actsparse.activations import named
from actsparse.blocks.stages import keep_above as cut
from actsparse.kernels import prepare, sparse_mlp

PHIS = ["silu", "gelu", "gelu_tanh", "relu"]
FORMS = ["plain", "gate", "product", "both"]
DTYPES = [torch.float32, torch.bfloat16, torch.float64]
Weights = dict[str, Tensor]


def coarse(*sizes: int, scale: float = 1.0) -> Tensor:
    """Normal numbers of a few bits: their products add up to the same in any order."""
    return (torch.randn(*sizes) * scale * 16).round() / 16


def weights(d: int, h: int, form: str, density: float, layout: str = "rows") -> Weights:
    """Weights in float32, and thresholds that keep none, all or about a share of the units."""
    gated = form != "plain"
    made = {"up": coarse(h, d), "bias": coarse(h), "down": coarse(d, h), "down_bias": coarse(d)}
    if gated:
        made |= {"gate": coarse(h, d, scale=1.5 / d**0.5), "gate_bias": coarse(h)}
    if layout == "columns":
        made = {n: t.t().contiguous().t() if t.dim() == 2 else t for n, t in made.items()}
    if layout == "strided":
        made = {n: torch.cat([t, t], -1)[..., : t.shape[-1]] for n, t in made.items()}
    each = 2 * (1 - density) * (torch.rand(h) + 0.5)
    each = each if density else torch.full((h,), torch.inf)
    return made | {"threshold": torch.stack([each / 2, each]) if form == "both" else each}


def to(dtype: torch.dtype, w: Weights, learns: bool = False) -> Weights:
    return {
        n: t if n == "threshold" else t.detach().to(dtype).requires_grad_(learns)
        for n, t in w.items()
    }


def hidden(x: Tensor, w: Weights, phi: str, product: bool) -> tuple[Tensor, Tensor]:
    """a of the dense layers in their dtype, uncut, and what of it is kept."""
    first = ("gate", "gate_bias") if "gate" in w else ("up", "bias")
    v = a = named(phi).value(F.linear(x, *(w[name] for name in first)))
    if "gate" in w:
        a = a * F.linear(x, w["up"], w["bias"])
    if w["threshold"].dim() == 2:
        return a, ~((v.abs() <= w["threshold"][0]) | (a.abs() <= w["threshold"][1]))
    return a, ~((a if product else v).abs() <= w["threshold"])


def packed(x: Tensor, w: Weights, phi: str, product: bool) -> Tensor:
    """Which entries pass the first threshold: those that are packed."""
    first = w["threshold"][0] if w["threshold"].dim() == 2 else w["threshold"]
    return hidden(x, w | {"threshold": first}, phi, product)[1]


def dense(x: Tensor, w: Weights, phi: str, product: bool, keep: Tensor) -> Tensor:
    a = torch.where(keep, hidden(x, w, phi, product)[0], 0)
    return F.linear(a, w["down"], w["down_bias"])


def off(ours: Tensor, exact: Tensor) -> float:
    return float((ours.double() - exact).detach().norm())


@settings(max_examples=80)
@given(
    leading=st.sampled_from([(), (0,), (1,), (7,), (2, 3), (2, 0, 3), (40,)]),
    d=st.integers(1, 140),
    h=st.sampled_from([1, 3, 64, 385, 800]),
    phi=st.sampled_from(PHIS),
    form=st.sampled_from(FORMS),
    density=st.sampled_from([0.0, 0.2, 0.5, 0.9, 1.0]),
    layout=st.sampled_from(["rows", "columns", "strided"]),
    dtype=st.sampled_from(DTYPES),
    threads=st.sampled_from([1, 2]),
    seed=st.integers(0, 9),
)
def test_values_and_gradients_are_those_of_the_layers(
    leading: tuple[int, ...],
    d: int,
    h: int,
    phi: str,
    form: str,
    density: float,
    layout: str,
    dtype: torch.dtype,
    threads: int,
    seed: int,
) -> None:
    torch.manual_seed(seed)
    product, before = form == "product", torch.get_num_threads()
    made = weights(d, h, form, density, layout)
    w, w64 = to(dtype, made, learns=True), to(torch.float64, made, learns=True)
    x, x64 = (coarse(*leading, d).to(t).requires_grad_() for t in (dtype, torch.float64))
    with torch.no_grad():
        x64.copy_(x)
        keep, first = hidden(x, w, phi, product)[1], packed(x, w, phi, product)
    kept: list[int] = []
    torch.set_num_threads(threads)
    try:
        copies = prepare(*(w.get(name) for name in ("down", "up", "gate")))
        with torch.no_grad():
            inferred = sparse_mlp(x, **w, activation=phi, product=product, prepared=copies)
        y = sparse_mlp(x, **w, activation=phi, product=product, on_active=kept.append)
        plain, exact = dense(x, w, phi, product, keep), dense(x64, w64, phi, product, keep)
        grad_y = coarse(*y.shape)
        found = []
        for out, leaves in ((y, (x, w)), (plain, (x, w)), (exact, (x64, w64))):
            learning = [leaves[0], *(t for n, t in leaves[1].items() if n != "threshold")]
            found.append(torch.autograd.grad(out, learning, grad_y.to(out.dtype)))
    finally:
        torch.set_num_threads(before)
    assert kept == [int(first.sum())]  # z is exact here, so that the sets are equal
    eps = torch.finfo(dtype).eps
    results = [(inferred, plain, exact), (y, plain, exact), *zip(*found, strict=True)]
    for ours, theirs, right in results:
        assert ours.shape == theirs.shape
        assert ours.dtype is dtype
        assert off(ours, right) <= 1.5 * off(theirs, right) + 8 * eps * off(right, torch.zeros(()))


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("dtype", DTYPES[:2])
def test_every_instruction_set_keeps_the_same(way: str, form: str, dtype: torch.dtype) -> None:
    torch.manual_seed(1)
    w, x = to(dtype, weights(70, 801, form, 0.4)), coarse(5, 70).to(dtype)
    for threads in (1, 2):
        torch.set_num_threads(threads)
        y = sparse_mlp(x, **w, activation="silu", product=form == "product")
        keep = hidden(x, w, "silu", form == "product")[1]
        assert 0.05 < keep.float().mean() < 0.95
        plain, exact = (
            dense(x.to(t), to(t, w), "silu", form == "product", keep)
            for t in (dtype, torch.float64)
        )
        assert off(y, exact) <= 1.5 * off(plain, exact) + 1e-6 * float(exact.norm())


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("learns", [False, True])
def test_nan_is_kept_and_reaches_y(form: str, dtype: torch.dtype, learns: bool) -> None:
    torch.manual_seed(2)
    w, x = to(dtype, weights(16, 90, form, 0.3)), torch.randn(12, 16).to(dtype)
    x[1, 3], x[2, 4] = torch.nan, torch.inf
    w["up"][5, 2] = torch.nan
    w["bias"][7] = torch.inf
    w["threshold"][..., 9] = torch.nan
    w["threshold"][..., 10] = torch.inf  # only NaN passes it
    x.requires_grad_(learns)
    y = sparse_mlp(x, **w, activation="silu", product=form == "product")
    keep = hidden(x, w, "silu", form == "product")[1]
    plain = dense(x, w, "silu", form == "product", keep)
    assert torch.equal(y.isnan(), plain.isnan())
    assert torch.equal(y.isinf(), plain.isinf())
    assert y[1:3].isnan().any()


@pytest.mark.parametrize("form", FORMS)
def test_weights_of_dropped_units_are_not_read(form: str) -> None:
    torch.manual_seed(3)
    w, x = to(torch.float32, weights(16, 90, form, 0.3)), torch.randn(1, 16)
    y = sparse_mlp(x, **w, activation="silu", product=form == "product")
    (dropped,) = (~hidden(x, w, "silu", form == "product")[1][0]).nonzero(as_tuple=True)
    (unread,) = (~packed(x, w, "silu", form == "product")[0]).nonzero(as_tuple=True)
    w["down"][:, dropped] = torch.nan
    if form in ("gate", "both"):
        w["up"][unread] = torch.nan
    assert torch.equal(sparse_mlp(x, **w, activation="silu", product=form == "product"), y)


def test_a_bfloat16_activation_is_compared_with_the_float32_threshold() -> None:
    above = torch.tensor([1.0], dtype=torch.bfloat16)
    one = torch.ones(1, 1, dtype=torch.bfloat16)
    for t, want in ((1.0, 0.0), (0.999, 1.0)):  # .999 is 1 in bfloat16
        limit = torch.tensor([t])
        assert sparse_mlp(above, one, None, one, activation="relu", threshold=limit) == want


def test_what_does_not_fit_is_refused_by_name() -> None:
    w, x = weights(8, 12, "gate", 0.5), torch.randn(2, 8)
    t = w.pop("threshold")
    plain = {name: each for name, each in w.items() if "gate" not in name}
    for bad in (t[:-1], t.double(), t.bfloat16(), t[None], t.to("meta"), t.expand(3, 12)):
        with pytest.raises(ValueError, match=r"threshold must be torch.float32 \[12\] on cpu"):
            sparse_mlp(x, **w, activation="silu", threshold=bad)
    for more, names in (({}, plain), ({"product": True}, w)):  # of a plain block, of the product
        with pytest.raises(ValueError, match=r"threshold must be torch.float32 \[12\] on cpu"):
            sparse_mlp(x, **names, activation="silu", threshold=t.expand(2, 12), **more)
    with pytest.raises(ValueError, match=r"product=True .*; gate is None"):
        sparse_mlp(x, **plain, activation="silu", threshold=t, product=True)
    with pytest.raises(ValueError, match=r"product=True .*; threshold is None"):
        sparse_mlp(x, **w, activation="silu", product=True)
    with pytest.raises(ValueError, match="down has shape"):
        sparse_mlp(x, **w | {"down": torch.ones(3, 4)}, activation="silu", threshold=t)
    with pytest.raises(ValueError, match="gate has shape"):
        sparse_mlp(x, **w | {"gate": torch.ones(12, 9)}, activation="silu", threshold=t)


def test_a_screen_and_autocast_are_ignored_and_a_strided_threshold_is_taken() -> None:
    torch.manual_seed(4)
    w, x = weights(32, 100, "gate", 0.4), torch.randn(3, 32)
    y = sparse_mlp(x, **w, activation="silu")
    w["threshold"] = w["threshold"].repeat_interleave(2)[::2].requires_grad_()
    assert torch.equal(sparse_mlp(x, **w, activation="silu", screen=True), y)
    with torch.autocast("cpu", torch.bfloat16):
        assert torch.equal(sparse_mlp(x, **w, activation="silu"), y)
    assert not y.requires_grad


def test_norms_and_what_stands_between_see_what_is_kept() -> None:
    torch.manual_seed(5)
    w, x = weights(32, 100, "gate", 0.4), torch.randn(3, 32)
    read: dict[str, Tensor] = {}
    y = sparse_mlp(x, **w, activation="silu", between=lambda a: 2 * a, on_norms=read.update)
    a, keep = hidden(x, w, "silu", False)
    a = torch.where(keep, a, 0)
    torch.testing.assert_close(read["l1"], a.abs().sum(-1, keepdim=True))
    torch.testing.assert_close(y, F.linear(2 * a, w["down"], w["down_bias"]))


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("sizes", [(5, 77), (70, 800), (2, 3, 16), (0, 8), (4, 0)])
def test_cut_keeps_every_bit_of_what_is_above(
    way: str, dtype: torch.dtype, sizes: tuple[int, ...]
) -> None:
    torch.manual_seed(6)
    v, t = torch.randn(sizes).to(dtype), torch.rand(sizes[-1]) * 2
    if v.numel():
        v.view(-1)[:4] = torch.tensor([torch.nan, torch.inf, -torch.inf, 1e-39]).to(dtype)
        t[:3] = torch.tensor([0.0, torch.inf, torch.nan])
    for threads in (1, 2):
        torch.set_num_threads(threads)
        for laid in (v, torch.stack([v, v], -1)[..., 0]):
            right = laid.masked_fill(laid.abs() <= t, 0)
            assert torch.equal(cut(laid, t).nan_to_num(7.0), right.nan_to_num(7.0))
            assert torch.equal(cut(laid, t).isnan(), right.isnan())


def test_each_kind_of_derivative_goes_through_the_mask() -> None:
    x, t = torch.randn(3, 5, dtype=torch.float32), torch.full((5,), 0.5)
    x[0, 0], x[1, 1] = 0.2, 0.9

    def cubes(v: Tensor) -> Tensor:
        return cut(v, t).pow(3).sum()

    want = torch.where(x.abs() <= t, 0, 3 * x.square())
    tangent = torch.randn_like(x)
    learning = x.clone().requires_grad_()
    assert torch.equal(torch.autograd.grad(cubes(learning), learning)[0], want)
    assert torch.equal(torch.func.grad(cubes)(x), want)
    assert torch.equal(torch.func.jacfwd(cubes)(x), want)
    assert torch.allclose(torch.func.jvp(cubes, (x,), (tangent,))[1], (want * tangent).sum())
    with forward_ad.dual_level():
        moved = forward_ad.unpack_dual(cubes(forward_ad.make_dual(x, tangent))).tangent
    assert torch.allclose(moved, (want * tangent).sum())
    curvature = torch.autograd.functional.hessian(cubes, x).reshape(15, 15)
    assert torch.allclose(curvature, torch.where(x.abs() <= t, 0, 6 * x).flatten().diag())
    x[2, 2] = torch.nan
    kept = cut(x.requires_grad_(), t)
    assert kept[2, 2].isnan()
    assert torch.autograd.grad(kept, x, torch.ones_like(x))[0][2, 2] == 1

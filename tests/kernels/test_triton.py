"""The GPU's kernels in Triton's interpreter: the CPU kernels' laws hold, on small shapes.

A law is a function of another file here; what only these kernels have is tested below it. The
interpreter cuts bfloat16 instead of rounding it, so that bounds are of two units in the last place.
"""

from __future__ import annotations

from typing import Any

import pytest
import torch
import torch.nn.functional as F
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from torch import Tensor, nn

from actsparse.activations import ActivationFunction, named
from actsparse.kernels import backends, forms, ops, sparse_mlp
from actsparse.kernels import pack as packing
from tests.kernels import test_exactness as exactness
from tests.kernels import test_masks as masks

pytest.importorskip("triton")

from actsparse.kernels import triton_pack, triton_products
from actsparse.kernels.triton_launch import INTERPRETED

pytestmark = [
    pytest.mark.skipif(not INTERPRETED, reason="needs TRITON_INTERPRET=1"),
    # a product that overflows float16 is infinite, as it is on a GPU
    pytest.mark.filterwarnings("ignore:overflow encountered:RuntimeWarning"),
    pytest.mark.filterwarnings("ignore:invalid value encountered:RuntimeWarning"),
]
DTYPES = [torch.float32, torch.bfloat16, torch.float16]
FIXTURE = [HealthCheck.function_scoped_fixture]


def interpreted(*tensors: Tensor | None) -> bool:
    """`backends.on_gpu`, as if the CPU were one."""
    return all(t is None or t.dtype in DTYPES for t in tensors)


@pytest.fixture(autouse=True)
def as_on_a_gpu(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(backends, "_load", lambda: False)
    monkeypatch.setattr(backends, "on_gpu", interpreted)


# ---- the laws of the CPU kernels ------------------------------------------------------------


@pytest.mark.slow
@settings(max_examples=10, suppress_health_check=FIXTURE)
@given(
    leading=st.sampled_from([(), (0,), (1,), (4,), (2, 3), (17,)]),
    d=st.sampled_from([1, 5, 17, 70]),
    h=st.one_of(st.integers(1, 70), st.sampled_from([129, 385])),
    density=st.floats(0, 1),
    activation=st.sampled_from(forms.FUSED),
    screen=st.booleans(),
    layouts=st.tuples(*[st.sampled_from(["rows", "columns", "strided", "offset"])] * 3),
    seed=st.integers(0, 99),
)
def test_every_entry_stays_within_its_a_priori_bound(
    leading: tuple[int, ...], d: int, h: int, density: float, activation: str, screen: bool,
    layouts: tuple[str, ...], seed: int,
) -> None:  # fmt: skip
    torch.manual_seed(seed)
    w = exactness.made(d, h, density)
    x, of_up, of_down = torch.randn(*leading, d), *layouts[:2]
    w["up"], w["down"] = exactness.laid(w["up"], of_up), exactness.laid(w["down"], of_down)
    x = exactness.laid(x, layouts[2])
    gradients = exactness.assert_bounds_hold(x, w, activation, screen)
    for t, gradient in zip((x, *w.values()), gradients, strict=True):
        assert gradient.shape == t.shape


@pytest.mark.slow
@settings(max_examples=10, suppress_health_check=FIXTURE)
@given(
    n=st.sampled_from([0, 1, 2, 9, 17]),
    d=st.integers(1, 20),
    h=st.one_of(st.integers(1, 70), st.sampled_from([129, 385])),
    activation=st.sampled_from(masks.FUSED + masks.TWO_MASKS),
    gated=st.booleans(),
    screen=st.booleans(),
    seed=st.integers(0, 99),
)
def test_where_nothing_rounds_results_are_those_of_dense_float64(
    n: int, d: int, h: int, activation: ActivationFunction, gated: bool, screen: bool, seed: int
) -> None:
    torch.manual_seed(seed)
    masks.assert_same_as_float64(*masks.dyadic(n, d, h, gated), activation, screen)


@pytest.mark.parametrize("gated", [False, True])
def test_dropout_and_each_products_own_mask(gated: bool) -> None:
    masks.test_dropout_on_packed_values_is_dropout("triton", masks.FUSED[0], gated)
    masks.test_each_product_asks_its_own_mask("triton")


@pytest.mark.parametrize("screen", [False, True], ids=["plain", "screen"])
def test_the_one_difference_is_a_product_with_an_exact_zero(screen: bool) -> None:
    for partner in (float("nan"), float("inf")):
        masks.test_the_one_difference_is_a_product_with_an_exact_zero("triton", partner, screen)


@pytest.mark.parametrize("learns", [False, True])
def test_sizes_of_nothing(learns: bool) -> None:
    for tokens, d, h in [(0, 4, 6), (3, 4, 0), (3, 0, 6), (0, 0, 0)]:
        x, w = masks.dyadic(tokens, d, h)
        leaves = [t.requires_grad_(learns) for t in (x, *w.values())]
        y = sparse_mlp(*leaves, screen=True)
        assert torch.equal(y.detach(), masks.dense(x, w, masks.FUSED[0]))
        if learns:
            for t, gradient in zip(leaves, torch.autograd.grad(y.sum(), leaves), strict=True):
                assert gradient.shape == t.shape
                assert gradient.isfinite().all()


@pytest.mark.parametrize("tokens", [1, 5])
def test_runs_are_bit_identical(tokens: int) -> None:
    w = exactness.made(20, 140, 0.3)
    leaves = [t.requires_grad_() for t in (torch.randn(tokens, 20), *w.values())]

    def everything() -> list[Tensor]:
        with torch.no_grad():
            inferred = sparse_mlp(*leaves, screen=True)
        y = sparse_mlp(*leaves)
        return [inferred, y, *torch.autograd.grad(y.square().sum(), leaves)]

    assert all(torch.equal(one, two) for one, two in zip(everything(), everything(), strict=True))


# ---- packing: the three ways a tile is written, counted, kept or spilled ----------------------


@settings(max_examples=15)
@given(
    n=st.sampled_from([1, 3, 65]),
    d=st.integers(1, 20),
    h=st.one_of(st.integers(1, 140), st.sampled_from([127, 128, 129, 256, 385])),
    density=st.sampled_from([0.0, 0.02, 0.2, 0.3, 0.9, 1.0]),
    floor=st.sampled_from([0.0, 0.25]),
    dtype=st.sampled_from(DTYPES),
    fused=st.booleans(),
    biased=st.booleans(),
    seed=st.integers(0, 99),
)
def test_no_tile_is_too_full(
    n: int, d: int, h: int, density: float, floor: float, dtype: torch.dtype, fused: bool,
    biased: bool, seed: int,
) -> None:  # fmt: skip
    """On numbers that round nowhere, each density: none is dropped, each is in its place."""
    torch.manual_seed(seed)
    x = torch.ones(n, d, dtype=dtype)
    up = torch.where(torch.rand(h, 1) < density, 1.0, -1.0).expand(h, d).to(dtype)
    bias = (torch.randint(0, 2, (h,)) * 0.25).to(dtype) if biased else None
    z = F.linear(x.float(), up.float(), None if bias is None else bias.float())
    keep = ~(z <= floor)
    pointer, index, value = triton_pack.pack(x, up, bias, floor, fused)
    want = packing.pack(keep)
    assert torch.equal(pointer, want[0])
    assert torch.equal(index, want[1])
    assert torch.equal(value.float(), z[keep])


def test_tiles_of_each_kind_were_met() -> None:
    """Of the test above: tiles that fit their room exactly, by one too few and one too many.

    All other units are at the floor.
    """
    room, tile = triton_pack.ROOM, triton_pack.TILE
    for full in (0, room - 1, room, room + 1, tile):
        up, bias = torch.full((3 * tile, 1), -1.0), torch.full((3 * tile,), 1.25)
        bias[tile:][:full] = torch.arange(2.0, full + 2)
        for fused in (False, True):
            pointer, index, value = triton_pack.pack(torch.ones(2, 1), up, bias, 0.25, fused)
            assert pointer.tolist() == [0, full, 2 * full]
            assert value.tolist() == [*range(1, full + 1)] * 2
            assert index.tolist() == [tile + k for k in range(full)] * 2


@pytest.mark.parametrize("fused", [False, True])
def test_what_float16_rounds_to_above_the_floor_is_active(fused: bool) -> None:
    """z is 0.05 steps of float16 below the floor, but nearest to a number above, as in dense."""
    step = 2.0**-13
    x, bias = torch.tensor([[1064 * step]]).half(), torch.tensor([0.55 * step, -step]).half()
    floor = (1065 - 0.4) * step
    _, index, value = triton_pack.pack(x, torch.ones(2, 1).half(), bias, floor, fused)
    assert index.tolist() == [0]
    assert value.tolist() == [1065 * step]


@pytest.mark.parametrize("fused", [False, True])
def test_nan_is_active_in_any_dtype(fused: bool) -> None:
    for dtype in DTYPES:
        up = torch.tensor(masks.EDGES).to(dtype)[:, None].repeat(13, 1)
        _, index, value = triton_pack.pack(torch.ones(2, 1, dtype=dtype), up, None, 0.0, fused)
        keep = ~(up[:, 0] <= 0)
        assert torch.equal(index.long(), keep.nonzero()[:, 0].repeat(2))
        assert value.isnan().sum() == 2 * up.isnan().sum() > 0


# ---- products ---------------------------------------------------------------------------------


@pytest.mark.slow
@settings(max_examples=10)
@given(
    n=st.sampled_from([1, 5, 17]),
    h=st.one_of(st.integers(1, 40), st.just(150)),
    d=st.sampled_from([1, 7, 70]),
    density=st.sampled_from([0.0, 0.01, 0.2, 1.0]),
    dtype=st.sampled_from(DTYPES),
    seed=st.integers(0, 99),
)
def test_products_round_as_their_dtype_does(
    n: int, h: int, d: int, density: float, dtype: torch.dtype, seed: int
) -> None:
    """Within γ of float32 sums, and two units in the last place of the result's dtype."""
    torch.manual_seed(seed)
    a = torch.randn(n, h).to(dtype) * (torch.rand(n, h) < density)
    keep = a != 0
    pointer, index = packing.pack(keep)
    rows, bias, x = (torch.randn(*size).to(dtype) for size in ((h, d), (d,), (n, d)))
    eps = torch.finfo(dtype).eps

    def check(got: Tensor, left: Tensor, right: Tensor, plus: Any, where: Any = ...) -> None:
        exact = (left.double() @ right.double() + plus)[where]
        terms = (left.double().abs() @ right.double().abs() + abs(plus))[where]
        bound = 2 * eps * exact.abs() + exactness.gamma(max(h, d) + 2) * terms + 1e-7
        assert bool(((got.double() - exact).abs() <= bound).all())

    for turned in (False, True):
        y = triton_products.multiply(pointer, index, a[keep], rows, bias, n, turned)
        assert y.shape == (n, d)
        assert (y.t() if turned else y).is_contiguous()
        check(y, a, rows, bias.double())
    for sampled in (triton_products.sample, triton_pack.sample_dense):
        check(sampled(pointer, index, x, rows), x, rows.t(), 0, keep)
        check(sampled(pointer, index, x, rows.t().contiguous().t()), x, rows.t(), 0, keep)


def test_units_of_every_tile_and_block_are_sampled() -> None:
    h, x = 2 * packing.BLOCK + 5, torch.tensor([[1.0], [2.0]])
    up, keep = torch.arange(float(h))[:, None], torch.zeros(2, h, dtype=torch.bool)
    keep[0, [0, 127, 128, 383, 384, 767, 768, h - 1]], keep[1, ::100] = True, True
    pointer, index = packing.pack(keep)
    for sampled in (triton_products.sample, triton_pack.sample_dense):
        assert torch.equal(sampled(pointer, index, x, up), (x @ up.t())[keep])


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("gated", [False, True])
def test_rms_error_is_at_most_four_times_dense(dtype: torch.dtype, gated: bool) -> None:
    """y and gradients of one block against float64; all on the mask of z as it is rounded."""
    torch.manual_seed(1)
    w, x, grad_y = exactness.made(24, 140, 0.2), torch.randn(9, 24), torch.randn(9, 24)
    if gated:
        w |= {"gate": w["up"].flip(0), "gate_bias": w["bias"], "bias": torch.randn(140)}
    leaves = [t.to(dtype).requires_grad_() for t in (x, *w.values())]
    wide = [t.detach().double().requires_grad_() for t in leaves]

    def block(values: list[Tensor], f: Any) -> list[Tensor]:
        y = f(values[0], **dict(zip(w, values[1:], strict=True)))
        return [y, *torch.autograd.grad(y, values, grad_y.to(y.dtype))]

    relu = named("relu")
    exact = block(wide, lambda x, **w: masks.dense(x, w, relu))
    plain = block(leaves, lambda x, **w: masks.dense(x, w, relu))
    ours = block(leaves, sparse_mlp)
    for mine, theirs, true in zip(ours, plain, exact, strict=True):
        assert mine.dtype == dtype
        error, other = ((t.double() - true).square().mean().sqrt() for t in (mine, theirs))
        assert error <= 4 * other + torch.finfo(dtype).eps * true.abs().mean()


@pytest.mark.parametrize("partner", [float("nan"), float("inf")], ids=str)
def test_a_packed_value_that_is_zero_skips_its_partner(partner: float) -> None:
    """As dropout, or a gate's up of 0, leaves them."""
    pointer, index = packing.pack(torch.ones(2, 2) != 0)
    value, rows = torch.tensor([0.0, 1.0, 2.0, -0.0]), torch.tensor([[partner], [3.0]])
    y = triton_products.multiply(pointer, index, value, rows, None, 2)
    assert y[:, 0].tolist() == pytest.approx([3.0, partner], nan_ok=True)


def test_both_ways_to_sample_are_taken(monkeypatch: pytest.MonkeyPatch) -> None:
    taken: list[str] = []
    for module, name in ((triton_products, "sample"), (triton_pack, "sample_dense")):
        old = getattr(module, name)
        monkeypatch.setattr(
            module, name, lambda *t, old=old, name=name: taken.append(name) or old(*t)
        )
    for h, sampled in ((400, "sample"), (10, "sample_dense")):
        pointer, index = packing.pack(torch.arange(h)[None] == 0)
        x, up = torch.ones(1, 3, dtype=torch.half), torch.ones(h, 3, dtype=torch.half)
        got = ops.sample(pointer, index, x, up, None)
        assert got.tolist() == [3.0]
        assert taken.pop() == sampled


# ---- accelerate -------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "dtype",
    [pytest.param(d, marks=() if d is torch.bfloat16 else pytest.mark.slow) for d in DTYPES],
)
@pytest.mark.parametrize("mode", ["auto", "sparse", "screened"])
def test_a_model_runs_so_in_its_own_dtype(mode: Any, dtype: torch.dtype) -> None:
    from actsparse.kernels import accelerate

    torch.manual_seed(2)
    model = nn.Sequential(nn.Linear(12, 70), nn.ReLU(), nn.Linear(70, 12)).to(dtype)
    for x in (torch.randn(1, 12).to(dtype), torch.randn(2, 9, 12).to(dtype)):
        want = model(x)
        (grad,) = torch.autograd.grad(want.square().sum(), model[0].weight)
        with accelerate(model, inputs=x, mode=mode) as handle:
            for _ in range(3):
                with torch.no_grad():
                    y = model(x)
                learnt = model(x)
            (ours,) = torch.autograd.grad(learnt.square().sum(), model[0].weight)
            ran = {(row["program"], (row["reason"] or "")[:9]) for row in handle.table()}
        assert y.dtype == dtype
        close = {"rtol": 0.0, "atol": 32 * torch.finfo(dtype).eps}
        torch.testing.assert_close(y, want, **close)
        torch.testing.assert_close(learnt, want, **close)
        scale = float(grad.abs().max())
        torch.testing.assert_close(ours / scale, grad / scale, **close)
        assert ran == ({(mode, "")} if mode != "auto" else {("dense", "too small")})

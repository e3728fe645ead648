"""Which entries count: φ ≠ 0 and φ′ ≠ 0 apart, NaN and infinity, dropout, and zeros of every kind.

On dyadic numbers of a few bits no float32 sum rounds, so that results are compared bit for bit
with dense float64: one entry too few, one too many or one in the wrong place shows.
"""

from __future__ import annotations

import itertools
import math
from dataclasses import replace
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from torch import Tensor, nn

from actsparse.activations import ActivationFunction, named, shifted_s_shape
from actsparse.kernels import backends, forms, in_compiled, ops, prepare, row_norms, sparse_mlp
from actsparse.kernels import pack as packing
from tests.kernels import reference

TWO_MASKS = [
    named("relu6"), named("hardtanh"), shifted_s_shape(1.5, 0.0), shifted_s_shape(0.0, -1.0),
    shifted_s_shape(-1.5, 1.0),
]  # fmt: skip
NUMBERS = [
    "relu(threshold=0.5)", "jsrelu(threshold=1)", "squared_relu(threshold=1.5)", "relu(shift=1)",
    "relu(shift=0.5, threshold=1)", "jsrelu(jump=0.5, cap=2, threshold=0.5)",
]  # fmt: skip
FUSED = [named(name) for name in (*forms.FUSED, *NUMBERS)]
Weights = dict[str, Tensor]


def dyadic(n: int, d: int, h: int, gated: bool = False) -> tuple[Tensor, Weights]:
    """Halves and quarters, two or three of each row not zero: z often hits 0, 1, 1.5, 2.5, 6."""

    def few(rows: int, columns: int, step: float, each: int) -> Tensor:
        values = torch.randint(-4, 5, (rows, columns)) * step
        return values * (torch.rand(rows, columns) < each / max(columns, 1))

    x = few(n, d, 1.0, 3)
    w = {"up": few(h, d, 0.5, 4), "bias": torch.randint(-4, 4, (h,)) * 0.5,
         "down": few(d, h, 1.0, 40), "down_bias": torch.randint(-4, 5, (d,)) * 1.0}  # fmt: skip
    if gated:
        w |= {"gate": few(h, d, 0.5, 4), "gate_bias": torch.randint(-4, 4, (h,)) * 0.5}
    return x, w


def dense(
    x: Tensor, w: Weights, activation: ActivationFunction, keep: Tensor | None = None
) -> Tensor:
    """The block of plain operators, with autograd's own gradients."""
    z = F.linear(x, w.get("gate", w["up"]), w.get("gate_bias", w["bias"]))
    a = activation.value(z)
    if "gate" in w:
        a = a * F.linear(x, w["up"], w["bias"])
    return F.linear(a if keep is None else a * keep, w["down"], w["down_bias"])


def assert_same_as_float64(
    x: Tensor, w: Weights, activation: ActivationFunction, screen: bool, **options: Any
) -> None:
    """Bit for bit: y with and without gradients, and every gradient."""
    leaves = [t.requires_grad_() for t in (x, *w.values())]
    exact = [t.detach().double().requires_grad_() for t in leaves]
    wide = dict(zip(w, exact[1:], strict=True))
    keep = options.pop("keep", None)
    ready = prepare(w["down"], w["up"], w.get("gate"))
    given = ready if screen else None  # the copies serve training as well
    y = sparse_mlp(x, **w, activation=activation, screen=screen, prepared=given, **options)
    want = dense(exact[0], wide, activation, keep)
    assert torch.equal(y.double(), want)
    grad_y = torch.randint(-3, 4, y.shape).float()
    got = torch.autograd.grad(y, leaves, grad_y)
    for name, ours, plain in zip(
        ("x", *w), got, torch.autograd.grad(want, exact, grad_y.double()), strict=True
    ):
        assert torch.equal(ours.double(), plain), name
    if not options:
        with torch.no_grad():
            for prepared in (None, ready):
                again = sparse_mlp(x, **w, activation=activation, screen=screen, prepared=prepared)
                assert torch.equal(again.double(), want)


def assert_same_in_bfloat16(
    x: Tensor, w: Weights, activation: ActivationFunction, screen: bool
) -> None:
    """Only φ, φ ⊙ u and y are rounded, each once: bit for bit, with and without gradients."""
    exact = {name: t.detach().double() for name, t in (("x", x), *w.items())}
    of = {name: t.bfloat16() for name, t in exact.items()}
    z = F.linear(exact["x"], exact.get("gate", exact["up"]), exact.get("gate_bias", exact["bias"]))
    a = activation.value(z).bfloat16().double()
    if "gate" in w:
        a = (a * F.linear(exact["x"], exact["up"], exact["bias"])).bfloat16().double()
    want = F.linear(a, exact["down"], exact["down_bias"]).bfloat16()
    ready = prepare(of["down"], of["up"], of.get("gate"))
    for learns, prepared in itertools.product((False, True), (None, ready)):
        of["x"].requires_grad_(learns)
        y = sparse_mlp(**of, activation=activation, screen=screen, prepared=prepared)
        assert torch.equal(y, want), (learns, prepared)


@settings(max_examples=40, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(
    n=st.one_of(st.integers(0, 12), st.sampled_from([40, 385, 800])),
    d=st.one_of(st.integers(1, 40), st.sampled_from([193, 770])),
    h=st.one_of(st.integers(1, 140), st.sampled_from([383, 384, 385, 768, 769])),
    activation=st.sampled_from(FUSED + TWO_MASKS),
    gated=st.booleans(),
    screen=st.booleans(),
    seed=st.integers(0, 99),
)
def test_where_nothing_rounds_results_are_those_of_dense_float64(
    way: str, n: int, d: int, h: int, activation: ActivationFunction, gated: bool, screen: bool,
    seed: int,
) -> None:  # fmt: skip
    torch.manual_seed(seed)
    x, w = dyadic(n, d, h, gated)
    assert_same_as_float64(x, w, activation, screen)
    form = forms.form_of(activation.name)
    if way != "reference" and form is not None and form.act is not None:
        assert_same_in_bfloat16(x, w, activation, screen)


@pytest.mark.parametrize("activation", FUSED + TWO_MASKS, ids=lambda f: f.name)
@pytest.mark.parametrize("gated", [False, True])
def test_dropout_on_packed_values_is_dropout(
    way: str, activation: ActivationFunction, gated: bool
) -> None:
    """nn.Dropout(0.5) draws one number for each packed value; its factors, 0 and 2, are exact."""
    x, w = dyadic(21, 9, 400, gated)
    first = F.linear(x, w.get("gate", w["up"]), w.get("gate_bias", w["bias"]))
    packed = activation.value(first) != 0
    if activation in TWO_MASKS:
        packed |= activation.derivative(first) != 0
    pointer, index = packing.pack(packed)
    torch.manual_seed(7)
    drawn = F.dropout(torch.ones(len(index)), 0.5)
    assert 0.4 < float((drawn == 0).float().mean()) < 0.6
    keep = packing.unpack(pointer, index, drawn, *packed.shape).double()
    torch.manual_seed(7)
    assert_same_as_float64(x, w, activation, False, between=nn.Dropout(0.5), keep=keep)


@pytest.mark.parametrize(
    ("name", "gated"),
    [("relu", False), ("relu", True), ("jsrelu", False), ("squared_relu", False),
     ("relu6", True), ("hardtanh", True), ("s_shape", False)],
)  # fmt: skip
def test_gradcheck_through_the_float32_kernels(way: str, name: str, gated: bool) -> None:
    """y is of degree 2 between kinks: there a central difference is the derivative, exactly.

    Steps of 2⁻⁵ times factors up to 4 move z, a multiple of 1/2 and 1/4 more, across no kink, and
    a square of z < 2⁴ in steps of 2⁻⁸ times a factor below 2² still fits the 24 bits of float32.
    """
    x, w = dyadic(3, 3, 7, gated)
    w["gate_bias" if gated else "bias"] += 0.25
    leaves = [t.double().requires_grad_() for t in (x, *w.values())]

    def run(*tensors: Tensor) -> Tensor:
        narrow = [t.float() for t in tensors]
        weights = dict(zip(w, narrow[1:], strict=True))
        return sparse_mlp(narrow[0], **weights, activation=name, screen=True).double()

    assert torch.autograd.gradcheck(run, leaves, eps=2.0**-5, atol=1e-9, rtol=0)


# ---- the masks ------------------------------------------------------------------------------

EDGES = [math.nan, math.inf, -math.inf, 0.0, -0.0, 1e-45, -1e-45, 1e-38, -1e-38, 1.0, -1.0, 3e38]


@pytest.mark.parametrize("screen", [False, True], ids=["plain", "screen"])
@pytest.mark.parametrize("where", ["up", "bias"])
def test_active_is_what_is_not_at_most_zero(way: str, screen: bool, where: str) -> None:
    """NaN and a denormal are active, both zeros are not: in every lane, word and block."""
    for h in (1, 7, 12, 63, 64, 65, 130, 383, 384, 385, 770):
        z = torch.tensor(EDGES).repeat(h)[torch.arange(h) * 5 % len(EDGES)]
        zero = torch.zeros(h)
        up, bias = (z, zero if h % 2 else None) if where == "up" else (zero, z)
        for tokens in (1, 5, 40):
            x = torch.ones(tokens, 1)
            codes = ops.quantise(up[:, None]) if screen and backends.loaded() else []
            pointer, index, value, _ = ops.pack(x, up[:, None], bias, codes, "relu")
            want = packing.pack(~(z <= 0).expand(tokens, h))
            assert torch.equal(pointer, want[0])
            assert torch.equal(index, want[1])
            torch.testing.assert_close(value, z[index.long()], rtol=0, atol=0, equal_nan=True)


@pytest.mark.parametrize("activation", TWO_MASKS, ids=lambda f: f.name)
def test_where_two_masks_differ_either_packs(activation: ActivationFunction) -> None:
    """Saturated: a alone. A zero crossing: φ′ alone. Neither: not packed."""
    x, w = dyadic(50, 9, 500)
    z = F.linear(x, w["up"], w["bias"])
    a, slope = activation.value(z), activation.derivative(z)
    pointer, index, value, packed_slope = ops.pack_values(x, w["up"], w["bias"], a, slope)
    for got, want in ((value, a), (packed_slope, slope)):
        assert torch.equal(packing.unpack(pointer, index, got, 50, 500), want)
    assert len(index) == int(((a != 0) | (slope != 0)).sum())
    alone = (bool(((a != 0) & (slope == 0)).any()), bool(((a == 0) & (slope != 0)).any()))
    assert alone == (activation is not TWO_MASKS[2], activation not in (TWO_MASKS[0], TWO_MASKS[2]))


def test_each_product_asks_its_own_mask(way: str) -> None:
    """S-shape − 1, z = 2.5: a = 0, φ′ = 2; z = 0: a = −1, φ′ = 0; z = 3.5: a = 3, φ′ = 4."""
    activation = shifted_s_shape(0.0, -1.0)
    up, bias = torch.ones(3, 1), torch.tensor([2.5, 0.0, 3.5])
    plain = torch.tensor([[2.0, 3.0, 5.0], [1.0, 1.0, 1.0]])

    def run(down: Tensor) -> tuple[Tensor, ...]:
        leaves = [t.clone().requires_grad_() for t in (torch.zeros(1, 1), up, bias, down)]
        y = sparse_mlp(*leaves, activation=activation)
        return y.detach()[0], *torch.autograd.grad(y.sum(), leaves)

    y, dx, dup, dbias, ddown = run(plain)
    assert y.tolist() == [-3 + 15, -1 + 3]
    assert dbias.tolist() == [3 * 2, 0, 6 * 4]
    assert float(dx) == 30
    assert dup.flatten().tolist() == [0, 0, 0]  # x = 0
    assert ddown.tolist() == [[0, -1, 3]] * 2
    # a NaN in V where a = 0: not in y, but in the gradient through φ′ ≠ 0; and the other way round
    for unit, in_y, in_dx in ((0, False, True), (1, True, False), (2, True, True)):
        down = plain.clone()
        down[0, unit] = math.nan
        y, dx, _, dbias, ddown = run(down)
        assert bool(y[0].isnan()) == in_y
        assert not y[1].isnan()
        assert bool(dx.isnan()) == in_dx
        assert dbias.isnan().tolist() == [in_dx and k == unit for k in range(3)]
        assert ddown.isfinite().all()


# ---- NaN and infinity -----------------------------------------------------------------------


def signs(t: Tensor) -> Tensor:
    """0 finite, 1 NaN, 2 +∞, 3 −∞."""
    return t.isnan() + 2 * t.isposinf() + 3 * t.isneginf()


def as_autograd_has_it(function: ActivationFunction) -> ActivationFunction:
    """The ReLU kinds' slope at NaN is 1."""
    form = forms.form_of(function.name)
    if form is None or not form.ones:
        return function
    return replace(function, derivative=lambda z: 1.0 * ~(z <= form.floor))


@pytest.mark.parametrize(
    ("activation", "gated", "screen"),
    [  # every pair of two of the three
        pytest.param(each, gated, gated ^ other, id=f"{each.name}-{gated}-{gated ^ other}")
        for number, each in enumerate([*FUSED, TWO_MASKS[0], TWO_MASKS[3]])
        for gated, other in [(False, number % 2 == 1), (True, number % 2 == 1)]
    ],
)
def test_nan_and_infinity_arrive_where_the_entries_carry_them(
    way: str, activation: ActivationFunction, gated: bool, screen: bool
) -> None:
    """From x, biases and U, one at a time, to y and every gradient; without a gate as in dense."""
    function = as_autograd_has_it(activation)
    first, bias = ("gate", "gate_bias") if gated else ("up", "bias")
    for place in dict.fromkeys(("x", first, bias, "up", "bias")):
        for poison in (math.nan, math.inf, -math.inf):
            x, w = torch.randn(9, 6), dyadic(1, 6, 130, gated)[1]
            w[bias][[70, 129]] = 10.0  # on, so that something is computed there
            t = x if place == "x" else w[place]
            t[(2, 4) if place == "x" else (70, 3) if t.dim() == 2 else 129] = poison
            leaves = [t.requires_grad_() for t in (x, *w.values())]
            y = sparse_mlp(x, **w, activation=activation, screen=screen)
            grad_y = torch.randn(y.shape)
            got = dict(zip(("x", *w), torch.autograd.grad(y, leaves, grad_y), strict=True))
            wide = {name: t.detach().double() for name, t in w.items()}
            down_bias, flat = wide.pop("down_bias"), x.detach().double()
            ordered = [wide[name] for name in ("up", "bias", "down")]
            gates = {name: wide[name] for name in ("gate", "gate_bias") if gated}
            want = reference.forward(flat, *ordered, down_bias, function, **gates)
            assert torch.equal(signs(y), signs(want)), (place, poison)
            assert not math.isnan(poison) or y.isnan().any(), place
            if not gated:
                z = F.linear(x, w["up"], w["bias"])
                plain = F.linear(activation.value(z), w["down"], w["down_bias"])
                assert torch.equal(signs(y), signs(plain)), (place, poison)
                with torch.no_grad():
                    again = sparse_mlp(x, **w, activation=activation, screen=screen)
                assert torch.equal(signs(y), signs(again)), (place, poison)
            gradients = reference.backward(grad_y.double(), flat, *ordered, function, **gates)
            for name, ours in got.items():
                plain = getattr(gradients, name)
                assert torch.equal(signs(ours), signs(plain)), (place, poison, name)


@pytest.mark.parametrize("partner", [math.nan, math.inf, -math.inf])
@pytest.mark.parametrize("screen", [False, True], ids=["plain", "screen"])
def test_the_one_difference_is_a_product_with_an_exact_zero(
    way: str, partner: float, screen: bool
) -> None:
    """Unit 1 is off for token 0 and on for token 1: its partners meet that, or not."""
    x = torch.tensor([[1.0, 0.0], [0.0, 1.0]])
    up = torch.tensor([[1.0, 1.0], [-1.0, 1.0]]).requires_grad_()
    down = torch.tensor([[1.0, partner]])
    for learns in (True, False):
        with torch.set_grad_enabled(learns):
            y = sparse_mlp(x, up, None, down, screen=screen)
        assert y[0].tolist() == [1.0]  # dense: 1 + 0 · partner = NaN
        assert not y[1].isfinite()
        assert F.linear(torch.relu(F.linear(x, up)), down)[0].isnan()
    y = sparse_mlp(x, up, None, down, screen=screen)
    (dup,) = torch.autograd.grad(y.sum(), up)
    assert dup[1, 0] == 0 or dup[1, 0].isnan()  # token 1 has x = 0 there
    assert dup[0].tolist() == [1.0, 1.0]
    # the gradient of an output: dV skips the tokens in which a unit is off
    finite = torch.ones(1, 2, requires_grad=True)
    y = sparse_mlp(x, up, None, finite, screen=screen)
    (ddown,) = torch.autograd.grad(y, finite, torch.tensor([[partner], [1.0]]))
    assert ddown[0, 1] == 1
    assert not ddown[0, 0].isfinite()
    # gated: u of a unit whose gate is off
    bias = torch.tensor([0.0, partner])
    y = sparse_mlp(x, torch.ones(2, 2), bias, torch.ones(1, 2), gate=up, screen=screen)
    assert y[0].tolist() == [1.0]
    assert not y[1].isfinite()


@pytest.mark.parametrize("learns", [False, True])
@pytest.mark.parametrize("screen", [False, True], ids=["plain", "screen"])
def test_sizes_of_nothing_and_more_channels_than_codes_can_sum(
    way: str, learns: bool, screen: bool
) -> None:
    """No token, no unit, no channel; and D > 2¹⁶, whose int8 products could overflow 32 bits."""
    for tokens, d, h in [(0, 4, 6), (3, 4, 0), (3, 0, 6), (0, 0, 0), (2, 2**16 + 1, 5)]:
        x, w = dyadic(tokens, d, h)
        want = dense(x, w, FUSED[0])
        leaves = [t.requires_grad_(learns) for t in (x, *w.values())]
        y = sparse_mlp(*leaves, screen=screen)
        assert torch.equal(y.detach(), want)
        if learns:
            for t, gradient in zip(leaves, torch.autograd.grad(y.sum(), leaves), strict=True):
                assert gradient.shape == t.shape
                assert gradient.isfinite().all()


# ---- contracts ------------------------------------------------------------------------------


@pytest.mark.filterwarnings("ignore:The .grad attribute of a Tensor")  # torch 2.15 looks itself
def test_every_operator_passes_opcheck() -> None:
    """Schema, fake, autograd and compiled dispatch, as torch checks them; none is forgotten."""
    x, w = dyadic(5, 6, 70)
    x, up, down = (t.requires_grad_() for t in (x, w["up"], w["down"]))
    bias, down_bias = w["bias"].requires_grad_(), w["down_bias"].requires_grad_()
    fixed, rows = up.detach(), down.detach().t().contiguous()
    codes = ops.quantise(fixed) if backends.loaded() else []
    with torch.no_grad():
        pointer, index, value, _ = ops.pack(x, up, bias, [], "jsrelu")
        by_unit = ops.by_unit(pointer, index, value, 5, 70)
    learns = value.clone().requires_grad_()
    a, slope = torch.randint(-1, 2, (2, 5, 70)).float()
    calls: dict[str, list[tuple[Any, ...]]] = {
        "pack": [(x, up, bias, codes, name) for name in (*forms.FUSED, *NUMBERS)]
        + [(x, up, None, [], "relu")],
        "pack_values": [(x, up, bias, a, slope), (x, up, None, a, slope)],
        "sample": [(pointer, index, x, up, bias), (pointer, index, x, up, None)],
        "project": [(pointer, index, learns, down, r, b, 5) for r in (None, rows)
                    for b in (None, down_bias)],
        "multiply": [(pointer, index, value, rows, b, 5, turned) for turned in (False, True)
                     for b in (None, w["down_bias"].detach())],
        "by_unit": [(pointer, index, value, 5, 70)],
        "row_sums": [(by_unit[0], by_unit[2], 70)],
        "row_norms": [(pointer, learns, 5)],
        "row_norms_backward": [(pointer, value, torch.ones(5), *torch.randn(2, 5))],
        "panels": [(fixed,)] if backends.loaded() else [],
        "quantise": [(fixed,)] if backends.loaded() else [],
    }  # fmt: skip
    registered = {
        name.split("::")[1].split(".")[0]
        for name in torch._C._dispatch_get_all_op_names()
        if name.startswith("actsparse::")
    }
    assert registered - {"decode", "block"} == set(calls)  # a GPU's, see test_triton_decode.py
    static = ("test_schema", "test_faketensor", "test_autograd_registration")
    whole = (fixed, bias.detach(), down.detach(), None, None, None, None, "relu", False, "sparse")
    torch.library.opcheck(in_compiled._block, (x.detach(), *whole), test_utils=static)
    for name, arguments in calls.items():
        # torch's fourth check adds floats to its first output, which is whole numbers here;
        # test_mlp compiles both
        checks = static if name.startswith("pack") else (*static, "test_aot_dispatch_dynamic")
        for each in arguments:
            operator = getattr(row_norms if name.startswith("row_norms") else ops, name)
            torch.library.opcheck(operator, each, test_utils=checks)
    if backends.loaded():
        kernels, checks = torch.ops.actsparse_cpu, {"test_utils": static[:2]}
        torch.library.opcheck(kernels.cut.default, (slope, bias.detach()), **checks)
        torch.library.opcheck(kernels.linear.default, (x.detach(), fixed, bias.detach()), **checks)
        for act in range(len(forms.FUSED)):
            flat, b = x.detach(), bias.detach()
            for second in ((None, None), (fixed, b)):
                rest = (*second, ops.panels(rows), down_bias.detach(), 6, act, 0.1)
                for threshold in (None, b.float()):
                    each = (flat @ fixed.t(), threshold, flat, *rest)
                    torch.library.opcheck(kernels.forward.default, each, **checks)
                each = (flat, fixed, b, *codes, *rest)
                torch.library.opcheck(kernels.forward_screened.default, each, **checks)

"""sparse_mlp is the dense MLP: values, gradients, memory, compiled, and where zeros meet NaN."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from actsparse.activations import ActivationFunction, named, shifted_s_shape
from actsparse.kernels import backends, forms, ops, prepare, sparse_mlp
from actsparse.kernels import pack as packing
from tests.kernels import reference

TWO_MASKS = [named("relu6"), named("hardtanh"), shifted_s_shape(0.4, 1.6), shifted_s_shape(-1.6)]
THRESHOLDS = [named("relu(threshold=0.5)"), named("jsrelu(jump=0.5, cap=2, threshold=0.25)")]
ALL = [named(name) for name in forms.FUSED] + THRESHOLDS + TWO_MASKS


def weights(
    d: int, h: int, dtype: torch.dtype = torch.float64, gated: bool = False
) -> dict[str, Tensor]:
    """Weights that leave about a tenth of the units active."""
    made = {
        "up": torch.randn(h, d, dtype=dtype) / d**0.5,
        "bias": torch.randn(h, dtype=dtype) * 0.3 - 1.3,
        "down": torch.randn(d, h, dtype=dtype) / h**0.5,
        "down_bias": torch.randn(d, dtype=dtype),
    }
    if gated:
        made["gate"], made["gate_bias"] = made["up"].flip(0).clone(), made["bias"].clone()
        made["bias"] = torch.randn(h, dtype=dtype)
    return {name: tensor.requires_grad_() for name, tensor in made.items()}


def dense(x: Tensor, w: dict[str, Tensor], activation: ActivationFunction) -> Tensor:
    return reference.forward(x, w["up"], w["bias"], w["down"], w["down_bias"], activation,
                             w.get("gate"), w.get("gate_bias"))  # fmt: skip


def gradients(y: Tensor, x: Tensor, w: dict[str, Tensor], grad_y: Tensor) -> tuple[Tensor, ...]:
    return torch.autograd.grad(y, [x, *w.values()], grad_y)


@settings(max_examples=80)
@given(
    leading=st.sampled_from([(), (0,), (1,), (7,), (2, 3), (2, 0, 3)]),
    d=st.integers(1, 40),
    h=st.sampled_from([1, 3, 64, 385, 800]),
    activation=st.sampled_from(ALL),
    gated=st.booleans(),
    screen=st.booleans(),
    layout=st.sampled_from(["linear", "conv1d", "strided"]),
    dtype=st.sampled_from([torch.float32, torch.float64]),
    seed=st.integers(0, 9),
)
def test_values_and_gradients_are_those_of_the_reference(
    leading: tuple[int, ...],
    d: int,
    h: int,
    activation: ActivationFunction,
    gated: bool,
    screen: bool,
    layout: str,
    dtype: torch.dtype,
    seed: int,
) -> None:
    torch.manual_seed(seed)
    w64 = weights(d, h, gated=gated)
    x64 = torch.randn(*leading, d, dtype=torch.float64)
    # float32 has no roundings near a kink that float64 has not: values of a few bits
    coarse = {name: (t.detach() * 16).round() / 16 for name, t in w64.items()}
    x64 = (x64 * 16).round() / 16
    coarse["bias" if not gated else "gate_bias"] += 1 / 512  # z is never 0 or on a kink
    w, x = {}, x64.to(dtype).requires_grad_()
    for name, tensor in coarse.items():
        t = tensor.to(dtype)
        if t.dim() == 2 and layout == "conv1d":
            t = t.t().contiguous().t()
        if t.dim() == 2 and layout == "strided":
            t = torch.cat([t, t], 1)[:, : t.shape[1]]
        w[name] = t.requires_grad_()
    if layout == "strided" and x.dim() > 1:
        x = torch.cat([x, x], -1)[..., :d].detach().requires_grad_()
    y = sparse_mlp(x, **w, activation=activation, screen=screen)
    assert y.shape == x.shape
    grad_y = torch.randn(y.shape, dtype=torch.float64)
    flat, flat_grad = x64.reshape(-1, d), grad_y.reshape(-1, d)
    exact = dense(flat, coarse, activation).reshape(y.shape)
    want = reference.backward(flat_grad, flat, coarse["up"], coarse["bias"], coarse["down"],
                              activation, coarse.get("gate"), coarse.get("gate_bias"))  # fmt: skip
    # Every result is a sum of at most h or len(flat) terms, of factors that are sums of d or so:
    # n roundings of u each, relative to terms that are at most tens here (s_shape, gate: squares)
    n = d + h + len(flat) + 20
    atol = n * torch.finfo(dtype).eps * 100
    torch.testing.assert_close(y.double(), exact, rtol=0, atol=atol)
    got = gradients(y, x, w, grad_y.to(dtype))
    names = ["x", *w]
    for name, ours in zip(names, got, strict=True):
        plain = getattr(want, name).reshape(ours.shape)
        torch.testing.assert_close(ours.double(), plain, rtol=0, atol=atol, msg=name)
    with torch.no_grad():
        inferred = sparse_mlp(x, **w, activation=activation, screen=screen,
                              prepared=prepare(w["down"], w["up"], w.get("gate")))  # fmt: skip
    torch.testing.assert_close(inferred.double(), exact, rtol=0, atol=atol)


@pytest.mark.parametrize("gated", [False, True])
@pytest.mark.parametrize("activation", ALL, ids=lambda f: f.name)
def test_gradcheck(activation: ActivationFunction, gated: bool) -> None:
    torch.manual_seed(2)
    w, x = weights(3, 7, gated=gated), torch.randn(4, 3, dtype=torch.float64).requires_grad_()
    keep = (torch.rand(1000, dtype=torch.float64) < 0.7) / 0.7

    def drop(value: Tensor) -> Tensor:
        return value * keep[: len(value)]

    def run(x: Tensor, *tensors: Tensor) -> Tensor:
        named_tensors = dict(zip(w, tensors, strict=True))
        return sparse_mlp(x, **named_tensors, activation=activation, between=drop)

    assert torch.autograd.gradcheck(run, (x, *w.values()), eps=1e-7, atol=1e-5)


@pytest.mark.parametrize("name", forms.FUSED)
@pytest.mark.parametrize("screen", [False, True])
def test_rms_error_is_that_of_dense(name: str, screen: bool) -> None:
    """RMS error against float64, each on the mask of its own z: at most 4 times dense's."""
    activation = named(name)
    w64, x64 = weights(192, 768), torch.randn(300, 192, dtype=torch.float64)
    w = {n: t.detach().float().requires_grad_() for n, t in w64.items()}
    x, grad_y = x64.float().requires_grad_(), torch.randn(300, 192)
    codes = ops.quantise(w["up"].detach()) if screen and backends.loaded() else []
    entries = ops.pack(x.detach(), w["up"].detach(), w["bias"].detach(), codes, name)
    ours_mask = packing.unpack(*entries[:2], torch.ones(len(entries[1])), 300, 768) != 0
    dense_mask = F.linear(x, w["up"], w["bias"]) > 0

    def errors(y: Tensor, mask: Tensor) -> list[float]:
        leaves = {n: t.detach().double().requires_grad_() for n, t in w.items()}
        xx = x.detach().double().requires_grad_()
        z = F.linear(xx, leaves["up"], leaves["bias"])
        a = torch.where(mask, {"relu": z, "jsrelu": z + z * z / 2, "squared_relu": z * z}[name], 0)
        exact = F.linear(a, leaves["down"], leaves["down_bias"])
        got = [y, *gradients(y, x, w, grad_y)]
        want = [exact, *gradients(exact, xx, leaves, grad_y.double())]
        return [
            float((g - e).detach().square().mean().sqrt()) for g, e in zip(got, want, strict=True)
        ]

    h = activation.value(F.linear(x, w["up"], w["bias"]))
    plain = errors(F.linear(h, w["down"], w["down_bias"]), dense_mask)
    sparse = errors(sparse_mlp(x, **w, activation=name, screen=screen), ours_mask)
    for ours, theirs in zip(sparse, plain, strict=True):
        assert ours <= 4 * theirs, (sparse, plain)


def test_what_is_saved_is_the_entries() -> None:
    """Index and value of the active tenth, a pointer each row and block; not the hidden layer."""
    n, d, h = 256, 32, 1536
    w, x = weights(d, h, torch.float32), torch.randn(n, d).requires_grad_()
    own = {t.untyped_storage().data_ptr() for t in (x, *w.values())}
    saved: dict[int, int] = {}

    def keep(t: Tensor) -> Tensor:
        if t.untyped_storage().data_ptr() not in own:
            saved[t.untyped_storage().data_ptr()] = t.untyped_storage().nbytes()
        return t

    with torch.autograd.graph.saved_tensors_hooks(keep, lambda t: t):
        y = sparse_mlp(x, **w)
    active = int((F.linear(x, w["up"], w["bias"]) > 0).sum())
    assert active < 0.15 * n * h
    pointers = 8 * (n * packing.blocks(h) + 1)
    assert sum(saved.values()) <= 8 * (active + 8) + pointers  # 8 entries: signs of rounding
    assert y.requires_grad


def test_dropout_between_is_dropout_of_the_hidden_layer() -> None:
    w, x = weights(24, 200), torch.randn(30, 24, dtype=torch.float64).requires_grad_()
    keep = (torch.rand(30, 200, dtype=torch.float64) < 0.8) / 0.8
    z = F.linear(x, w["up"], w["bias"])
    y = sparse_mlp(x, **w, between=lambda value: value * keep[z > 0])
    plain = F.linear(torch.relu(z) * keep, w["down"], w["down_bias"])
    torch.testing.assert_close(y, plain)
    grad_y = torch.randn_like(y)
    for ours, theirs in zip(
        gradients(y, x, w, grad_y), gradients(plain, x, w, grad_y), strict=True
    ):
        torch.testing.assert_close(ours, theirs)


def test_dropout_module_fits_between() -> None:
    w, x = weights(24, 200, torch.float32), torch.randn(30, 24)
    everything = sparse_mlp(x, **w, between=torch.nn.Dropout(1.0))
    assert torch.equal(everything, w["down_bias"].expand(30, 24))


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("screen", [False, True])
@pytest.mark.parametrize("learns", [False, True])
@pytest.mark.parametrize("activation", [named("relu"), *THRESHOLDS], ids=lambda f: f.name)
def test_nan_and_infinity_reach_y_where_dense_has_them(
    dtype: torch.dtype, screen: bool, learns: bool, activation: ActivationFunction
) -> None:
    w = {n: t.detach().to(dtype) for n, t in weights(16, 90).items()}
    x = torch.randn(12, 16, dtype=dtype)
    w["bias"] -= 1
    x[1, 3], x[2, 4] = torch.nan, torch.inf
    w["up"][5, 2] = torch.nan
    w["bias"][7] = torch.inf
    x.requires_grad_(learns)
    y = sparse_mlp(x, **w, activation=activation, screen=screen)
    plain = dense(x, w, activation)
    assert torch.equal(y.isnan(), plain.isnan())
    assert torch.equal(y.isinf(), plain.isinf())
    assert y[1:3].isnan().any()


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_zero_activations_hide_nan_in_down_and_dense_does_not(dtype: torch.dtype) -> None:
    w = {n: t.detach().to(dtype) for n, t in weights(16, 90).items()}
    x = torch.randn(12, 16, dtype=dtype).requires_grad_()
    w["bias"][9] = -100.0  # never active
    w["down"][3, 9], w["up"][9, 0] = torch.nan, -torch.inf
    w["up"][9, 0] = -1e30 if dtype == torch.float32 else w["up"][9, 0]
    w["bias"][9] = -torch.inf
    w["up"][9, 0] = 0.0
    y = sparse_mlp(x, **w)
    assert y.isfinite().all()
    (dx,) = torch.autograd.grad(y.sum(), x)
    assert dx.isfinite().all()
    assert F.linear(torch.relu(F.linear(x, w["up"], w["bias"])), w["down"]).isnan().any()


def test_saturated_units_count_in_y_and_not_in_dx() -> None:
    """ReLU6 above 6: a = 6, φ′ = 0; NaN in its row of U reaches no dx, in its row of V y."""
    activation = named("relu6")
    up, down = torch.ones(2, 1), torch.ones(1, 2)
    x = torch.tensor([[1.0]], requires_grad=True)
    bias = torch.tensor([9.0, 1.0], requires_grad=True)
    y = sparse_mlp(x, up, bias, down, activation=activation)
    assert y.tolist() == [[6 + 2]]
    dx, dbias = torch.autograd.grad(y, [x, bias])
    assert float(dx) == 1
    assert dbias.tolist() == [0.0, 1.0]
    down[0, 0] = torch.nan
    y = sparse_mlp(x, up, bias, down, activation=activation)
    assert y.isnan()
    (dx,) = torch.autograd.grad(y, x)
    assert float(dx) == 1


@pytest.mark.parametrize(
    "options",
    [
        {},
        {"screen": True},
        {"activation": "jsrelu"},
        {"activation": "relu6"},
        {"activation": "jsrelu(threshold=0.5)", "screen": True},
        {"activation": "relu(shift=0.5)"},
        {"gated": True},
        {"between": lambda value: value * 0.5},
    ],
    ids=lambda options: (
        "-".join(f"{k}={v}" for k, v in options.items() if not callable(v)) or "plain"
    ),
)
def test_compiles_as_one_graph(options: dict[str, Any]) -> None:
    options = dict(options)
    torch._dynamo.reset()
    w = weights(16, 400, torch.float32, gated=options.pop("gated", False))
    x = torch.randn(3, 5, 16).requires_grad_()

    def run(x: Tensor, w: dict[str, Tensor]) -> Tensor:
        return sparse_mlp(x * 1, **w, **options) * 2

    compiled: Callable[..., Tensor] = torch.compile(run, fullgraph=True, backend="aot_eager")
    grad_y = torch.randn(3, 5, 16)
    y, plain = compiled(x, w), run(x, w)
    assert torch.equal(y, plain)
    for ours, theirs in zip(
        gradients(y, x, w, grad_y), gradients(plain, x, w, grad_y), strict=True
    ):
        assert torch.equal(ours, theirs)
    with torch.no_grad():
        assert torch.equal(compiled(x, w), run(x, w))
        assert torch.equal(compiled(x[:2], w), run(x[:2], w))


@pytest.mark.slow
def test_compiles_through_inductor() -> None:
    w, x = weights(16, 400, torch.float32), torch.randn(3, 5, 16).requires_grad_()
    compiled = torch.compile(lambda x: sparse_mlp(x, **w, activation="jsrelu"), fullgraph=True)
    y, plain = compiled(x), sparse_mlp(x, **w, activation="jsrelu")
    assert torch.equal(y, plain)
    (ours,), (theirs,) = torch.autograd.grad(y.sum(), x), torch.autograd.grad(plain.sum(), x)
    assert torch.equal(ours, theirs)


def test_operators_keep_their_contracts() -> None:
    """Schemas, fakes and autograd registrations, as torch itself checks them."""
    w, x = weights(6, 70, torch.float32), torch.randn(5, 6).requires_grad_()
    up, down = w["up"], w["down"]
    entries = ops.pack(x, up, w["bias"], [], "jsrelu")
    pointer, index, value, _ = (t.detach().requires_grad_(t.is_floating_point()) for t in entries)
    checks = ("test_schema", "test_faketensor", "test_autograd_registration")
    for operator, arguments in [
        (ops.pack, (x, up, w["bias"], [], "jsrelu")),
        (ops.pack_values, (x, up, None, torch.randn(5, 70), torch.randn(5, 70))),
        (ops.sample, (pointer, index, x, up, w["bias"])),
        (ops.project, (pointer, index, value, down, None, w["down_bias"], 5)),
        (ops.multiply, (pointer, index, value.detach(), down.detach().t(), None, 5)),
        (ops.by_unit, (pointer, index, value.detach(), 5, 70)),
        *([(ops.panels, (down,))] if backends.loaded() else []),
    ]:
        torch.library.opcheck(operator, arguments, test_utils=checks)


def test_prepared_weights_give_the_same_numbers() -> None:
    w, x = weights(48, 500, torch.float32), torch.randn(9, 48)
    ready = prepare(w["down"], w["up"])
    with torch.no_grad():
        for screen in (False, True):
            plain = sparse_mlp(x, **w, screen=screen)
            assert torch.equal(sparse_mlp(x, **w, screen=screen, prepared=ready), plain)
            one = torch.cat([sparse_mlp(t, **w, screen=screen, prepared=ready) for t in x.split(1)])
            torch.testing.assert_close(one, plain)
    y = sparse_mlp(x, **w, prepared=ready)
    torch.testing.assert_close(y, plain)
    y.sum().backward()
    assert w["down"].grad is not None
    with pytest.raises(ValueError, match="prepared was made with a gate"):
        sparse_mlp(x, **w, prepared=prepare(w["down"], w["up"], w["up"]))
    with pytest.raises(ValueError, match="prepared was made without a gate"):
        sparse_mlp(x, **w, gate=w["up"], prepared=ready)


def test_the_output_may_be_wider_or_narrower_than_x() -> None:
    for d_out in (3, 40):
        w, x = weights(12, 90, torch.float32), torch.randn(5, 12).requires_grad_()
        w["down"], w["down_bias"] = torch.randn(d_out, 90).requires_grad_(), torch.zeros(d_out)
        for screen in (False, True):
            y = sparse_mlp(x, **w, screen=screen)
            torch.testing.assert_close(y, dense(x, w, named("relu")))
            with torch.no_grad():
                torch.testing.assert_close(sparse_mlp(x, **w, screen=screen), y)
        y.sum().backward()
        assert w["down"].grad is not None


def test_autocast_does_not_apply_and_biases_may_be_strided() -> None:
    w, x = weights(8, 70, torch.float32), torch.randn(9, 8)
    w["bias"] = torch.tensor([-0.5]).expand(70)
    for learns in (True, False):
        with torch.set_grad_enabled(learns):
            plain = sparse_mlp(x, **w)
            with torch.autocast("cpu", torch.bfloat16):
                assert torch.equal(sparse_mlp(x, **w), plain)


def test_misfits_are_named() -> None:
    w, x = weights(4, 6, torch.float32), torch.randn(2, 4)
    for learns in (True, False):
        with torch.set_grad_enabled(learns):
            with pytest.raises(ValueError, match=r"x has shape \[2, 3\]; .* must be \[2, 4\]"):
                sparse_mlp(x[:, :3], **w)
            with pytest.raises(ValueError, match=r"down has shape \[4, 5\]; .* must be \[4, 6\]"):
                sparse_mlp(x, **{**w, "down": w["down"][:, :5]})
            with pytest.raises(ValueError, match=r"bias is torch.float64; up is torch.float32"):
                sparse_mlp(x, **{**w, "bias": w["bias"].double()})
    with pytest.raises(ValueError, match="unknown activation 'rely'"):
        sparse_mlp(x, **w, activation="rely")

"""Activation functions against their definitions and against autograd."""

from __future__ import annotations

import copy
import json
import math
import pickle
from pathlib import Path

import pytest
import torch
from hypothesis import example, given
from hypothesis import strategies as st
from torch import Tensor, nn
from torch.autograd import gradcheck, gradgradcheck

from actsparse import Recipe, SwapActivation, handle_of, load, observe, save, sparsify
from actsparse.activations import (
    ACTIVATIONS,
    ActivationFunction,
    SShape,
    derivative_of,
    identify,
    jsrelu,
    named,
    s_shape_of,
    shifted_s_shape,
)
from actsparse.blocks.site import site_of

# Where a function has a corner or a jump its derivative is a convention: keep away.
KINKS = {
    "relu": [0.0], "jsrelu": [0.0], "squared_relu": [0.0], "relu6": [0.0, 6.0],
    "hardtanh": [-1.0, 1.0], "s_shape": [-1.5, 1.5], "leaky_relu": [0.0], "elu": [0.0],
    "hardswish": [-3.0, 3.0], "softplus": [20.0],
}  # fmt: skip

FLOATS = [torch.float64, torch.float32, torch.bfloat16, torch.float16]
finite = st.floats(-30, 30, allow_nan=False)


def double(*values: float) -> Tensor:
    return torch.tensor(values, dtype=torch.float64)


# --- JSReLU ------------------------------------------------------------------------------------


def definition(z: float) -> tuple[float, float]:
    """Value and derivative as the paper writes them."""
    return (((z + 1) ** 2 - 1) / 2, z + 1) if z > 0 else (0.0, 0.0)


@given(st.lists(st.floats(-1e3, 1e3), min_size=1, max_size=16))
def test_jsrelu_is_its_definition_value_and_derivative(values: list[float]) -> None:
    z = double(*values).requires_grad_()
    out = jsrelu(z)
    (slope,) = torch.autograd.grad(out.sum(), z)
    want = [definition(v) for v in values]
    # the definition itself subtracts 1 from (z+1)²: an absolute error of some eps·max(1, (z+1)²)
    scale = torch.tensor([max(1.0, (abs(v) + 1) ** 2) for v in values], dtype=torch.float64)
    eps = torch.finfo(torch.float64).eps
    assert bool(((out.detach() - double(*(w[0] for w in want))).abs() <= 4 * eps * scale).all())
    torch.testing.assert_close(slope, double(*(w[1] for w in want)), rtol=2 * eps, atol=0)
    torch.testing.assert_close(
        ACTIVATIONS["jsrelu"].derivative(z.detach()), slope, rtol=2 * eps, atol=0
    )


def test_jsrelu_jumps_by_one_at_zero_and_is_off_at_zero_itself() -> None:
    tiny = 5e-324  # the smallest number above zero
    z = double(-tiny, -0.0, 0.0, tiny).requires_grad_()
    out = jsrelu(z)
    (slope,) = torch.autograd.grad(out.sum(), z)
    assert out.tolist() == [0.0, 0.0, 0.0, tiny]
    assert slope.tolist() == [0.0, 0.0, 0.0, 1.0]
    assert ACTIVATIONS["jsrelu"].derivative(z.detach()).tolist() == [0.0, 0.0, 0.0, 1.0]


@pytest.mark.parametrize("dtype", FLOATS, ids=str)
def test_jsrelu_keeps_its_dtype_and_rounds_once_or_twice(dtype: torch.dtype) -> None:
    z = torch.linspace(-4, 4, 97).to(dtype).requires_grad_()
    out = jsrelu(z)
    out.sum().backward()
    assert out.dtype == z.grad.dtype == dtype
    exact = z.detach().double()
    on = exact > 0
    eps = torch.finfo(dtype).eps
    # r²/2, then r + that: two roundings of half an eps, of positive terms, so the error is relative
    torch.testing.assert_close(
        out.detach().double(), (exact + exact.square() / 2) * on, rtol=1.01 * eps, atol=0
    )
    torch.testing.assert_close(z.grad.double(), (exact + 1) * on, rtol=1.01 * eps, atol=0)


def test_jsrelu_lets_nan_through_and_infinity_be_infinite() -> None:
    z = double(math.nan, math.inf, -math.inf).requires_grad_()
    out = jsrelu(z)
    (slope,) = torch.autograd.grad(out.sum(), z)
    for got in (out.detach(), slope, ACTIVATIONS["jsrelu"].derivative(z.detach())):
        assert math.isnan(got[0])
        assert got[1:].tolist() == [math.inf, 0.0]


def test_jsrelu_of_subnormals_is_the_identity() -> None:
    z = torch.tensor([1e-40, 1e-44])
    assert torch.equal(jsrelu(z), z)


def test_jsrelu_passes_gradcheck_and_gradgradcheck_away_from_its_jump() -> None:
    z = double(-2.0, -0.3, 0.2, 0.9, 3.0).requires_grad_()
    assert gradcheck(jsrelu, z)
    assert gradgradcheck(jsrelu, z)
    second = torch.autograd.functional.hessian(lambda v: jsrelu(v).sum(), z.detach())
    assert second.diagonal().tolist() == [0.0, 0.0, 1.0, 1.0, 1.0]


@pytest.mark.filterwarnings("ignore:There is a performance drop")  # vmap of addcmul_
def test_jsrelu_works_under_vmap_and_grad() -> None:
    z = torch.randn(4, 7, dtype=torch.float64)
    assert torch.equal(torch.vmap(jsrelu)(z), jsrelu(z))
    slope = torch.vmap(torch.func.grad(lambda row: jsrelu(row).sum()))(z)
    assert torch.equal(slope, (z + 1) * (z > 0))


def test_jsrelu_has_a_forward_mode_derivative() -> None:
    z = torch.randn(9, dtype=torch.float64)
    value, push = torch.func.jvp(jsrelu, (z,), (2 * torch.ones_like(z),))
    assert torch.equal(value, jsrelu(z))
    torch.testing.assert_close(push, 2 * (z + 1) * (z > 0), rtol=1e-15, atol=0)


def test_jsrelu_compiles_whole_with_its_gradient() -> None:
    z = torch.randn(33)
    both = torch.compile(
        lambda v: (jsrelu(v), ACTIVATIONS["jsrelu"].derivative(v)), fullgraph=True, backend="eager"
    )
    value, slope = both(z)
    # one multiply–add more or less fused
    torch.testing.assert_close(value, jsrelu(z), rtol=2 * torch.finfo(z.dtype).eps, atol=0)
    assert torch.equal(slope, (z + 1) * (z > 0))
    torch._dynamo.reset()


# --- all of them -------------------------------------------------------------------------------


@pytest.mark.parametrize("name", sorted(ACTIVATIONS))
@given(st.lists(finite, min_size=1, max_size=8))
def test_the_derivative_is_the_one_autograd_finds(name: str, values: list[float]) -> None:
    z = double(*(v for v in values if all(abs(v - k) > 1e-9 for k in KINKS.get(name, []))))
    function = ACTIVATIONS[name]
    leaf = z.clone().requires_grad_()
    (slope,) = torch.autograd.grad(function.value(leaf).sum(), leaf)
    # both are float64 formulas of some ten operations on numbers up to (30 + 1)²
    torch.testing.assert_close(function.derivative(z), slope, rtol=1e-13, atol=1e-13)


@pytest.mark.parametrize("name", sorted(ACTIVATIONS))
def test_the_derivative_is_the_slope_of_the_value(name: str) -> None:
    """Against differences, so that an error in value and autograd's derivative alike shows."""
    function = ACTIVATIONS[name]
    z = torch.linspace(-6.9, 6.9, 64, dtype=torch.float64)
    h = 1e-6
    for kink in KINKS.get(name, []):
        z = z[(z - kink).abs() > 10 * h]
    slope = (function.value(z + h) - function.value(z - h)) / (2 * h)
    # rounding eps·|φ|/h ≈ 7e-9 for |φ| ≤ 32, truncation h²·|φ‴|/6
    torch.testing.assert_close(function.derivative(z), slope, rtol=0, atol=1e-7)


@pytest.mark.parametrize("name", sorted(ACTIVATIONS))
def test_a_nan_stays_visible_in_the_value_and_in_our_own_derivatives(name: str) -> None:
    z = double(math.nan, 1.0)
    assert bool(ACTIVATIONS[name].value(z)[0].isnan())
    # torch's own backward of the other piecewise functions takes NaN for a number of one side
    if name not in ("identity", "elu", "hardswish", "leaky_relu"):
        assert bool(ACTIVATIONS[name].derivative(z)[0].isnan())


@pytest.mark.parametrize("name", sorted(ACTIVATIONS))
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32], ids=str)
def test_dtype_and_shape_are_kept(name: str, dtype: torch.dtype) -> None:
    z = torch.randn(2, 3, 5).to(dtype)
    for function in (ACTIVATIONS[name].value, ACTIVATIONS[name].derivative):
        out = function(z)
        assert (out.dtype, out.shape) == (dtype, z.shape)
        assert not out.requires_grad


@pytest.mark.parametrize(
    "name",
    sorted(ACTIVATIONS),
)
def test_the_flags_say_where_the_function_is_silent(name: str) -> None:
    function = ACTIVATIONS[name]
    z = torch.linspace(-6, 6, 1001, dtype=torch.float64)  # below −7 GELU is a float64 zero, too
    z = z[z != 0]
    quiet, flat = function.value(z) == 0, function.derivative(z) == 0
    assert bool(quiet.float().mean() > 0.05) == function.silent
    assert bool((quiet == flat).all() and quiet.any()) == function.same_zeros


def test_derivatives_work_in_inference_mode_and_without_gradients() -> None:
    z = torch.linspace(-3, 3, 31)
    for name, function in ACTIVATIONS.items():
        want = function.derivative(z)
        with torch.inference_mode():
            got = function.derivative(z.clone())
        assert (got - want).abs().max() < 4e-6, name  # roundings of slopes up to 4
        assert torch.equal(torch.no_grad()(function.derivative)(z), want), name


@given(st.floats(-2, 2), st.floats(-2, 2), finite)
def test_the_shifted_s_shape_is_its_formula(dx: float, dy: float, z: float) -> None:
    function = shifted_s_shape(dx, dy)

    def relu(v: float) -> float:
        return max(v, 0.0)

    s = relu(z - dx - 1.5) ** 2 - relu(dx - z - 1.5) ** 2
    assert float(function.value(double(z))[0]) == pytest.approx(s + dy, rel=1e-12, abs=1e-12)
    slope = 2 * (relu(z - dx - 1.5) + relu(dx - z - 1.5))
    assert float(function.derivative(double(z))[0]) == pytest.approx(slope, rel=1e-12, abs=1e-12)


# --- naming ------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", sorted(ACTIVATIONS))
def test_each_function_is_recognised_by_its_values(name: str) -> None:
    assert identify(ACTIVATIONS[name].value) == name
    assert identify(lambda z: ACTIVATIONS[name].value(z) + 0) == name


MODULES = {
    "relu": nn.ReLU(inplace=True), "gelu": nn.GELU(), "gelu_tanh": nn.GELU("tanh"),
    "silu": nn.SiLU(), "tanh": nn.Tanh(), "sigmoid": nn.Sigmoid(), "relu6": nn.ReLU6(),
    "hardtanh": nn.Hardtanh(), "elu": nn.ELU(), "leaky_relu": nn.LeakyReLU(), "mish": nn.Mish(),
    "softplus": nn.Softplus(), "hardswish": nn.Hardswish(), "identity": nn.Identity(),
}  # fmt: skip


@pytest.mark.parametrize("name", sorted(MODULES))
def test_torchs_modules_are_recognised(name: str) -> None:
    assert identify(MODULES[name]) == name


STRANGERS = {
    "elu(alpha=2)": nn.ELU(2.0), "leaky 0.2": nn.LeakyReLU(0.2), "selu": nn.SELU(),
    "celu(2)": nn.CELU(2.0), "softsign": nn.Softsign(), "softshrink": nn.Softshrink(),
    "hardtanh(-2, 2)": nn.Hardtanh(-2, 2), "threshold": nn.Threshold(0.5, 0.0),
    "sine": torch.sin, "scaled relu": lambda z: 1.001 * torch.relu(z),
    "softmax": nn.Softmax(-1), "norm": lambda z: z / z.norm(), "glu": nn.GLU(),
    "a sum": torch.sum, "a list": lambda z: [z], "an error": lambda z: 1 / 0,
    "shifted": lambda z: torch.relu(z - 0.01), "int only": lambda z: torch.bitwise_not(z),
}  # fmt: skip


@pytest.mark.parametrize("name", sorted(STRANGERS))
def test_a_strangers_function_has_no_name(name: str) -> None:
    assert identify(STRANGERS[name]) is None


class Learnt(nn.Module):
    """GELU whose sharpness is learnt."""

    def __init__(self, dtype: torch.dtype = torch.float32) -> None:
        super().__init__()
        self.k = nn.Parameter(torch.ones(1, dtype=dtype))

    def forward(self, z: Tensor) -> Tensor:
        return nn.functional.gelu(z * self.k)


@pytest.mark.parametrize("dtype", FLOATS, ids=str)
def test_a_function_that_learns_is_not_named_after_what_it_is_today(dtype: torch.dtype) -> None:
    assert identify(Learnt(dtype)) is None
    assert identify(nn.PReLU(init=0.01, dtype=dtype)) is None


@pytest.mark.parametrize(
    "dtype",
    FLOATS,
    ids=str,
)
def test_a_function_with_frozen_parameters_of_any_dtype_is_named_rightly(
    dtype: torch.dtype,
) -> None:
    """In bfloat16 the values of GELU and ReLU lie closer than a careless tolerance."""
    module = Learnt(dtype).requires_grad_(False)
    assert identify(module) == "gelu"
    assert module.k.dtype == dtype


def test_identify_fires_no_hook_and_changes_no_parameter() -> None:
    module, fired = nn.ReLU(), []
    module.register_forward_hook(lambda *a: fired.append(a))
    assert identify(module) == "relu"
    assert fired == []


def test_identify_leaves_no_gradient_and_no_random_state_behind() -> None:
    module, state = nn.RReLU(), torch.get_rng_state()
    identify(module.eval())
    assert torch.equal(torch.get_rng_state(), state)


def test_names_and_unknown_names() -> None:
    assert named("jsrelu") is ACTIVATIONS["jsrelu"]
    with pytest.raises(ValueError, match=r"unknown activation 'geglu'.*known: .*gelu.*relu"):
        named("geglu")


def test_derivative_of_takes_the_formula_then_autograd_then_refuses() -> None:
    z = torch.linspace(-2, 2, 9)
    assert derivative_of(None, "relu") is ACTIVATIONS["relu"].derivative
    torch.testing.assert_close(derivative_of(torch.sin, None)(z), z.cos())
    kept = z.clone()
    in_place = derivative_of(nn.SELU(inplace=True), None)(z)
    torch.testing.assert_close(in_place, derivative_of(nn.SELU(), None)(z))
    assert torch.equal(z, kept)
    with pytest.raises(ValueError, match="inline"):
        derivative_of(None, None)


# --- shifted S-shapes by name --------------------------------------------------------------------

SHIFTED = "s_shape(dx=1.6, dy=-1.6)"
any_number = st.floats(allow_nan=False, allow_infinity=False)
any_width = st.floats(0, exclude_min=True, allow_infinity=False)


@given(any_number, any_number, any_width)
@example(-0.0, 0.0, 1.5)
@example(5e-324, -1.7976931348623157e308, 1e16)
@example(1 / 3, 0.1 + 0.2, 1.5000000000000002)
@example(1e-5, 123456789.0, 2.0)
def test_a_name_gives_back_the_function_and_its_numbers(dx: float, dy: float, h: float) -> None:
    function = shifted_s_shape(dx, dy, h)
    assert named(function.name) is function
    assert s_shape_of(function.name) == (dx, dy, h)
    assert pickle.loads(pickle.dumps(function)) is copy.deepcopy(function) is function
    assert derivative_of(None, function.name) is function.derivative
    assert function.silent == function.same_zeros == (dy == 0)


numbers = st.builds(SShape, *(st.sampled_from([0.0, 1.6, -1.6, 1.6000000000000003]),) * 2,
                    st.sampled_from([1.5, 1.4999999999999998, 1.6]))  # fmt: skip


@given(numbers, numbers)
def test_two_functions_have_two_names(one: SShape, other: SShape) -> None:
    names = {shifted_s_shape(*one).name, shifted_s_shape(*other).name}
    assert len(names) == len({one, other})


def test_the_names_are_these() -> None:
    assert shifted_s_shape(1.6, -1.6).name == SHIFTED
    assert shifted_s_shape(2, -1.0).name == "s_shape(dx=2, dy=-1)"
    assert shifted_s_shape(0, 0, 1).name == "s_shape(dx=0, dy=0, half_width=1)"
    assert shifted_s_shape(-0.0, 1e-7, 1e20).name == "s_shape(dx=0, dy=1e-07, half_width=1e+20)"
    assert shifted_s_shape() is shifted_s_shape(-0.0) is named("s_shape")


@pytest.mark.parametrize(
    "name",
    [
        "s_shape()", "s_shape(1.6, -1.6)", "s_shape(dx=1.6)", "s_shape(dy=-1.6, dx=1.6)",
        "s_shape(dx=1.6,dy=-1.6)", " s_shape(dx=1.6, dy=-1.6)", "s_shape(dx=1.6, dy=-1.6)\n",
        "S_shape(dx=1.6, dy=-1.6)", "s_shape(dx=1.60, dy=-1.6)", "s_shape(dx=+1.6, dy=-1.6)",
        "s_shape(dx=1.6.0, dy=-1.6)", "s_shape(dx=., dy=-1.6)", "s_shape(dx=1_6, dy=-1.6)",
        "s_shape(dx=١, dy=-1.6)", "s_shape(dx=nan, dy=0)", "s_shape(dx=0, dy=inf)",
        "s_shape(dx=1e+999, dy=0)", "s_shape(dx=0, dy=0)", "s_shape(dx=0, dy=-0)",
        "s_shape(dx=0, dy=1.0)", "s_shape(dx=-0, dy=1)", "s_shape(dx=1.6, dy=-1.6, half_width=1.5)",
        "s_shape(dx=1.6, dy=-1.6, half_width=0)", "s_shape(dx=1.6, dy=-1.6, half_width=-1)",
        "s_shape(dx=1.6, dy=-1.6, 2)", "s_shape(dx=__import__('os'), dy=0)",
    ],
)  # fmt: skip
def test_a_name_of_another_form_is_unknown(name: str) -> None:
    assert s_shape_of(name) is None
    with pytest.raises(ValueError, match=r"unknown activation .*known: .*relu.*s_shape\(dx=1\.6, "):
        named(name)
    with pytest.raises(ValueError, match="unknown activation"):
        SwapActivation(name)


@pytest.mark.parametrize(
    "wrong",
    [{"dx": math.nan}, {"dy": -math.inf}, {"half_width": 0}, {"half_width": -1.5}],
    ids=str,
)
def test_numbers_that_make_no_s_shape_are_named(wrong: dict[str, float]) -> None:
    (key, value), = wrong.items()  # fmt: skip
    with pytest.raises(ValueError, match=rf"{key}={value!r}.*finite numbers, half_width above 0"):
        shifted_s_shape(**wrong)


def test_a_strangers_function_does_not_pickle_as_ours() -> None:
    stranger = ActivationFunction(SHIFTED, torch.sin, torch.cos)
    assert pickle.loads(pickle.dumps(stranger)).value is torch.sin
    assert s_shape_of("relu") is None


def test_a_recipe_with_a_shifted_s_shape_survives_json_training_and_a_file(tmp_path: Path) -> None:
    from transformers import GPT2Config, GPT2LMHeadModel

    recipe = Recipe("manipulated", (SwapActivation(to=SHIFTED, mix=2),))
    again = Recipe.from_json(json.loads(json.dumps(recipe.to_json())))
    assert again == recipe
    config = GPT2Config(vocab_size=11, n_positions=8, n_embd=8, n_layer=2, n_head=2)
    model, ids = GPT2LMHeadModel(config), torch.randint(11, (2, 6))
    handle = sparsify(model, again, inputs={"input_ids": ids})
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    handle.attach(optimizer, steps=4)
    for _ in range(3):
        optimizer.zero_grad()
        model(input_ids=ids, labels=ids).loss.backward()
        optimizer.step()
    model.eval()
    pickled = pickle.loads(pickle.dumps(model))
    for twin in (load(save(model, tmp_path / "m")), pickled, copy.deepcopy(model)):
        assert torch.equal(twin(input_ids=ids).logits, model(input_ids=ids).logits)
        kept = handle_of(twin)
        assert kept is not None
        assert kept.recipe == recipe
        site = site_of(next(iter(kept.blocks)))
        assert site.function == SHIFTED
        z = torch.linspace(-4, 6, 41)
        assert torch.equal(site.derivative(z), shifted_s_shape(1.6, -1.6).derivative(z))


@pytest.mark.parametrize("dy", [0.0, -1.6])
def test_density_of_a_shifted_s_shape(dy: float) -> None:
    torch.manual_seed(2)
    model, x = nn.Sequential(nn.Linear(4, 30), nn.ReLU(), nn.Linear(30, 4)), torch.randn(40, 4)
    name = shifted_s_shape(1.6, dy).name
    sparsify(model, SwapActivation(name), inputs=x)
    with observe(model, ["density", "flatness"], inputs=x) as seen:
        model(x).square().sum().backward()
    found, z = seen.summary("train"), model[0](x).detach()
    assert found is not None
    phi = named(name)
    assert found["density"] == float((phi.value(z) != 0).double().mean())
    assert found["derivative_density"] == float((phi.derivative(z) != 0).double().mean())
    assert 0 < found["derivative_density"] < 1
    assert (found["density"] == found["derivative_density"]) == phi.same_zeros

"""Activation functions with numbers of their own, against their definitions and their names."""

from __future__ import annotations

import copy
import itertools
import math
import pickle

import pytest
import torch
from hypothesis import example, given
from hypothesis import strategies as st
from torch import Tensor, nn
from torch.autograd import gradcheck, gradgradcheck

from actsparse import SwapActivation, find_mlp_blocks, sparsify
from actsparse.activations import (
    ACTIVATIONS,
    derivative_of,
    identify,
    jsrelu,
    named,
    numbers_of,
    s_shape_of,
    thresholded,
    with_numbers,
)
from actsparse.blocks.site import site_of

Numbers = dict[str, float]
FLOATS = [torch.float64, torch.float32, torch.bfloat16, torch.float16]
EPS64 = torch.finfo(torch.float64).eps

NAMES = [
    "relu(threshold=0.5)", "relu(shift=1)", "relu(shift=0.75)", "relu(shift=0.5, threshold=1.25)",
    "relu(shift=1, threshold=0.25)", "squared_relu(threshold=0.5)", "jsrelu(threshold=0.5)",
    "jsrelu(jump=0)", "jsrelu(jump=0.25)", "jsrelu(cap=3)", "jsrelu(jump=0, cap=1)",
    "jsrelu(jump=2.5, cap=3, threshold=0.125)", "jsrelu(jump=0.5, cap=2, threshold=4)",
]  # fmt: skip


def double(*values: float) -> Tensor:
    return torch.tensor(values, dtype=torch.float64)


def definition(name: str, z: float) -> tuple[float, float]:
    """φ(z) and φ′(z), in words of the definition: nothing up to the threshold, above it the φ."""
    base, n = numbers_of(name) or ("", {})
    shift, jump, cap = n.get("shift", 0.0), n.get("jump", 1.0), n.get("cap", math.inf)
    if z <= max(n.get("threshold", 0.0), shift if base == "relu" else 0.0):
        return 0.0, 0.0
    if base == "relu":
        return z - shift, 1.0
    if base == "squared_relu":
        return z * z, 2 * z
    knee = cap - jump  # φ′ = jump + z up to here, cap from here on
    below = min(z, knee)
    area = below * (jump + (jump + below)) / 2  # under the rising part of φ′, a trapezium
    return area + (cap * (z - knee) if z > knee else 0.0), jump + below


def corners(name: str) -> list[float]:
    n = (numbers_of(name) or ("", {}))[1]
    return [0.0, n.get("threshold", 0.0), n.get("shift", 0.0),
            n.get("cap", math.inf) - n.get("jump", 1.0)]  # fmt: skip


# --- value and derivative ----------------------------------------------------------------------


@pytest.mark.parametrize("name", NAMES)
@given(st.lists(st.floats(-1e3, 1e3), min_size=1, max_size=12))
def test_value_and_derivative_are_the_definition(name: str, values: list[float]) -> None:
    phi, z = named(name), double(*values, *corners(name)[:3]).requires_grad_()
    out = phi.value(z)
    (slope,) = torch.autograd.grad(out.sum(), z)
    want = [definition(name, v) for v in z.tolist()]
    # some five roundings of positive terms on both sides; z − shift is exact up to one
    torch.testing.assert_close(out.detach(), double(*(w[0] for w in want)), rtol=8 * EPS64, atol=0)
    for got in (slope, phi.derivative(z.detach())):
        torch.testing.assert_close(got, double(*(w[1] for w in want)), rtol=2 * EPS64, atol=0)


@pytest.mark.parametrize("name", NAMES)
def test_the_derivative_is_the_slope_of_the_value(name: str) -> None:
    phi, h = named(name), 1e-6
    z = torch.linspace(-6.9, 6.9, 64, dtype=torch.float64)
    for corner in corners(name):
        z = z[(z - corner).abs() > 10 * h]
    slope = (phi.value(z + h) - phi.value(z - h)) / (2 * h)
    # rounding eps·|φ|/h ≈ 1e-8 for |φ| ≤ 48; no third derivative, so no truncation
    torch.testing.assert_close(phi.derivative(z), slope, rtol=0, atol=1e-7)


@pytest.mark.parametrize("name", NAMES)
def test_nan_stays_visible_and_infinity_is_infinite(name: str) -> None:
    z = double(math.nan, math.inf, -math.inf).requires_grad_()
    phi = named(name)
    out, derivative = phi.value(z), phi.derivative(z.detach())
    (slope,) = torch.autograd.grad(out.sum(), z)
    assert out[0].isnan()
    assert out[1:].tolist() == [math.inf, 0.0]
    assert derivative[0].isnan()
    assert derivative[1] == slope[1] == definition(name, math.inf)[1]
    assert derivative[2] == slope[2] == 0
    assert slope[0] != 0  # as of torch.relu: 1, or NaN


@pytest.mark.parametrize("dtype", FLOATS, ids=str)
@pytest.mark.parametrize("name", NAMES)
def test_half_precision_rounds_but_is_open_where_the_definition_is(
    name: str, dtype: torch.dtype
) -> None:
    phi = named(name)
    z = torch.cat([torch.linspace(-4, 4, 97), torch.tensor([300.0])]).to(dtype).requires_grad_()
    out = phi.value(z)
    out.sum().backward()
    slope = phi.derivative(z.detach())
    assert out.dtype == slope.dtype == z.grad.dtype == dtype
    want = [definition(name, v) for v in z.tolist()]  # the numbers are exact in every dtype
    eps, largest = torch.finfo(dtype).eps, torch.finfo(dtype).max
    # at most four roundings of half an eps, of positive terms
    value = double(*(w[0] for w in want)).clamp(max=math.inf)
    value[value > largest] = math.inf
    torch.testing.assert_close(out.detach().double(), value, rtol=2 * eps, atol=0)
    for got in (slope, z.grad):
        torch.testing.assert_close(got.double(), double(*(w[1] for w in want)), rtol=eps, atol=0)


@pytest.mark.parametrize("dtype", FLOATS[1:], ids=str)
@pytest.mark.parametrize("base", ["relu", "jsrelu", "squared_relu"])
@given(threshold=st.floats(1e-3, 4))
def test_a_threshold_that_rounds_opens_value_and_derivative_together(
    base: str, dtype: torch.dtype, threshold: float
) -> None:
    phi = thresholded(base, threshold)
    steps = 1 + torch.arange(-3, 4) * torch.finfo(dtype).eps
    z = (threshold * steps.double()).to(dtype).requires_grad_()  # the numbers next to it
    out = phi.value(z)
    out.sum().backward()
    assert torch.equal(out != 0, z.double() > torch.tensor(threshold, dtype=torch.float32).double())
    assert torch.equal(out != 0, z.grad != 0)
    assert torch.equal(out != 0, phi.derivative(z.detach()) != 0)
    assert not out[0]
    assert out[6]


@pytest.mark.parametrize("name", NAMES)
def test_second_derivatives_are_those_of_the_pieces(name: str) -> None:
    z = double(-2.0, -0.3, 0.2, 0.9, 1.7, 3.0, 5.5)
    leaf = z.clone().requires_grad_()
    assert gradcheck(named(name).value, leaf)
    assert gradgradcheck(named(name).value, leaf)


@pytest.mark.filterwarnings("ignore:There is a performance drop")
@pytest.mark.parametrize("name", [name for name in NAMES if name.startswith("jsrelu")])
def test_jsrelus_numbers_work_under_vmap_forward_mode_and_compile(name: str) -> None:
    phi, z = named(name), torch.randn(4, 7, dtype=torch.float64)
    assert torch.equal(torch.vmap(phi.value)(z), phi.value(z))
    slope = torch.vmap(torch.func.grad(lambda row: phi.value(row).sum()))(z)
    torch.testing.assert_close(slope, phi.derivative(z), rtol=2 * EPS64, atol=0)
    _, push = torch.func.jvp(phi.value, (z,), (torch.full_like(z, 2),))
    torch.testing.assert_close(push, 2 * slope, rtol=2 * EPS64, atol=0)
    both = torch.compile(
        lambda v: (phi.value(v), phi.derivative(v)), fullgraph=True, backend="eager"
    )
    leaf = z.clone().requires_grad_()
    value, compiled = both(leaf)
    value.sum().backward()
    torch.testing.assert_close(value, phi.value(z), rtol=8 * EPS64, atol=0)
    torch.testing.assert_close(leaf.grad, phi.derivative(z), rtol=8 * EPS64, atol=0)
    assert torch.equal(compiled, phi.derivative(z))
    torch._dynamo.reset()


def test_the_functions_without_numbers_are_bit_for_bit_what_they_were() -> None:
    z = torch.randn(999)
    r = torch.relu(z)
    assert torch.equal(named("relu").value(z), r)
    assert torch.equal(named("squared_relu").value(z), r.square())
    assert torch.equal(named("jsrelu").value(z), torch.addcmul(r, r, r, value=0.5))
    eps = torch.finfo(z.dtype).eps
    torch.testing.assert_close(jsrelu(z, cap=1e9), jsrelu(z), rtol=4 * eps, atol=0)


def test_relu_keeps_its_output_for_backward_and_not_its_input() -> None:
    """The next layer keeps it too, so that a block keeps one tensor of [T, H], not two."""
    kept: list[Tensor] = []
    with torch.autograd.graph.saved_tensors_hooks(lambda t: kept.append(t) or t, lambda t: t):
        z = torch.randn(5, requires_grad=True)
        a = named("relu").value(z)
    assert [t.data_ptr() for t in kept] == [a.data_ptr()]


# --- names -------------------------------------------------------------------------------------

positive = st.floats(0, 1e300)
of_each = st.one_of(
    st.tuples(
        st.just("relu"),
        st.fixed_dictionaries({}, optional={"shift": positive, "threshold": positive}),
    ),
    st.tuples(st.just("squared_relu"), st.fixed_dictionaries({}, optional={"threshold": positive})),
    st.tuples(
        st.just("jsrelu"),
        st.fixed_dictionaries(
            {},
            optional={
                "jump": st.floats(0, 10), "cap": st.floats(10, 1e300, exclude_min=True),
                "threshold": positive,
            },
        ),
    ),
)  # fmt: skip


@given(of_each)
@example(("relu", {"threshold": 5e-324}))
@example(("relu", {"shift": -0.0, "threshold": 1 / 3}))
@example(("jsrelu", {"jump": 0.1 + 0.2, "cap": 1e16}))
def test_a_name_gives_back_the_function_and_its_numbers(given: tuple[str, Numbers]) -> None:
    base, numbers = given
    phi = with_numbers(base, **numbers)
    defaults = {"shift": 0.0, "threshold": 0.0, "jump": 1.0}
    changed = {key: value for key, value in numbers.items() if value != defaults.get(key)}
    assert numbers_of(phi.name) == (base, changed)
    assert named(phi.name) is phi
    assert pickle.loads(pickle.dumps(phi)) is copy.deepcopy(phi) is phi
    assert derivative_of(None, phi.name) is phi.derivative
    assert phi.silent
    assert phi.same_zeros
    assert SwapActivation(phi.name).to == phi.name
    assert s_shape_of(phi.name) is None


def test_names_are_written_in_one_way() -> None:
    assert with_numbers("relu", threshold=0) is with_numbers("relu") is ACTIVATIONS["relu"]
    assert with_numbers("jsrelu", cap=math.inf, jump=1) is ACTIVATIONS["jsrelu"]
    assert with_numbers("relu", threshold=2, shift=1.5).name == "relu(shift=1.5, threshold=2)"
    assert (
        with_numbers("jsrelu", threshold=1e-7, cap=4, jump=0).name
        == "jsrelu(jump=0, cap=4, threshold=1e-07)"
    )
    for name in NAMES:
        assert named(name).name == name


@pytest.mark.parametrize(
    "name",
    [
        "relu()", "relu(0.5)", "relu(threshold=0.50)", "relu(threshold=.5)", "relu(threshold=0.5",
        "relu(threshold=0)", "relu(threshold=-0.5)", "relu(threshold=nan)", "relu(threshold=inf)",
        "relu(threshold=1_6)", "relu(threshold=0.5,shift=1)", "relu(threshold=0.5, shift=1)",
        "relu(threshold=0.5, threshold=0.5)", "relu(jump=2)", "relu(shift=inf)", "relu(shift=-1)",
        "relu(threshold=0.5))", " relu(threshold=0.5)", "relu (threshold=0.5)", "jsrelu(jump=1)",
        "jsrelu(cap=1)", "jsrelu(jump=2, cap=2)", "jsrelu(jump=-1)", "jsrelu(cap=inf)",
        "squared_relu(shift=1)", "gelu(threshold=0.5)", "silu(shift=1)", "relu(threshold=0.5)=1",
    ],
)  # fmt: skip
def test_a_name_of_another_form_is_unknown(name: str) -> None:
    assert numbers_of(name) is None
    with pytest.raises(ValueError, match=r"unknown activation .*'relu\(threshold=0\.5\)'"):
        named(name)


@pytest.mark.parametrize(
    ("base", "numbers", "message"),
    [
        ("relu", {"threshold": -1}, r"relu\(threshold=-1\): .*threshold at least 0"),
        ("relu", {"shift": -1}, r"relu\(shift=-1\): .*shift and threshold at least 0"),
        ("relu", {"cap": 2}, r"relu\(cap=2\): options are shift, threshold"),
        ("jsrelu", {"jump": 3, "cap": 2}, r"jump=3, cap=2\): .*cap above jump"),
        ("jsrelu", {"jump": math.nan}, "jump=nan.*finite"),
        ("squared_relu", {"threshold": math.inf}, "threshold=inf.*finite"),
        ("gelu", {"threshold": 1}, r"relu, jsrelu, squared_relu, s_shape take.*'gelu' does not"),
    ],
    ids=str,
)
def test_numbers_that_make_no_function_are_named(base: str, numbers: Numbers, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        with_numbers(base, **numbers)


def test_a_name_with_numbers_out_of_range_is_told_what_they_may_be() -> None:
    with pytest.raises(ValueError, match=r"shift=-1\)'; relu takes .*shift and .* at least 0"):
        named("relu(shift=-1)")


def test_a_threshold_joins_the_numbers_that_are_there_and_the_larger_one_holds() -> None:
    assert thresholded("relu", 0.5).name == "relu(threshold=0.5)"
    assert thresholded("jsrelu(jump=0.5)", 0.5).name == "jsrelu(jump=0.5, threshold=0.5)"
    assert thresholded("relu(threshold=0.5)", 0.25).name == "relu(threshold=0.5)"
    assert thresholded("relu(threshold=0.5)", 1).name == "relu(threshold=1)"
    assert thresholded("squared_relu", 0.0) is ACTIVATIONS["squared_relu"]
    for name, threshold in itertools.product(NAMES, [0.25, 3.0]):
        z = torch.linspace(-7, 7, 400, dtype=torch.float64)
        want = named(name).value(z) * (z > threshold)
        assert torch.equal(thresholded(name, threshold).value(z), want)
    for bad in (-0.5, math.nan, math.inf):
        with pytest.raises(ValueError, match="threshold"):
            thresholded("relu", bad)
    with pytest.raises(ValueError, match="'gelu' does not"):
        thresholded("gelu", 0.5)


@pytest.mark.parametrize(
    "name",
    [*NAMES, "relu(threshold=1e-05)", "relu(shift=1e-05)", "squared_relu(threshold=0.003)",
     "jsrelu(threshold=0.0001)", "jsrelu(cap=30)", "jsrelu(jump=1.00001)"],
)  # fmt: skip
def test_a_strangers_function_with_numbers_is_not_taken_for_the_one_without(name: str) -> None:
    assert identify(named(name).value) in (None, *(["relu"] if name == "relu" else []))


# --- in a model --------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["relu(threshold=0.25)", "jsrelu(cap=2, threshold=0.25)"])
def test_a_block_computes_by_it_and_the_site_knows_it(name: str) -> None:
    model = nn.Sequential(nn.Linear(4, 30), nn.ReLU(), nn.Linear(30, 4)).double()
    x = torch.randn(9, 4, dtype=torch.float64)
    want = model[2](named(name).value(model[0](x)))
    handle = sparsify(model, SwapActivation(name), inputs=x)
    assert torch.equal(model(x), want)
    site, z = site_of(handle.blocks[0]), model[0](x)
    assert site.function == name
    assert torch.equal(site.derivative(z), named(name).derivative(z))
    handle.remove()
    assert find_mlp_blocks(model, x)[0].activation.function == "relu"

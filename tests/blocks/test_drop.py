"""Small entries of a gradient, told apart in exact arithmetic."""

from __future__ import annotations

import math
from fractions import Fraction

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from actsparse.blocks.drop_gradients import change_gradient, without_small


def small(eta: list[float], threshold: float, slack: float = 0.0) -> list[bool | None]:
    """Which entries |η| ≤ threshold · rms are, in exact arithmetic; None: within ``slack`` of it.

    |η|² #{η ≠ 0} ≤ threshold² Σ η², and nothing where that says nothing.
    """
    exact = [Fraction(e) for e in eta]
    bound = Fraction(threshold) ** 2 * sum(e * e for e in exact)
    count = sum(e != 0 for e in exact)
    if not count or not threshold:
        return [False] * len(eta)
    near = Fraction(slack) * bound
    return [None if abs(e * e * count - bound) < near else e * e * count <= bound for e in exact]


def follows(left: Tensor, eta: Tensor, threshold: float) -> bool:
    """Whether ``left`` is η̂ of η [..., H], entry by entry; at rounding's reach of the bound either.

    Sums over H and then over at most 18 rows, a root, two quotients and products: each off by ε/2
    at most, in float32 for half precision; squared, as here, by twice that.
    """
    eps = 2.0**-52 if eta.dtype == torch.float64 else 2.0**-23
    flags = small(eta.flatten().tolist(), threshold, slack=(eta.shape[-1] + 28) * eps)
    both = zip(flags, eta.flatten().tolist(), left.flatten().tolist(), strict=True)
    return all(new == (0.0 if flag else old) for flag, old, new in both if flag is not None)


entries = st.lists(
    st.one_of(st.just(0.0), st.floats(-1e3, 1e3).filter(lambda x: abs(x) > 1e-3)), min_size=1,
    max_size=24,
)  # fmt: skip
levels = st.floats(0, 4)
DTYPES = [torch.float64, torch.float32, torch.bfloat16, torch.float16]


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@given(entries, levels)
def test_what_is_at_most_the_threshold_times_the_rms_of_what_is_not_zero_is_dropped(
    dtype: torch.dtype, values: list[float], threshold: float
) -> None:
    eta = torch.tensor(values, dtype=dtype)
    left = without_small(eta, threshold)
    assert left.dtype == dtype
    assert follows(left, eta, threshold)


@given(entries, levels, st.integers(-80, 80))
def test_the_scale_of_the_gradient_does_not_matter(
    values: list[float], threshold: float, power: int
) -> None:
    eta = torch.tensor(values)
    scaled = torch.ldexp(eta, torch.tensor(power))  # exact; squares would vanish or overflow
    left = without_small(scaled, threshold)
    assert torch.equal(left, torch.ldexp(without_small(eta, threshold), torch.tensor(power)))


@given(entries, levels, levels)
def test_a_higher_threshold_drops_the_same_and_more(
    values: list[float], one: float, two: float
) -> None:
    eta = torch.tensor(values, dtype=torch.float64)
    low, high = (without_small(eta, threshold) for threshold in sorted((one, two)))
    assert torch.equal(high, low * (high != 0))


def test_silent_units_and_tokens_do_not_change_what_a_threshold_means() -> None:
    eta = torch.randn(5, 8, dtype=torch.float64)
    wide = torch.zeros(50, 80, dtype=torch.float64)
    wide[:5, :8] = eta
    for threshold in (0.1, 0.5, 1.0, 2.0):
        left = without_small(eta, threshold)
        assert 0 < int((left != 0).sum()) < 40
        assert torch.equal(without_small(wide, threshold)[:5, :8], left)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_the_rule_holds_for_many_entries(dtype: torch.dtype) -> None:
    eta = torch.randn(18, 300, generator=torch.Generator().manual_seed(0)).to(dtype)
    for threshold in (0.3, 1.0, 2.0):
        left = without_small(eta, threshold)
        assert follows(left, eta, threshold)
        assert 0 < int((left != 0).sum()) < eta.numel()


def test_an_entry_on_the_bound_is_dropped() -> None:
    eta = torch.tensor([2.0, -2.0, 0.0, 2.0])
    assert torch.equal(without_small(eta, 1.0), torch.zeros(4))


@pytest.mark.parametrize("bad", [math.nan, math.inf, -math.inf], ids=str)
def test_what_is_not_finite_stays_visible_and_nothing_is_dropped(bad: float) -> None:
    eta = torch.tensor([[1e-9, 1.0], [bad, 0.0]])
    assert torch.equal(without_small(eta, 1.0).nan_to_num(7), eta.nan_to_num(7))


@pytest.mark.parametrize("shape", [(3, 4), (0, 4), (2, 0, 4), (1,)], ids=str)
def test_a_gradient_of_zeros_or_of_no_token_is_left_alone(shape: tuple[int, ...]) -> None:
    assert torch.equal(without_small(torch.zeros(shape), 1.0), torch.zeros(shape))


def test_a_threshold_of_zero_drops_nothing_however_small() -> None:
    eta = torch.tensor([1e-45, 1e30, -0.0])
    assert torch.equal(without_small(eta, 0.0), eta)
    assert without_small(eta, 0.0).signbit().tolist() == eta.signbit().tolist()


def test_of_a_fused_layer_the_other_rows_keep_their_gradient() -> None:
    x, incoming = torch.randn(3, 8, requires_grad=True), torch.randn(3, 8)
    for rows in (slice(0, 4), slice(1, 8, 2)):
        out = change_gradient(x, lambda gradient: gradient * 0, rows)
        assert torch.equal(out, x)
        (gradient,) = torch.autograd.grad(out, x, incoming)
        want = incoming.clone()
        want[:, rows] = 0
        assert torch.equal(gradient, want)


def test_a_gradients_own_gradient_takes_what_is_small_for_a_constant() -> None:
    x = torch.tensor([1.0, 2.0, 3.0], requires_grad=True)
    out = change_gradient(x, lambda gradient: without_small(gradient, 0.9)).square() * 1.0
    (slope,) = torch.autograd.grad(out.sum(), x, create_graph=True)
    assert slope.tolist() == [0, 4, 6]  # of 2x, whose rms is 4.3: 3.9 and less
    (curvature,) = torch.autograd.grad(slope.sum(), x)
    assert curvature.tolist() == [0, 2, 2]

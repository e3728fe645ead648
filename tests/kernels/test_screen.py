"""The screen misses no unit that is active in float64 or in dense float32."""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterator

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from actsparse.kernels import build, ops
from actsparse.kernels import pack as packing

if not build.load():
    pytest.skip("no compiled kernels here", allow_module_level=True)

BEST = torch.ops.actsparse_cpu.level(-1)
Case = tuple[Tensor, Tensor, Tensor]


@pytest.fixture(params=range(BEST + 1), ids=lambda level: build.LEVELS[level])
def level(request: pytest.FixtureRequest) -> Iterator[int]:
    torch.ops.actsparse_cpu.level(request.param)
    yield request.param
    torch.ops.actsparse_cpu.level(BEST)


def gaussian(t: int, d: int, h: int) -> Case:
    x, up = torch.randn(t, d), torch.randn(h, d) / max(d, 1) ** 0.5
    return x, up, torch.full((h,), -1.645) + 0.3 * torch.randn(h)


def outliers(t: int, d: int, h: int) -> Case:
    x, up, bias = gaussian(t, d, h)
    x[:, :2] *= 100
    return x, up, bias - 100 * up[:, :2].abs().sum(1)


def weight_outliers(t: int, d: int, h: int) -> Case:
    x, up, bias = gaussian(t, d, h)
    up[:, 1] *= 100
    return x, up, bias


def tiny(t: int, d: int, h: int) -> Case:
    x, up, bias = gaussian(t, d, h)
    scale = 10.0 ** -torch.randint(0, 39, (t, 1)).float()
    return x * scale, up * 10.0 ** -torch.randint(0, 20, (h, 1)).float(), bias * 1e-25


def denormal(t: int, d: int, h: int) -> Case:
    x, up, bias = gaussian(t, d, h)
    return x * 1e-41, up * 10.0 ** torch.randint(-3, 3, (h, 1)).float(), bias * 1e-43


def cancelling(t: int, d: int, h: int) -> Case:
    """z within a few roundings of zero: bias = −x·u of one token, the last bit up or down."""
    x, up, _ = gaussian(t, d, h)
    x = x[:1] + 1e-7 * torch.randn(t, d) * (torch.rand(t, 1) < 0.5)
    bias = -(x[0].double() @ up.double().t()).float()
    return x, up, torch.nextafter(bias, bias + torch.randint(-1, 2, (h,)).float())


def large(t: int, d: int, h: int) -> Case:
    """Norms whose product overflows float32 while z does not."""
    x, up, bias = gaussian(t, d, h)
    return x * 10.0 ** torch.randint(0, 38, (t, 1)).float(), up * 1e3, bias * 1e5


def gridded(t: int, d: int, h: int) -> Case:
    """Values half-way between two codes, where rounding errs most."""
    x = torch.randint(-127, 128, (t, d)).float() + 0.5
    up = torch.randint(-127, 128, (h, d)).float() + 0.5
    return x, up, -torch.randint(0, 4, (h,)).float() * d**0.5 * 5000


CASES = [gaussian, outliers, weight_outliers, tiny, denormal, cancelling, large, gridded]


def cancelling_codes(t: int, d: int, h: int, weight: float = 127.0) -> Case:
    """x and u are whole numbers that 8 bits hold exactly, and x·u cancels to weight · (−40 … 40).

    Products 2·x·m meet −x·m twice, which rounds differently; one more channel decides. The last
    two only set the step of the codes to 1.
    """
    part, m = torch.randint(90, 128, (1, d)), torch.randint(45, 64, (h, d))
    last = torch.randint(-40, 41, (h, 1))
    x = torch.cat([part, part, part, torch.tensor([[weight, 127, 0]])], 1)
    up = torch.cat([2 * m, -m, -m, last, torch.tensor([[0, 127]]).expand(h, 2)], 1)
    return x.float().expand(t, -1).contiguous(), up.float(), torch.zeros(h)


def rounding(t: int, d: int, h: int) -> Case:
    """Sums pass 2²⁷, where float32 counts in sixteens: dense is off by more than x·u is below 0."""
    return cancelling_codes(t, 8192, h, weight=1.0)


def vanishing(t: int, d: int, h: int) -> Case:
    """Products of a few denormal steps, 2⁻¹⁴⁹: each is rounded by up to half of one."""
    x, up, bias = cancelling_codes(t, 512, h)
    return x * 2.0**-80, up * 2.0**-80, bias


def overflowing(t: int, d: int, h: int) -> Case:
    """Partial sums overflow while x·u is a moderate number below zero or above."""
    x, up, bias = cancelling_codes(t, 128, h)
    return x * 2.0**55, up * 2.0**55, bias


def missed(
    case: Case, floor: float = 0.0, dtype: torch.dtype = torch.float32
) -> tuple[int, Tensor, float]:
    """How many active units the screen leaves out, the dense mask and the share of candidates.

    A unit is active above ``floor``, as much above as the case's own is above 0.
    """
    floor = float(torch.tensor(floor))  # as float32 has it
    x, up, bias = (t.to(dtype) for t in (*case[:2], case[2] + floor))
    pointer, index = torch.ops.actsparse_cpu.candidates(x, up, bias, *ops.quantise(up), floor)
    ones = torch.ones(len(index))
    kept = packing.unpack(pointer, index, ones, len(x), len(up)) != 0
    exact = x.double() @ up.double().t() + bias.double()
    x, up, bias = x.float(), up.float(), bias.float()
    sums = (exact, F.linear(x, up, bias), x @ up.t() + bias)
    active = ~torch.stack([z.to(dtype).double() <= floor for z in sums]).all(0)
    return int((active & ~kept).sum()), active, float(kept.float().mean())


@pytest.mark.parametrize("case", CASES, ids=lambda case: case.__name__)
@pytest.mark.parametrize("tokens", [1, 2, 61])  # a tile of each height, one and two planes
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_no_active_unit_is_missed(
    level: int, case: Callable[[int, int, int], Case], tokens: int, dtype: torch.dtype
) -> None:
    for floor, (d, h) in itertools.product([0.0, 0.13, 750.0], [(5, 70), (64, 257), (131, 130)]):
        count, _, _ = missed(case(tokens, d, h), floor, dtype)
        assert count == 0


@pytest.mark.parametrize("floor", [0.13, 750.0])
def test_the_screen_leaves_out_as_many_below_a_threshold(floor: float) -> None:
    case = gaussian(200, 128, 1024)
    _, active, kept = missed(case)
    _, above, more = missed(case, floor)
    # z and the bound are rounded at the size of the floor, 750 · 2⁻²⁴ · γ's 2D + 64 roundings
    near = 750 * 2**-24 * (2 * 128 + 64) * 4
    assert abs(int(active.sum()) - int(above.sum())) <= near * active.numel()
    assert abs(kept - more) <= near


@pytest.mark.parametrize("case", CASES, ids=lambda case: case.__name__)
def test_no_active_unit_is_missed_in_millions(case: Callable[[int, int, int], Case]) -> None:
    """8 cases × 1.3 · 10⁶ decisions: more than 10⁷ rows of U met a token."""
    count, active, _ = missed(case(640, 48, 2048))
    assert active.numel() * len(CASES) > 10**7
    assert count == 0


@pytest.mark.parametrize("case", [rounding, vanishing, overflowing], ids=lambda case: case.__name__)
def test_what_the_codes_hold_exactly_float32_may_still_round(
    level: int, case: Callable[[int, int, int], Case]
) -> None:
    """Here the bound is γ(‖x‖‖u‖ + |b|) and the floor alone: x̂ = x and û = u."""
    x, up, bias = case(33, 0, 256)
    count, active, _ = missed((x, up, bias))
    exact = x[0].double() @ up.double().t()
    assert (active[0] & (exact < 0)).any()  # dense float32 calls active what is not
    assert count == 0


@pytest.mark.parametrize("case", [tiny, denormal, vanishing], ids=lambda case: case.__name__)
def test_no_active_unit_is_missed_where_denormals_are_flushed(
    level: int, case: Callable[[int, int, int], Case]
) -> None:
    if not torch.set_flush_denormal(True):
        pytest.skip("this CPU cannot flush denormals")
    try:
        assert missed(case(33, 40, 257))[0] == 0
    finally:
        torch.set_flush_denormal(False)


def test_the_screen_leaves_out_most_units() -> None:
    """What it is for; else a screen that keeps everything would pass every other test.

    A Gaussian x and u in D channels: step s = max|u|/127 ≈ 3.3σ/127, so that ‖u − û‖/‖u‖ ≈
    s/(σ√12) = 0.0075, the same for x; both times √D = 16 bound 0.24 σ_z. Active above 1.645, kept
    above 1.645 − 0.24: 8 %, with two planes 6.4 %; a third more for units of larger norm.
    """
    x, up = torch.randn(400, 256), torch.randn(2048, 256) / 16
    bias = torch.full((2048,), -1.645)
    _, active, kept = missed((x, up, bias))
    assert 0.04 < float(active.float().mean()) < 0.06
    assert kept < 0.107
    _, _, kept = missed((x[:1], up, bias))
    assert kept < 0.107


def candidates(x: Tensor, up: Tensor, share: float, tokens: int) -> float:
    """The share of units that the screen keeps, ``tokens`` at a time, each active on ``share``."""
    z = x @ up.t()
    bias = -z.sort(0, descending=True).values[round(share * len(x))]
    codes = ops.quantise(up)
    kept = [
        torch.ops.actsparse_cpu.candidates(some, up, bias, *codes, 0.0)[1].numel()
        for some in x.split(tokens)
    ]
    return sum(kept) / z.numel()


@pytest.mark.parametrize("factor", [30.0, 100.0])
@pytest.mark.parametrize("channels", [1, 2, 8])
@pytest.mark.parametrize(("tokens", "d"), [(512, 64), (512, 768), (1, 256)])
def test_channels_of_another_size_leave_as_few_candidates(
    factor: float, channels: int, tokens: int, d: int
) -> None:
    """u's 8 bits would be off by ‖x‖ · ‖u − û‖, which a few channels make many times as large.

    Apart they cost |x_c| of half a step; z has grown by more. A constant is worse: the bias takes
    it off again, and z has not grown at all.
    """
    x, up = torch.randn(512, d), torch.randn(512, d) / d**0.5
    scaled, shifted = x.clone(), x.clone()
    scaled[:, :channels] *= factor
    shifted[:, 0] += factor
    for share in (0.01, 0.05):
        most = 1.3 * candidates(x, up, share, tokens)
        assert candidates(scaled, up, share, tokens) <= most
        if d > 64 and factor == 30:
            assert candidates(shifted, up, share, tokens) <= most


@settings(max_examples=60, derandomize=True, database=None)
@given(
    t=st.integers(1, 40),
    d=st.integers(1, 200),
    h=st.integers(1, 130),
    spread=st.floats(0, 8),
    offset=st.floats(0, 100),
    large=st.lists(st.tuples(st.integers(0, 199), st.floats(-37, 17)), max_size=4),
    grid=st.booleans(),
    floor=st.sampled_from([0.0, 0.5]),
    dtype=st.sampled_from([torch.float32, torch.bfloat16]),
    way=st.integers(0, BEST),
    seed=st.integers(0, 2**20),
)
def test_no_active_unit_is_missed_whatever_the_channels_sizes(
    t: int,
    d: int,
    h: int,
    spread: float,
    offset: float,
    large: list[tuple[int, float]],
    grid: bool,
    floor: float,
    dtype: torch.dtype,
    way: int,
    seed: int,
) -> None:
    """Sizes and means of channels drawn at random; biases bring z near the floor."""
    torch.manual_seed(seed)
    x = (torch.randn(t, d) + offset * torch.randn(d)) * (spread * torch.randn(d)).exp()
    up = torch.randint(-127, 128, (h, d)).float() if grid else torch.randn(h, d)
    for channel, power in large:
        x[:, channel % d] = 10.0**power * torch.randn(t).sign()
    x, up = x.to(dtype), up.to(dtype)
    z = x.double() @ up.double().t()
    near = z.gather(0, torch.randint(t, (1, h)))[0]
    bias = (-near + 0.01 * near.abs() * torch.randn(h)).float()
    torch.ops.actsparse_cpu.level(way)
    try:
        assert missed((x, up, bias), floor, dtype)[0] == 0
    finally:
        torch.ops.actsparse_cpu.level(BEST)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_nan_and_infinity_always_pass(level: int, dtype: torch.dtype) -> None:
    x, up, bias = gaussian(20, 40, 100)
    bias -= 100.0
    x[3, 5], x[4, 6], x[5, 7] = torch.nan, torch.inf, -torch.inf
    up[8, 1], up[9, 2] = torch.nan, torch.inf
    bias[11], bias[12] = torch.nan, torch.inf
    count, active, _ = missed((x, up, bias), dtype=dtype)
    assert count == 0
    assert active[3].all()
    assert active[:, [8, 11, 12]].all()


@pytest.mark.parametrize(("dtype", "u"), [(torch.float32, 0.0), (torch.bfloat16, 2.0**-8)])
def test_screened_packing_is_the_unscreened_one_up_to_rounding(
    level: int, dtype: torch.dtype, u: float
) -> None:
    x, up, bias = (t.to(dtype) for t in gaussian(50, 100, 901))
    codes = ops.quantise(up)
    plain = packing.unpack(*ops.pack(x, up, bias, [], "relu")[:3], 50, 901)
    screened = packing.unpack(*ops.pack(x, up, bias, codes, "relu")[:3], 50, 901)
    # two sums of 101 terms, each within γ_101 of the exact one
    terms = x.double().abs() @ up.double().abs().t() + bias.double().abs()
    off = 2 * 101 * 2.0**-24 * 1.001 * terms + 2 * u * (plain.double().abs() + bias.double().abs())
    assert ((plain - screened).abs() <= off).all()


def test_codes_of_another_matrix_are_refused() -> None:
    x, up, bias = gaussian(3, 40, 100)
    with pytest.raises(RuntimeError, match="codes must be contiguous int8"):
        ops.pack(x, up, bias, ops.quantise(up[:30]), "relu")
    with pytest.raises(RuntimeError, match="up must have at most 65536 columns"):
        ops.quantise(torch.zeros(1, 2**16 + 1))

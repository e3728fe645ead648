"""Decoding in Triton's interpreter: a screen that loses nothing, lists in order, and their sums.

The interpreter cuts bfloat16 instead of rounding it: bounds are of two units in the last place.
"""

from __future__ import annotations

import itertools

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from actsparse.activations import named
from actsparse.kernels import forms
from tests.kernels.test_exactness import gamma, made, threshold

pytest.importorskip("triton")

from actsparse.kernels import triton_decode
from actsparse.kernels.triton_decode import MOST, ROUNDING, TILE, decode, quantise
from actsparse.kernels.triton_launch import INTERPRETED

pytestmark = [
    pytest.mark.skipif(not INTERPRETED, reason="needs TRITON_INTERPRET=1"),
    # what overflows is infinite and what is infinite may cancel to NaN, as on a GPU
    pytest.mark.filterwarnings("ignore:overflow encountered:RuntimeWarning"),
    pytest.mark.filterwarnings("ignore:invalid value encountered:RuntimeWarning"),
]
DTYPES = [torch.float32, torch.bfloat16, torch.float16]
Listed = list[list[int]]  # by tile


def listed(
    x: Tensor, up: Tensor, bias: Tensor, floor: float = 0.0, screen: bool = False
) -> tuple[Listed, Tensor]:
    """The units of each tile that a kernel lists, and without screen their z [listed, T]."""
    (tokens, d), h, many = x.shape, len(up), int(len(x) > 1)
    tiles, bt = -(-h // TILE), MOST if many else 1
    unit = torch.full((tiles * TILE,), -1, dtype=torch.int32, device=x.device)
    count, z = unit.new_full((tiles,), -1), x.new_full((tiles * TILE, bt), 7.0)
    how = {"HAS_BIAS": True, "WIDE": INTERPRETED, "TILE": TILE, "BT": bt}
    if screen:
        triton_decode._candidates[many][(tiles,)](
            x, *quantise(up), bias, unit, count, tokens, h, d, floor, (d + 2) * ROUNDING,
            torch.finfo(x.dtype).eps, **how,
        )  # fmt: skip
    else:
        triton_decode._active[many][(tiles,)](
            x, up, bias, unit, z, count, tokens, h, d, floor, ACT=-1, **how
        )
    places = [range(k * TILE, k * TILE + taken) for k, taken in enumerate(count.tolist())]
    rows = [place for tile in places for place in tile]
    return [[int(unit[place]) for place in tile] for tile in places], z[rows, :tokens]


def flat(units: Listed) -> Tensor:
    return torch.tensor([u for tile in units for u in tile], dtype=torch.long)


def missed(x: Tensor, up: Tensor, bias: Tensor, floor: float = 0.0) -> tuple[int, float]:
    """How many units active exactly or in the kernel the screen leaves out; its share of units."""
    floor = float(torch.tensor(floor))  # as float32 has it
    kept = torch.zeros(len(up), dtype=torch.bool)
    kept[flat(listed(x, up, bias, floor, screen=True)[0])] = True
    active = ~(x.double() @ up.double().t() + bias.double() <= floor).all(0)
    active[flat(listed(x, up, bias, floor)[0])] = True
    return int((active & ~kept).sum()), int(kept.sum()) / len(kept)


# ---- y --------------------------------------------------------------------------------------


@settings(max_examples=10)
@given(
    tokens=st.sampled_from([1, 2, 5, 16]),
    size=st.sampled_from([(1, 1, 1), (5, 63, 9), (17, 64, 70), (40, 130, 3), (70, 65, 40)]),
    density=st.sampled_from([0.0, 0.1, 0.5, 1.0]),
    dtype=st.sampled_from(DTYPES),
    activation=st.sampled_from([*forms.FUSED, "relu(threshold=0.3)"]),
    gated=st.booleans(),
    biased=st.booleans(),
    screen=st.booleans(),
    seed=st.integers(0, 99),
)
def test_each_stage_rounds_as_its_dtype_does(
    tokens: int, size: tuple[int, int, int], density: float, dtype: torch.dtype, activation: str,
    gated: bool, biased: bool, screen: bool, seed: int,
) -> None:  # fmt: skip
    """Against float64 on the numbers of the stage before; down = (1, V) shows a beside y."""
    torch.manual_seed(seed)
    d, h, out = size
    w, sizes = made(d, h, density), ((tokens, d), (h, d), (h, out))
    first, (x, up, rows) = w["up"].to(dtype), (torch.randn(*size).to(dtype) for size in sizes)
    bias, up_bias, down_bias = (
        t.to(dtype) if biased else None for t in (w["bias"], torch.randn(h), torch.randn(out))
    )
    codes = list(quantise(first)) if screen else []
    eps = torch.finfo(dtype).eps
    least = torch.finfo(dtype).smallest_normal * eps

    def linear(left: Tensor, right: Tensor, plus: Tensor | None) -> tuple[Tensor, Tensor]:
        """In float64, and the bound: roundings of float32 sums, two units in the last place."""
        left, right = left.double(), right.double()
        plus = torch.zeros(()) if plus is None else plus.double()
        exact, terms = left @ right + plus, left.abs() @ right.abs() + plus.abs()
        return exact, gamma(max(d, h) + 2) * terms + 2 * eps * exact.abs() + 2 * least

    z = decode(x, first, bias, torch.eye(h).to(dtype), None, "relu", None, None, codes)
    exact, bound = linear(x, first.t(), bias)
    assert bool(((z.double() - exact.relu()).abs() <= bound).all())

    both = torch.cat([torch.eye(h).to(dtype), rows], 1)
    ends = None if down_bias is None else torch.cat([torch.zeros(h).to(dtype), down_bias])
    second, its_bias = (up, up_bias) if gated else (None, None)
    got = decode(x, first, bias, both, ends, activation, second, its_bias, codes)
    a, y = got[:, :h], got[:, h:]
    form = forms.form_of(activation)
    assert form is not None
    phi = named(activation).value(z).double()
    its_bound = 2 * eps * phi.abs()
    clear = (exact - form.floor).abs() > bound  # elsewhere calls may differ on which side it is
    if gated:
        of_up, its_bound = linear(x, up.t(), up_bias)
        its_bound = phi.abs() * its_bound + 4 * eps * (phi * of_up).abs() + 2 * least
        phi = phi * of_up
    assert bool(((a.double() - phi).abs() <= its_bound)[clear].all())
    exact, bound = linear(a, rows, down_bias)
    assert y.shape == exact.shape
    assert y.dtype == dtype
    assert bool(((y.double() - exact).abs() <= bound).all())


@pytest.mark.parametrize("tokens", [1, 3])
def test_calls_are_bit_identical_and_codes_change_no_number(tokens: int) -> None:
    torch.manual_seed(3)
    w, x = made(70, 130, 0.2), torch.randn(tokens, 70)
    rows, down_bias = w["down"].t().contiguous(), w["down_bias"]

    def run(codes: list[Tensor]) -> Tensor:
        return decode(x, w["up"], w["bias"], rows, down_bias, "jsrelu", None, None, codes)

    codes = list(quantise(w["up"]))
    plain, screened = run([]), run(codes)
    assert torch.equal(run([]), plain)
    assert torch.equal(run(codes), screened)
    # two sums of the same terms, which another place may order otherwise: 71 and 131 roundings
    torch.testing.assert_close(screened, plain, rtol=0, atol=float(gamma(202)) * 130)


@pytest.mark.parametrize("activation", ["jsrelu", "squared_relu(threshold=0.3)"])
def test_z_is_rounded_before_it_is_activated(activation: str) -> None:
    """Float32 sums are exact here, so that both ways to z round once, as dense does."""
    torch.manual_seed(9)
    x, up = torch.randint(-32, 33, (2, 12)) / 32, torch.randint(-64, 65, (70, 12)) / 64
    want = named(activation).value((x @ up.t()).half().float()).half()
    for codes in ([], list(quantise(up.half()))):
        for tokens in (1, 2):
            y = decode(x[:tokens].half(), up.half(), None, torch.eye(70).half(), None, activation,
                       None, None, codes)  # fmt: skip
            assert torch.equal(y, want[:tokens])


@pytest.mark.parametrize("tokens", [1, 2])
def test_units_of_more_tiles_than_splits_are_summed_once_each(
    tokens: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(triton_decode, "SPLITS", (2, 2))
    h = 4 * TILE + 1
    up = torch.where(torch.arange(h) % 3 == 0, 1.0, -1.0)[:, None]
    y = decode(torch.ones(tokens, 1), up, None, torch.arange(1.0, h + 1)[:, None], None, "relu",
               None, None, [])  # fmt: skip
    assert y.tolist() == [[sum(range(1, h + 1, 3))]] * tokens  # below 2²⁴: exact


@pytest.mark.parametrize("screen", [False, True], ids=["plain", "screen"])
def test_sizes_of_nothing(screen: bool) -> None:
    for tokens, d, h, out in itertools.product([0, 1, 2], [0, 3], [0, 2], [0, 4]):
        x, up, rows = torch.ones(tokens, d), torch.ones(h, d), torch.ones(h, out)
        codes = list(quantise(up)) if screen else []
        y = decode(x, up, torch.ones(h), rows, torch.ones(out), "relu", None, None, codes)
        assert torch.equal(y, torch.full((tokens, out), 1.0 + h * (1 + d)))


# ---- what is not a number ---------------------------------------------------------------------


@pytest.mark.parametrize("partner", [float("nan"), float("-inf")], ids=str)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_a_partner_of_an_exact_zero_is_skipped(partner: float, dtype: torch.dtype) -> None:
    """Unit 1 is off for token 0 alone; unit 2 for both, though the codes cannot tell."""
    x, up = torch.eye(2, dtype=dtype), torch.tensor([[1, 1], [-1, 1], [-0.003, -1]]).to(dtype)
    rows = torch.tensor([[1, 2], [partner, 3], [partner, partner]]).to(dtype)
    for screen in (False, True):
        codes = list(quantise(up)) if screen else []
        y = decode(x, up, None, rows, None, "relu", None, None, codes)
        assert y[0].tolist() == [1.0, 2.0]
        assert y[1].tolist() == pytest.approx([partner, 5.0], nan_ok=True)
        for t in range(2):
            alone = decode(x[t : t + 1], up, None, rows, None, "relu", None, None, codes)
            assert torch.equal(alone[0].nan_to_num(7), y[t].nan_to_num(7))
        # gated: up of a unit whose gate is off
        bias = torch.tensor([0.0, partner, partner]).to(dtype)
        ones = torch.ones_like
        y = decode(x, up, None, ones(rows), None, "relu", ones(up), bias, codes)
        assert y[0].tolist() == [1.0, 1.0]
        assert y[1].tolist() == pytest.approx([1 + 1 + partner] * 2, nan_ok=True)


@pytest.mark.parametrize("tokens", [1, 3])
@pytest.mark.parametrize("screen", [False, True], ids=["plain", "screen"])
def test_activations_that_are_no_numbers_spread_as_in_dense(tokens: int, screen: bool) -> None:
    inf, nan = torch.inf, torch.nan
    x = torch.ones(tokens, 1)
    for bias, row in itertools.product((nan, inf, -inf), (2.0, inf)):
        up, rows = torch.tensor([[1.0], [2.0]]), torch.tensor([[1.0, -3.0], [row, 5.0]])
        b = torch.tensor([0.0, bias])
        want = torch.relu(x @ up.t() + b).double()[0, :, None] * rows
        want = torch.where(torch.tensor([True, bias != -inf])[:, None], want, 0).sum(0)
        codes = list(quantise(up)) if screen else []
        y = decode(x, up, b, rows, None, "relu", None, None, codes)
        for got in y.tolist():
            assert got == pytest.approx(want.tolist(), nan_ok=True)
    x[0] = nan  # of one token only
    y = decode(x, up, None, torch.ones(2, 2), None, "relu", None, None, codes)
    assert y[0].isnan().all()
    assert y[1:].tolist() == [[3.0, 3.0]] * (tokens - 1)


@pytest.mark.parametrize("screen", [False, True], ids=["plain", "screen"])
@pytest.mark.parametrize("tokens", [1, 2])
def test_a_tile_lists_its_own_units_in_rising_order(tokens: int, screen: bool) -> None:
    """Tiles of all, of none, of the first and last, and a broken one; z stands beside them."""
    h = 3 * TILE + 9
    on = torch.zeros(h, dtype=torch.bool)
    on[:TILE], on[2 * TILE], on[3 * TILE - 1], on[3 * TILE :: 2] = True, True, True, True
    up = torch.where(on, torch.arange(1.0, h + 1), -1.0)[:, None]
    x = torch.arange(1.0, tokens + 1)[:, None] * 2
    units, z = listed(x, up, torch.zeros(h), screen=screen)
    want = on.nonzero()[:, 0].split([TILE, 0, 2, 5])
    assert units == [each.tolist() for each in want]
    if not screen:
        assert torch.equal(z, (x @ up[on].t()).t())


@pytest.mark.parametrize("screen", [False, True], ids=["plain", "screen"])
def test_a_unit_is_listed_if_one_token_needs_it_and_no_token_is_made_up(screen: bool) -> None:
    """Rows of tokens that are not there would be zeros: with a bias above 0 all units."""
    x, bias = torch.tensor([[1.0, 0.0], [0.0, 1.0]]), torch.full((3,), 0.5)
    up = torch.tensor([[1.0, -1.0], [-1.0, -1.0], [-1.0, 1.0]])
    assert listed(x, up, bias, screen=screen)[0] == [[0, 2]]
    assert listed(x[1:], up, bias, screen=screen)[0] == [[2]]
    assert listed(x, up, bias, floor=1.25, screen=screen)[0] == [[0, 2]]
    assert listed(x, up, bias, floor=1.75, screen=screen)[0] == [[]]


@pytest.mark.parametrize("screen", [False, True], ids=["plain", "screen"])
def test_a_step_above_the_floor_is_on_and_what_rounds_to_there(screen: bool) -> None:
    """In float16 z is 0.05 steps below the floor, but nearest to a number above, as in dense."""
    one, bias = torch.ones(2, 1), torch.tensor([0.25 - 2.0**-20, 0.25 + 2.0**-25])
    assert listed(one[:1], 0 * one, bias, 0.25, screen)[0] == [[1]]
    assert listed(one[:1], 0 * one, bias.clamp(0.25), 0.25)[0] == [[1]]  # at the floor: off
    step = 2.0**-13
    x, bias = torch.tensor([[1064 * step]]).half(), torch.tensor([0.55 * step, -step]).half()
    assert listed(x, one.half(), bias, (1065 - 0.4) * step, screen)[0] == [[0]]
    step = 2.0**-24  # float16's smallest: here a step is a sixteenth of the floor
    x, up = torch.tensor([[16.55 / 1024]]).half(), torch.full((1, 1), 1024 * step).half()
    assert listed(x, up, torch.zeros(1), 16.9 * step, screen)[0] == [[0]]


# ---- the screen -------------------------------------------------------------------------------


KINDS = ["gaussian", "outliers", "tiny", "denormal", "large", "half-way"]


def rows_of(kind: str, tokens: int, d: int, h: int) -> tuple[Tensor, Tensor]:
    x, up = torch.randn(tokens, d), torch.randn(h, d)
    if kind == "outliers":
        x[:, :2] *= 100
    if kind in ("tiny", "large"):
        powers = (-30, 0) if kind == "tiny" else (8, 19)
        x *= 10.0 ** torch.randint(*powers, (tokens, 1)).float()
        up *= 10.0 ** torch.randint(*powers, (h, 1)).float()
    if kind == "denormal":
        x *= 1e-39
    if kind == "half-way":
        x, up = torch.randint(-127, 127, (tokens, d)) + 0.5, torch.randint(-127, 127, (h, d)) + 0.5
    return x, up


def near(x: Tensor, up: Tensor, floor: float, dtype: torch.dtype) -> tuple[Tensor, ...]:
    """x and up in ``dtype``, and biases within two steps of where a unit is just above floor."""
    x, up = x.to(dtype), up.to(dtype)
    bias = threshold(x[-1], up) + floor
    for _ in range(2):
        bias = torch.nextafter(bias, bias + torch.randint(-1, 2, bias.shape).float())
    bias[::3] -= 0.3 * bias[::3].abs()
    return x, up, bias.to(dtype)


@pytest.mark.parametrize("kind", [*KINDS, "channels", "zeros", "vanishing"])
def test_no_active_unit_is_missed(kind: str) -> None:
    torch.manual_seed(4)
    kinds = [((5, 65), torch.float32, 0.0), ((70, 30), torch.float32, 0.13)]
    kinds += [((40, 30), torch.bfloat16, 0.13), ((70, 30), torch.float16, 0.0)]
    for tokens, ((d, h), dtype, floor) in itertools.product((1, 2), kinds):
        x, up = rows_of(kind, tokens, d, h)
        if kind == "channels":
            x[:, :2] *= 30
        if kind == "zeros":
            x[-1], up[::2] = 0, 0
        if kind == "vanishing":  # their squares are 0 in float32
            x *= 1e-23
        assert missed(*near(x, up, floor, dtype), floor)[0] == 0


@pytest.mark.parametrize("tokens", [1, 2])
@pytest.mark.parametrize("scale", [1.0, 2.0**-60, 2.0**60, 2.0**-148], ids=lambda s: f"{s:.0e}")
def test_no_unit_is_missed_where_the_bound_has_nothing_to_spare(tokens: int, scale: float) -> None:
    """All errors of the codes are of one sign and x is constant: Cauchy–Schwarz is equality.

    0.499 steps each; z is the smallest number above 0. An error bound half a percent too small
    misses it. At 2⁻¹⁴⁸ the codes are 0, and norms a few of float32's smallest steps.
    """
    up, x = torch.randint(-100, 100, (70, 100)) + 0.499, torch.full((tokens, 100), 3.0)
    up[:, 0], x[:, 0] = 127.0, 0.0
    if scale < 2.0**-100:
        up, x = torch.full((70, 3), 7.0), torch.full((tokens, 3), 2.0**30)
    for sign in (1, -1):
        mine, its = sign * x, sign * scale * up
        assert missed(mine, its, threshold(mine[0], its))[0] == 0
    assert missed(x, scale * up, torch.full((70,), -1e38))[1] == 0


@pytest.mark.parametrize("tokens", [1, 2])
@pytest.mark.parametrize("groups", [3, 300])
def test_what_the_codes_hold_exactly_float32_may_still_round(tokens: int, groups: int) -> None:
    """u is whole numbers, x·u = −1 … 1 after sums past 2²⁴: float32 may not tell which."""
    torch.manual_seed(5)
    part, m = torch.randint(90, 128, (1, groups)) * 4097, torch.randint(21, 42, (64, groups))
    x = torch.cat([part, part, part, part, torch.tensor([[1, 0]])], 1).float()
    last = torch.randint(-1, 2, (64, 1))
    up = torch.cat([3 * m, -m, -m, -m, last, torch.full((64, 1), 127)], 1).float()
    order = torch.randperm(x.shape[1])
    x, up = x[:, order].expand(tokens, -1).contiguous(), up[:, order].contiguous()
    exact, about = x[0].double() @ up.double().t(), listed(x, up, torch.zeros(64))[0]
    assert flat(about).tolist() != (exact > 0).nonzero()[:, 0].tolist()
    assert missed(x, up, torch.zeros(64))[0] == 0


@pytest.mark.parametrize("tokens", [1, 2])
def test_products_are_rounded_up_to_the_smallest_step(tokens: int) -> None:
    """64 times 0.6 of 2⁻¹⁴⁹, each rounded to 1: z = 64 − 50, where ‖x‖‖u‖ is 38.4."""
    step = 2.0**-149
    x, up = torch.full((tokens, 64), 0.6), torch.full((3, 64), step)
    bias = torch.full((3,), -50 * step)
    assert flat(listed(x, up, bias)[0]).tolist() == [0, 1, 2]
    assert missed(x, up, bias)[0] == 0


@pytest.mark.parametrize("tokens", [1, 2])
@pytest.mark.parametrize("channel", [1, 30])
def test_the_screen_leaves_out_most_units(tokens: int, channel: int) -> None:
    """The rounding to codes bounds 0.0075 · √600 = 0.18 of z's spread: of 5 % it makes 7.3 %.

    Two channels × 30 double ‖x‖ and the spread of z alike.
    """
    torch.manual_seed(6)
    x, up = torch.randn(1, 600).repeat(tokens, 1), torch.randn(128, 600)
    x[:, :2] *= channel
    bias = -(x[0] @ up.t()).quantile(0.95).expand(128).contiguous()
    count, kept = missed(x, up, bias)
    assert count == 0
    assert 0.05 <= kept < 0.12


@pytest.mark.parametrize("tokens", [1, 3])
def test_nan_and_infinity_always_pass(tokens: int) -> None:
    torch.manual_seed(7)
    up, bias = torch.randn(70, 40), torch.randn(70) - 100
    up[8, 0], up[9, 2], bias[11], bias[12] = torch.nan, torch.inf, torch.nan, torch.inf
    x = torch.randn(tokens, 40)
    for bad in (None, 0.0, torch.nan, torch.inf, -torch.inf):
        if bad is not None:
            x[0, 5 if bad else slice(None)] = bad
        count, kept = missed(x, up, bias)
        assert count == 0
        if bad is None:
            assert kept == 4 / 70
    assert kept == 1.0


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_codes_hold_what_they_promise(dtype: torch.dtype) -> None:
    """Norms are of û = scale · codes as they are, and rounded up: no more than 2⁻¹⁹ of them."""
    torch.manual_seed(8)
    up = torch.cat([rows_of(kind, 1, 70, 9)[1] for kind in KINDS])
    up = torch.cat([up, torch.zeros(1, 70), up[:9] * 1e-40, up[:9] * 2e-44]).to(dtype)
    up = torch.where(up.isfinite(), up, 1)  # float16 holds less
    codes, scale, norm, error, whole = quantise(up)
    assert codes.dtype == torch.int8
    assert int(codes.abs().max()) == int(-codes.min()) == 127  # −128 has no counterpart
    about = codes.double() * scale.double()[:, None]
    step = 2.0**-149
    for said, true in ((norm, about), (error, up.double() - about), (whole, up.double())):
        least = true.norm(dim=1)
        assert said.dtype == torch.float32
        assert bool((said.double() >= least).all())
        assert bool((said.double() <= least * (1 + 2.0**-19) + 2 * step).all())
    # half a step, and the rounding of scale times 127
    largest = (up.double() - about).abs().amax(1)
    assert bool((largest <= 0.5001 * scale.double() + 127 * step).all())
    # of rows with NaN or infinities norms are infinite: they are never screened out
    up[1, 0], up[2, 1], up[3, 2] = torch.nan, torch.inf, -torch.inf
    _, scale, *norms = quantise(up[:5])
    assert scale.isfinite().all()
    assert all(each.isinf().tolist() == [False, True, True, True, False] for each in norms)


@pytest.mark.parametrize("whole", [False, True], ids=["plain", "gated-screen"])
def test_the_operator_is_what_it_says(whole: bool) -> None:
    up = torch.randn(9, 5)
    rows, codes = torch.randn(9, 4), list(quantise(up)) if whole else []
    second = (torch.randn(9, 5), torch.randn(9)) if whole else (None, None)
    args = (torch.randn(2, 5), up, torch.randn(9), rows, torch.randn(4), "relu", *second, codes)
    torch.library.opcheck(decode, args)

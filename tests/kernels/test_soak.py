"""Every operator on shapes, layouts, densities and values drawn at random, against float64.

A few examples in the suite; ``make sanitize`` draws others under AddressSanitizer at each run, for
$ACTSPARSE_SOAK seconds.
"""

from __future__ import annotations

import itertools
import os
import time

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from actsparse.activations import named
from actsparse.kernels import build, forms, ops, reference, row_norms, sparse_mlp
from actsparse.kernels import pack as packing

if not build.load():
    pytest.skip("no compiled kernels here", allow_module_level=True)

SECONDS = float(os.environ.get("ACTSPARSE_SOAK", "0"))
U = 2.0**-24  # unit roundoff of float32
COMPILED = {torch.float32: 0.0, torch.bfloat16: 2.0**-8}  # what rounding a float32 sum adds
TINY = {torch.float32: 1e-44, torch.bfloat16: 2.4e-38}  # products of bfloat16 flush denormals
BEST = torch.ops.actsparse_cpu.level(-1)
SMALL = st.integers(0, 70)


def lies(t: Tensor, layout: str) -> Tensor:
    """t by rows, by columns, or at an odd multiple of an entry's bytes."""
    if layout == "columns":
        return t.t().contiguous().t()
    return torch.cat([t.new_zeros(1), t.flatten()])[1:].view(t.shape) if layout == "odd" else t


def spoilt(t: Tensor, number: float | None) -> Tensor:
    """t with a few entries exchanged."""
    if number is not None and t.numel():
        t.view(-1)[torch.randint(t.numel(), (2,))] = number
    return t


def close(got: Tensor, exact: Tensor, bound: Tensor) -> bool:
    """Within the bound; what is not finite is the same."""
    got = got.double()
    same = (got == exact) | (got.isnan() & exact.isnan())
    return got.shape == exact.shape and bool((same | ((got - exact).abs() <= bound)).all())


def gamma(n: int) -> float:
    return n * U / (1 - n * U)


def absolute(left: Tensor, right: Tensor) -> Tensor:
    return left.double().abs() @ right.double().abs()


def test_every_operator_stays_within_its_bounds() -> None:
    end = time.monotonic() + SECONDS
    some_operators_stay_within_their_bounds()
    while time.monotonic() < end:
        some_operators_stay_within_their_bounds()


@settings(max_examples=40, derandomize=not SECONDS, database=None)
@given(
    n=SMALL | st.sampled_from([129, 400]),
    d=SMALL | st.sampled_from([128, 200]),
    h=SMALL | st.sampled_from([383, 384, 385, 7000]),  # the last: more than a part of the cache
    density=st.sampled_from([0.0, 0.02, 0.3, 1.0]),
    layouts=st.tuples(*[st.sampled_from(["rows", "columns", "odd"])] * 2),
    special=st.sampled_from([None, None, float("nan"), float("inf"), -float("inf"), 1e-40]),
    place=st.sampled_from(["x", "up", "bias", "rows"]),
    biased=st.booleans(),
    dtype=st.sampled_from(list(COMPILED)),
    level=st.integers(0, BEST),
    threads=st.sampled_from([1, 1, 1, 3]),
    seed=st.integers(0, 2**20),
)
def some_operators_stay_within_their_bounds(
    n: int,
    d: int,
    h: int,
    density: float,
    layouts: tuple[str, str],
    special: float | None,
    place: str,
    biased: bool,
    dtype: torch.dtype,
    level: int,
    threads: int,
    seed: int,
) -> None:
    torch.manual_seed(seed)
    n = min(n, 40) if h > 385 else n
    torch.ops.actsparse_cpu.level(level)
    torch.set_num_threads(threads)
    shift = torch.distributions.Normal(0, d**0.5 + 1).icdf(torch.tensor(density)).clamp(-1e3, 1e3)
    of = {
        "x": torch.randn(n, d).to(dtype),
        "up": torch.randn(h, d).to(dtype),
        "bias": (torch.randn(h) + float(shift)).to(dtype),
        "rows": torch.randn(h, d).to(dtype),
    }
    spoilt(of[place], special)
    x, up, rows = lies(of["x"], "odd"), lies(of["up"], layouts[0]), lies(of["rows"], layouts[1])
    bias = of["bias"] if biased else None
    try:
        packs(x, up, bias)
        products(x, up, bias, rows, density)
    finally:
        torch.set_num_threads(1)
        torch.ops.actsparse_cpu.level(BEST)


def packs(x: Tensor, up: Tensor, bias: Tensor | None) -> None:
    (n, d), h, u = x.shape, len(up), COMPILED[x.dtype]
    plus = torch.zeros(h) if bias is None else bias
    of_screen = x.double() @ up.double().t() + plus.double()
    # torch's own, which may round before it adds the bias, and for some D hands a NaN or infinity
    # of a token to the one before
    of_torch = F.linear(x, up, bias).double() if u else of_screen
    off = gamma(d + 1) * (absolute(x, up.t()) + plus.double().abs()) + (d + 1) * TINY[x.dtype]
    if u:
        off += u * (of_screen.abs() + off)
    codes, rest = ops.quantise(up), torch.randn(h, 3).to(x.dtype)
    for name, screen in itertools.product(forms.FUSED, (False, True)):
        z = of_screen if screen else of_torch
        a = named(name).value(z)
        # φ is continuous, and φ′ at most 1 + 2|z|
        bound = off * (1 + 2 * z.abs() + 2 * off) + (8 * U + u) * a.abs()
        pointer, index, value, _ = ops.pack(x, up, bias, codes if screen else [], name)
        assert close(packing.unpack(pointer, index, value, n, h), a, bound)
        y = sparse_mlp(x, up, bias, rest.t(), screen=screen, activation=name)
        if a.isfinite().all():
            more = (gamma(h) + u) * absolute(a, rest) + 2 * absolute(bound, rest)
            assert close(y, a @ rest.double(), more)
        else:
            assert torch.equal(y.isfinite().all(1), a.isfinite().all(1))


def products(x: Tensor, up: Tensor, bias: Tensor | None, rows: Tensor, density: float) -> None:
    (n, d), h, u, tiny = x.shape, len(up), COMPILED[x.dtype], TINY[x.dtype]
    keep = torch.rand(n, h) < density
    a = torch.where(keep, torch.randn(n, h) * (torch.rand(n, h) < 0.9), 0)  # some zeros packed
    a = a.to(x.dtype)
    pointer, index = packing.pack(keep)
    value = a[keep]
    plus = torch.zeros(h) if bias is None else bias
    panels = ops.panels(rows)
    assert close(panels.transpose(0, 1).flatten(1)[:, :d], rows.double(), torch.zeros(h, d))

    exact = (x.double() @ up.double().t() + plus.double())[keep]
    terms = (absolute(x, up.t()) + plus.double().abs())[keep]
    got = ops.sample(pointer, index, x, up, bias)
    assert close(got, exact, gamma(d + 1) * terms + u * exact.abs() + (d + 1) * tiny)

    exact = reference.product(a.double(), rows.double())
    bound = gamma(h + 1) * reference.product(a.double().abs(), rows.double().abs()) + h * tiny
    bound += u * (exact.abs() + bound)
    for laid, turned in itertools.product((rows, panels), (False, True)):
        y = torch.ops.actsparse_cpu.multiply(pointer, index, value, laid, None, n, d, turned)
        assert close(y.t() if turned else y, exact, bound)

    ours = ops.by_unit(pointer, index, value, n, h)
    assert all(map(torch.equal, ours, packing.by_unit(pointer, index, value, n, h)))
    wide = a.double()
    sums, most = ops.row_sums(ours[0], ours[2], h), wide.abs().sum(0)
    assert close(sums, wide.sum(0), 2 * U * most + u * wide.sum(0).abs())
    norms = row_norms.row_norms(pointer, value, n)
    for got, order in zip(norms, (1, 2), strict=True):
        exact = wide.norm(order, dim=1) if h else torch.zeros(n).double()
        assert close(got, exact, (2 * U + u) * exact)

"""Each operator on packed entries against float64, for every instruction set this CPU has."""

from __future__ import annotations

import itertools
from collections.abc import Iterator

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from actsparse.activations import named
from actsparse.kernels import build, forms, ops, reference
from actsparse.kernels import pack as packing

if not build.load():
    pytest.skip("no compiled kernels here", allow_module_level=True)

U = 2.0**-24  # unit roundoff of float32
COMPILED = {torch.float32: 0.0, torch.bfloat16: 2.0**-8}  # what rounding a float32 sum adds
kernels = torch.ops.actsparse_cpu


def levels_here() -> list[int]:
    best = torch.ops.actsparse_cpu.level(-1)
    return list(range(best + 1))


@pytest.fixture(params=levels_here(), ids=lambda level: build.LEVELS[level])
def level(request: pytest.FixtureRequest) -> Iterator[int]:
    best = torch.ops.actsparse_cpu.level(-1)
    torch.ops.actsparse_cpu.level(request.param)
    yield request.param
    torch.ops.actsparse_cpu.level(best)


@pytest.fixture(params=COMPILED, ids=str)
def dtype(request: pytest.FixtureRequest) -> torch.dtype:
    return request.param


def gamma(n: Tensor | int) -> Tensor:
    """γ_n = n·u / (1 − n·u): n roundings, in any order of summation."""
    nu = torch.as_tensor(n, dtype=torch.float64) * U
    return nu / (1 - nu)


def within(got: Tensor, exact: Tensor, terms: Tensor, n: Tensor | int) -> bool:
    """γ_n of the terms' magnitude, a rounding to the dtype, and what flushing denormals loses."""
    off = gamma(n) * terms + torch.as_tensor(n) * 2.4e-38
    return bool(((got - exact).abs() <= off + COMPILED[got.dtype] * (exact.abs() + off)).all())


def sparse(n: int, k: int, density: float, seed: int, dtype: torch.dtype) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    dense = torch.randn(n, k, generator=generator).to(dtype)
    return dense * (torch.rand(n, k, generator=generator) < density)


def packed(dense: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    pointer, index = packing.pack(dense != 0)
    return pointer, index, dense[dense != 0]


# (rows, columns of the sparse matrix, width of the dense one): odd ones, more than one block of
# 384 columns or rows, more than a part of the cache, fewer rows than "few", none at all
SIZES = [
    (5, 7, 3),
    (1, 800, 33),
    (33, 1000, 130),
    (400, 385, 17),
    (9, 64, 800),
    (0, 5, 4),
    (3, 5, 0),
    (20, 5, 0),
    (3, 20_000, 8),
    (20, 9_000, 200),
]


@pytest.mark.parametrize("density", [0.0, 0.05, 0.6, 1.0])
@pytest.mark.parametrize("size", SIZES, ids=str)
def test_multiply_stays_within_its_a_priori_bound(
    level: int, size: tuple[int, int, int], density: float, dtype: torch.dtype
) -> None:
    n, k, m = size
    a, rows = sparse(n, k, density, 0, dtype), torch.randn(k, m).to(dtype)
    bias = torch.randn(m).to(dtype)
    y = ops.multiply(*packed(a), rows, bias, n)
    exact = a.double() @ rows.double() + bias.double()
    size_of_terms = a.double().abs() @ rows.double().abs() + bias.double().abs()
    assert within(y, exact, size_of_terms, (a != 0).sum(1, keepdim=True) + 1)


@pytest.mark.parametrize("size", SIZES, ids=str)
def test_samples_stay_within_their_a_priori_bound(
    level: int, size: tuple[int, int, int], dtype: torch.dtype
) -> None:
    n, k, m = size
    keep = sparse(n, k, 0.3, 0, dtype) != 0
    left, rows, bias = (torch.randn(*s).to(dtype) for s in ((n, m), (k, m), (k,)))
    value = ops.sample(*packing.pack(keep), left, rows, bias)
    exact = (left.double() @ rows.double().t() + bias.double())[keep]
    terms = (left.double().abs() @ rows.double().abs().t() + bias.double().abs())[keep]
    assert within(value, exact, terms, m + 1)


@pytest.mark.parametrize("size", SIZES, ids=str)
def test_by_unit_is_the_transpose(
    level: int, size: tuple[int, int, int], dtype: torch.dtype
) -> None:
    n, k, _ = size
    a = sparse(n, k, 0.4, 1, dtype)
    entries = ops.by_unit(*packed(a), n, k)
    assert torch.equal(packing.unpack(*entries, k, n), a.t())
    for ours, plain in zip(entries, packing.by_unit(*packed(a), n, k), strict=True):
        assert torch.equal(ours, plain)
    sums = ops.row_sums(entries[0], entries[2], k)
    assert within(sums, a.double().sum(0), a.double().abs().sum(0), n + 1)


@pytest.mark.parametrize("size", SIZES, ids=str)
def test_layouts_and_threads_change_no_number(
    level: int, size: tuple[int, int, int], dtype: torch.dtype
) -> None:
    n, k, m = size
    a, rows, left = sparse(n, k, 0.3, 2, dtype), *(torch.randn(s, m).to(dtype) for s in (k, n))
    columns, panels = rows.t().contiguous().t(), ops.panels(rows)
    assert torch.equal(ops.panels(columns), panels)
    assert torch.equal(panels.transpose(0, 1).reshape(k, -1)[:, :m], rows)
    entries = packed(a)
    y = ops.multiply(*entries, rows, None, n)
    value = ops.sample(*entries[:2], left, rows, None)
    try:
        for threads, laid in itertools.product((1, 2), (rows, columns, panels)):
            torch.set_num_threads(threads)
            assert torch.equal(kernels.multiply(*entries, laid, None, n, m, False), y)
            assert torch.equal(kernels.multiply(*entries, laid, None, n, m, True), y.t())
            assert torch.equal(ops.sample(*entries[:2], left, laid, None), value)
    finally:
        torch.set_num_threads(1)
    assert ops.multiply(*entries, rows, None, n, True).t().is_contiguous()


@pytest.mark.parametrize("name", forms.FUSED)
def test_packing_is_the_activation(level: int, name: str, dtype: torch.dtype) -> None:
    x, up, bias = (torch.randn(*s).to(dtype) for s in ((7, 12), (801, 12), (801,)))
    pointer, index, value, slope = ops.pack(x, up, bias, [], name)
    z = F.linear(x, up, bias)
    active = z > 0
    want_pointer, want_index = packing.pack(active)
    assert torch.equal(pointer, want_pointer)
    assert torch.equal(index, want_index)
    # z and two more roundings of a sum of positive terms
    of, near = z[active].float(), {"rtol": 4 * U + COMPILED[dtype], "atol": 0}
    torch.testing.assert_close(value.float(), named(name).value(of), **near)
    if name == "relu":
        assert slope.numel() == 0
    else:
        torch.testing.assert_close(slope.float(), named(name).derivative(of), **near)


@settings(max_examples=60)
@given(
    n=st.integers(0, 40),
    k=st.integers(1, 90),
    m=st.integers(1, 70),
    density=st.sampled_from([0.0, 0.1, 0.9, 1.0]),
    dtype=st.sampled_from(list(COMPILED)),
    seed=st.integers(0, 99),
)
def test_products_over_all_shapes(
    n: int, k: int, m: int, density: float, dtype: torch.dtype, seed: int
) -> None:
    a, rows = sparse(n, k, density, seed, dtype), torch.randn(k, m).to(dtype)
    entries = packed(a)
    y = ops.multiply(*entries, rows, None, n)
    terms = a.double().abs() @ rows.double().abs()
    assert within(y, a.double() @ rows.double(), terms, k + 1)
    assert torch.equal(packing.unpack(*entries, n, k), a)


def test_exact_zeros_are_skipped_whatever_they_meet(level: int, dtype: torch.dtype) -> None:
    a = torch.tensor([[0.0, 2.0, -0.0], [1.0, 0.0, 0.0]], dtype=dtype)
    rows = torch.tensor([[1.0, 1.0], [3.0, torch.inf], [torch.nan, -torch.inf]], dtype=dtype)
    keep = torch.ones_like(a, dtype=torch.bool)  # zeros packed on purpose, as dropout leaves them
    entries, want = (*packing.pack(keep), a.flatten()), [[6.0, torch.inf], [1.0, 1.0]]
    for laid in (rows, ops.panels(rows)):
        assert kernels.multiply(*entries, laid, None, 2, 2, False).tolist() == want
    assert reference.product(a, rows).tolist() == want


@pytest.mark.parametrize("size", [(37, 900, 101), (5, 20_000, 8)], ids=str)
def test_runs_are_bit_identical_whatever_the_number_of_threads(
    level: int, size: tuple[int, int, int], dtype: torch.dtype
) -> None:
    n, k, m = size
    a, rows, left = sparse(n, k, 0.2, 3, dtype), *(torch.randn(s, m).to(dtype) for s in (k, n))
    entries = packed(a)

    def run() -> list[Tensor]:
        y = ops.multiply(*entries, rows, None, n)
        g = ops.sample(entries[0], entries[1], left, rows, None)
        turned = ops.by_unit(*entries, n, k)
        return [y, g, *turned, ops.row_sums(turned[0], turned[2], k)]

    first, again = run(), run()
    torch.set_num_threads(2)
    try:
        threaded = run()
    finally:
        torch.set_num_threads(1)
    for one, two, three in zip(first, again, threaded, strict=True):
        assert torch.equal(one, two)
        assert torch.equal(one, three)


def test_kernels_refuse_operands_that_do_not_fit() -> None:
    entries, rows = packed(sparse(3, 4, 1.0, 0, torch.float32)), torch.randn(4, 5)
    for bad, bias, d, what in [
        (rows, torch.randn(6), 5, "bias must be contiguous float32"),
        (torch.randn(4, 10)[:, ::2], None, 5, "rows must be contiguous float32"),
        (ops.panels(rows), None, 65, r"rows must be contiguous float32 \[2, 4, 64\]"),
        (rows.bfloat16(), None, 5, "value must be contiguous bfloat16"),
    ]:
        with pytest.raises(RuntimeError, match=what):
            kernels.multiply(*entries, bad, bias, 3, d, False)
    with pytest.raises(RuntimeError, match=r"up must be contiguous float32 \[4, 5\]"):
        kernels.sample(*entries[:2], torch.randn(3, 5), torch.randn(5, 4).double().t(), None)
    with pytest.raises(RuntimeError, match="no kernels of level"):
        kernels.level(7)


def test_block_is_the_one_of_the_cpp_sources() -> None:
    source = (build.SOURCES / "tensors.h").read_text()
    assert f"kBlock = {packing.BLOCK};" in source
    assert packing.BLOCK % 64 == 0  # a whole number of mask words

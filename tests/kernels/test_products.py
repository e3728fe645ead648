"""Each operator on packed entries against float64, for every instruction set this CPU has."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from actsparse.activations import named
from actsparse.kernels import build, forms, ops, reference
from actsparse.kernels import pack as packing

if not build.load():
    pytest.skip("no compiled kernels here", allow_module_level=True)

U = 2.0**-24  # unit roundoff of float32


def levels_here() -> list[int]:
    best = torch.ops.actsparse_cpu.level(-1)
    return list(range(best + 1))


@pytest.fixture(params=levels_here(), ids=lambda level: build.LEVELS[level])
def level(request: pytest.FixtureRequest) -> Iterator[int]:
    best = torch.ops.actsparse_cpu.level(-1)
    torch.ops.actsparse_cpu.level(request.param)
    yield request.param
    torch.ops.actsparse_cpu.level(best)


def gamma(n: Tensor | int) -> Tensor:
    """γ_n = n·u / (1 − n·u): n roundings, in any order of summation."""
    nu = torch.as_tensor(n, dtype=torch.float64) * U
    return nu / (1 - nu)


def sparse(n: int, k: int, density: float, seed: int) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    dense = torch.randn(n, k, generator=generator)
    return dense * (torch.rand(n, k, generator=generator) < density)


def packed(dense: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    pointer, index = packing.pack(dense != 0)
    return pointer, index, dense[dense != 0]


# (rows, columns of the sparse matrix, width of the dense one): odd ones, more than one block of
# 384 columns or rows, more than one chunk of 768, fewer rows than "few", none at all
SIZES = [
    (5, 7, 3),
    (1, 800, 33),
    (33, 1000, 130),
    (400, 385, 17),
    (9, 64, 800),
    (0, 5, 4),
    (3, 5, 0),
]


@pytest.mark.parametrize("density", [0.0, 0.05, 0.6, 1.0])
@pytest.mark.parametrize("size", SIZES, ids=str)
def test_multiply_stays_within_its_a_priori_bound(
    level: int, size: tuple[int, int, int], density: float
) -> None:
    n, k, m = size
    a, rows, bias = sparse(n, k, density, 0), torch.randn(k, m), torch.randn(m)
    y = ops.multiply(*packed(a), rows, bias, n)
    exact = a.double() @ rows.double() + bias.double()
    size_of_terms = a.double().abs() @ rows.double().abs() + bias.double().abs()
    active = (a != 0).sum(1, keepdim=True)
    assert ((y - exact).abs() <= gamma(active + 1) * size_of_terms).all()


@pytest.mark.parametrize("size", SIZES, ids=str)
def test_samples_stay_within_their_a_priori_bound(level: int, size: tuple[int, int, int]) -> None:
    n, k, m = size
    keep = sparse(n, k, 0.3, 0) != 0
    left, rows = torch.randn(n, m), torch.randn(k, m)
    value = ops.sample(*packing.pack(keep), left, rows, None)
    exact = (left.double() @ rows.double().t())[keep]
    terms = (left.double().abs() @ rows.double().abs().t())[keep]
    assert ((value - exact).abs() <= gamma(m) * terms).all()


@pytest.mark.parametrize("size", SIZES, ids=str)
def test_by_unit_is_the_transpose(level: int, size: tuple[int, int, int]) -> None:
    n, k, _ = size
    a = sparse(n, k, 0.4, 1)
    entries = ops.by_unit(*packed(a), n, k)
    assert torch.equal(packing.unpack(*entries, k, n), a.t())
    for ours, plain in zip(entries, packing.by_unit(*packed(a), n, k), strict=True):
        assert torch.equal(ours, plain)
    sums = ops.row_sums(entries[0], entries[2], k)
    assert torch.allclose(
        sums.double(), a.double().sum(0), rtol=0, atol=float(gamma(n + 1)) * 4 * n
    )


@pytest.mark.parametrize("size", SIZES, ids=str)
def test_layouts_change_no_number(level: int, size: tuple[int, int, int]) -> None:
    n, k, m = size
    a, rows, left = sparse(n, k, 0.3, 2), torch.randn(k, m), torch.randn(n, m)
    columns = rows.t().contiguous().t()
    entries = packed(a)
    y = ops.multiply(*entries, rows, None, n)
    assert torch.equal(ops.multiply(*entries, columns, None, n), y)
    turned = ops.multiply(*entries, columns, None, n, True)
    assert torch.equal(turned, y)
    assert turned.t().is_contiguous()
    value = ops.sample(*entries[:2], left, rows, None)
    assert torch.equal(ops.sample(*entries[:2], left, columns, None), value)


def test_turned_is_the_transpose(level: int) -> None:
    for rows, columns in [(1, 1), (16, 32), (17, 5), (3, 0), (100, 77)]:
        t = torch.randn(rows, columns)
        assert torch.equal(ops.turned(t), t.t())
        assert ops.turned(t).is_contiguous()


@pytest.mark.parametrize("name", forms.FUSED)
def test_packing_is_the_activation(level: int, name: str) -> None:
    x, up, bias = torch.randn(7, 12), torch.randn(801, 12), torch.randn(801)
    pointer, index, value, slope = ops.pack(x, up, bias, [], name)
    z = x @ up.t() + bias
    active = z > 0
    want_pointer, want_index = packing.pack(active)
    assert torch.equal(pointer, want_pointer)
    assert torch.equal(index, want_index)
    # z and two more roundings of a sum of positive terms
    torch.testing.assert_close(value, named(name).value(z[active]), rtol=4 * U, atol=0)
    if name == "relu":
        assert slope.numel() == 0
    else:
        torch.testing.assert_close(slope, named(name).derivative(z[active]), rtol=4 * U, atol=0)


@settings(max_examples=60)
@given(
    n=st.integers(0, 40),
    k=st.integers(1, 90),
    m=st.integers(1, 70),
    density=st.sampled_from([0.0, 0.1, 0.9, 1.0]),
    seed=st.integers(0, 99),
)
def test_products_over_all_shapes(n: int, k: int, m: int, density: float, seed: int) -> None:
    a, rows = sparse(n, k, density, seed), torch.randn(k, m)
    entries = packed(a)
    y = ops.multiply(*entries, rows, None, n)
    terms = a.double().abs() @ rows.double().abs()
    assert ((y - a.double() @ rows.double()).abs() <= gamma(k + 1) * terms).all()
    assert torch.equal(packing.unpack(*entries, n, k), a)


def test_exact_zeros_are_skipped_whatever_they_meet(level: int) -> None:
    a = torch.tensor([[0.0, 2.0, -0.0], [1.0, 0.0, 0.0]])
    rows = torch.tensor([[1.0, 1.0], [3.0, torch.inf], [torch.nan, -torch.inf]])
    keep = torch.ones_like(a, dtype=torch.bool)  # zeros packed on purpose, as dropout leaves them
    y = ops.multiply(*packing.pack(keep), a.flatten(), rows, None, 2)
    assert torch.equal(y, torch.tensor([[6.0, torch.inf], [1.0, 1.0]]))
    assert torch.equal(reference.product(a, rows), y)


def test_runs_are_bit_identical_whatever_the_number_of_threads(level: int) -> None:
    a, rows = sparse(37, 900, 0.2, 3), torch.randn(900, 101)
    entries, left = packed(a), torch.randn(37, 101)

    def run() -> list[Tensor]:
        y = ops.multiply(*entries, rows, None, 37)
        g = ops.sample(entries[0], entries[1], left, rows, None)
        turned = ops.by_unit(*entries, 37, 900)
        return [y, g, *turned, ops.row_sums(turned[0], turned[2], 900)]

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
    entries = packed(sparse(3, 4, 1.0, 0))
    kernels = torch.ops.actsparse_cpu
    with pytest.raises(RuntimeError, match="bias must be contiguous float32"):
        kernels.multiply(*entries, torch.randn(4, 5), torch.randn(6), 3, False)
    with pytest.raises(RuntimeError, match="rows must be contiguous float32"):
        kernels.multiply(*entries, torch.randn(4, 10)[:, ::2], None, 3, False)
    with pytest.raises(RuntimeError, match=r"up must be contiguous float32 \[4, 5\]"):
        kernels.sample(*entries[:2], torch.randn(3, 5), torch.randn(5, 4).double().t(), None)
    with pytest.raises(RuntimeError, match="no kernels of level"):
        kernels.level(7)


def test_block_is_the_one_of_the_cpp_sources() -> None:
    source = (build.SOURCES / "tensors.h").read_text()
    assert f"kBlock = {packing.BLOCK};" in source
    assert packing.BLOCK % 64 == 0  # a whole number of mask words

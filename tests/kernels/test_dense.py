"""The dense programs beside the layers: oneDNN's products give the layers' numbers."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn

from actsparse.kernels import accelerate, backends, dense, prepare
from actsparse.kernels.programs import DENSE, Weights, copies, known, run

pytestmark = pytest.mark.skipif(not dense.has_onednn(), reason="this PyTorch has no oneDNN")
HALF, SINGLE = torch.bfloat16, torch.float32


def spread(t: Tensor) -> Tensor:
    """The same numbers, every other entry of a larger tensor."""
    out = t.new_full((*t.shape[:-1], 2 * t.shape[-1]), torch.nan)[..., ::2]
    return out.copy_(t).detach()


def weights(d: int, h: int, gated: bool, dtype: torch.dtype, seed: int = 0) -> Weights:
    generator = torch.Generator().manual_seed(seed)
    make = lambda *size: torch.randn(*size, generator=generator).to(dtype)  # noqa: E731
    plain = make(h, d), make(h), make(d, h), make(d)
    return Weights(*plain, *((make(h, d), make(h)) if gated else ()))


def expected(x: Tensor, w: Weights) -> Tensor:
    if w.gate is None:
        return F.linear(F.relu(F.linear(x, w.up, w.bias)), w.down, w.down_bias)
    hidden = F.relu(F.linear(x, w.gate, w.gate_bias)) * F.linear(x, w.up, w.bias)
    return F.linear(hidden, w.down, w.down_bias)


def near(one: Tensor, two: Tensor, exact: Tensor) -> bool:
    """Whether the first is about as far from float64's as the second."""
    off = [float((t.double() - exact).square().sum()) for t in (one, two)]
    return off[0] <= 2 * off[1] + 1e-9 * float(exact.square().sum())


@settings(max_examples=40)
@given(
    st.integers(0, 20), st.integers(1, 40), st.integers(1, 70), st.booleans(),
    st.sampled_from([SINGLE, HALF]), st.booleans(), st.integers(0, 9),
)  # fmt: skip
def test_numbers_are_those_of_the_layers(
    n: int, d: int, h: int, gated: bool, dtype: torch.dtype, strided: bool, seed: int
) -> None:
    w = weights(d, h, gated, dtype, seed)
    x = torch.randn(n, d, generator=torch.Generator().manual_seed(seed + 1)).to(dtype)
    want, exact = expected(x, w), expected(x.double(), w.to(torch.float64))
    if strided:
        x, w = spread(x), Weights._make(t if t is None else spread(t) for t in w)
    for program in [name for name in known(x, "relu", False) if name in DENSE]:
        assert near(run(program, x, w, "relu", prepared=w.prepare()), want, exact)


@pytest.mark.parametrize("gated", [False, True])
def test_gradients_are_those_of_the_layers(gated: bool) -> None:
    w, x = weights(9, 33, gated, SINGLE), torch.randn(7, 9)
    found = []
    for program in ("onednn", "dense"):
        leaves = Weights._make(t if t is None else t.clone().requires_grad_() for t in w)
        given_x = x.clone().requires_grad_()
        y = (
            expected(given_x, leaves)
            if program == "dense"
            else run(program, given_x, leaves, "relu")
        )
        learning = [given_x, *(t for t in leaves if t is not None)]
        found.append(torch.autograd.grad(y.square().sum(), learning))
    for one, two in zip(*found, strict=True):
        assert torch.allclose(one, two, rtol=1e-4, atol=1e-3)


def test_nan_and_inf_pass() -> None:
    w, x = weights(5, 12, False, SINGLE), torch.zeros(3, 5)
    x[0, 1], x[1, 2] = torch.nan, torch.inf
    for program in ("onednn", "packed"):
        y = run(program, x, w, "relu", prepared=w.prepare())
        assert torch.equal(y.isnan(), expected(x, w).isnan())


def test_copies_take_what_is_counted_and_no_more_than_is_allowed() -> None:
    for dtype in (SINGLE, HALF):
        w = weights(256, 512, False, dtype)
        for program, tokens in (("packed", 40), ("screened", 40), ("screened", 1), ("sparse", 40)):
            x, ready = torch.randn(tokens, 256).to(dtype), prepare(w.down, w.up)
            with torch.no_grad():
                run(program, x, w, "relu", prepared=ready)
            counted = sum(copies(program, w, tokens).values())
            assert counted <= ready.bytes() <= counted + 20 * 512  # and what the bound needs
            assert counted <= 1.35 * w.nbytes
    turned = w._replace(up=w.up.t().contiguous().t())  # as Conv1D has it: few tokens read panels
    ready = turned.prepare()
    with torch.no_grad():
        run("screened", x[:1], turned, "relu", prepared=ready)
    counted = sum(copies("screened", turned, 1).values())
    assert counted <= ready.bytes() <= counted + 20 * 512


def test_dense_mode_and_no_memory_leave_dense_programs() -> None:
    model = nn.Sequential(nn.Linear(64, 4096), nn.ReLU(), nn.Linear(4096, 64)).eval()
    nn.init.constant_(model[0].bias, -2.0)
    x = torch.randn(64, 64)
    with torch.no_grad():
        want = model(x)
        for options in ({"mode": "dense"}, {"max_extra_memory": 0}):
            handle = accelerate(model, inputs=x, **options)
            for _ in range(3):
                assert torch.allclose(model(x), want, atol=1e-5)
            (ran,) = next(iter(handle.runs.values())).met()
            assert ran.trial is not None
            tried = ran.trial.seconds.keys()
            assert tried <= set(DENSE) if "mode" in options else "packed" not in tried
            handle.remove()
    with pytest.raises(ValueError, match="max_extra_memory is -1; it must be 0 or more"):
        accelerate(model, inputs=x, max_extra_memory=-1)


@pytest.mark.skipif(not backends.loaded(), reason="no compiled kernels here")
@pytest.mark.parametrize("dtype", backends.CPU)
@pytest.mark.parametrize("sizes", [(1, 5, 3), (1, 0, 3), (0, 5, 3), (1, 5, 0), (3, 800, 130)])
def test_the_product_by_rows_is_linear(
    way: str, dtype: torch.dtype, sizes: tuple[int, int, int]
) -> None:
    if way == "reference":
        return
    n, h, d = sizes
    torch.manual_seed(0)
    x, weight, bias = (torch.randn(*size).to(dtype) for size in ((n, d), (h, d), (h,)))
    for threads, plus in ((1, bias), (2, None)):
        torch.set_num_threads(threads)
        exact = F.linear(x.double(), weight.double(), None if plus is None else plus.double())
        eps = torch.finfo(dtype).eps
        z = dense.by_rows(x, weight, plus)
        torch.testing.assert_close(z.double(), exact, rtol=eps, atol=1e-5)
        assert torch.equal(dense.by_rows(x[None], weight, plus), z[None])


@pytest.mark.parametrize("sizes", [(0, 4, 6), (3, 4, 0), (3, 0, 6), (0, 0, 0)])
def test_products_of_nothing(sizes: tuple[int, int, int]) -> None:
    n, d, h = sizes
    x, weight, bias = torch.ones(n, d), torch.ones(h, d), torch.ones(h)
    with torch.no_grad():
        assert torch.equal(dense.onednn(x, weight, bias), x @ weight.t() + bias)

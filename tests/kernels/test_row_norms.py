"""Norms of packed rows, for penalties: those of the dense hidden layer, and so their gradients."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from actsparse.activations import ActivationFunction, named, shifted_s_shape
from actsparse.blocks.stages import token_norm
from actsparse.kernels import forms, row_norms, sparse_mlp
from actsparse.kernels import pack as packing

ROUNDOFF = {torch.float32: 2.0**-24, torch.bfloat16: 2.0**-8}
ACTIVATIONS = [*map(named, forms.FUSED), named("relu6"), shifted_s_shape(0.4, 1.6)]

# rows, units: more than one block of 384 units, one row, no rows, no units
SIZES = [(5, 7), (40, 800), (1, 385), (0, 30), (6, 0)]


def rows(n: int, units: int, dtype: torch.dtype = torch.float32) -> Tensor:
    """Some entries, of either sign, and a row that is silent but for a packed zero."""
    generator = torch.Generator().manual_seed(n + units)
    dense = torch.randn(n, units, generator=generator, dtype=dtype)
    dense *= torch.rand(n, units, generator=generator) < 0.2
    if n > 2:
        dense[1] = 0
    return dense


def packed(dense: Tensor) -> tuple[Tensor, Tensor]:
    keep = dense != 0
    keep[:, :1] = True  # a value may be zero: of a gated unit whose u is
    return packing.pack(keep)[0], dense[keep]


@pytest.mark.parametrize(("n", "units"), SIZES)
@pytest.mark.parametrize("dtype", ROUNDOFF)
@pytest.mark.usefixtures("way")
def test_the_norms_are_those_of_the_rows(n: int, units: int, dtype: torch.dtype) -> None:
    dense, near = rows(n, units, dtype), {"rtol": 1.1 * ROUNDOFF[dtype], "atol": 0}
    pointer, value = packed(dense)
    one, two = row_norms.row_norms(pointer, value, n)
    # summed in float64, then rounded
    exact = dense.double()
    torch.testing.assert_close(one.double(), exact.abs().sum(1), **near)
    torch.testing.assert_close(two.double(), exact.square().sum(1).sqrt(), **near)


@pytest.mark.parametrize(("n", "units"), SIZES)
@pytest.mark.parametrize("dtype", ROUNDOFF)
@pytest.mark.usefixtures("way")
def test_the_gradient_is_that_of_the_dense_norms_and_zero_where_a_is(
    n: int, units: int, dtype: torch.dtype
) -> None:
    dense = rows(n, units, dtype)
    pointer, value = packed(dense)
    grads = torch.randn(2, n).to(dtype)
    value.requires_grad_()
    torch.autograd.backward(row_norms.row_norms(pointer, value, n), tuple(grads))
    exact = dense.double().requires_grad_()
    torch.autograd.backward([exact.norm(1, dim=1), exact.norm(2, dim=1)], tuple(grads.double()))
    keep = dense != 0
    keep[:, :1] = True
    want = exact.grad[keep]
    assert bool((value.grad[value == 0] == 0).all())
    # the norm's rounding, a quotient, a product and a sum, relative to the two terms
    largest = (grads[0].abs() + grads[1].abs()).double()[:, None].expand(n, units)[keep]
    assert bool(((value.grad.double() - want).abs() <= 4.1 * ROUNDOFF[dtype] * largest).all())


@pytest.mark.parametrize("which", [0, 1], ids=["l1", "l2"])
def test_one_norm_may_be_used_without_the_other(which: int) -> None:
    dense = rows(5, 7, torch.float64)
    pointer, value = packed(dense)
    for dtype in (torch.float32, torch.float64):
        leaf = value.to(dtype).requires_grad_()
        row_norms.row_norms(pointer, leaf, 5)[which].sum().backward()
        norm = dense.norm(2, dim=1)[packing.rows_of(pointer, 5, len(value))]
        want = value.sign() if which == 0 else value / torch.where(norm > 0, norm, 1)
        torch.testing.assert_close(leaf.grad, want.to(dtype))


def test_gradcheck() -> None:
    dense = rows(4, 9, torch.float64)
    pointer = packing.pack(dense != 0)[0]
    value = dense[dense != 0].requires_grad_()  # away from zero, where ‖·‖₁ has a kink
    assert float(value.detach().abs().min()) > 1e-3

    def run(value: Tensor) -> tuple[Tensor, Tensor]:
        return row_norms.row_norms(pointer, value, 4)

    assert torch.autograd.gradcheck(run, (value,))


# --- of an MLP ---------------------------------------------------------------------------------


def halves(*shape: int) -> Tensor:
    """−1, −½, 0, ½ or 1: sums of products are exact in any order, in float32 too."""
    return torch.randint(-2, 3, shape).double() / 2


def weights(d: int, h: int, gated: bool, density: float) -> dict[str, Tensor]:
    """About that density; no pre-activation nearer to 0 than 1/8, so that ‖a‖ is no less."""
    bias = halves(h) - 1.375
    bias = torch.full_like(bias, {0.0: -20.0, 1.0: 20.0}[density]) if density in (0, 1) else bias
    made = {"up": halves(h, d), "bias": bias, "down": halves(d, h), "down_bias": halves(d)}
    if gated:
        made["gate"], made["gate_bias"] = made["up"].flip(0).clone(), bias
        made["bias"] = halves(h)
        made["up"][: h // 3], made["bias"][: h // 3] = 0, 0  # u = 0 exactly
    return made


def penalised(y: Tensor, one: Tensor, two: Tensor, grad_y: Tensor) -> Tensor:
    ratio = one / torch.where(two > 0, two, 1)
    return (y * grad_y).sum() + ratio.square().sum() + 0.5 * ratio.sum() + 0.25 * one.sum()


@settings(max_examples=60)
@given(
    leading=st.sampled_from([(), (1,), (7,), (2, 3), (2, 0, 3)]),
    d=st.integers(1, 12),
    h=st.sampled_from([1, 3, 64, 385]),
    activation=st.sampled_from(ACTIVATIONS),
    gated=st.booleans(),
    screen=st.booleans(),
    dtype=st.sampled_from([torch.float32, torch.float64]),
    density=st.sampled_from([0.0, 0.1, 1.0]),
    seed=st.integers(0, 9),
)
def test_a_loss_of_the_norms_has_the_gradients_of_the_dense_block(
    leading: tuple[int, ...],
    d: int,
    h: int,
    activation: ActivationFunction,
    gated: bool,
    screen: bool,
    dtype: torch.dtype,
    density: float,
    seed: int,
) -> None:
    torch.manual_seed(seed)
    w, x, grad_y = weights(d, h, gated, density), halves(*leading, d), halves(*leading, d)
    leaves = {name: t.clone().requires_grad_() for name, t in (("x", x), *w.items())}
    z = leaves["x"] @ leaves["gate" if gated else "up"].t()
    z = z + leaves["gate_bias" if gated else "bias"]
    a = activation.value(z)
    if gated:
        a = a * (leaves["x"] @ leaves["up"].t() + leaves["bias"])
    y = a @ leaves["down"].t() + leaves["down_bias"]
    exact = penalised(y, token_norm(a, 1), token_norm(a, 2), grad_y)
    want = torch.autograd.grad(exact, list(leaves.values()))

    ours = {name: t.detach().to(dtype).requires_grad_() for name, t in leaves.items()}
    norms: dict[str, Tensor] = {}
    y = sparse_mlp(**ours, activation=activation, screen=screen, on_norms=norms.update)
    assert norms["l1"].shape == norms["l2"].shape == (*leading, 1)
    loss = penalised(y, norms["l1"], norms["l2"], grad_y.to(dtype))
    # z is exact; then come sums of at most h, d or len(x) terms one after the other, of terms no
    # larger than some hundreds or than the largest gradient: a rounding each, of that size
    n = d + h + x.numel() + 20
    scale = max(100.0, *(float(g.abs().max()) for g in want if g.numel()))
    atol = n * torch.finfo(dtype).eps * scale
    value = float(exact.detach())
    assert float(loss.detach()) == pytest.approx(value, rel=0, abs=max(1.0, abs(value)) * atol)
    got = torch.autograd.grad(loss, list(ours.values()))
    for name, one, two in zip(ours, got, want, strict=True):
        torch.testing.assert_close(one.double(), two, rtol=0, atol=atol, msg=name)


def test_norms_are_of_a_before_dropout() -> None:
    w, x = weights(8, 64, gated=False, density=0.1), halves(6, 8)
    plain: dict[str, Tensor] = {}
    dropped: dict[str, Tensor] = {}
    sparse_mlp(x, **w, on_norms=plain.update)
    sparse_mlp(x, **w, on_norms=dropped.update, between=torch.nn.Dropout(0.9))
    assert all(torch.equal(plain[name], dropped[name]) for name in ("l1", "l2"))
    a = torch.relu(x @ w["up"].t() + w["bias"])
    torch.testing.assert_close(plain["l1"], a.abs().sum(1, keepdim=True))


@pytest.mark.parametrize("gated", [False, True])
def test_compiles_as_one_graph(gated: bool) -> None:
    torch._dynamo.reset()
    w = {name: t.float() for name, t in weights(8, 400, gated, density=0.1).items()}
    x, grad_y = halves(3, 5, 8).float().requires_grad_(), halves(3, 5, 8).float()

    def run(x: Tensor) -> Tensor:
        norms: dict[str, Tensor] = {}
        y = sparse_mlp(x, **w, on_norms=norms.update)
        return penalised(y, norms["l1"], norms["l2"], grad_y)

    compiled: Callable[[Tensor], Tensor] = torch.compile(run, fullgraph=True, backend="aot_eager")
    loss, plain = compiled(x), run(x)
    assert torch.equal(loss, plain)
    (ours,), (theirs,) = torch.autograd.grad(loss, x), torch.autograd.grad(plain, x)
    assert torch.equal(ours, theirs)

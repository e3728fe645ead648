"""Every number of the sparse MLP within the bound that its own roundings allow, on every path."""

from __future__ import annotations

import itertools
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from torch import Tensor

from actsparse.activations import named
from actsparse.kernels import backends, build, forms, ops, prepare, sparse_mlp
from actsparse.kernels import pack as packing

U = 2.0**-24  # unit roundoff of float32
BEST = torch.ops.actsparse_cpu.level(-1) if build.load() else -1
KERNELS = build.LEVELS[: BEST + 1]


def made(d: int, h: int, density: float = 0.4) -> dict[str, Tensor]:
    """float32 weights whose bias leaves about this share of the units active."""
    shift = torch.distributions.Normal(0, 1.05).icdf(torch.tensor(1 - density)).clamp(-50, 50)
    up, bias = torch.randn(h, d) / max(d, 1) ** 0.5, torch.randn(h) * 0.3 - shift
    down, down_bias = torch.randn(d, h) / max(h, 1) ** 0.5, torch.randn(d)
    return {"up": up, "bias": bias, "down": down, "down_bias": down_bias}


def laid(t: Tensor, layout: str) -> Tensor:
    """The same values in other memory."""
    if layout == "columns":
        return t.mT.contiguous().mT if t.dim() > 1 else t
    if layout == "strided":
        return torch.stack([t, t + 1], -1)[..., 0]
    return t if layout == "rows" else torch.cat([t.new_zeros(1), t.flatten()])[1:].view(t.shape)


def gamma(n: Tensor | int) -> Tensor:
    """γ_n = n·u / (1 − n·u): n roundings one upon another, in any order of summation."""
    nu = torch.as_tensor(n, dtype=torch.float64) * U
    return nu / (1 - nu)


def assert_within(
    what: str, got: Tensor, left: Tensor, right: Tensor, n: Tensor | int,
    plus: Tensor | None = None, where: Tensor | None = None,
) -> None:  # fmt: skip
    """got = left @ right (+ plus), each entry within γ_n (Σ|left||right| + |plus|)."""
    left, right = left.detach().double(), right.detach().double()
    plus = torch.zeros(()) if plus is None else plus.detach().double()
    error = (got.detach().double() - (left @ right + plus)).abs()
    bound = gamma(n) * (left.abs() @ right.abs() + plus.abs())
    assert got.shape == bound.shape, what
    assert bool(((error <= bound) | (False if where is None else ~where)).all()), what


def assert_bounds_hold(
    x: Tensor, w: dict[str, Tensor], activation: str, screen: bool
) -> tuple[Tensor, ...]:
    """Follow a call forward and backward, product by product, on the operators' own entries.

    Bounds count roundings: D products and D sums, the first with 0, are D roundings at most; a
    bias is one more. Skipped zeros round nothing. Returns the gradients.
    """
    leaves = [t.requires_grad_() for t in (x, *w.values())]
    tokens = x.detach().reshape(-1, x.shape[-1]).contiguous()
    n, (units, d) = len(tokens), w["up"].shape
    with torch.no_grad():
        up = w["up"] if w["up"].t().is_contiguous() else w["up"].contiguous()
        codes = ops.quantise(up) if screen and backends.loaded() else []
        pointer, index, a, slope = ops.pack(tokens, up, w["bias"], codes, activation)
        z = ops.pack(tokens, up, w["bias"], codes, "relu")[2]
    seen: list[Tensor] = []

    def whole(entries: Tensor) -> Tensor:
        return packing.unpack(pointer, index, entries.detach(), n, units).double()

    y = sparse_mlp(x, **w, activation=activation, screen=screen,
                   between=lambda value: seen.append(value) or value)  # fmt: skip
    grad_y = torch.randn(y.shape)
    dx, dup, dbias, ddown, ddown_bias, g_a = torch.autograd.grad(y, [*leaves, *seen], grad_y)
    flat_y, flat_g = (t.reshape(n, len(w["down"])) for t in (y, grad_y))
    keep = whole(torch.ones(len(index))) != 0

    # z on the own mask, and a mask that errs by rounding alone
    assert_within("z", whole(z), tokens, up.t(), d + 1, w["bias"], where=keep)
    exact, terms = (
        f(tokens).double() @ f(up.t()).double() + f(w["bias"]) for f in (torch.clone, torch.abs)
    )
    assert bool((exact <= gamma(d + 1) * terms)[~keep].all()), "units left out"
    torch.testing.assert_close(a, named(activation).value(z), rtol=4 * U, atol=0)
    assert torch.equal(seen[0], a)

    # forward, then backward, from the entries themselves
    hidden = whole(a)
    active, of_tokens = (hidden != 0).sum(1, keepdim=True), (hidden != 0).sum(0)[:, None]
    assert_within("y", flat_y, hidden, w["down"].t(), active + 1, w["down_bias"])
    assert_within("dV", ddown.t(), hidden.t(), flat_g, of_tokens + 1)
    assert_within("db'", ddown_bias, torch.ones(n), flat_g, n)
    assert_within("g_a", whole(g_a), flat_g, w["down"], d, where=keep)
    g_z = whole(g_a if activation == "relu" else torch.where(slope != 0, g_a * slope, 0))
    active, of_tokens = (g_z != 0).sum(1, keepdim=True), (g_z != 0).sum(0)
    assert_within("dU", dup, g_z.t(), tokens, of_tokens[:, None] + 1)
    assert_within("db", dbias, torch.ones(n), g_z, of_tokens)
    assert_within("dx", dx.reshape(n, d), g_z, w["up"], active + 1)
    return dx, dup, dbias, ddown, ddown_bias


# (tokens, D, H): whole and broken vectors, mask words (64) and blocks (384) of units, blocks of
# tokens, tiles of 384 columns and chunks of 768, fewer tokens than "few", one of everything
SIZES = [
    (1, 1, 1), (3, 5, 63), (4, 16, 64), (5, 17, 65), (7, 33, 383), (9, 48, 384), (8, 31, 385),
    (33, 2, 769), (385, 19, 40), (770, 4, 9), (6, 401, 130), (2, 800, 70), (0, 4, 6),
]  # fmt: skip


@pytest.mark.parametrize("screen", [False, True], ids=["plain", "screen"])
def test_every_entry_stays_within_its_a_priori_bound(way: str, screen: bool) -> None:
    kinds = ((0.0, "relu"), (0.1, "jsrelu"), (0.3, "squared_relu"), (1.0, "relu"))
    for (tokens, d, h), (density, activation) in itertools.product(SIZES, kinds):
        assert_bounds_hold(torch.randn(tokens, d), made(d, h, density), activation, screen)


@settings(max_examples=60, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(
    leading=st.sampled_from([(), (0,), (1,), (4,), (7,), (2, 3), (2, 0, 3), (41,)]),
    d=st.integers(1, 70),
    h=st.one_of(st.integers(1, 140), st.sampled_from([383, 385, 769, 1155])),
    density=st.floats(0, 1),
    activation=st.sampled_from(forms.FUSED),
    screen=st.booleans(),
    layouts=st.tuples(*[st.sampled_from(["rows", "columns", "strided", "offset"])] * 3),
    seed=st.integers(0, 99),
)
def test_bounds_hold_over_shapes_densities_and_strides(
    way: str, leading: tuple[int, ...], d: int, h: int, density: float, activation: str,
    screen: bool, layouts: tuple[str, ...], seed: int,
) -> None:  # fmt: skip
    torch.manual_seed(seed)
    w = made(d, h, density)
    w["up"], w["down"] = laid(w["up"], layouts[0]), laid(w["down"], layouts[1])
    x = laid(torch.randn(*leading, d), layouts[2])
    gradients = assert_bounds_hold(x, w, activation, screen)
    for t, gradient in zip((x, *w.values()), gradients, strict=True):
        assert gradient.shape == t.shape


@pytest.mark.parametrize(("dtype", "most"), [(torch.float32, 4), (torch.bfloat16, 1.3)])
@pytest.mark.parametrize("size", [(300, 96, 768, 0.1), (20_000, 16, 130, 0.4), (50, 16, 8192, 0.4)])
def test_rms_error_is_at_most_a_few_times_dense(
    way: str, size: tuple[int, int, int, float], dtype: torch.dtype, most: float
) -> None:
    """Against float64 on the mask of each; long sums of one sign err most."""
    tokens, d, h, density = size
    x, grad_y = torch.randn(tokens, d).to(dtype), (torch.randn(tokens, d) + 1).to(dtype)
    w = {name: t.to(dtype) for name, t in made(d, h, density).items()}
    leaves = [t.requires_grad_() for t in (x, *w.values())]

    def errors(y: Tensor, mask: Tensor) -> Tensor:
        wide = [t.detach().double().requires_grad_() for t in leaves]
        exact = F.linear(F.linear(*wide[:3]) * mask, *wide[3:])
        got = (y, *torch.autograd.grad(y, leaves, grad_y))
        want = (exact, *torch.autograd.grad(exact, wide, grad_y.double()))
        pairs = zip(got, want, strict=True)
        return torch.stack([(one - two).detach().square().mean().sqrt() for one, two in pairs])

    z = F.linear(*leaves[:3])
    dense = errors(F.linear(torch.relu(z), *leaves[3:]), z > 0)
    for screen in (False, True):
        codes = ops.quantise(w["up"].detach()) if screen and backends.loaded() else []
        with torch.no_grad():
            pointer, index, value, _ = ops.pack(*leaves[:3], codes, "relu")
        mask = packing.unpack(pointer, index, torch.ones_like(value), tokens, h) != 0
        ratios = errors(sparse_mlp(x, **w, screen=screen), mask) / dense
        assert float(ratios.max()) <= most, ratios


# ---- the screen -----------------------------------------------------------------------------


def missed(x: Tensor, up: Tensor, bias: Tensor) -> tuple[int, int]:
    """How many units the screen leaves out though float64 or dense float32 has them active."""
    codes = ops.quantise(up)
    pointer, index = torch.ops.actsparse_cpu.candidates(x, up, bias, *codes, 0.0)
    kept = packing.unpack(pointer, index, torch.ones(len(index)), len(x), len(up)) != 0
    off = (x.double() @ up.double().t() + bias.double() <= 0) & (F.linear(x, up, bias) <= 0)
    return int((~off & ~kept).sum()), int(kept.sum())


def threshold(x: Tensor, up: Tensor) -> Tensor:
    """The smallest float32 bias with which x [D] activates a unit, in exact arithmetic."""
    exact = -(x.double() @ up.double().t())
    bias = exact.float()
    return torch.where(bias.double() > exact, bias, torch.nextafter(bias, bias + 1))


@pytest.mark.parametrize("way", KERNELS, indirect=True)
@pytest.mark.parametrize("whose", ["up", "x", "channel", "channel and rest"])
@pytest.mark.parametrize(("tokens", "outliers"), [(1, False), (61, False), (61, True)])
def test_no_unit_is_missed_where_the_bound_has_nothing_to_spare(
    way: str, whose: str, tokens: int, outliers: bool
) -> None:
    """Every error of rounding to codes points along the other factor: Cauchy–Schwarz is equality.

    One matrix is constant, so that codes hold it exactly; the other has errors of 0.499 steps of
    one sign, a step being 127/127 (8 bits) or 127/32512 (16). z is the smallest number above 0:
    an error bound that is half a percent too small misses it. ``channel``: x is large in one, for
    which the largest error counts apart, by Hölder.
    """
    d, h = 63, 130
    step = 1 / 256 if whose == "x" and (tokens == 1 or outliers) else 1.0  # with two planes
    rough = torch.randint(-100, 100, (tokens if whose == "x" else h, d)) + 0.499 * step
    rough[:, 0] = 127.0
    plain = torch.full((h if whose == "x" else tokens, d), 3.0)
    plain[:, 0] = 0.0
    if whose == "channel":
        plain[:, 2:] = 0.0
    if whose == "channel and rest":
        plain[:, 1] = 381.0
    x, up = (rough, plain) if whose == "x" else (plain, rough)
    if outliers:  # of another token, so that 8 bits would lose too much
        x[1, 1:], x[1, 0] = 0.3, 1e4
    for sign in (1, -1):  # errors and what they meet change their signs together
        wanted = threshold(sign * x[0], sign * up)
        assert bool((x[0].double() @ up.double().t() + wanted > 0).all())
        assert missed(sign * x, sign * up, wanted)[0] == 0
    # and it is the bound that keeps them: far below zero nothing is kept
    assert missed(x, up, wanted - 1e8)[1] == 0


# ---- run to run -----------------------------------------------------------------------------


def everything(
    tokens: int, screen: bool, dtype: torch.dtype, backward_threads: int | None = None
) -> list[Tensor]:
    """y with and without gradients, alone and prepared, and all gradients."""
    d, h = 151, 900  # more columns than threads take at once, and three blocks
    # no generator: threads share it
    grid = torch.arange(h * d).remainder(997).sub(498).div(300).to(dtype)
    grad_y = grid[: tokens * d].view(tokens, d)
    x, up, down = torch.sin(grad_y), torch.sin(grid * 7).view(h, d), torch.cos(grid).view(d, h)
    w = {"up": up, "bias": grid[:h] - 7, "down": down, "down_bias": grid[:d].clone()}
    out = [sparse_mlp(x, **w, screen=screen, prepared=p) for p in (None, prepare(down, up))]
    leaves = [t.requires_grad_() for t in (x, *w.values())]
    y = sparse_mlp(x, **w, screen=screen, activation="jsrelu")
    if backward_threads is not None:
        torch.set_num_threads(backward_threads)
    return [*out, y.detach(), *torch.autograd.grad(y, leaves, grad_y)]


@pytest.mark.parametrize("tokens", [1, 5, 9, 400])  # few for one thread, for two, for neither
@pytest.mark.parametrize("screen", [False, True], ids=["plain", "screen"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_runs_are_bit_identical(way: str, tokens: int, screen: bool, dtype: torch.dtype) -> None:
    first, again = (everything(tokens, screen, dtype) for _ in range(2))
    assert all(torch.equal(one, two) for one, two in zip(first, again, strict=True))
    if way != "reference":  # what follows the entries is ours, and its sums know no threads
        again = everything(tokens, screen, dtype, backward_threads=2)
        assert all(torch.equal(one, two) for one, two in zip(first, again, strict=True))
        if screen:  # so is all the rest, without the matrix product for z
            torch.set_num_threads(2)
            again = everything(tokens, screen, dtype)
            assert all(torch.equal(one, two) for one, two in zip(first, again, strict=True))


def test_calls_side_by_side_do_not_meet() -> None:
    x, w = torch.randn(80, 64), made(64, 900, 0.1)
    want = [sparse_mlp(x[: 20 * k], **w, screen=True) for k in range(5)]

    def as_alone(k: int) -> bool:
        again = (sparse_mlp(x[: 20 * k], **w, screen=True) for _ in range(100))
        return all(torch.equal(y, want[k]) for y in again)

    with ThreadPoolExecutor(4) as pool:
        assert all(pool.map(as_alone, range(1, 5)))


# ---- what autograd and callers do -----------------------------------------------------------


def dense(x: Tensor, up: Tensor, bias: Tensor, down: Tensor, down_bias: Any = None) -> Tensor:
    return F.linear(torch.relu(F.linear(x, up, bias)), down, down_bias)


def assert_gradients_of_dense(run: Callable[..., Tensor], *leaves: Tensor) -> None:
    """To a few hundred roundings of the largest: sums of up to 130 terms, twice over."""
    ours, plain = (torch.autograd.grad(run(mlp), leaves) for mlp in (sparse_mlp, dense))
    for one, two in zip(ours, plain, strict=True):
        torch.testing.assert_close(one, two, rtol=0, atol=500 * U * float(two.abs().max()))


def test_tied_and_repeated_weights_sum_their_gradients(way: str) -> None:
    x, *w = (t.requires_grad_() for t in (torch.randn(9, 12), *made(12, 130).values()))
    up, bias, down, _ = w
    assert_gradients_of_dense(lambda mlp: mlp(x, up, bias, up.t()).sum(), x, up, bias)
    assert_gradients_of_dense(lambda mlp: mlp(x, down.t(), bias, down).sum(), x, down, bias)
    assert_gradients_of_dense(lambda mlp: mlp(mlp(x, *w), *w).sum(), x, *w)


def test_any_one_tensor_may_learn_and_gradients_be_of_any_strides(way: str) -> None:
    tensors = [torch.randn(9, 12), *made(12, 130).values()]
    grads = (torch.randn(12).expand(9, 12), torch.randn(12, 9).t(), torch.ones(9, 24)[:, ::2])
    for k, grad in itertools.product(range(len(tensors)), grads):
        leaves = [t.clone().requires_grad_(i == k) for i, t in enumerate(tensors)]

        def run(mlp: Callable[..., Tensor], leaves: Any = leaves, grad: Tensor = grad) -> Tensor:
            return (mlp(*leaves) * grad).sum() + mlp(*leaves)[0].sum()

        assert_gradients_of_dense(run, leaves[k])


def test_a_penalty_on_the_values_alone_has_its_gradient(way: str) -> None:
    """Σ a: autograd hands on its ones expanded, of stride 0."""
    x, *w = (t.requires_grad_() for t in (torch.randn(9, 12), *made(12, 130).values()))
    sums: list[Tensor] = []

    def penalty(mlp: Callable[..., Tensor]) -> Tensor:
        if mlp is dense:
            return torch.relu(F.linear(x, *w[:2])).sum()
        mlp(x, *w, between=lambda value: sums.append(value.sum()) or value)
        return sums[0]

    assert_gradients_of_dense(penalty, x, *w[:2])


def test_weights_that_change_between_calls(way: str) -> None:
    """With ``prepared``: prepare again. Before backward: an error, as in dense."""
    w, x = made(12, 130), torch.randn(9, 12)
    stale = prepare(w["down"].clone(), w["up"].clone())
    w["up"].mul_(-2), w["down"].mul_(-2)
    for screen in (False, True):
        y = sparse_mlp(x, **w, screen=screen)
        fresh = prepare(w["down"], w["up"])
        assert torch.equal(sparse_mlp(x, **w, screen=screen, prepared=fresh), y)
        assert not torch.equal(sparse_mlp(x, **w, screen=screen, prepared=stale), y)
    for name in ("up", "down"):
        y = sparse_mlp(x, **{**w, name: w[name].requires_grad_()})
        w[name].detach().mul_(2)
        with pytest.raises(RuntimeError, match="modified by an inplace operation"):
            y.sum().backward()


def test_what_autograd_cannot_do_is_refused_not_wrong(way: str) -> None:
    w, x = made(12, 130), torch.randn(9, 12)
    with torch.inference_mode():
        inside = {name: t.clone() for name, t in w.items()}
        y = sparse_mlp(x, **inside)
    assert torch.equal(sparse_mlp(x, **inside), y)
    x.requires_grad_()
    with pytest.raises(RuntimeError, match="Inference tensors cannot be saved for backward"):
        sparse_mlp(x, **inside)
    (dx,) = torch.autograd.grad(sparse_mlp(x, **w).square().sum(), x, create_graph=True)
    with pytest.raises(RuntimeError, match="no autograd formula"):
        dx.sum().backward()

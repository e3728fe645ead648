"""The papers' equations, written out by hand in float64, against what ``sparsify`` does.

Peng, Qi, Shi, Gao 2023 (arXiv 2309.03004) and Peng et al. 2026 (arXiv 2605.25612); the weight
noise and both penalties are compared with their definitions in tests/modify.
"""

from __future__ import annotations

import math
from collections.abc import Callable

import pytest
import torch
from torch import Tensor, nn

from actsparse import ActivationPenalty, NormFloor, SwapActivation, ZerothBias, sparsify
from actsparse.modify.recipe import recipe_named
from tests.mlp import Mlp

B, T, D, H = 2, 4, 5, 7
EPS = torch.finfo(torch.float64).eps
Row = list[float]
Matrix = list[Row]


class RMSNorm(nn.Module):
    def __init__(self, offset: float) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.full((D,), 1 - offset))
        self.offset = offset

    def forward(self, x: Tensor) -> Tensor:
        normed = x / (x.square().mean(-1, keepdim=True) + 1e-6).sqrt()
        return normed * (self.weight + self.offset)


def plain() -> Mlp:
    """LayerNorm and two matrices, as in ViT."""
    return Mlp(nn.ReLU(), D, H, norm=nn.LayerNorm(D))


def gated() -> Mlp:
    """RMSNorm that multiplies by 1 + w, and a gate, as in Gemma."""
    return Mlp(nn.SiLU(), D, H, norm=RMSNorm(1.0), gated=True)


def stream() -> Tensor:
    return torch.randn(B, T, D, dtype=torch.float64)


def jsrelu(z: float) -> float:
    return ((z + 1) ** 2 - 1) / 2 if z > 0 else 0.0


def affine(weight: Matrix, x: Row, bias: Row) -> Row:
    return [
        sum(w * v for w, v in zip(row, x, strict=True)) + b
        for row, b in zip(weight, bias, strict=True)
    ]


def values(model: nn.Module) -> dict[str, list]:
    return {name: p.tolist() for name, p in model.named_parameters()}


def plain_by_hand(p: dict[str, list], x: Row, d: Row, phi: Callable[[float], float]) -> Row:
    mean = sum(x) / D
    std = math.sqrt(sum((v - mean) ** 2 for v in x) / D + 1e-5)
    scale, shift = p["norm.weight"], p["norm.bias"]
    n = [(v - mean) / std * s + b + e for v, s, b, e in zip(x, scale, shift, d, strict=True)]
    a = [phi(z) for z in affine(p["up.weight"], n, p["up.bias"])]
    y = affine(p["down.weight"], a, p["down.bias"])
    return [v + w for v, w in zip(x, y, strict=True)]


def gated_by_hand(p: dict[str, list], x: Row, d: Row, phi: Callable[[float], float]) -> Row:
    rms = math.sqrt(sum(v * v for v in x) / D + 1e-6)
    n = [v / rms * (1 + w) + e for v, w, e in zip(x, p["norm.weight"], d, strict=True)]
    gate = [phi(z) for z in affine(p["gate.weight"], n, p["gate.bias"])]
    up = affine(p["up.weight"], n, p["up.bias"])
    y = affine(p["down.weight"], [g * u for g, u in zip(gate, up, strict=True)], p["down.bias"])
    return [v + w for v, w in zip(x, y, strict=True)]


BY_HAND = {"plain": (plain, plain_by_hand, 0.0), "gated": (gated, gated_by_hand, 1.0)}


def train(
    model: nn.Module, handle_steps: int, recipe: object, follow: Callable[[int], None]
) -> None:
    """Steps large enough that floor and clip are met; ``follow`` after each."""
    x = stream()
    optimizer = torch.optim.AdamW(model.parameters(), lr=0.05, weight_decay=0.3)
    handle = sparsify(model, recipe, inputs=x)
    handle.attach(optimizer, steps=handle_steps)
    for step in range(1, handle_steps + 1):
        optimizer.zero_grad()
        (model(x) - x.roll(1, -1)).square().mean().backward()
        optimizer.step()
        follow(step)


def check_outputs(model: nn.Module, kind: str, phi: Callable[[float], float]) -> None:
    _, by_hand, _ = BY_HAND[kind]
    x = stream()
    p = values(model)
    table = p["up.actsparse.zeroth_bias"]
    expected = torch.tensor(
        [[by_hand(p, x[b, t].tolist(), table[t], phi) for t in range(T)] for b in range(B)],
        dtype=torch.float64,
    )
    # sums over D and H terms, squared by φ and multiplied by weights of size one
    tolerance = 64 * (D + H) * EPS * expected.abs().max().item()
    torch.testing.assert_close(model(x), expected, rtol=0, atol=tolerance)


@pytest.mark.parametrize("kind", BY_HAND)
def test_the_modified_block_computes_down_phi_up_of_norm_plus_zeroth_bias(kind: str) -> None:
    """y = V·JSReLU(U·(LN(x) + d_t) + b) + b′ after training: positions have their own d."""
    build, _, offset = BY_HAND[kind]
    model = build().double()
    bounds = []

    def follow(step: int) -> None:
        for s, *column in zip(model.norm.weight.tolist(), *table(model), strict=True):
            assert s + offset >= 1
            assert all(abs(d) <= 0.1 * abs(s + offset) * (1 + 2 * EPS) for d in column)
            bounds.append(any(abs(d) >= 0.1 * (s + offset) * (1 - 2 * EPS) for d in column))

    train(model, 8, "paper", follow)
    rows = table(model)
    assert len(rows) == T
    assert len({tuple(row) for row in rows}) == T
    assert any(bounds)
    check_outputs(model, kind, jsrelu)


def table(model: nn.Module) -> Matrix:
    return model.up.actsparse.zeroth_bias.tolist()


@pytest.mark.parametrize("kind", BY_HAND)
def test_finetuning_follows_mixing_and_uplift_step_by_step(kind: str) -> None:
    build, _, offset = BY_HAND[kind]
    model = build().double()
    start = [-2.0, -0.25, 0.0, 0.5, 1.5]
    with torch.no_grad():
        model.norm.weight.copy_(torch.tensor(start) - offset)
        if kind == "plain":
            model.norm.bias.copy_(torch.linspace(-1, 1, D))
    biases = [b.tolist() for name, b in model.named_parameters() if name == "norm.bias"]
    old = {
        "plain": lambda z: max(z, 0.0),
        "gated": lambda z: z / (1 + math.exp(-z)),
    }[kind]

    def follow(step: int) -> None:
        k = min(1.0, step / 3)  # a third of 9 steps
        scales = [w + offset for w in model.norm.weight.tolist()]
        assert all(abs(s) >= k * (1 - 4 * EPS) - 2 * EPS for s in scales)
        assert [b.tolist() for n, b in model.named_parameters() if n == "norm.bias"] == biases
        # k is held in float32
        k = torch.tensor(k).item()
        check_outputs(model, kind, lambda z: (1 - k) * old(z) + k * jsrelu(z))

    train(model, 9, "paper-finetune", follow)


@pytest.mark.parametrize("offset", [0.0, 1.0])
def test_uplift_alone_is_sign_times_the_larger_of_magnitude_and_ramped_floor(offset: float) -> None:
    model = (gated() if offset else plain()).double()
    start = [-2.0, -0.25, 0.0, 0.5, 1.5]
    model.norm.weight.data.copy_(torch.tensor(start) - offset)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.0)
    handle = sparsify(model, NormFloor(1.25, uplift=4), inputs=stream())
    handle.attach(optimizer)
    expected = start
    for step in range(1, 7):
        optimizer.step()
        floor = 1.25 * min(1.0, step / 4)
        expected = [(-1 if s < 0 else 1) * max(abs(s), floor) for s in expected]
        got = [w + offset for w in model.norm.weight.tolist()]
        assert got == pytest.approx(expected, rel=0, abs=4 * EPS)


def test_jsrelu_and_its_slope_jump_at_zero_and_agree_with_the_formula() -> None:
    grid = [-3.0, -1e-300, -0.0, 0.0, 1e-300, 1e-20, 1e-8, 0.5, 1.0, 3.0, 1e3]
    model = nn.Sequential(nn.LayerNorm(D), nn.Linear(D, H), nn.GELU(), nn.Linear(H, D)).double()
    handle = sparsify(model, SwapActivation("jsrelu"), inputs=stream())
    phi = handle.blocks[0].activation.module
    z = torch.tensor([[grid]], dtype=torch.float64, requires_grad=True)
    handle.blocks[0].up.module.register_forward_hook(lambda *hook: z)
    seen: list[Tensor] = []
    phi.register_forward_hook(lambda *hook: seen.append(hook[-1]) or torch.zeros(1, 1, H).double())
    model(stream())
    (slope,) = torch.autograd.grad(seen[0].sum(), z)
    for value, a, s in zip(grid, seen[0][0, 0].tolist(), slope[0, 0].tolist(), strict=True):
        # z + z²/2, the formula without its cancellation
        expected = value + value * value / 2 if value > 0 else 0.0
        assert a == pytest.approx(expected, rel=4 * EPS, abs=0)
        assert s == pytest.approx(value + 1 if value > 0 else 0.0, rel=4 * EPS, abs=0)


def test_output_biases_are_the_released_programs_variant() -> None:
    """y + d_t in place of x + d_t."""
    model, x = plain().double(), stream()
    before = model(x)
    sparsify(model, ZerothBias(at="output"), inputs=x)
    d = torch.randn(T, D, dtype=torch.float64)
    model.up.actsparse.zeroth_bias.data.copy_(d)
    # one more addition
    atol = 4 * EPS * (before.abs().max() + d.abs().max()).item()
    torch.testing.assert_close(model(x), before + d, rtol=0, atol=atol)


def test_recipes_hold_the_papers_constants() -> None:
    zeroth, floor, swap = recipe_named("paper").modifications
    assert (zeroth.clip, zeroth.at, zeroth.finetune) == (0.1, "input", False)
    assert (floor.floor, floor.uplift) == (1.0, None)
    assert (swap.to, swap.mix) == ("jsrelu", None)
    zeroth, floor, swap = recipe_named("paper-finetune").modifications
    assert zeroth.finetune
    # mixing and uplift over 5 of 15 epochs
    assert [ramp.value(5, 15) for ramp in (*floor.ramps(), *swap.ramps())] == [1.0, 1.0]
    assert [ramp.value(4, 15) for ramp in (*floor.ramps(), *swap.ramps())] == [0.8, 0.8]


def test_the_hoyer_penalty_is_the_mean_over_tokens_of_one_over_h_times_l1_over_l2_squared() -> None:
    model, x = gated().double(), stream()
    handle = sparsify(model, ActivationPenalty("hoyer", weight=0.5), inputs=x)
    model(x)
    p, total = values(model), 0.0
    for token in x.reshape(-1, D).tolist():
        rms = math.sqrt(sum(v * v for v in token) / D + 1e-6)
        n = [v / rms * (1 + w) for v, w in zip(token, p["norm.weight"], strict=True)]
        z, u = affine(p["gate.weight"], n, p["gate.bias"]), affine(p["up.weight"], n, p["up.bias"])
        a = [v / (1 + math.exp(-v)) * w for v, w in zip(z, u, strict=True)]
        total += sum(map(abs, a)) ** 2 / (H * sum(v * v for v in a))
    expected = 0.5 * total / (B * T)
    assert handle.penalty().item() == pytest.approx(expected, rel=64 * H * EPS)

"""Skippable multiplications, counted one by one in explicit loops on tiny blocks."""

from __future__ import annotations

from collections import Counter
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor, nn

from actsparse.activations import ACTIVATIONS
from actsparse.blocks import find_mlp_blocks
from actsparse.observe import observe, skippable
from actsparse.observe.skippable_work import skippable_products
from tests.observe.brute import D, Mlp


class Loops:
    """y and all gradients of Σ y·g by scalar multiplications, zeros left out; counts both.

    ``name`` is a way and a product.
    """

    def __init__(self) -> None:
        self.done: Counter[str] = Counter()
        self.all: Counter[str] = Counter()

    def product(self, name: str, needed: Tensor, left: Tensor, right: Tensor) -> Tensor:
        """left [t, k] @ right [k, m]; needed, whose shape says of which: True where it counts."""
        out = torch.zeros(len(left), right.shape[1], dtype=left.dtype)
        on = {"left": left, "right": right, "out": out}
        (place,) = [which for which, t in on.items() if t.shape == needed.shape]
        for t in range(len(left)):
            for m in range(right.shape[1]):
                for k in range(left.shape[1]):
                    self.all[name] += 1
                    index = {"left": (t, k), "right": (k, m), "out": (t, m)}[place]
                    if needed[index]:
                        self.done[name] += 1
                        out[t, m] += left[t, k] * right[k, m]
        return out

    def skipped(self) -> dict[str, float]:
        """By way."""
        return {
            way: 1 - self._total(self.done, way) / self._total(self.all, way)
            for way in ("forward", "backward")
        }

    @staticmethod
    def _total(counts: Counter[str], way: str) -> int:
        return sum(count for name, count in counts.items() if name.startswith(way))

    def products(self) -> dict[str, float]:
        """By product."""
        return {name.split(": ")[1]: 1 - self.done[name] / n for name, n in self.all.items()}


def count(mlp: Mlp, x: Tensor, loops: Loops, slope_of: Any) -> None:
    """One block by hand on its rows x [T, D] (T ≠ D ≠ H, so that shapes name the operands)."""
    up, down = mlp.up.weight, mlp.down.weight
    y = mlp.down(mlp.act(mlp.up(x))) if mlp.gate is None else None
    g_y = torch.randn(len(x), D, dtype=x.dtype)
    everything = torch.ones(len(x), up.shape[0], dtype=torch.bool)
    if mlp.gate is None:
        z = loops.product("forward: z = xUᵀ", everything, x, up.T) + mlp.up.bias
        a, on = mlp.act(z), slope_of(z) != 0
        out = loops.product("forward: y = aVᵀ", a != 0, a, down.T) + mlp.down.bias
        dv = loops.product("backward: dV = g_yᵀa", (a != 0).T, a.T, g_y).T
        g_z = loops.product("backward: g_a = g_yV", on, g_y, down) * slope_of(z)
        grads = [
            loops.product("backward: dx = g_zU", on, g_z, up),
            loops.product("backward: dU = g_zᵀx", on.T, g_z.T, x),
            dv,
        ]
        weights = [up, down]
    else:
        gate = mlp.gate.weight
        z = loops.product("forward: z = xGᵀ", everything, x, gate.T) + mlp.gate.bias
        phi, on = mlp.act(z), slope_of(z) != 0
        u = loops.product("forward: u = xUᵀ", phi != 0, x, up.T) + mlp.up.bias
        a = phi * u
        out = loops.product("forward: y = aVᵀ", a != 0, a, down.T) + mlp.down.bias
        dv = loops.product("backward: dV = g_yᵀa", (a != 0).T, a.T, g_y).T
        g_a = loops.product("backward: g_a = g_yV", (phi != 0) | on, g_y, down)
        g_z, g_u = g_a * u * slope_of(z), g_a * phi
        dx = loops.product("backward: dx += g_zG", on, g_z, gate)
        dx = dx + loops.product("backward: dx += g_uU", phi != 0, g_u, up)
        grads = [
            dx,
            loops.product("backward: dG = g_zᵀx", on.T, g_z.T, x),
            loops.product("backward: dU = g_uᵀx", (phi != 0).T, g_u.T, x),
            dv,
        ]
        weights = [gate, up, down]
        y = mlp.down(mlp.act(mlp.gate(x)) * mlp.up(x))
    assert y is not None
    torch.testing.assert_close(out, y)  # what was skipped changes nothing
    torch.testing.assert_close(grads, list(torch.autograd.grad((y * g_y).sum(), [x, *weights])))


CASES = [(phi, gated, False) for phi in ("relu", "jsrelu", "relu6", "gelu") for gated in (0, 1)]


# exact zeros of u where φ and φ′ differ: see test_a_bound
@pytest.mark.parametrize(
    ("phi", "gated", "zero_u"), [*CASES, ("relu", True, True), ("jsrelu", True, True)]
)
def test_counted_one_by_one(phi: str, gated: bool, zero_u: bool) -> None:
    torch.manual_seed(3)
    model = nn.Sequential(Mlp(phi, gated, 4), Mlp(phi, gated, 5)).double()
    if zero_u:
        with torch.no_grad():
            model[0].up.weight[0], model[0].up.bias[0] = 0, 0
    if phi == "relu6":
        with torch.no_grad():
            for mlp in model:
                mlp.pre.weight.mul_(4)  # so that some z is above 6, where φ′ is 0 and φ is not
    x, loops = torch.randn(1, 7, D, dtype=torch.float64), Loops()
    blocks = find_mlp_blocks(model, x)
    with observe(model, blocks=blocks) as seen:
        model(x)
    stream = x[0]
    for mlp in model:
        count(mlp, mlp.norm(stream).detach().requires_grad_(), loops, ACTIVATIONS[phi].derivative)
        stream = mlp(stream)
    summary = seen.summary("train")
    assert summary is not None
    got = skippable(summary, blocks)
    assert got == pytest.approx(loops.skipped())
    products = skippable_products(summary, blocks)
    assert products == pytest.approx(loops.products())
    assert products["z = xGᵀ" if gated else "z = xUᵀ"] == 0
    assert (products["y = aVᵀ"] < products["dx += g_zG" if gated else "dx = g_zU"]) == (
        phi == "relu6"
    )
    if phi != "gelu":
        assert min(got.values()) > 0


def row(d: float, s: float, tokens: int = 3) -> dict[str, Any]:
    return {"block": "0", "tokens": tokens, "density": d, "derivative_density": s}


def blocks_of(gated: bool) -> Any:
    return find_mlp_blocks(nn.Sequential(Mlp("relu", gated)), torch.randn(2, 3, D))


share = st.floats(0, 1)
FOUND = {gated: blocks_of(gated) for gated in (False, True)}


@given(share, share, st.booleans())
def test_shares_stay_in_their_bounds(d: float, s: float, gated: bool) -> None:
    got = skippable({"blocks": [row(d, s)]}, FOUND[gated])
    assert 0 <= got["forward"] <= (2 / 3 if gated else 1 / 2) + 1e-12
    assert 0 <= got["backward"] <= 1 + 1e-12


def test_the_ends_of_the_scale() -> None:
    for gated in (False, True):
        silent = skippable({"blocks": [row(0.0, 0.0)]}, FOUND[gated])
        assert silent == {"forward": pytest.approx(2 / 3 if gated else 1 / 2), "backward": 1.0}
        dense = skippable({"blocks": [row(1.0, 1.0)]}, FOUND[gated])
        assert dense == {"forward": 0.0, "backward": 0.0}


def test_blocks_weigh_by_their_multiplications() -> None:
    model = nn.Sequential(Mlp("relu", False, 4), Mlp("relu", False, 12))
    blocks = find_mlp_blocks(model, torch.randn(2, 3, D))
    summary = {"blocks": [row(0.0, 0.0), row(1.0, 1.0, tokens=2) | {"block": "1"}]}
    share = 3 * 4 / (3 * 4 + 2 * 12)
    assert skippable(summary, blocks) == pytest.approx({"forward": share / 2, "backward": share})
    products = skippable_products(summary, blocks)
    assert products.pop("z = xUᵀ") == 0
    assert list(products.values()) == pytest.approx([share] * 5)


def test_gated_and_other_blocks_have_products_of_their_own_beside_those_they_share() -> None:
    model = nn.Sequential(Mlp("relu", False, 4), Mlp("relu", True, 12))
    blocks = find_mlp_blocks(model, torch.randn(2, 3, D))
    products = skippable_products(
        {"blocks": [row(0.5, 0.5), row(0.25, 0.25) | {"block": "1"}]}, blocks
    )
    both, plain, gate = (4 * 0.5 + 12 * 0.75) / 16, 0.5, 0.75
    want = {"y = aVᵀ": both, "dV = g_yᵀa": both, "g_a = g_yV": both}
    want |= {"z = xUᵀ": 0, "dx = g_zU": plain, "dU = g_zᵀx": plain}
    want |= {"z = xGᵀ": 0, "u = xUᵀ": gate, "dx += g_zG": gate, "dG = g_zᵀx": gate}
    want |= {"dx += g_uU": gate, "dU = g_uᵀx": gate}
    assert products == pytest.approx(want)


def test_a_bound() -> None:
    """Where u is exactly 0 and φ, φ′ differ, p = max(d, s) is the smallest that d and s allow."""
    torch.manual_seed(0)
    mlp = Mlp("relu6", True, 8)
    with torch.no_grad():
        mlp.up.weight[:], mlp.up.bias[:] = 0, 0
    model = nn.Sequential(mlp)
    with observe(model, inputs=torch.randn(4, 6, D)) as seen:
        model(torch.randn(4, 6, D))
    summary = seen.summary("train")
    assert summary is not None
    assert summary["density"] == 0 < summary["derivative_density"]
    assert skippable(summary, seen.blocks.values())["forward"] > 0


def test_errors() -> None:
    for each in (skippable, skippable_products):
        with pytest.raises(ValueError, match="no pass"):
            each(None, FOUND[False])  # type: ignore[arg-type]
        with pytest.raises(ValueError, match=r"block 'x' of the summary is not in blocks: 0, 0.up"):
            each({"blocks": [row(0.5, 0.5) | {"block": "x"}]}, FOUND[False])

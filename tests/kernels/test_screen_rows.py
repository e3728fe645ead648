"""Ten million rows for each instruction set and dtype: no unit above the threshold is left out.

pytest -m slow -s tests/kernels/test_screen_rows.py     # ACTSPARSE_ROWS=1000000 takes fewer
"""

from __future__ import annotations

import itertools
import os

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from actsparse.kernels import build, ops
from actsparse.kernels import pack as packing

ROWS = int(os.environ.get("ACTSPARSE_ROWS", "10_000_000"))
BEST = torch.ops.actsparse_cpu.level(-1) if build.load() else -1
KINDS = [
    "gaussian", "near", "scales", "denormal", "one channel", "means", "cancelling", "weight rows",
    "constant", "half-way", "not finite",
]  # fmt: skip
# what rounding a float32 sum to the dtype adds, what a product may lose by underflow, and a factor
ROUNDED = {torch.float32: (0.0, 1e-44, 0.0), torch.bfloat16: (2.0**-8, 2.4e-38, 2.0**-126)}


def drawn(kind: str, t: int, d: int, h: int) -> tuple[Tensor, Tensor]:
    """x [t, d] and up [h, d]."""
    x, up = torch.randn(t, d), torch.randn(h, d) / d**0.5
    if kind == "near":  # tokens that are alike but for a rounding or two
        x = x[:1] * (1 + 1e-7 * torch.randint(-1, 2, (t, d)))
    if kind == "scales":
        x *= 10.0 ** (34 * torch.rand(t, 1) - 17)
        up *= 10.0 ** (34 * torch.rand(h, 1) - 17)
    if kind == "denormal":  # of few rows, since they are slow
        x[::32] *= 1e-39
        up *= 10.0 ** torch.randint(-3, 4, (h, 1))
    if kind == "one channel":
        large = 10.0 ** (6 * torch.rand(t))
        x[:, torch.randint(d, ())] *= large
        x[::2, torch.randint(d, ())] += large[::2]
    if kind == "means":
        x += 10.0 ** (3 * torch.rand(())) * torch.randn(d)
    if kind == "cancelling":
        half = d // 2
        x[:, half : 2 * half] = x[:, :half]
        up[:, half : 2 * half] = -up[:, :half] * (1 + 1e-6 * torch.randn(h, half))
    if kind == "weight rows":
        x = up[torch.randint(h, (t,))] * 10.0 ** torch.randint(-3, 4, (t, 1))
        x *= torch.randn(t, 1).sign()
    if kind == "constant":
        x[::2], up[::2] = torch.randn(len(x[::2]), 1), torch.randn(len(up[::2]), 1)
        x[::3] = 0
    if kind == "half-way":  # between two codes
        x, up = torch.randint(-127, 128, (t, d)) + 0.5, torch.randint(-127, 128, (h, d)) + 0.5
    return x, up


def biases(x: Tensor, up: Tensor) -> Tensor:
    """A third at the threshold for a token, but for steps of float32; a third below; and others."""
    exact = -(x[torch.randint(len(x), (len(up),))].double() * up.double()).sum(1)
    bias = exact.float()
    for _ in range(2):
        bias = torch.nextafter(bias, bias + torch.randint(-1, 2, bias.shape))
    bias[1::3] -= 0.3 * bias[1::3].abs()
    bias[2::3] = -1.6 * x.norm(dim=1).median() * up[2::3].norm(dim=1)
    return bias


def marked(pointer: Tensor, index: Tensor, t: int, h: int) -> Tensor:
    """[t, h]: the entries that there are."""
    marks = torch.zeros(t, h, dtype=torch.bool)
    marks[packing.rows_of(pointer, t, len(index)), index.long()] = True
    return marks


def check(x: Tensor, up: Tensor, bias: Tensor, floor: float) -> tuple[int, int]:
    """Pre-activations within rounding of the threshold, and those computed and above it."""
    (t, d), h, (rounding, tiny, flushed) = x.shape, len(up), ROUNDED[x.dtype]
    wide_x, wide_up, plus = x.double(), up.double(), bias.double()
    exact = torch.addmm(plus, wide_x, wide_up.t())
    dense = F.linear(x.float(), up.float(), bias.float())
    codes = ops.quantise(up)
    kept = marked(*torch.ops.actsparse_cpu.candidates(x, up, bias, *codes, floor), t, h)
    assert not (~((exact <= floor) & (dense <= floor)) & ~kept).any()

    # γ (Σ|x||u| + |b|), the sum by Cauchy–Schwarz, and what denormals lose
    sizes, of_units = wide_x.norm(dim=1), wide_up.norm(dim=1)
    roundings = (d + 1) * 2.0**-24 / (1 - (d + 1) * 2.0**-24)
    lost = (d + 1) * tiny + flushed * d**0.5 * (sizes[:, None] + of_units)
    off = roundings * (sizes[:, None] * of_units + plus.abs()) + lost
    near = (exact - floor).abs() <= off + rounding * floor
    overflows = ~(sizes[:, None] * of_units + plus.abs() < 1e37)

    name = f"relu(threshold={floor})" if floor else "relu"
    pointer, index, value, _ = ops.pack(x, up, bias, codes, name)
    packed = marked(pointer, index, t, h)
    assert not ((exact > floor) & ~near & ~packed & ~overflows).any()
    want, most, wild = exact[packed], off[packed], overflows[packed]
    most += rounding * (want.abs() + most)
    assert bool((((value.double() - want).abs() <= most) | wild).all())
    return int(near.sum()), len(index)


def check_rows(rows: int, dtype: torch.dtype, seed: int) -> tuple[int, int, int, int]:
    """Rows, pre-activations, those within rounding of the threshold, those found above it."""
    torch.manual_seed(seed)
    done = units = within = active = 0
    sizes = itertools.cycle([(128, 64), (128, 64), (23, 70), (128, 64), (131, 130)])
    for kind, turn, (d, h) in zip(itertools.cycle(KINDS), itertools.count(), sizes):
        if done >= rows:
            break
        x, up = drawn(kind, 8192, d, h)
        bias = biases(x, up)
        if kind == "not finite":
            for part in (x, up, bias):
                some = torch.randint(part.numel(), (2 + part.numel() // 2000,))
                part.view(-1)[some] = torch.tensor([torch.nan, torch.inf, -torch.inf])[some % 3]
        x, up, bias = x.to(dtype), up.to(dtype), bias.to(dtype)
        few = 1 + turn % 3  # rows at a time take other paths
        for some in (x, *x[: 6 * few].split(few)):
            near, found = check(some, up, bias, 0.13 if turn % 3 == 2 else 0.0)
            done, units = done + len(some), units + len(some) * h
            within, active = within + near, active + found
    return done, units, within, active


@pytest.mark.slow
@pytest.mark.parametrize("dtype", list(ROUNDED), ids=str)
@pytest.mark.parametrize("way", build.LEVELS[: BEST + 1], indirect=True)
def test_no_active_unit_is_missed_in_ten_million_rows(way: str, dtype: torch.dtype) -> None:
    """Every unit that float64 or dense float32 has above the threshold is a candidate; every one
    that lies above it by more than the rounding of the sum is computed, to within that rounding.
    """
    rows, units, within, active = check_rows(ROWS, dtype, build.LEVELS.index(way))
    print(
        f"\n{way} {dtype}: {rows:,} rows, {units:,} pre-activations, {within:,} within rounding of "
        f"the threshold, {active:,} computed and above it, none missed"
    )
    assert 0 < within < 0.5 * units
    assert active < 0.7 * units

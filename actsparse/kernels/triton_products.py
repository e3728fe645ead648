"""Products of packed entries with dense rows, in Triton: y, dV, dx and dU; sampled products.

Packed entries as :mod:`actsparse.kernels.pack` has them. One program has ``BM`` rows and ``BD``
columns of the result and walks the entries of its rows side by side. They rise, so that its rows
come by a row of the dense operand at about the same time, and what one of them has fetched the
others find in the first-level cache: what bounds the product is the second level's bandwidth at
``BM`` = 1 and the first level's at many (docs/kernels.md). Sums are of float32, 128 at a time, in
one order whatever the block sizes.
"""

from __future__ import annotations

import triton
import triton.language as tl
from torch import Tensor

from actsparse.kernels import pack as packing
from actsparse.kernels.triton_launch import about, on_its_device, tuned

_GATHERS = [
    {"BM": 16, "BD": 128, "warps": 4},
    {"BM": 1, "BD": 512, "warps": 4},
    {"BM": 4, "BD": 256, "warps": 4},
    {"BM": 64, "BD": 64, "warps": 8},
    {"BM": 128, "BD": 64, "warps": 8},
    {"BM": 256, "BD": 64, "warps": 8},
]


@tuned(_GATHERS, key=["about_n", "m"])
@triton.jit
def _multiply(
    pointer, index, value, rows, bias, out, n, m, about_n, blocks, out_row, out_column,
    HAS_BIAS: tl.constexpr, PART: tl.constexpr, BM: tl.constexpr, BD: tl.constexpr,
):  # fmt: skip
    """out[r, c] = Σ over r's entries of value · rows[index, c], + bias[c]."""
    r = tl.program_id(0).to(tl.int64) * BM + tl.arange(0, BM)
    c = tl.program_id(1) * BD + tl.arange(0, BD)
    begin = tl.load(pointer + r * blocks, mask=r < n, other=0)
    end = tl.load(pointer + (r + 1) * blocks, mask=r < n, other=0)
    longest = tl.max(end - begin, axis=0)
    total = tl.zeros([BM, BD], dtype=tl.float32)
    for first in range(0, longest, PART):
        part = tl.zeros([BM, BD], dtype=tl.float32)
        for e in range(first, tl.minimum(first + PART, longest)):
            here = begin + e < end
            k = tl.load(index + begin + e, mask=here, other=0).to(tl.int64)
            v = tl.load(value + begin + e, mask=here, other=0.0).to(tl.float32)
            wanted = (v != 0)[:, None] & (c < m)[None, :]  # 0 · NaN is skipped
            row = tl.load(rows + k[:, None] * m + c[None, :], mask=wanted, other=0.0)
            part += v[:, None] * row.to(tl.float32)
        total += part
    if HAS_BIAS:
        total += tl.load(bias + c, mask=c < m, other=0.0).to(tl.float32)[None, :]
    at = out + r[:, None] * out_row + c[None, :].to(tl.int64) * out_column
    tl.store(at, total.to(out.dtype.element_ty), mask=(r < n)[:, None] & (c < m)[None, :])


@on_its_device
def multiply(
    pointer: Tensor,
    index: Tensor,
    value: Tensor,
    rows: Tensor,
    bias: Tensor | None,
    n: int,
    turned: bool = False,
) -> Tensor:
    """``a rows + bias`` [n, M], as :func:`actsparse.kernels.ops.multiply` has it."""
    m = rows.shape[1]
    out = value.new_empty(m, n).t() if turned else value.new_empty(n, m)
    rows = rows.contiguous()
    if out.numel():
        _multiply[lambda size: (triton.cdiv(n, size["BM"]), triton.cdiv(m, size["BD"]))](
            pointer, index, value, rows, rows if bias is None else bias, out, n, m, about(n),
            packing.blocks(rows.shape[0]), out.stride(0), out.stride(1),
            HAS_BIAS=bias is not None, PART=128,
        )  # fmt: skip
    return out


_SAMPLES = [
    {"BE": 16, "BK": 256, "warps": 4},
    {"BE": 8, "BK": 512, "warps": 4},
    {"BE": 32, "BK": 128, "warps": 4},
    {"BE": 4, "BK": 1024, "warps": 8},
]


@tuned(_SAMPLES, key=["d"])
@triton.jit
def _sample(
    pointer, index, x, up, out, n, d, blocks, PROGRAMS: tl.constexpr,
    BE: tl.constexpr, BK: tl.constexpr,
):  # fmt: skip
    """out[k] = ⟨x[row k], up[index k]⟩, BE entries of a row at a time."""
    r = tl.program_id(0).to(tl.int64)
    begin = tl.load(pointer + r * blocks)
    end = tl.load(pointer + (r + 1) * blocks)
    for first in range(begin + tl.program_id(1) * BE, end, BE * PROGRAMS):
        e = first + tl.arange(0, BE)
        k = tl.load(index + e, mask=e < end, other=0).to(tl.int64)
        total = tl.zeros([BE], dtype=tl.float32)
        for c in range(0, d, BK):
            column = c + tl.arange(0, BK)
            one = tl.load(x + r * d + column, mask=column < d, other=0.0).to(tl.float32)
            there = (e < end)[:, None] & (column < d)[None, :]
            row = tl.load(up + k[:, None] * d + column[None, :], mask=there, other=0.0)
            total += tl.sum(row.to(tl.float32) * one[None, :], axis=1)
        tl.store(out + e, total.to(out.dtype.element_ty), mask=e < end)


@on_its_device
def sample(pointer: Tensor, index: Tensor, x: Tensor, up: Tensor) -> Tensor:
    """``⟨x[row k], up[index k]⟩`` for packed entries [nnz]; x contiguous.

    Few rows are split among more programs.
    """
    n, d = x.shape
    out = x.new_empty(index.shape[0])
    if out.numel():
        programs = max(1, 1024 // n)
        _sample[(n, programs)](
            pointer, index, x, up.contiguous(), out, n, d, packing.blocks(up.shape[0]),
            PROGRAMS=programs,
        )  # fmt: skip
    return out

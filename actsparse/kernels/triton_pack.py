"""``x → z → packed entries`` in Triton: the product packs as it ends, or z is packed after it.

A tile is ``TILE`` units of one token. The product's epilogue keeps of a tile what is active, up to
``ROOM`` entries; of a fuller tile it writes all of z to a spill of z's size, which costs its bytes
and drops nothing. Counts of tiles, summed up, are the pointer of the packed entries; a second
kernel moves tiles to their places. The size of the result is the one thing the host must wait for.
"""

from __future__ import annotations

from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from actsparse.kernels import pack as packing
from actsparse.kernels.triton_launch import INTERPRETED, about, on_its_device, strides, tuned

TILE = 128  # three are a block of the packed entries
ROOM = 32  # of a tile of 128: above a quarter nobody runs sparse
# 256 rows, or 128 by four warps, leave the epilogue that packs no registers
_PACKS = [
    {"BM": 64, "BK": 64, "warps": 8, "stages": 4},
    {"BM": 128, "BK": 64, "warps": 8, "stages": 4},
    {"BM": 64, "BK": 64, "warps": 4, "stages": 4},
    {"BM": 64, "BK": 128, "warps": 8, "stages": 3},
]
_PICKS = [
    {"BM": 128, "BK": 64, "warps": 8, "stages": 4},
    {"BM": 128, "BK": 32, "warps": 4, "stages": 4},
    {"BM": 64, "BK": 64, "warps": 4, "stages": 4},
    {"BM": 256, "BK": 64, "warps": 8, "stages": 3},
]


def _whole(arguments: dict[str, Any]) -> bool:
    return arguments["d"] % arguments["BK"] == 0


@triton.jit
def _tile(
    x, up, bias, first, unit, n, h, d, up_unit, up_channel,
    HAS_BIAS: tl.constexpr, WHOLE: tl.constexpr, WIDE: tl.constexpr,
    BM: tl.constexpr, BN: tl.constexpr, BK: tl.constexpr,
):  # fmt: skip
    """x[first :] upᵀ[:, unit :] + bias[unit :] in float32; what is outside is some number."""
    r = tl.minimum(tl.arange(0, BM), n - first - 1)
    u = tl.minimum(tl.arange(0, BN), h - unit - 1)
    c = tl.arange(0, BK)
    ones = x + first.to(tl.int64) * d + r[:, None] * d + c[None, :]
    twos = up + unit.to(tl.int64) * up_unit + u[None, :] * up_unit + c[:, None] * up_channel
    z = tl.zeros([BM, BN], dtype=tl.float32)
    for k in range(0, d, BK):
        if WHOLE:
            one = tl.load(ones)
            two = tl.load(twos)
        else:
            one = tl.load(ones, mask=(c < d - k)[None, :], other=0.0)
            two = tl.load(twos, mask=(c < d - k)[:, None], other=0.0)
        if WIDE:  # the interpreter multiplies the bits of bfloat16 as if they were integers
            one = one.to(tl.float32)
            two = two.to(tl.float32)
        z = tl.dot(one, two, z, input_precision="ieee")
        ones += BK
        twos += BK * up_channel
    if HAS_BIAS:
        z += tl.load(bias + unit + u).to(tl.float32)[None, :]
    return z


@triton.jit
def _order():
    """Which rows and tile: eight tiles of units at a time, whose weights the caches keep."""
    tile, row = tl.swizzle2d(
        tl.program_id(1), tl.program_id(0), tl.num_programs(1), tl.num_programs(0), 8
    )
    return row, tile


@tuned(_PACKS, key=["about_n", "h", "d"])
@triton.heuristics({"WHOLE": _whole})
@triton.jit
def _multiply_and_pack(
    x, up, bias, count, local, kept, spill, n, h, d, about_n, tiles, up_unit, up_channel, floor,
    HAS_BIAS: tl.constexpr, WHOLE: tl.constexpr, WIDE: tl.constexpr, ROOM: tl.constexpr,
    TILE: tl.constexpr, BM: tl.constexpr, BK: tl.constexpr,
):  # fmt: skip
    """Of each tile: how many are active; which, and their z, or if they are too many all of z."""
    row, tile = _order()
    first = row * BM
    z = _tile(
        x, up, bias, first, tile * TILE, n, h, d, up_unit, up_channel, HAS_BIAS, WHOLE, WIDE,
        BM, TILE, BK,
    )  # fmt: skip
    z = z.to(kept.dtype.element_ty)  # as the dense product rounds, before it is compared
    wide = z.to(tl.float32)
    r, lane = tl.arange(0, BM), tl.arange(0, TILE)
    inside = (r < n - first)[:, None] & (lane < h - tile * TILE)[None, :]
    active = inside & ((wide > floor) | (wide != wide))
    place = tl.cumsum(active.to(tl.int32), axis=1) - 1
    active_here = tl.max(place, axis=1) + 1
    begin = first.to(tl.int64) * tiles + tile  # in tiles; what is added fits 32 bits
    tl.store(count + begin + r * tiles, active_here, mask=r < n - first)
    fits = (active_here <= ROOM)[:, None]
    at = (r * (tiles * ROOM))[:, None] + place
    own = tl.broadcast_to(lane[None, :], [BM, TILE]).to(tl.uint8)
    tl.store(local + begin * ROOM + at, own, mask=active & fits)
    tl.store(kept + begin * ROOM + at, z, mask=active & fits)
    if tl.max(active_here, axis=0) > ROOM:
        dense = spill + first.to(tl.int64) * h + tile * TILE
        tl.store(dense + (r * h)[:, None] + lane[None, :], z, mask=inside & (fits == 0))


@triton.jit
def _count(z, count, h, tiles, floor, TILE: tl.constexpr, MANY: tl.constexpr):
    """How many of each tile of a finished z are active."""
    r = tl.program_id(0).to(tl.int64)
    tile = tl.program_id(1) * MANY + tl.arange(0, MANY)
    u = tile[:, None] * TILE + tl.arange(0, TILE)[None, :]
    one = tl.load(z + r * h + u, mask=u < h, other=float("-inf")).to(tl.float32)
    active = (one > floor) | (one != one)
    tl.store(count + r * tiles + tile, tl.sum(active.to(tl.int32), axis=1), mask=tile < tiles)


@triton.jit
def _move(
    count, start, local, kept, spill, index, value, h, tiles, floor,
    ROOM: tl.constexpr, TILE: tl.constexpr, MANY: tl.constexpr,
):  # fmt: skip
    """The entries of ``MANY`` tiles of a token to their places, from ``kept`` or from all of z."""
    r = tl.program_id(0).to(tl.int64)
    tile = tl.program_id(1) * MANY + tl.arange(0, MANY)
    many = tl.load(count + r * tiles + tile, mask=tile < tiles, other=0)
    at = tl.load(start + r * tiles + tile, mask=tile < tiles, other=0)
    if ROOM > 0:
        e = tl.arange(0, ROOM)
        there = (many <= ROOM)[:, None] & (e[None, :] < many[:, None])
        place = (r * tiles + tile)[:, None] * ROOM + e[None, :]
        u = tile[:, None] * TILE + tl.load(local + place, mask=there, other=0).to(tl.int32)
        tl.store(index + at[:, None] + e[None, :], u, mask=there)
        z = tl.load(kept + place, mask=there, other=0.0)
        tl.store(value + at[:, None] + e[None, :], z, mask=there)
    if tl.max(many, axis=0) > ROOM:
        unit = tile[:, None] * TILE + tl.arange(0, TILE)[None, :]
        full = (many > ROOM)[:, None] & (unit < h)
        every = tl.load(spill + r * h + unit, mask=full, other=float("-inf"))
        wide = every.to(tl.float32)
        active = (wide > floor) | (wide != wide)
        to = at[:, None] + tl.cumsum(active.to(tl.int32), axis=1) - 1
        tl.store(index + to, unit, mask=active)
        tl.store(value + to, every, mask=active)


@on_its_device
def pack(
    x: Tensor, up: Tensor, bias: Tensor | None, floor: float, fused: bool
) -> tuple[Tensor, Tensor, Tensor]:
    """Pointer, index and z of the units with z = x upᵀ + bias above ``floor``, or NaN.

    x [N, D] contiguous, up [H, D] of any strides, bias [H], of one dtype.

    Args:
        fused: pack in the product's epilogue; else cuBLAS multiplies and z is packed after it.
    """
    (n, d), h = x.shape, up.shape[0]
    per_block = packing.BLOCK // TILE
    tiles = packing.blocks(h) * per_block
    room = ROOM if fused else 0
    count = torch.zeros(n, tiles, dtype=torch.int32, device=x.device)
    local = torch.empty(n, tiles, room, dtype=torch.uint8, device=x.device)
    kept = x.new_empty(n, tiles, room)
    many = 16
    by_token = (n, triton.cdiv(tiles, many))
    if not fused:
        spill = torch.nn.functional.linear(x, up, bias)
        if spill.numel():
            _count[by_token](spill, count, h, tiles, floor, TILE=TILE, MANY=many)
    else:
        spill = x.new_empty(n, h)
        if spill.numel():
            _multiply_and_pack[lambda size: (triton.cdiv(n, size["BM"]), triton.cdiv(h, TILE))](
                x, up, x if bias is None else bias, count, local, kept, spill, n, h, d,
                about(n), tiles, *strides(up), floor, HAS_BIAS=bias is not None, WIDE=INTERPRETED,
                ROOM=ROOM, TILE=TILE,
            )  # fmt: skip
    start = torch.zeros(n * tiles + 1, dtype=torch.int64, device=x.device)
    torch.cumsum(count.view(-1), 0, out=start[1:])
    total = int(start[-1])
    index = torch.empty(total, dtype=torch.int32, device=x.device)
    value = x.new_empty(total)
    if total:
        _move[by_token](
            count, start, local, kept, spill, index, value, h, tiles, floor,
            ROOM=room, TILE=TILE, MANY=many,
        )  # fmt: skip
    return start[::per_block].contiguous(), index, value


@tuned(_PICKS, key=["about_n", "h", "d"])
@triton.heuristics({"WHOLE": _whole})
@triton.jit
def _multiply_and_pick(
    pointer, index, x, up, out, n, h, d, about_n, blocks, up_unit, up_channel,
    WHOLE: tl.constexpr, WIDE: tl.constexpr, BLOCK: tl.constexpr,
    TILE: tl.constexpr, BM: tl.constexpr, BK: tl.constexpr,
):  # fmt: skip
    """A tile of x upᵀ on tensor cores, of which the packed entries alone are written."""
    row, tile = _order()
    first, unit = row * BM, tile * TILE
    z = _tile(x, up, x, first, unit, n, h, d, up_unit, up_channel, False, WHOLE, WIDE, BM, TILE, BK)
    r, lane = tl.arange(0, BM), tl.arange(0, TILE)
    segment = pointer + first.to(tl.int64) * blocks + r * blocks + unit // BLOCK
    begin = tl.load(segment, mask=r < n - first, other=0)
    many = (tl.load(segment + 1, mask=r < n - first, other=0) - begin).to(tl.int32)
    for e in range(tl.max(many, axis=0)):
        k = tl.load(index + begin + e, mask=e < many, other=-1) - unit
        mine = k[:, None] == lane[None, :]
        picked = tl.sum(tl.where(mine, z, 0.0), axis=1)
        found = (k >= 0) & (k < TILE)
        tl.store(out + begin + e, picked.to(out.dtype.element_ty), mask=found)


@on_its_device
def sample_dense(pointer: Tensor, index: Tensor, x: Tensor, up: Tensor) -> Tensor:
    """As :func:`triton_products.sample`, by the whole product: cheaper above a per cent or so."""
    (n, d), h = x.shape, up.shape[0]
    out = x.new_empty(index.shape[0])
    if out.numel():
        _multiply_and_pick[lambda size: (triton.cdiv(n, size["BM"]), triton.cdiv(h, TILE))](
            pointer, index, x, up, out, n, h, d, about(n), packing.blocks(h), *strides(up),
            WIDE=INTERPRETED, BLOCK=packing.BLOCK, TILE=TILE,
        )  # fmt: skip
    return out

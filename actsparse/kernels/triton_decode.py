"""An MLP for few tokens in Triton, without gradients, for decoding one token at a time.

At T ≤ 16 the weights' bytes are the time. Up (or gate) is read whole, or its int8 copy is and then
the rows that this cannot prove inactive; of down the rows of active units are. A tile is ``TILE``
units; the units of a tile that any token needs are listed in the tile's own place, which has room
for all of them. So nothing overflows, no program waits for another, the host waits for none, and
a CUDA graph can hold it all. Sums are of one order from call to call.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor
from torch.library import custom_op

from actsparse.activations import named
from actsparse.kernels.forms import FEW as MOST
from actsparse.kernels.forms import form_of
from actsparse.kernels.triton_launch import INTERPRETED, on_its_device, tuned

TILE = 64
SPLITS = (128, 16)  # of the units, in the product with down, for one token and for more
# Roundings of a sum of D products, in float32 with an accumulator that truncates, as tensor cores'
# do: at most (D + 2) times this, relative to the sum of their absolute values.
ROUNDING = 2.0**-22  # float32 is never multiplied in TF32 here: nothing is gained, bytes are it


class Codes(NamedTuple):
    """What the screen knows of up [H, D]: int8 codes, and of each unit [H] in float32 its scale,
    ‖û‖ and ‖u − û‖ with û = scale · codes, both rounded up, and ‖u‖ likewise.
    """

    codes: Tensor
    scale: Tensor
    norm: Tensor
    error: Tensor
    whole: Tensor


@torch.no_grad()
def quantise(up: Tensor) -> Codes:
    """Codes of up [H, D], a row at a time; rows with NaN or infinities are never screened out.

    >>> [each.shape for each in quantise(torch.ones(3, 2))][:2]
    [torch.Size([3, 2]), torch.Size([3])]
    """
    wide = up.double()
    finite = wide.isfinite().all(1)
    wide = torch.where(finite[:, None], wide, 0)
    scale = (wide.abs().amax(1) / 127).float() if up.shape[1] else wide.new_zeros(len(up)).float()
    divisor = torch.where(scale > 0, scale, 1).double()[:, None]
    codes = (wide / divisor).round().clamp(-127, 127).to(torch.int8)
    about = codes.double() * scale.double()[:, None]
    norms = [about.norm(dim=1), (wide - about).norm(dim=1), wide.norm(dim=1)]
    upper = [
        torch.where(finite, each * (1 + 2.0**-20) + 2.0**-149, torch.inf).float() for each in norms
    ]
    return Codes(codes, scale, *upper)


# One token: a thread adds up lanes of its own, and registers are the limit. More: tensor cores.
_ONE = [
    {"BU": 16, "BK": 512, "warps": 4},
    {"BU": 8, "BK": 512, "warps": 4},
    {"BU": 8, "BK": 1024, "warps": 8},
    {"BU": 16, "BK": 1024, "warps": 8},
    {"BU": 32, "BK": 256, "warps": 4},
]
_MANY = [
    {"BU": 16, "BK": 128, "warps": 2, "stages": 5},
    {"BU": 32, "BK": 128, "warps": 4, "stages": 4},
    {"BU": 64, "BK": 128, "warps": 4, "stages": 3},
    {"BU": 64, "BK": 64, "warps": 4, "stages": 5},
]
_FEW_ONE = [{"BK": size["BK"], "warps": size["warps"]} for size in _ONE[:3]]
_FEW_MANY = [{"BK": 128, "warps": 2, "stages": 5}, {"BK": 128, "warps": 4, "stages": 3}]
_DOWN_ONE = [
    {"BE": 8, "BD": 256, "warps": 4},
    {"BE": 16, "BD": 256, "warps": 4},
    {"BE": 8, "BD": 512, "warps": 4},
    {"BE": 4, "BD": 512, "warps": 2},
]
_DOWN_MANY = [
    {"BE": 16, "BD": 128, "warps": 4},
    {"BE": 16, "BD": 64, "warps": 2},
    {"BE": 32, "BD": 64, "warps": 4},
]


def _kinds(one: list[dict[str, int]], many: list[dict[str, int]]) -> Callable[[Any], Any]:
    """A kernel tuned for one token, and for more."""
    key = ["d"]
    return lambda kernel: (tuned(one, key)(kernel), tuned(many, key)(kernel))


@triton.jit
def _products(
    x, up, u, wanted, tokens, d, SQUARES: tl.constexpr, WIDE: tl.constexpr,
    BT: tl.constexpr, BU: tl.constexpr, BK: tl.constexpr,
):  # fmt: skip
    """⟨up[u], x[t]⟩ [BU, BT] in float32, of the wanted units; and ‖x[t]‖² [BT] where asked for."""
    t = tl.arange(0, BT)
    c = tl.arange(0, BK)
    rows = up + u.to(tl.int64)[:, None] * d + c[None, :]
    total = tl.zeros([BU, BT], dtype=tl.float32)
    lanes = tl.zeros([BU, BK], dtype=tl.float32)
    squares = tl.zeros([BT], dtype=tl.float32)
    own_squares = tl.zeros([BK], dtype=tl.float32)
    for k in range(0, d, BK):
        row = tl.load(rows + k, mask=wanted[:, None] & (c < d - k)[None, :], other=0)
        if BT == 1:
            one = tl.load(x + k + c, mask=c < d - k, other=0.0).to(tl.float32)
            lanes += row.to(tl.float32) * one[None, :]
            if SQUARES:
                own_squares += one * one
        else:
            many = tl.load(
                x + t[None, :] * d + (k + c)[:, None],
                mask=(t < tokens)[None, :] & (c < d - k)[:, None],
                other=0.0,
            )
            if SQUARES:
                squares += tl.sum(many.to(tl.float32) * many.to(tl.float32), axis=0)
            if WIDE:
                row, many = row.to(tl.float32), many.to(tl.float32)
            else:
                row = row.to(many.dtype)  # int8 codes are exact in every dtype
            total = tl.dot(row, many, total, input_precision="ieee")
    if BT == 1:
        total = tl.sum(lanes, axis=1)[:, None]
        squares += tl.sum(own_squares, axis=0)
    return total, squares


@triton.jit
def _phi(z, floor, ACT: tl.constexpr):
    """Number ACT of ``forms.FUSED``; z itself where it is none of them."""
    r = tl.where(z <= floor, 0.0, z)
    if ACT == 0:
        z = r
    if ACT == 1:
        z = r + 0.5 * r * r
    if ACT == 2:
        z = r * r
    return z


@_kinds(_ONE, _MANY)
@triton.jit
def _active(
    x, up, bias, unit, value, count, tokens, h, d, floor,
    ACT: tl.constexpr, HAS_BIAS: tl.constexpr, WIDE: tl.constexpr, TILE: tl.constexpr,
    BT: tl.constexpr, BU: tl.constexpr, BK: tl.constexpr,
):  # fmt: skip
    """Units with z = x upᵀ + bias above the floor for any token, and their φ(z) for all tokens."""
    tile = tl.program_id(0)
    t = tl.arange(0, BT)
    listed = tile * TILE
    for part in range(0, TILE, BU):
        u = tile * TILE + part + tl.arange(0, BU)
        inside = u < h
        z, _ = _products(x, up, u, inside, tokens, d, False, WIDE, BT, BU, BK)
        if HAS_BIAS:
            z += tl.load(bias + u, mask=inside, other=0.0).to(tl.float32)[:, None]
        z = z.to(value.dtype.element_ty).to(tl.float32)  # rounded as dense, then compared
        active = ((z > floor) | (z != z)) & (t < tokens)[None, :]
        wanted = (inside & (tl.max(active.to(tl.int32), axis=1) > 0)).to(tl.int32)
        at = listed + tl.cumsum(wanted, axis=0) - 1
        tl.store(unit + at, u, mask=wanted > 0)
        out = _phi(z, floor, ACT).to(value.dtype.element_ty)
        tl.store(value + at[:, None] * BT + t[None, :], out, mask=(wanted > 0)[:, None])
        listed += tl.sum(wanted, axis=0)
    tl.store(count + tile, listed - tile * TILE)


@_kinds(_ONE, _MANY)
@triton.jit
def _candidates(
    x, codes, scale, norm, error, whole, bias, unit, count, tokens, h, d, floor, rounding, eps,
    HAS_BIAS: tl.constexpr, WIDE: tl.constexpr, TILE: tl.constexpr,
    BT: tl.constexpr, BU: tl.constexpr, BK: tl.constexpr,
):  # fmt: skip
    """Units that the int8 codes do not prove to be at the floor or below for every token."""
    tile = tl.program_id(0)
    t = tl.arange(0, BT)
    listed = tile * TILE
    for part in range(0, TILE, BU):
        u = tile * TILE + part + tl.arange(0, BU)
        inside = u < h
        about, squares = _products(x, codes, u, inside, tokens, d, True, WIDE, BT, BU, BK)
        of_x = tl.sqrt(squares * (1 + 2 * rounding) + d * 2.0**-126) * (1 + 2.0**-20)
        b = tl.zeros([BU], dtype=tl.float32)
        if HAS_BIAS:
            b = tl.load(bias + u, mask=inside, other=0.0).to(tl.float32)
        # the screen's own roundings, those of the product it stands for, and of these sums;
        # 2⁻¹²⁶ for what underflows, where GPUs may flush denormals, 2⁻¹⁴ for float16's own
        slack = tl.load(error + u, mask=inside, other=0.0) + rounding * (
            tl.load(norm + u, mask=inside, other=0.0) + tl.load(whole + u, mask=inside, other=0.0)
        )
        size = tl.abs(b) + tl.abs(floor)
        bound = about * tl.load(scale + u, mask=inside, other=0.0)[:, None] + b[:, None]
        bound += of_x[None, :] * slack[:, None] + rounding * size[:, None] + (d + 8) * 2.0**-126
        silent = bound < floor - eps * (tl.abs(floor) + 2.0**-14)  # NaN is not
        candidate = (silent == 0) & (t < tokens)[None, :]
        wanted = (inside & (tl.max(candidate.to(tl.int32), axis=1) > 0)).to(tl.int32)
        tl.store(unit + listed + tl.cumsum(wanted, axis=0) - 1, u, mask=wanted > 0)
        listed += tl.sum(wanted, axis=0)
    tl.store(count + tile, listed - tile * TILE)


@_kinds(_FEW_ONE, _FEW_MANY)
@triton.jit
def _listed(
    x, up, bias, unit, count, factor, out, tokens, d, floor, ACT: tl.constexpr,
    GATED: tl.constexpr, HAS_BIAS: tl.constexpr, WIDE: tl.constexpr,
    TILE: tl.constexpr, FEW: tl.constexpr, BT: tl.constexpr, BK: tl.constexpr,
):  # fmt: skip
    """φ(x upᵀ + bias) of the units that are listed; ``GATED``: without φ, times ``factor``.

    ``FEW`` places of a tile a program, which ends at once where none of them is taken.
    """
    tile = tl.program_id(0)
    place = tl.program_id(1) * FEW + tl.arange(0, FEW)
    many = tl.load(count + tile)
    if tl.program_id(1) * FEW < many:
        t = tl.arange(0, BT)
        there = place < many
        at = tile * TILE + place
        u = tl.load(unit + at, mask=there, other=0)
        z, _ = _products(x, up, u, there, tokens, d, False, WIDE, BT, FEW, BK)
        if HAS_BIAS:
            z += tl.load(bias + u, mask=there, other=0.0).to(tl.float32)[:, None]
        z = z.to(out.dtype.element_ty).to(tl.float32)  # as the dense product rounds
        where = at[:, None] * BT + t[None, :]
        if GATED:
            phi = tl.load(factor + where, mask=there[:, None], other=0.0).to(tl.float32)
            z = tl.where(phi != 0, phi * z, 0.0)
        else:
            z = _phi(z, floor, ACT)
        tl.store(out + where, z.to(out.dtype.element_ty), mask=there[:, None])


@_kinds(_DOWN_ONE, _DOWN_MANY)
@triton.jit
def _gather(
    unit, value, count, rows, partial, tokens, tiles, splits, d,
    WIDE: tl.constexpr, TILE: tl.constexpr, BT: tl.constexpr,
    BE: tl.constexpr, BD: tl.constexpr,
):  # fmt: skip
    """partial[split, t] = Σ over the split's listed units of value[t] · rows[unit]."""
    c = tl.program_id(0) * BD + tl.arange(0, BD)
    split = tl.program_id(1)
    t = tl.arange(0, BT)
    total = tl.zeros([BT, BD], dtype=tl.float32)
    for tile in range(split, tiles, splits):
        many = tl.load(count + tile)
        for first in range(0, many, BE):
            e = first + tl.arange(0, BE)
            at = tile * TILE + e
            k = tl.load(unit + at, mask=e < many, other=0).to(tl.int64)
            v = tl.load(
                value + at[None, :] * BT + t[:, None],
                mask=(e < many)[None, :] & (t < tokens)[:, None],
                other=0.0,
            )
            wide_v = v.to(tl.float32)
            needed = tl.max((wide_v != 0).to(tl.int32), axis=0) > 0
            row = tl.load(
                rows + k[:, None] * d + c[None, :], mask=needed[:, None] & (c < d)[None, :],
                other=0.0,
            )  # fmt: skip
            wide = row.to(tl.float32)
            if BT == 1:
                each = tl.sum(wide_v, axis=0)[:, None] * wide
                total += tl.sum(each, axis=0)[None, :]
            else:  # 0 · NaN is skipped: what is not finite takes no part in the tensor cores'
                bad = (wide != wide) | (tl.abs(wide) == float("inf"))
                if tl.max(tl.max(bad.to(tl.int32), axis=1), axis=0) > 0:
                    for i in range(BT):
                        own = tl.sum(tl.where(t[:, None] == i, wide_v, 0.0), axis=0)
                        each = tl.where((own != 0)[:, None], own[:, None] * wide, 0.0)
                        total += tl.where(t[:, None] == i, tl.sum(each, axis=0)[None, :], 0.0)
                elif WIDE:
                    total = tl.dot(wide_v, wide, total, input_precision="ieee")
                else:
                    total = tl.dot(v, row, total, input_precision="ieee")
    at = (split * BT + t)[:, None].to(tl.int64) * d + c[None, :]
    tl.store(partial + at, total, mask=(c < d)[None, :])


@triton.jit
def _add(
    partial, bias, y, d, splits, HAS_BIAS: tl.constexpr, BT: tl.constexpr, BS: tl.constexpr,
    BD: tl.constexpr,
):  # fmt: skip
    """y[t] = Σ over splits of partial[split, t], + bias."""
    c = tl.program_id(0) * BD + tl.arange(0, BD)
    t = tl.program_id(1).to(tl.int64)
    split = tl.arange(0, BS)
    at = (split * BT + t)[:, None] * d + c[None, :]
    there = (split < splits)[:, None] & (c < d)[None, :]
    total = tl.sum(tl.load(partial + at, mask=there, other=0.0), axis=0)
    if HAS_BIAS:
        total += tl.load(bias + c, mask=c < d, other=0.0).to(tl.float32)
    tl.store(y + t * d + c, total.to(y.dtype.element_ty), mask=c < d)


@custom_op("actsparse::decode", mutates_args=())
@on_its_device
def decode(
    x: Tensor,
    first: Tensor,
    first_bias: Tensor | None,
    rows: Tensor,
    down_bias: Tensor | None,
    activation: str,
    up: Tensor | None,
    up_bias: Tensor | None,
    codes: list[Tensor],
) -> Tensor:
    """y [T, D′] of x [T, D], T ≤ 16, by first [H, D], φ and rows [H, D′], all contiguous.

    ``activation`` has a :class:`Form`. ``up`` [H, D] makes it gated: then ``first`` is the gate.
    ``codes``, if any: of ``first``; units that they prove silent are not computed.
    """
    form = form_of(activation)
    assert form is not None
    (tokens, d), h, out = x.shape, first.shape[0], rows.shape[1]
    tiles, many = triton.cdiv(h, TILE), int(tokens > 1)
    bt, few = (MOST, 16) if many else (1, 4)
    y = x.new_empty(tokens, out)
    if y.numel() == 0:
        return y
    unit = torch.empty(tiles * TILE, dtype=torch.int32, device=x.device)
    count = torch.empty(tiles, dtype=torch.int32, device=x.device)
    value = x.new_empty(tiles * TILE, bt)
    act, places = -1 if form.act is None else form.act, (tiles, TILE // few)
    how = {"WIDE": INTERPRETED, "TILE": TILE, "BT": bt}
    of_first = {"HAS_BIAS": first_bias is not None, **how}
    flat = x if first_bias is None else first_bias
    if not codes:
        _active[many][(tiles,)](
            x, first, flat, unit, value, count, tokens, h, d, form.floor, ACT=act, **of_first
        )
    else:
        _candidates[many][(tiles,)](
            x, *codes, flat, unit, count, tokens, h, d, form.floor, (d + 2) * ROUNDING,
            torch.finfo(x.dtype).eps, **of_first,
        )  # fmt: skip
        _listed[many][places](
            x, first, flat, unit, count, value, value, tokens, d, form.floor, ACT=act,
            GATED=False, FEW=few, **of_first,
        )  # fmt: skip
    if form.act is None:
        value = named(activation).value(value)  # of all places: those not taken are not read
    if up is not None:
        of_up, product = value if up_bias is None else up_bias, torch.empty_like(value)
        _listed[many][places](
            x, up, of_up, unit, count, value, product, tokens, d, form.floor, ACT=act,
            GATED=True, HAS_BIAS=up_bias is not None, FEW=few, **how,
        )  # fmt: skip
        value = product
    splits = min(tiles, SPLITS[many])
    partial = torch.empty(splits, bt, out, dtype=torch.float32, device=x.device)
    _gather[many][lambda size: (triton.cdiv(out, size["BD"]), splits)](
        unit, value, count, rows, partial, tokens, tiles, splits, out, **how
    )
    _add[(triton.cdiv(out, 32), tokens)](
        partial, y if down_bias is None else down_bias, y, out, splits,
        HAS_BIAS=down_bias is not None, BT=bt, BS=SPLITS[many], BD=32,
    )  # fmt: skip
    return y


@decode.register_fake
def _(
    x: Tensor,
    first: Tensor,
    first_bias: Tensor | None,
    rows: Tensor,
    down_bias: Tensor | None,
    activation: str,
    up: Tensor | None,
    up_bias: Tensor | None,
    codes: list[Tensor],
) -> Tensor:
    return x.new_empty(x.shape[0], rows.shape[1])

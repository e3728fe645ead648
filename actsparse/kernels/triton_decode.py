"""An MLP of few tokens in Triton, without gradients: what decoding runs, one token at a time.

At T ≤ 16 the weights' bytes are the time. Up (or gate) is read whole, or its int8 copy is and then
the rows that this cannot prove inactive; of down the rows of active units are. A tile is ``TILE``
units; the units of a tile that any token needs are listed in the tile's own place, which has room
for all of them. So nothing overflows, no program waits for another, the host waits for none, and
a CUDA graph can hold it all. Sums are of one order from call to call.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor
from torch.library import custom_op

from actsparse.activations import named
from actsparse.kernels.forms import form_of
from actsparse.kernels.triton_launch import INTERPRETED, tuned

MOST = 16  # tokens
TILE = 64
SPLITS = 16  # of the units, in the product with down; summed in order
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
    upper = [torch.where(finite, each * (1 + 2.0**-20), torch.inf).float() for each in norms]
    return Codes(codes, scale, *upper)


_ROWS = [
    {"BK": 256, "warps": 4, "stages": 4},
    {"BK": 512, "warps": 4, "stages": 3},
    {"BK": 512, "warps": 8, "stages": 4},
    {"BK": 1024, "warps": 8, "stages": 2},
    {"BK": 128, "warps": 2, "stages": 5},
]


@triton.jit
def _products(
    x, up, u, wanted, tokens, d, up_unit,
    SQUARES: tl.constexpr, WIDE: tl.constexpr, PRECISION: tl.constexpr,
    BT: tl.constexpr, BU: tl.constexpr, BK: tl.constexpr,
):  # fmt: skip
    """⟨up[u], x[t]⟩ [BU, BT] in float32, of the wanted units; and ‖x[t]‖² [BT] where asked for."""
    t = tl.arange(0, BT)
    total = tl.zeros([BU, BT], dtype=tl.float32)
    lanes = tl.zeros([BU, BK], dtype=tl.float32)
    squares = tl.zeros([BT], dtype=tl.float32)
    for k in range(0, d, BK):
        c = k + tl.arange(0, BK)
        row = tl.load(
            up + u[:, None] * up_unit + c[None, :],
            mask=wanted[:, None] & (c < d)[None, :],
            other=0,
        )
        if BT == 1:
            one = tl.load(x + c, mask=c < d, other=0.0).to(tl.float32)
            lanes += row.to(tl.float32) * one[None, :]
            if SQUARES:
                squares += tl.sum(one * one, axis=0)
        else:
            many = tl.load(
                x + t[None, :] * d + c[:, None],
                mask=(t < tokens)[None, :] & (c < d)[:, None],
                other=0.0,
            )
            if SQUARES:
                squares += tl.sum(many.to(tl.float32) * many.to(tl.float32), axis=0)
            if WIDE:
                row, many = row.to(tl.float32), many.to(tl.float32)
            else:
                row = row.to(many.dtype)  # int8 codes are exact in every dtype
            total = tl.dot(row, many, total, input_precision=PRECISION)
    if BT == 1:
        total = tl.sum(lanes, axis=1)[:, None]
    return total, squares


@triton.jit
def _list(wanted, u, unit, TILE: tl.constexpr):
    """The wanted units, rising, into their tile's place; how many there are."""
    ones = wanted.to(tl.int32)
    tile = tl.program_id(0)
    tl.store(unit + tile * TILE + tl.cumsum(ones, axis=0) - 1, u, mask=wanted)
    return tl.sum(ones, axis=0)


@tuned(_ROWS, key=["d", "tokens"])
@triton.jit
def _active(
    x, up, bias, unit, z, count, tokens, h, d, floor,
    HAS_BIAS: tl.constexpr, WIDE: tl.constexpr, PRECISION: tl.constexpr,
    TILE: tl.constexpr, BT: tl.constexpr, BK: tl.constexpr,
):  # fmt: skip
    """Units with z = x upᵀ + bias above the floor for any token, and their z for all tokens."""
    tile = tl.program_id(0)
    u = tile * TILE + tl.arange(0, TILE)
    t = tl.arange(0, BT)
    inside = u < h
    total, _ = _products(
        x, up, u.to(tl.int64), inside, tokens, d, d, False, WIDE, PRECISION, BT, TILE, BK
    )
    if HAS_BIAS:
        total += tl.load(bias + u, mask=inside, other=0.0).to(tl.float32)[:, None]
    own = total.to(z.dtype.element_ty)  # as the dense product rounds, before it is compared
    wide = own.to(tl.float32)
    active = ((wide > floor) | (wide != wide)) & (t < tokens)[None, :]
    wanted = inside & (tl.sum(active.to(tl.int32), axis=1) > 0)
    tl.store(count + tile, _list(wanted, u, unit, TILE))
    place = tile * TILE + tl.cumsum(wanted.to(tl.int32), axis=0) - 1
    tl.store(z + place[:, None] * BT + t[None, :], own, mask=wanted[:, None])


@tuned(_ROWS, key=["d", "tokens"])
@triton.jit
def _candidates(
    x, codes, scale, norm, error, whole, bias, unit, count, tokens, h, d, floor, rounding, eps,
    HAS_BIAS: tl.constexpr, WIDE: tl.constexpr, PRECISION: tl.constexpr,
    TILE: tl.constexpr, BT: tl.constexpr, BK: tl.constexpr,
):  # fmt: skip
    """Units that the int8 codes do not prove to be at the floor or below for every token."""
    tile = tl.program_id(0)
    u = tile * TILE + tl.arange(0, TILE)
    t = tl.arange(0, BT)
    inside = u < h
    about, squares = _products(
        x, codes, u.to(tl.int64), inside, tokens, d, d, True, WIDE, PRECISION, BT, TILE, BK
    )
    of_x = tl.sqrt(squares * (1 + 2 * rounding)) * (1 + 2.0**-20)
    b = tl.zeros([TILE], dtype=tl.float32)
    if HAS_BIAS:
        b = tl.load(bias + u, mask=inside, other=0.0).to(tl.float32)
    # the screen's own roundings, those of the product it stands for, and of what is summed here
    slack = tl.load(error + u, mask=inside, other=0.0) + rounding * (
        tl.load(norm + u, mask=inside, other=0.0) + tl.load(whole + u, mask=inside, other=0.0)
    )
    size = tl.abs(b) + tl.abs(floor)
    bound = about * tl.load(scale + u, mask=inside, other=0.0)[:, None] + b[:, None]
    bound += of_x[None, :] * slack[:, None] + rounding * size[:, None]
    silent = bound < floor - eps * tl.abs(floor)  # NaN is not
    candidate = (silent == 0) & (t < tokens)[None, :]
    wanted = inside & (tl.sum(candidate.to(tl.int32), axis=1) > 0)
    tl.store(count + tile, _list(wanted, u, unit, TILE))


@tuned(_ROWS, key=["d", "tokens"])
@triton.jit
def _listed(
    x, up, bias, unit, count, factor, out, tokens, d, floor,
    GATED: tl.constexpr, HAS_BIAS: tl.constexpr, WIDE: tl.constexpr, PRECISION: tl.constexpr,
    TILE: tl.constexpr, FEW: tl.constexpr, BT: tl.constexpr, BK: tl.constexpr,
):  # fmt: skip
    """x upᵀ + bias of the units that are listed; ``GATED``: times ``factor``, where that is not 0.

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
        total, _ = _products(
            x, up, u.to(tl.int64), there, tokens, d, d, False, WIDE, PRECISION, BT, FEW, BK
        )
        if HAS_BIAS:
            total += tl.load(bias + u, mask=there, other=0.0).to(tl.float32)[:, None]
        total = total.to(out.dtype.element_ty).to(tl.float32)  # as the dense product rounds
        where = at[:, None] * BT + t[None, :]
        if GATED:
            phi = tl.load(factor + where, mask=there[:, None], other=0.0).to(tl.float32)
            total = tl.where(phi != 0, phi * total, 0.0)
        tl.store(out + where, total.to(out.dtype.element_ty), mask=there[:, None])


_DOWN = [
    {"BE": 16, "BD": 128, "warps": 4, "stages": 4},
    {"BE": 16, "BD": 256, "warps": 4, "stages": 3},
    {"BE": 32, "BD": 128, "warps": 4, "stages": 3},
    {"BE": 16, "BD": 512, "warps": 8, "stages": 3},
]


@tuned(_DOWN, key=["d", "tokens"])
@triton.jit
def _gather(
    unit, value, count, rows, partial, tokens, tiles, d,
    WIDE: tl.constexpr, PRECISION: tl.constexpr, TILE: tl.constexpr, BT: tl.constexpr,
    SPLITS: tl.constexpr, BE: tl.constexpr, BD: tl.constexpr,
):  # fmt: skip
    """partial[split, t] = Σ over the split's listed units of value[t] · rows[unit]."""
    c = tl.program_id(0) * BD + tl.arange(0, BD)
    split = tl.program_id(1)
    t = tl.arange(0, BT)
    total = tl.zeros([BT, BD], dtype=tl.float32)
    for tile in range(split, tiles, SPLITS):
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
            v_wide = v.to(tl.float32)
            needed = tl.max((v_wide != 0).to(tl.int32), axis=0) > 0
            row = tl.load(
                rows + k[:, None] * d + c[None, :], mask=needed[:, None] & (c < d)[None, :],
                other=0.0,
            )  # fmt: skip
            if BT == 1:
                each = tl.sum(v_wide, axis=0)[:, None] * row.to(tl.float32)
                total += tl.sum(each, axis=0)[None, :]
            else:  # 0 · NaN is skipped: what is not finite takes no part in the tensor cores'
                wide = row.to(tl.float32)
                bad = (wide != wide) | (tl.abs(wide) == float("inf"))
                row = tl.where(bad, 0.0, wide)
                if WIDE:
                    total = tl.dot(v_wide, row, total, input_precision=PRECISION)
                else:
                    row = row.to(rows.dtype.element_ty)
                    total = tl.dot(v, row, total, input_precision=PRECISION)
                if tl.max(tl.max(bad.to(tl.int32), axis=1), axis=0) > 0:
                    both = (v_wide != 0)[:, :, None] & bad[None, :, :]
                    product = v_wide[:, :, None] * wide[None, :, :]
                    total += tl.sum(tl.where(both, product, 0.0), axis=1)
    at = (split * BT + t)[:, None].to(tl.int64) * d + c[None, :]
    tl.store(partial + at, total, mask=(c < d)[None, :])


@triton.jit
def _add(
    partial, bias, y, d, HAS_BIAS: tl.constexpr, SPLITS: tl.constexpr, BT: tl.constexpr,
    BD: tl.constexpr,
):  # fmt: skip
    """y[t] = Σ over splits of partial[split, t], + bias."""
    c = tl.program_id(0) * BD + tl.arange(0, BD)
    t = tl.program_id(1).to(tl.int64)
    split = tl.arange(0, SPLITS)
    at = (split * BT + t)[:, None] * d + c[None, :]
    total = tl.sum(tl.load(partial + at, mask=(c < d)[None, :], other=0.0), axis=0)
    if HAS_BIAS:
        total += tl.load(bias + c, mask=c < d, other=0.0).to(tl.float32)
    tl.store(y + t * d + c, total.to(y.dtype.element_ty), mask=c < d)


@custom_op("actsparse::decode", mutates_args=())
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
    form, phi = form_of(activation), named(activation).value
    assert form is not None
    floor = form.floor
    (tokens, d), h, out = x.shape, first.shape[0], rows.shape[1]
    tiles, bt = triton.cdiv(h, TILE), 1 if tokens == 1 else MOST
    y = x.new_empty(tokens, out)
    if y.numel() == 0:
        return y
    unit = torch.empty(tiles * TILE, dtype=torch.int32, device=x.device)
    count = torch.empty(tiles, dtype=torch.int32, device=x.device)
    z = x.new_empty(tiles * TILE, bt)
    how = {"WIDE": INTERPRETED, "PRECISION": "ieee", "TILE": TILE, "BT": bt}
    biased = first_bias is not None
    flat = x if first_bias is None else first_bias
    few = 16 if bt > 1 else 4
    places = (tiles, TILE // few)
    if not codes:
        _active[(tiles,)](
            x, first, flat, unit, z, count, tokens, h, d, floor, HAS_BIAS=biased, **how
        )
    else:
        _candidates[(tiles,)](
            x, *codes, flat, unit, count, tokens, h, d, floor, (d + 2) * ROUNDING,
            torch.finfo(x.dtype).eps, HAS_BIAS=biased, **how,
        )  # fmt: skip
        _listed[places](
            x, first, flat, unit, count, z, z, tokens, d, floor, GATED=False, HAS_BIAS=biased,
            FEW=few, **how,
        )  # fmt: skip
    value = phi(z)  # of all places: those that are not taken are not read
    if up is not None:
        of_up = value if up_bias is None else up_bias
        product = torch.empty_like(value)
        _listed[places](
            x, up, of_up, unit, count, value, product, tokens, d, floor, GATED=True,
            HAS_BIAS=up_bias is not None, FEW=few, **how,
        )  # fmt: skip
        value = product
    partial = torch.empty(SPLITS, bt, out, dtype=torch.float32, device=x.device)
    _gather[lambda size: (triton.cdiv(out, size["BD"]), SPLITS)](
        unit, value, count, rows, partial, tokens, tiles, out, SPLITS=SPLITS, **how
    )
    _add[(triton.cdiv(out, 256), tokens)](
        partial, y if down_bias is None else down_bias, y, out, HAS_BIAS=down_bias is not None,
        SPLITS=SPLITS, BT=bt, BD=256,
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

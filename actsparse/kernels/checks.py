"""Checks of operators' arguments, with the same messages as ``cpu/checks.h``.

The compiled kernels check for themselves. This is for operators that run on PyTorch's own ones, and
on a GPU; there the values of pointer and index are not read, since the host would wait for them.
All raise RuntimeError, as compiled kernels do.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from actsparse.kernels import pack as packing

MOST = 2**31 - 1  # rows and columns: indices have 32 bits


def given(name: str, t: Tensor | None) -> Tensor:
    """t; torch hands None to operators that ask for a tensor."""
    if t is None:
        raise RuntimeError(f"{name} must be a tensor; it is None")
    return t


def count(name: str, n: int) -> int:
    """n, if it can be a number of rows or columns."""
    if not 0 <= n <= MOST:
        raise RuntimeError(f"{name} must be from 0 to {MOST}; it is {n}")
    return n


def sizes_of(name: str, t: Tensor, dimensions: int = 2) -> tuple[int, ...]:
    """The sizes of a floating tensor of so many dimensions."""
    if given(name, t).dim() != dimensions or not t.is_floating_point() or not _is_there(t):
        raise RuntimeError(f"{name} must be floating, of {dimensions} dimensions; {_it_is(t)}")
    return tuple(count(name, size) for size in t.shape) if dimensions > 1 else tuple(t.shape)


def require(name: str, t: Tensor, sizes: tuple[int, ...], like: Tensor, dtype: torch.dtype) -> None:
    """t has these sizes and this dtype, and lies where ``like`` does."""
    if (
        given(name, t).shape != sizes
        or t.dtype is not dtype
        or t.device != like.device
        or not _is_there(t)
    ):
        raise RuntimeError(f"{name} must be {dtype} {list(sizes)} on {like.device}; {_it_is(t)}")


def entries(pointer: Tensor, index: Tensor, n: int, columns: int, like: Tensor) -> None:
    """Pointer and index are those of a matrix [n, columns]."""
    short = packing.index_type(columns, like.device)
    wanted = short if given("index", index).dtype is short else torch.int32
    require("index", index, (index.numel(),), like, wanted)
    segments = count("n", n) * packing.blocks(columns)
    require("pointer", pointer, (segments + 1,), like, torch.int64)
    _rises(pointer, index.numel())
    if index.is_cpu and index.numel():
        least, most = index.aminmax()
        if least < 0 or most >= columns:
            raise RuntimeError(f"index must be at least 0 and below {columns}")


def values(pointer: Tensor, index: Tensor, value: Tensor, n: int, columns: int) -> None:
    """These are the packed entries of a matrix [n, columns]."""
    sizes_of("value", value, 1)
    entries(pointer, index, n, columns, value)
    require("value", value, tuple(index.shape), value, value.dtype)


def product(
    pointer: Tensor, index: Tensor, value: Tensor, rows: Tensor, bias: Tensor | None, n: int
) -> None:
    """Packed entries [n, K] fit rows [K, M] and bias [M]."""
    units, d = sizes_of("rows", rows)
    entries(pointer, index, n, units, rows)
    require("value", value, tuple(index.shape), rows, rows.dtype)
    if bias is not None:
        require("bias", bias, (d,), rows, rows.dtype)


def linear(x: Tensor, up: Tensor, bias: Tensor | None) -> tuple[int, int]:
    """N and H of x [N, D], up [H, D] and bias [H]."""
    units, d = sizes_of("up", up)
    n = sizes_of("x", x)[0]
    require("x", x, (n, d), up, up.dtype)
    if bias is not None:
        require("bias", bias, (units,), up, up.dtype)
    return n, units


def rows_of(down: Tensor, rows: Tensor | None, value: Tensor) -> Tensor:
    """Rows [H, D], the copy of downᵀ, or downᵀ; every program comes by."""
    dtype = given("value", value).dtype
    if down is None or down.dim() != 2 or down.dtype is not dtype:
        require("down", down, sizes_of("down", down), value, dtype)
    if rows is None:
        return down.t()
    if rows.dim() == 3:  # panels, which the compiled kernels check
        if rows.shape[1] != down.shape[1]:
            raise RuntimeError(f"rows must be panels of {down.shape[1]} rows; {_it_is(rows)}")
        return rows
    if rows.shape != down.shape[::-1]:
        require("rows", rows, tuple(down.shape[::-1]), down, down.dtype)
    return rows


def rows(pointer: Tensor, value: Tensor, n: int) -> None:
    """Pointer and value are of entries of n rows, whatever their columns."""
    sizes_of("value", value, 1)
    last = given("pointer", pointer).numel() - 1
    require("pointer", pointer, (last + 1,), value, torch.int64)
    if last < n or last != last // max(count("n", n), 1) * n:
        blocks = f"1 more entry than {n} rows have blocks"
        raise RuntimeError(f"pointer must have {blocks}; it has {last + 1}")
    _rises(pointer, value.numel())


def fake(operator: Any) -> Callable[[Callable[..., Any]], Callable[..., Any]]:
    """Register what it decorates as the fake of ``operator``, for operands of one device.

    One meta tensor among others would have torch call the fake, whose empty result is real.
    """

    def register(function: Callable[..., Any]) -> Callable[..., Any]:
        def checked(*operands: Any, **named: Any) -> Any:
            devices = {t.device for t in (*operands, *named.values()) if isinstance(t, Tensor)}
            if len(devices) > 1:
                raise RuntimeError(f"operands must be on one device; they are on {devices}")
            return function(*operands, **named)

        torch.library.register_fake(operator, checked)
        return function

    return register


def _rises(pointer: Tensor, nnz: int) -> None:
    if not pointer.is_cpu:
        return
    if pointer[0] != 0 or pointer[-1] != nnz or bool((pointer[1:] < pointer[:-1]).any()):
        raise RuntimeError(f"pointer must rise from 0 to the number of entries, {nnz}")


def _is_there(t: Tensor) -> bool:
    """Whether t's entries lie within its storage, which can be resized under it."""
    if t.layout is not torch.strided:
        return False
    steps = zip(t.shape, t.stride(), strict=True)
    last = t.storage_offset() + sum((size - 1) * stride for size, stride in steps)
    room = t.untyped_storage().nbytes() // t.element_size()
    return t.numel() == 0 or bool(last < room)


def _it_is(t: Tensor) -> str:
    where = f"on {t.device}, {t.layout}"
    if t.layout is torch.strided:
        where = f"on {t.device}, in a storage of {t.untyped_storage().nbytes()} bytes"
    return f"it is {t.dtype} {list(t.shape)} {where}"

"""Blocked CSR: the entries of a matrix that are not zero, row by row, in blocks of columns.

The entries of row t whose column lies in block k, ``BLOCK`` columns wide, are
``pointer[t · blocks + k]`` up to ``pointer[t · blocks + k + 1]`` of ``index`` (their columns,
rising) and of ``value``. A product visits all rows of one block before the next, so that the
``BLOCK`` rows of the dense operand it gathers from stay in a core's second-level cache.
"""

from __future__ import annotations

import torch
from torch import Tensor

SHORT = 2**15  # columns whose numbers fit 16 bits
BLOCK = 384  # cpu/tensors.h has the same number


def blocks(columns: int) -> int:
    """How many blocks ``columns`` columns are; at least one.

    >>> blocks(3072), blocks(385), blocks(0)
    (8, 2, 1)
    """
    return max(-(-columns // BLOCK), 1)


def pack(keep: Tensor) -> tuple[Tensor, Tensor]:
    """Pointer int64 [N · blocks + 1] and index [nnz] of the True entries of [N, K].

    >>> pack(torch.tensor([[False, True], [True, True]]))
    (tensor([0, 1, 3]), tensor([1, 0, 1], dtype=torch.int16))
    """
    n, columns = keep.shape
    row, column = keep.nonzero(as_tuple=True)
    segment = row * blocks(columns) + column // BLOCK
    counts = torch.bincount(segment, minlength=n * blocks(columns))
    pointer = torch.cat([counts.new_zeros(1), counts.cumsum(0)])
    return pointer, column.to(index_type(columns, keep.device))


def index_type(columns: int, device: torch.device) -> torch.dtype:
    """The type of an index: the least that holds the columns; on a GPU the kernels have one.

    >>> index_type(3072, torch.device("cpu")), index_type(3072, torch.device("cuda"))
    (torch.int16, torch.int32)
    """
    return torch.int16 if columns <= SHORT and device.type != "cuda" else torch.int32


def rows_of(pointer: Tensor, n: int, nnz: int) -> Tensor:
    """The row of every entry, int64 [nnz]."""
    per_row = pointer[:: max((len(pointer) - 1) // max(n, 1), 1)].diff()
    rows = torch.arange(n, device=pointer.device)
    return torch.repeat_interleave(rows, per_row, output_size=nnz)  # else a GPU's host waits


def unpack(pointer: Tensor, index: Tensor, value: Tensor, n: int, columns: int) -> Tensor:
    """The dense [n, columns] of packed entries.

    >>> pointer, index = pack(torch.tensor([[False, True], [True, True]]))
    >>> unpack(pointer, index, torch.tensor([5.0, 6.0, 7.0]), 2, 2)
    tensor([[0., 5.], [6., 7.]])
    """
    out = value.new_zeros(n, columns)
    return out.index_put_((rows_of(pointer, n, len(index)), index.long()), value, accumulate=True)


def by_unit(
    pointer: Tensor, index: Tensor, value: Tensor, n: int, columns: int
) -> tuple[Tensor, Tensor, Tensor]:
    """The same entries packed by column: pointer, row (rising) and value of the transpose."""
    column, order = index.sort(stable=True)  # rows rise already
    row = rows_of(pointer, n, len(index))[order]
    segment = column.long() * blocks(n) + row // BLOCK
    ends = torch.arange(columns * blocks(n) + 1, device=index.device)
    return torch.searchsorted(segment, ends), row.to(torch.int32), value[order]

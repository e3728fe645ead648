"""What every data set here is: three datasets and a description that a record can hold."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, Generic, TypeVar

from torch import Tensor
from torch.utils.data import Dataset

D = TypeVar("D", covariant=True)  # the class of the three datasets


@dataclass(frozen=True)
class Splits(Generic[D]):
    """Train, validation and test data, and where they come from.

    Knobs are picked on `validation`; `test` is looked at once. `info` is JSON-ready and always
    has `name`, `source`, `sizes` (items in each split) and `sha256` (of the raw bytes).
    """

    train: D
    validation: D
    test: D
    info: dict[str, Any]


class TensorRows(Dataset[dict[str, Tensor]]):
    """Rows of named tensors, held in memory: item i is `{name: column[i]}`.

    Raises `ValueError` without columns, or when their first dimensions differ.

    >>> import torch
    >>> rows = TensorRows(pixel_values=torch.zeros(5, 1, 8, 8), labels=torch.arange(5))
    >>> len(rows), rows[3]["labels"]
    (5, tensor(3))
    """

    def __init__(self, **columns: Tensor) -> None:
        lengths = {name: len(column) for name, column in columns.items()}
        if len(set(lengths.values())) != 1:
            raise ValueError(f"columns must exist and have the same length, got {lengths}")
        self.columns = columns

    def __len__(self) -> int:
        return len(next(iter(self.columns.values())))

    def __getitem__(self, index: int) -> dict[str, Tensor]:
        return {name: column[index] for name, column in self.columns.items()}

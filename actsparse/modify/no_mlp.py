"""The control without MLPs: it shows whether the task needs them at all."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from torch import Tensor
from typing_extensions import override

from actsparse.blocks.block import Layer, MLPBlock
from actsparse.blocks.site import Site, site_of
from actsparse.modify.modification import Attached, Modification


@dataclass(frozen=True)
class LeaveOutMLP(Modification):
    """Replace every block's output y by zero, so that only the residual stream is left.

    It is a control. A density says something only where the network is clearly worse without its
    MLPs.

    >>> import torch
    >>> from actsparse import sparsify
    >>> mlp = torch.nn.Sequential(torch.nn.Linear(8, 32), torch.nn.ReLU(), torch.nn.Linear(32, 8))
    >>> handle = sparsify(mlp, LeaveOutMLP(), inputs=torch.randn(2, 8))
    >>> mlp(torch.randn(2, 8)).count_nonzero()
    tensor(0)
    """

    changes_function: ClassVar[bool] = True

    @override
    def apply(self, block: MLPBlock) -> Attached:
        return _LeftOut(site_of(block), "output replaced by zero")


class _LeftOut(Attached):
    def __init__(self, site: Site, note: str) -> None:
        super().__init__(site, note)
        site.transform_output(self.silence)

    def silence(self, site: Site, y: Tensor, a: Tensor, layer: Layer) -> Tensor:
        return y * 0

    @override
    def remove(self) -> None:
        self.site.release(self.silence)

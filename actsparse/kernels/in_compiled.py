"""A block in compiled code without gradients: one operator, which looks at the weights each call.

Compiled code could keep copies of weights as constants, but would not see that a weight changes.
It may also run for other blocks than the one it was made for: layers that are compiled one by one
share it where they are alike. So the operator finds the copies by the weights that it gets.
"""

from __future__ import annotations

from typing import Any, Self
from weakref import WeakSet, WeakValueDictionary

import torch
from torch import Tensor
from torch.library import custom_op

from actsparse.blocks.block import MLPBlock
from actsparse.blocks.site import site_at
from actsparse.blocks.stages import Cut
from actsparse.kernels.programs import Weights, parts_of, run

_made: WeakSet[ByWeights] = WeakSet()
_found: WeakValueDictionary[int, Any] = WeakValueDictionary()  # by the address of down's weight


class ByWeights:
    """An executor, of a ``block``, that compiled code finds by the weights of the block."""

    block: MLPBlock

    def __new__(cls, *_: Any) -> Self:
        """Copies and pickles come by here too."""
        made = super().__new__(cls)
        _made.add(made)
        return made


def executor_at(down: Tensor) -> Any:
    """The executor of the block that has this weight, or None."""
    address = down.data_ptr()
    found = _found.get(address)
    if found is None or not _runs(found, address):
        found = next((each for each in list(_made) if _runs(each, address)), None)
        if found is not None:
            _found[address] = found
    return found


def _runs(executor: Any, address: int) -> bool:
    block = executor.__dict__.get("block")  # not there yet while it is made
    if block is None or block.down.weight.data_ptr() != address:
        return False
    return getattr(site_at(block), "executor", None) is executor


@custom_op("actsparse::block", mutates_args=())
def _block(
    x: Tensor,
    up: Tensor,
    bias: Tensor | None,
    down: Tensor,
    down_bias: Tensor | None,
    gate: Tensor | None,
    gate_bias: Tensor | None,
    threshold: Tensor | None,
    function: str,
    product: bool,
    program: str,
) -> Tensor:
    weights = Weights(up, bias, down, down_bias, gate, gate_bias)
    known = executor_at(down)
    prepared = None if known is None else known.prepared(x.dtype, weights)
    cut = function if threshold is None else Cut(function, threshold, product)
    return run(program, x, weights, cut, prepared=prepared)


@torch.library.register_fake("actsparse::block")
def _like(x: Tensor, up: Tensor, bias: Tensor | None, down: Tensor, *_: Any) -> Tensor:
    return x.new_empty(*x.shape[:-1], down.shape[0])


def run_compiled(program: str, x: Tensor, weights: Weights, function: str | Cut) -> Tensor:
    """y of a block by ``program``, with the copies of weights that its executor keeps."""
    name, threshold, product = parts_of(function)
    y: Tensor = _block(x, *weights, threshold, name, product, program)
    return y

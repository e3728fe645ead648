"""A block in compiled code without gradients: one operator, which looks at the weights each call.

Compiled code could keep copies of weights as constants, but would not see that a weight changes.
"""

from __future__ import annotations

from typing import Any
from weakref import WeakValueDictionary

import torch
from torch import Tensor
from torch.library import custom_op

from actsparse.blocks.stages import Cut
from actsparse.kernels.programs import Weights, parts_of, run

_known: WeakValueDictionary[int, Any] = WeakValueDictionary()  # executors, by their id


class Numbered:
    """What compiled code finds again by a number, a constant to the compiler."""

    def number(self) -> int:
        """The number."""
        _known[id(self)] = self
        return id(self)

    number._dynamo_marked_constant = True  # type: ignore[attr-defined]


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
    executor: int,
) -> Tensor:
    weights = Weights(up, bias, down, down_bias, gate, gate_bias)
    known = _known.get(executor)
    prepared = None if known is None else known.prepared(x.dtype, weights)
    cut = function if threshold is None else Cut(function, threshold, product)
    return run(program, x, weights, cut, prepared=prepared)


@torch.library.register_fake("actsparse::block")
def _like(x: Tensor, up: Tensor, bias: Tensor | None, down: Tensor, *_: Any) -> Tensor:
    return x.new_empty(*x.shape[:-1], down.shape[0])


def run_compiled(
    executor: Numbered, program: str, x: Tensor, weights: Weights, function: str | Cut
) -> Tensor:
    """y of a block by ``program``, with the copies of weights that ``executor`` keeps."""
    name, threshold, product = parts_of(function)
    y: Tensor = _block(x, *weights, threshold, name, product, program, executor.number())
    return y

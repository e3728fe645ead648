"""What the layers of a block run at once, with few questions or none, in calls like the last.

Between two blocks of a large model the weights pass through the caches, so each line of Python and
each object that a call touches comes from memory: the questions of a whole block take 0.2 ms there.
A layer that multiplies by a packed copy of its weight takes nothing from anybody: the hidden layer
is there, whatever hangs on it. So it asks only whether its product may differ from the layer's own.
Sparse products skip the hidden layer, so that they ask who hangs on it too.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn
from torch._C import _are_functorch_transforms_active as _transforms
from torch._C import _is_tracing as _tracing
from torch._C import _len_torch_dispatch_stack as _dispatches
from torch._C import _len_torch_function_stack as _functions
from torch.autograd import forward_ad

from actsparse.blocks.block import MLPBlock
from actsparse.blocks.replace_forward import Detour
from actsparse.kernels import backends, dense
from actsparse.kernels.met import Last, Met
from actsparse.kernels.prepared import Prepared, fingerprint
from actsparse.kernels.programs import DENSE, Weights, function_at, infer_at_once, run


def _plain_call() -> bool:
    """Whether this call wants nothing but numbers: no gradients, no cast, nobody who looks on."""
    return not (
        torch.is_grad_enabled()
        or torch.is_autocast_enabled("cpu")
        or _functions()
        or _dispatches()
        or _transforms()
        or _tracing()
        or forward_ad._current_level >= 0
    )


class OwnLayers:
    """The layers run: they won the trial, and between two looks at the density nothing is asked."""

    skips = False

    def __init__(self, last: Last, met: Met, tokens: int) -> None:
        self.last, self.met, self.tokens = last, met, tokens
        self.like = met.training, met.dtype

    def takes(self, x: Tensor) -> bool:
        """Whether this call is one of those."""
        if self.like != (torch.is_grad_enabled(), x.dtype) or not self.met.rests():
            return False
        self.met.tokens, self.last.program = self.tokens, "dense"
        return True

    def product(self, layer: Detour, x: Tensor) -> Tensor:
        """The layer's own output."""
        return layer.original(x)

    def whole(self, x: Tensor) -> None:
        """The layers are called."""


class Copy:
    """A packed copy of a layer's weight, and what tells whether the weight is as it was then."""

    __slots__ = ("address", "bias", "dtype", "packed", "version", "weight", "width")

    def __init__(self, module: nn.Module, packed: Tensor) -> None:
        weight, self.bias = module._parameters["weight"], module._parameters["bias"]
        assert weight is not None
        self.weight, self.packed = weight, packed
        self.dtype, self.width = weight.dtype, weight.shape[1]
        self.version, self.address = weight._version, weight.data_ptr()


class PackedLayers:
    """Each layer multiplies by a packed copy of its weight: dense products without gradients."""

    skips = False

    def __init__(self, last: Last, met: Met, tokens: int, copies: dict[nn.Module, Copy]) -> None:
        self.last, self.met, self.tokens, self.copies = last, met, tokens, copies
        self.fresh = True  # no weight was found changed
        weights = [copy.weight for copy in copies.values()]
        self.weights = [*weights, *[None] * (3 - len(weights))]
        self.entries = fingerprint(*weights)

    @classmethod
    def of(
        cls, block: MLPBlock, last: Last, met: Met, prepared: Prepared, tokens: int
    ) -> PackedLayers | None:
        """Those of a block whose layers are plain; else None."""
        names = named_layers(block)
        if names is None or torch.is_autocast_enabled("cpu"):
            return None
        copies = {each: Copy(each, prepared.packed(name, tokens)) for each, name in names.items()}
        return cls(last, met, tokens, copies)

    def takes(self, x: Tensor) -> bool:
        """Whether oneDNN's products may stand for the layers' in this call."""
        if (
            not self.fresh
            or not _plain_call()
            or torch.ops.actsparse_cpu.fingerprint(*self.weights) != self.entries
            or not self.met.rests("packed")
        ):
            return False
        self.met.tokens, self.last.program = self.tokens, "packed"
        return True

    def product(self, layer: Detour, x: Tensor) -> Tensor:
        """The layer's output: by the copy, or its own where something differs."""
        copy, now = self.copies[layer.module], layer.module._parameters
        weight = copy.weight
        if (
            x.__class__ is Tensor
            and x.dtype is copy.dtype
            and x.shape[-1] == copy.width
            and x.is_cpu
            and now.get("weight") is weight
            and now.get("bias") is copy.bias
            and weight._version == copy.version
            and weight.data_ptr() == copy.address
        ):
            return dense.product(x.contiguous(), copy.packed, copy.bias)
        self.fresh = False
        return layer.original(x)

    def whole(self, x: Tensor) -> None:
        """The layers are called."""


class SparseLayers:
    """The kernels compute y; the layers before down, if called at all, pass on placeholders."""

    skips = True

    def __init__(
        self, run: Any, site: Any, met: Met, prepared: Prepared, x: Tensor, program: str
    ) -> None:
        self.run, self.site, self.met, self.prepared = run, site, met, prepared
        self.program, self.screens = program, program == "screened"
        self.dtype, self.tokens = x.dtype, x.shape[:-1].numel()
        self.between = [part.module for part in run.block.between]

    def _weights(self, x: Tensor) -> Weights | None:
        """The block's, if the kernels may stand for the layers in this call."""
        if not (
            x.__class__ is Tensor
            and x.dtype is self.dtype
            and x.is_cpu
            and _plain_call()
            and self.run.fit.reason() is None
            and not any(module.training for module in self.between)
        ):
            return None
        weights = Weights.of(self.run.block)
        if self.run.prepared(x.dtype, weights) is not self.prepared:
            return None
        if not self.met.rests(self.program):
            return None
        self.met.tokens, self.run.last.program = self.tokens, self.program
        return weights

    def _y(self, x: Tensor, weights: Weights) -> Tensor:
        function = function_at(self.site)
        assert function is not None
        if self.program not in DENSE:
            y = infer_at_once(x, weights, function, self.screens, self.prepared)
            if y is not None:
                return y
        return run(self.program, x, weights, function, prepared=self.prepared)

    def takes(self, x: Tensor) -> bool:
        """Whether the kernels may stand for the layers in this call."""
        return self._weights(x) is not None

    def product(self, layer: Detour, x: Tensor) -> Tensor:
        """y of the block's x."""
        return self._y(x, Weights.of(self.run.block))

    def whole(self, x: Tensor) -> Tensor | None:
        """The same, if this call may run so."""
        weights = self._weights(x)
        return None if weights is None else self._y(x, weights)


def named_layers(block: MLPBlock) -> dict[nn.Module, str] | None:
    """The layers of a block, as :class:`Prepared` names them, if all are plain linear layers."""
    first, second = (block.up, None) if block.gate is None else (block.gate, block.up)
    layers = {"first": first, "second": second, "down": block.down}
    found: dict[nn.Module, str] = {}
    for name, layer in layers.items():
        if layer is None:
            continue
        module = layer.module
        weight, bias = module._parameters.get("weight"), module._parameters.get("bias")
        if type(module) is not nn.Linear or layer.rows is not None or weight is None:
            return None
        if not backends.native(weight, bias) or not (bias is None or bias.is_contiguous()):
            return None
        found[module] = name
    return found

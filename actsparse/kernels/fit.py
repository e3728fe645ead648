"""Decide which blocks can run sparse without changing a result, and say why others cannot.

Layers in whose place the kernels run are skipped: so nothing may hang on them that only they do.
"""

from __future__ import annotations

import copy
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.modules import module as every
from torch.nn.modules.linear import NonDynamicallyQuantizableLinear

from actsparse.activations import identify
from actsparse.blocks.block import Layer, MLPBlock
from actsparse.blocks.replaced_modules import Standing, forward_of, is_own
from actsparse.blocks.site import function_of, no_executor, site_at
from actsparse.kernels.forms import is_silent

_HOOKS = (
    "_forward_pre_hooks", "_forward_hooks", "_backward_pre_hooks", "_backward_hooks",
)  # fmt: skip
_GLOBAL_HOOKS: tuple[dict[int, Any], ...] = tuple(
    getattr(every, f"_global{name}") for name in _HOOKS
)
_LINEAR = (nn.Linear, NonDynamicallyQuantizableLinear)
_DROPOUTS = (nn.Dropout, nn.Identity)  # others do more than keep or drop a value
_NUMBERS = (float, int, str)  # and words, as GELU has one
_PLAIN = (nn.Parameter, Tensor)


class Fit:
    """Whether the kernels may run one block, asked anew before each call.

    Looking is cheap: :meth:`reason` looks closely only where something differs from the last time.
    ``dense``: all products are to be computed, so φ need not have zeros.
    """

    def __init__(self, block: MLPBlock, dense: bool = False) -> None:
        self.block, self.dense = block, dense
        self.standing = block.standing or Standing(block)
        own = {} if block.activation.module is None else block.activation.module.__dict__
        self._names = [name for name, value in own.items() if value.__class__ in _NUMBERS]
        self._seen: list[Any] | None = None
        self._reason: str | None = None

    def reason(self) -> str | None:
        """Why the block keeps to its own layers, or None."""
        seen = self._look()
        if seen != self._seen:
            self._seen, self._reason = seen, self.refusal() or self._guest()
        return self._reason

    def _look(self) -> list[Any]:
        """All that the reasons depend on, as values to compare."""
        seen = [function_of(self.block), *self.standing.look()]
        add = seen.append
        for module in (*self.standing.parts.values(), *self.standing.between.values()):
            own = module.__dict__
            kind = module.__class__
            seen += (kind, kind.forward, own.get("forward"))
            if (
                own["_forward_hooks"]
                or own["_forward_pre_hooks"]
                or own["_backward_hooks"]
                or own["_backward_pre_hooks"]
            ):
                for hooks in _HOOKS:
                    seen += own[hooks]  # their numbers, which are given once
            for tensor in own["_parameters"].values():
                if tensor is not None:
                    add(tensor.__class__)
                    if tensor.is_meta or tensor.layout is not torch.strided:
                        seen += (tensor.is_meta, tensor.layout)
        seen += self.numbers()
        for of_all in _GLOBAL_HOOKS:
            if of_all:
                seen += of_all
        return seen

    def numbers(self) -> list[Any]:
        """Those of the activation, which are a part of φ."""
        module = self.block.activation.module
        return [] if module is None else [getattr(module, name, None) for name in self._names]

    def refusal(self) -> str | None:
        """Why the kernels can do nothing for the block as it is made, or None."""
        block = self.block
        for layer in (block.up, block.gate, block.down):
            if layer is not None and (reason := _unfit_layer(layer)) is not None:
                return reason
        if (reason := no_executor(block)) is not None:
            return reason
        for part in block.between:
            if type(part.module) not in _DROPOUTS:
                return f"{part.name} is a {type(part.module).__name__}, not nn.Dropout"
        site, activation = site_at(block), block.activation.module
        own = site is None or site.phi is None or site.cut is not None  # a cut is of the own φ
        if activation is not None and own:
            for training in (False, True):
                probe = copy.copy(activation)
                probe.training = training
                if is_own(probe.__dict__.get("forward")):
                    del probe.__dict__["forward"]
                if (now := identify(probe)) != block.activation.function:
                    mode = "in training" if training else "now"
                    return f"{block.activation.name} was {block.activation.function}, {mode} {now}"
        function = function_of(block)
        if function is None and (site is None or site.phi is None):
            return "its activation has no known name"
        if function is not None and not (self.dense or is_silent(function)):
            return f"{function} is never exactly zero"
        return None

    def _guest(self) -> str | None:
        """Who else hangs on what would be skipped, or None."""
        if (reason := self.standing.changed()) is not None:
            return reason
        if (site := site_at(self.block)) is not None and site.cut is None and not site.function:
            return "its φ is being mixed, or has no name"
        for name, module in {**self.standing.between, **self.standing.parts}.items():
            for hooks in _HOOKS:
                if not all(is_own(hook) for hook in getattr(module, hooks).values()):
                    return f"{name} has a hook, which would miss its tensors"
        for name, module in self.standing.parts.items():
            if forward_of(module)[1] is not None:
                return f"{name} has a forward of its own on the instance"
        if any(_GLOBAL_HOOKS):
            return "a hook for all modules (register_module_forward_hook) would miss its tensors"
        if self.block.hidden_feeds:
            return f"its hidden layer also feeds {', '.join(self.block.hidden_feeds)}"
        return None


def _unfit_layer(layer: Layer) -> str | None:
    kind = type(layer.module)
    conv = kind.__name__ == "Conv1D" and kind.__module__ == "transformers.pytorch_utils"
    if kind not in _LINEAR and not conv:
        return f"{layer.name} is a {kind.__name__} of {kind.__module__}, not a plain linear layer"
    if kind.forward.__globals__["__name__"] not in [each.__module__ for each in kind.mro()]:
        return f"the forward of {kind.__name__} was replaced, for all layers"
    for name in ("weight", "bias"):
        tensor = getattr(layer.module, name, None)
        if tensor is None:
            continue
        if type(tensor) not in _PLAIN:
            return f"{layer.name}.{name} is a {type(tensor).__name__}, not a plain tensor"
        if tensor.is_meta:
            return f"{layer.name}.{name} is on the meta device: offloaded, or never made"
        if tensor.layout is not torch.strided:
            return f"{layer.name}.{name} is laid out as {tensor.layout}"
    return None

"""What flatness must be, the slow way: weights copied for every token, plain hooks."""

from __future__ import annotations

import functools
import math
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from actsparse.blocks import MLPBlock
from actsparse.blocks.block import Layer
from actsparse.observe import observe


def layers_of(block: MLPBlock) -> dict[str, Layer]:
    """By the name of its flatness."""
    named = {"flatness_up": block.up, "flatness_gate": block.gate, "flatness_down": block.down}
    return {name: layer for name, layer in named.items() if layer is not None}


def by_copies(layer: Layer, total: Callable[[], Tensor], keep: Tensor | None = None) -> float:
    """Σ over tokens kept of ‖∂ total / ∂ the token's copy of the weight‖²."""
    copies = []

    def recompute(module: nn.Module, args: tuple[Any, ...], output: Tensor) -> Tensor:
        whole = replace(layer, rows=None)
        weight = whole.weight.detach()
        own = weight.expand(*args[0].shape[:-1], *weight.shape).clone().requires_grad_()
        copies.append(own)
        new = torch.einsum("...oi,...i->...o", own, args[0])
        return new if whole.bias is None else new + whole.bias

    hook = layer.module.register_forward_hook(recompute)
    loss = total()
    hook.remove()
    squares = 0.0
    for gradient in torch.autograd.grad(loss, copies):
        rows = gradient if layer.rows is None else gradient[..., layer.rows, :]
        each = rows.square().sum((-2, -1))
        squares += float(each.sum() if keep is None else each[keep].sum())
    return squares


SLOPES: dict[str, Callable[[Tensor], Tensor]] = {
    "relu": lambda z: (z > 0).double(),
    "jsrelu": lambda z: (z + 1) * (z > 0),
    "gelu": lambda z: torch.special.ndtr(z) + z * torch.exp(-z * z / 2) / math.sqrt(2 * math.pi),
}


def gelu_tanh_slope(z: Tensor) -> Tensor:
    inner, slope = z + 0.044715 * z**3, 1 + 3 * 0.044715 * z**2
    tanh = torch.tanh(math.sqrt(2 / math.pi) * inner)
    return (1 + tanh) / 2 + z * (1 - tanh**2) / 2 * math.sqrt(2 / math.pi) * slope


class Recorder:
    """Inputs, outputs and gradients of each block's layers and activation, by plain hooks."""

    def __init__(self, blocks: list[MLPBlock]) -> None:
        self.blocks = blocks
        self.values: list[dict[str, Tensor]] = [{} for _ in blocks]
        self.gradients: list[dict[str, Tensor]] = [{} for _ in blocks]

    @contextmanager
    def recording(self) -> Iterator[None]:
        hooks = []
        for i, block in enumerate(self.blocks):
            activation = block.activation.module
            assert activation is not None
            places = {"z": block.pre_activation.module, "f": activation, "y": block.down.module}
            places |= {"u": block.up.module} if block.gated else {}
            for place, module in places.items():
                into = (place, self.values[i], self.gradients[i])
                hooks.append(module.register_forward_hook(functools.partial(self._see, *into)))
        yield
        for hook in hooks:
            hook.remove()

    @staticmethod
    def _see(
        place: str,
        values: dict[str, Tensor],
        gradients: dict[str, Tensor],
        module: nn.Module,
        args: tuple[Any, ...],
        output: Tensor,
    ) -> None:
        values[place], values["into " + place] = output.detach(), args[0].detach()
        output.register_hook(lambda gradient: gradients.update({place: gradient}))

    def sums(self, i: int, keep: Tensor, slope: Callable[[Tensor], Tensor]) -> dict[str, float]:
        """Of block ``i``, token by token; the loss is a mean over the samples of ``keep``."""
        value = {key: t.double() for key, t in self.values[i].items()}
        g = {key: t.double() * len(keep) for key, t in self.gradients[i].items()}
        names = ("gate", "up", "down", "x", "d", "η", "g", "g without φ′", "c", "on", "active")
        sums = dict.fromkeys(names, 0.0)
        for at in map(tuple, keep.nonzero().tolist()):
            x, d = value["into z"][at].norm() ** 2, value["into y"][at].norm() ** 2
            phi = slope(value["z"][at])
            a = value["f"][at] * (value["u"][at] if "u" in value else 1)
            entering = g["z"][at].norm() ** 2
            up = g["u"][at].norm() ** 2 if "u" in g else entering
            terms = {
                "gate": entering * x, "up": up * x, "down": g["y"][at].norm() ** 2 * d,
                "x": x, "d": d, "η": entering, "on": (phi != 0).sum(), "active": (a != 0).sum(),
                "g": g["f"][at][phi != 0].norm() ** 2,
                "g without φ′": g["f"][at][phi != 0].norm() ** 2 * x,
                "c": (g["f"][at] * phi).norm() ** 2 * x,
            }  # fmt: skip
            sums = {key: sums[key] + float(term) for key, term in terms.items()}
        units = self.blocks[i].d_hidden
        return sums | {"tokens": int(keep.sum()), "H": units, "gated": "u" in value}


def summary_of(
    model: nn.Module, loss: Callable[[], Tensor], phase: Any = "train", **options: Any
) -> Any:
    """What ``observe`` says of a pass of ``loss``."""
    with observe(model, **{"measures": "flatness", **options}) as seen:
        loss().backward()
    return seen.summary(phase)


def alike(got: Any, want: Any, *but: str, rel: float = 1e-12) -> bool:
    """Whether two summaries tell the same numbers of all blocks together, up to rounding."""
    keys = want.keys() - {"blocks", *but}
    known = {key: want[key] for key in keys if want[key] is not None}
    unknown = {key for key in keys if got[key] is None}
    return unknown == keys - known.keys() and known == pytest.approx(
        {key: got[key] for key in known}, rel=rel
    )

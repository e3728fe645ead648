"""The stages of a block, x, z, a, y and others: their names, and what may be asked of each."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, NamedTuple, Protocol

import torch
from torch import Tensor
from torch.autograd import forward_ad

from actsparse.blocks.block import Layer
from actsparse.blocks.read_gradients import Reading

# the first argument is the Site
InputTransform = Callable[[Any, Tensor], Tensor]
OutputTransform = Callable[[Any, Tensor, Tensor, Layer], Tensor]  # site, output, input, layer
Tap = Callable[[Any, dict[str, Tensor]], None]
Stages = Sequence[str] | Callable[[Any], Sequence[str]]
GradientTap = Callable[[Any, Tensor, dict[str, Tensor]], Reading | None]
OnNorms = Callable[[dict[str, Tensor]], None]

NORMS = {"l1": 1, "l2": 2}  # stages that are norms of a's rows
STAGES = ("x", "z", "u", "a", *NORMS, "d", "y")
KNOWN_AT = {"z": "x", "u": "x", "f": "xz", "y": "d"}  # place of a gradient → stages known there


def drops(values: Tensor, threshold: Tensor) -> Tensor:
    """Where ``values`` [..., H] are at or below the threshold [H] of their unit; never at NaN.

    >>> drops(torch.tensor([[-3.0, 1.0, torch.nan]]), torch.tensor([2.0, 2.0, 2.0]))
    tensor([[False,  True, False]])
    """
    return values.abs() <= threshold


def keep_above(values: Tensor, threshold: Tensor) -> Tensor:
    """``values`` [..., H], 0 where they are at or below the threshold [H] of their unit.

    >>> keep_above(torch.tensor([[-3.0, 1.0, torch.nan]]), torch.tensor([2.0, 2.0, 2.0]))
    tensor([[-3., 0., nan]])
    """
    if (
        torch.compiler.is_compiling()
        or torch._C._are_functorch_transforms_active()
        or forward_ad._current_level >= 0  # the kernels' pass has no such derivative
    ):
        return values.masked_fill(drops(values, threshold), 0)
    with torch.no_grad():
        ways = (faster(values, threshold) for faster in FASTER)
        kept = next((found for found in ways if found is not None), None)
        if kept is None:
            kept = values.masked_fill(drops(values, threshold), 0)
    if not (torch.is_grad_enabled() and values.requires_grad):
        return kept
    # 0 where the second is 0 at most: in both directions a fraction of masked_fill's time
    return torch.ops.aten.threshold_backward(values, kept.abs(), 0)


def sides_of(threshold: Tensor, product: bool) -> tuple[Tensor | None, Tensor | None]:
    """The thresholds [H] of |φ(z)| and of the product |φ(z)·u|, of one or both in a tensor.

    >>> sides_of(torch.ones(3), product=True)
    (None, tensor([1., 1., 1.]))
    """
    if threshold.dim() == 2:
        return threshold[0], threshold[1]
    return (None, threshold) if product else (threshold, None)


# the kernels' own pass, once they are imported: torch's takes five times as long
FASTER: list[Callable[[Tensor, Tensor], Tensor | None]] = []


class Cut(NamedTuple):
    """Which activations a block keeps: those above a threshold of their unit.

    ``function``: the name of φ. ``threshold`` [H]: of |φ(z)|, or of |φ(z)·u| for a ``product``; or
    [2, H]: of |φ(z)|, and of |φ(z)·u| of those that are kept. In the dtype that the model has.
    """

    function: str
    threshold: Tensor
    product: bool

    @property
    def form(self) -> str:
        """Where the thresholds stand: "gate", "product" or "both"."""
        return "both" if self.threshold.dim() == 2 else "product" if self.product else "gate"

    @property
    def sides(self) -> tuple[Tensor | None, Tensor | None]:
        """The thresholds of |φ(z)| and of |φ(z)·u|, each [H] or None."""
        return sides_of(self.threshold.float(), self.product)


class Phi(Protocol):
    """What replaces a block's activation; ``own`` is the model's own φ, or its derivative."""

    @property
    def function(self) -> str | None:
        """Its name in actsparse.activations, None while it has none."""

    def __call__(self, z: Tensor, own: Callable[[Tensor], Tensor], /) -> Tensor:
        """φ(z), any shape."""

    def derivative(self, z: Tensor, own: Callable[[Tensor], Tensor], /) -> Tensor:
        """φ′(z), any shape."""


class Plan(Protocol):
    """How an executor runs one call of a block."""

    @property
    def runs(self) -> bool:
        """Whether the executor computes y; else the block's own layers do."""

    def __call__(self, site: Any, x: Tensor, on_norms: OnNorms | None) -> Tensor:
        """y [..., D_out] of x [..., D].

        ``on_norms``, if any, is to be called with ``l1`` and ``l2`` as the stages of these names.
        """

    def passed(self, d: Tensor) -> None:
        """The layers ran, and down's input was d [..., H]."""


class AtOnce(Protocol):
    """How a block runs in calls on an x of one shape, with no plan."""

    @property
    def skips(self) -> bool:
        """Whether down's product is y of the block's x, and the layers before it do not run."""

    def takes(self, x: Tensor) -> bool:
        """Whether this call may run so: asked before the first layer, by any thread."""

    def product(self, layer: Any, x: Tensor) -> Tensor:
        """The output of up, gate or down, a :class:`Detour`; it may differ by rounding."""

    def whole(self, x: Tensor) -> Tensor | None:
        """y of the block's x without its layers; None if they are to be called."""


class Executor(Protocol):
    """Computes a block's y from x in one go, with the same numbers as its layers."""

    def plan(self, site: Any, x: Tensor) -> Plan:
        """How this call is to run: asked before up, by any thread."""


def token_norm(a: Tensor, order: int) -> Tensor:
    """The norm of each token's a over its units, in float32 at least: [..., H] → [..., 1].

    >>> token_norm(torch.tensor([[3.0, -4.0]]), 2)
    tensor([[5.]])
    """
    dtype = torch.promote_types(a.dtype, torch.float32)  # a sum of squares overflows float16
    return torch.linalg.vector_norm(a, order, dim=-1, keepdim=True, dtype=dtype)

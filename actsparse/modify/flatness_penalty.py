"""A penalty on augmented flatness itself: the loss's own gradient, squared, in the loss."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch import Tensor
from typing_extensions import override

from actsparse.blocks.block import MLPBlock
from actsparse.blocks.running import OfThread
from actsparse.blocks.site import Site, site_of
from actsparse.modify.modification import Attached, Modification, Progress, Weighted
from actsparse.modify.schedule import Over, Ramp, ramp_note
from actsparse.values import AtLeast0


@dataclass(frozen=True)
class FlatnessPenalty(Modification):
    """``weight ·`` the mean over blocks of the augmented flatness of the layer that enters φ, for
    each token and unit: ``AF / (T·H)``; in training mode.

        ``AF = mean_b Σ_t ‖g_z,t‖² ‖x_t‖²``,  ``AF / (T·H) = mean over tokens of ‖g_z‖² ‖x‖² / H``

    with z [..., H] the output of up (of the gate, in gated blocks), x [..., D] the layer's input,
    ``g_z`` the gradient at z of the **per-sample** loss and T the mean number of unpadded tokens in
    a sample (Peng et al. 2026, arXiv 2605.25612: density is AF over the input's norm and the
    gradient at φ, so the theory taken at its word makes AF small). Both ``g_z`` and x are
    differentiated, also where they depend on the layers before.

    It needs the loss: ``loss = loss + handle.penalty(loss)``, or the training callback. That loss
    is taken as the **mean over the B samples of the batch**: ``g_z = B · ∂loss/∂z``. Of a language
    model, whose loss is the mean over the B·N predicted positions, the per-sample loss is then the
    mean over its N positions; of their sum AF would be N² times as large.

    Cost: a second backward pass over the whole model, kept as a graph, and the derivative of that:
    a step took twice as long on the digits ViT. Attention must be differentiable twice
    (``attn_implementation="eager"``, or ``torch.nn.attention.sdpa_kernel(SDPBackend.MATH)`` around
    the forward), the model not compiled, checkpointing not reentrant. ``∂loss/∂z`` of a mean over
    many tokens is small: under float16 much of it is zero, bfloat16 holds it. With ``ramp`` the
    weight rises linearly from 0 over the first so many steps (int) or that fraction of all steps
    (float); while it is 0 nothing is computed.

    Raises:
        ValueError: ``weight`` is negative or not a number.

    >>> from actsparse import sparsify
    >>> mlp = torch.nn.Sequential(torch.nn.Linear(8, 32), torch.nn.ReLU(), torch.nn.Linear(32, 8))
    >>> x = torch.randn(4, 8)
    >>> handle = sparsify(mlp, FlatnessPenalty(0.1), inputs=x)
    >>> loss = mlp(x).square().mean()
    >>> (loss + handle.penalty(loss)).backward()
    """

    needs_loss: ClassVar[bool] = True

    weight: AtLeast0
    ramp: Over | None = None

    @override
    def ramps(self) -> list[Ramp]:
        return [] if self.ramp is None else [Ramp(self.ramp)]

    @override
    def apply(self, block: MLPBlock) -> Attached:
        note = f"AF of {block.pre_activation}, weight {self.weight:g}{ramp_note(self.ramps())}"
        return _Flattened(site_of(block), note, self)


@dataclass(frozen=True)
class _Pass:
    """One pass through the block: z [..., H], x [..., D], unpadded tokens [...], and B."""

    z: Tensor
    x: Tensor
    keep: Tensor | None
    samples: int


class _Passes(OfThread):
    def __init__(self) -> None:
        self.of_forward: list[_Pass] = []


class _Flattened(Weighted):
    def __init__(self, site: Site, note: str, config: FlatnessPenalty) -> None:
        super().__init__(site, note, config.weight, config.ramps())
        self.checked = False  # whether its gradients were found to have gradients
        self.passes = _Passes()
        site.tap(self.collect, self.stages, in_training=True)
        self.update(Progress(0, None))
        self.settle()

    def stages(self, site: Site) -> tuple[str, ...]:
        """What it reads; nothing while it weighs nothing."""
        # of a layer that shares its module a part is known; where φ is caught, the part φ gets
        shared = site.block.pre_activation.rows is not None
        return (("x", "z", "a") if shared else ("x", "z")) if self.reads else ()

    def collect(self, site: Site, stages: dict[str, Tensor]) -> None:
        if not stages or site.recomputing:
            return
        x, z = stages["x"], stages["z"]
        tokens = site.tokens
        passes = self.passes.of_forward
        passes.append(_Pass(z, x, tokens.unpadded(z), tokens.samples(z)[1]))
        del passes[: -site.block.calls]  # a shared block runs several times

    @override
    def differentiated(self) -> list[Tensor]:
        if not (self.site.block.up.module.training and torch.is_grad_enabled()):
            self.passes.of_forward.clear()  # of a training pass that nobody asked about
        return [each.z for each in self.passes.of_forward]

    @override
    def penalty(self) -> Tensor | None:
        passes, gradients = list(self.passes.of_forward), self.gradients
        self.passes.of_forward.clear()
        self.gradients = []  # and the graph behind them
        if not passes:
            return None
        values = []
        for each, gradient in zip(passes, gradients, strict=True):
            if gradient is None:
                raise RuntimeError(
                    f"FlatnessPenalty at block {self.site.block.name!r}: the loss does not depend "
                    f"on its pre-activation z; is it the loss of the last forward pass?"
                )
            if not self.checked:
                self._check(gradient)
            rows = each.samples**2 * _squares(gradient) * _squares(each.x) / gradient.shape[-1]
            keep = torch.ones_like(rows, dtype=torch.bool) if each.keep is None else each.keep
            values.append(torch.where(keep, rows, 0).sum() / keep.sum().clamp(min=1))
        return self.weight * torch.stack(values).mean()

    @override
    def forget(self) -> None:
        self.passes.of_forward.clear()

    @property
    @override
    def unclaimed(self) -> bool:
        return any(each.z.requires_grad for each in self.passes.of_forward)

    def _check(self, gradient: Tensor) -> None:
        """Fail here and with advice rather than in somebody's backward."""
        met: set[Any] = set()
        nodes = [gradient.grad_fn]
        while nodes:
            node = nodes.pop()
            if node is None or node in met:
                continue
            if node.name().endswith("NotImplemented"):
                raise RuntimeError(
                    f"FlatnessPenalty at block {self.site.block.name!r}: what follows it cannot be "
                    f"differentiated twice, most likely fused attention: build the model with "
                    f"attn_implementation='eager', or run its forward under "
                    f"torch.nn.attention.sdpa_kernel(SDPBackend.MATH)"
                )
            met.add(node)
            nodes += [following for following, _ in node.next_functions]
        self.checked = True

    @override
    def remove(self) -> None:
        self.site.release(self.collect)
        self.passes.of_forward.clear()


def _squares(rows: Tensor) -> Tensor:
    """``‖row‖²`` in float32 at least: [..., features] → [...]."""
    return rows.to(torch.promote_types(rows.dtype, torch.float32)).square().sum(-1)

"""Backward pruning: in training, small entries of the effective gradient are set to zero."""

from __future__ import annotations

from dataclasses import dataclass
from functools import partial

from torch import Tensor
from typing_extensions import override

from actsparse.blocks.block import Layer, MLPBlock
from actsparse.blocks.drop_gradients import change_gradient, without_small
from actsparse.blocks.site import Site, site_of
from actsparse.modify.modification import Attached, Modification
from actsparse.values import AtLeast0


@dataclass(frozen=True)
class PruneGradient(Modification):
    """In training, set small entries of the effective gradient η = ∂ℓ/∂z to zero.

    η [..., H] is the gradient at z, the output of the layer that enters φ. That is up; in gated
    blocks it is gate, and up keeps its whole gradient. With η̂ in its place that layer has the
    gradients ``dU = η̂ᵀx`` and ``dx = η̂U``:

        ``η̂ = η · 1[|η| > threshold · rms(η)]``,  ``rms(η) = √(Σ η² / #{η ≠ 0})``

    over all tokens and units of one call of the block: with several processes each of its own
    batch, under accumulation each small batch by itself. Zeros do not count in rms, so the
    threshold means the same at every density, and padding without a gradient has no influence. The
    scale of the loss does not matter (``GradScaler``). An η that is not finite is left as it is.

    The forward pass stays the same to the bit. ``observe`` reads η before the block's own pruning,
    so what it reports includes the pruning of later blocks only. Zeros are written, not skipped:
    this saves no time, and under :func:`actsparse.accelerate` such a block runs by its own layers,
    in evaluation too.

    Source: Peng et al. 2026, arXiv 2605.25612, on sparse backward passes; the rule is ours.

    Args:
        threshold: what is dropped, as a multiple of rms(η); 0 drops nothing.

    Raises:
        ValueError: ``threshold`` is not a finite number ≥ 0.

    >>> import torch
    >>> from actsparse import sparsify
    >>> mlp = torch.nn.Sequential(torch.nn.Linear(8, 32), torch.nn.ReLU(), torch.nn.Linear(32, 8))
    >>> x = torch.randn(4, 8)
    >>> handle = sparsify(mlp, PruneGradient(0.3), inputs=x)
    >>> mlp(x).square().sum().backward()
    """

    threshold: AtLeast0

    @override
    def apply(self, block: MLPBlock) -> Attached:
        note = f"|η| ≤ {self.threshold:g} · rms dropped at {block.pre_activation}"
        return _Pruned(site_of(block), note, self.threshold)


class _Pruned(Attached):
    def __init__(self, site: Site, note: str, threshold: float) -> None:
        super().__init__(site, note)
        self.threshold = threshold
        site.transform_layers(self.prune)

    def prune(self, site: Site, output: Tensor, x: Tensor, layer: Layer) -> Tensor:
        source = site.block.pre_activation
        if layer.module is not source.module or not layer.module.training:
            return output
        drop = partial(without_small, threshold=self.threshold)
        return change_gradient(output, drop, source.rows)

    @override
    def remove(self) -> None:
        self.site.release(self.prune)

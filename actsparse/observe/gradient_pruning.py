"""Backward pruning: what dropping small effective gradients does to the gradient of the loss.

The rule is that of :class:`actsparse.PruneGradient`, which trains with it. In the backward pass of
every block, and for each batch by itself, entries of η = g_z (at the layer whose output enters φ)
with ``|η| ≤ threshold · rms(η)`` become zero, ``rms(η) = √(Σ η² / #{η ≠ 0})``. What φ′(z) = 0
lets the backward pass skip is exact. What small η let it skip beyond that is not (Peng et al.
2026, arXiv 2605.25612). This module measures how much that is, and what it costs.
"""

from __future__ import annotations

import math
from collections.abc import Iterable
from contextlib import ExitStack
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from actsparse.blocks.block import Layer, MLPBlock
from actsparse.blocks.drop_gradients import change_gradient, without_small
from actsparse.blocks.resolve import blocks_of
from actsparse.blocks.site import Site, site_of
from actsparse.blocks.trace import undisturbed
from actsparse.observe.curvature_product import LossSurface
from actsparse.observe.gradient_measure import Weighing
from actsparse.observe.loss import LossFn, Reduction, sample_losses
from actsparse.observe.registry import Watch
from actsparse.observe.session import Seen


def pruning(
    model: nn.Module,
    loss_fn: LossFn,
    batches: Iterable[Any],
    thresholds: Iterable[float] = (0.03, 0.1, 0.3, 1.0),
    *,
    inputs: Any = None,
    blocks: Iterable[MLPBlock] | None = None,
    reduction: Reduction = "mean",
) -> list[dict[str, Any]]:
    """Drop small effective gradients η, and measure the error of the gradient of the loss.

    G is the gradient of the mean loss over the samples of all ``batches``, in all parameters that
    require gradients. Ĝ is the same with small η dropped in every block; the module's docstring has
    the rule. The model runs in eval mode. Parameters, gradients, modes, buffers, hooks and global
    random numbers are afterwards as they were, also after an error.

    It takes a forward and a backward pass over each batch for G and for each threshold but 0. In
    memory it takes G and Ĝ, in float32 or wider, beside the gradient of the current batch.

    Args:
        model: any model, modified or not.
        loss_fn: ``loss_fn(model, batch)`` returns a scalar, the mean over the batch's samples, or
            the pair (logits [B, ..., C], targets [B, ...]), −100 where nothing is predicted.
        batches: a list of batches, or a DataLoader: read again for every threshold.
        thresholds: finite numbers ≥ 0, multiples of rms(η); at 0 Ĝ is G.
        inputs, blocks: the MLP blocks, as for :func:`actsparse.observe`.
        reduction: of a sample's loss over its predicted positions, ``"mean"`` or ``"sum"``; a
            scalar is taken as it is.

    Returns:
        A row for each threshold, in their order, all numbers plain:

        - ``threshold``;
        - ``kept``: the share of entries of η that are not dropped, of all blocks' units at all
          unpadded tokens. It is at most
        - ``derivative_density``: the share of φ′(z) ≠ 0 among them;
        - ``error``: ``‖Ĝ − G‖ / ‖G‖``;
        - ``cosine``: ``⟨Ĝ, G⟩ / (‖Ĝ‖ ‖G‖)``.

        The shares are of blocks that a gradient comes to (not those below all that is trained).
        None stands where a denominator is zero.

    Raises:
        ValueError: a threshold is negative or not finite, or none is given; no MLP block, or one
            whose φ′ is unknown; nothing requires gradients; batches that can be read only once; and
            what :func:`actsparse.observe.loss.check_loss` says of the loss.
        ArithmeticError: a gradient is not finite.

    >>> mlp = nn.Sequential(nn.Linear(8, 32), nn.ReLU(), nn.Linear(32, 8))
    >>> batch = {"x": torch.randn(64, 8), "y": torch.randint(8, (64,))}
    >>> rows = pruning(
    ...     mlp, lambda m, b: (m(b["x"]), b["y"]), [batch], [0.0, 0.3], inputs=batch["x"]
    ... )
    >>> [(row["threshold"], row["error"] > 0) for row in rows]
    [(0.0, False), (0.3, True)]
    >>> rows[0]["kept"] == rows[0]["derivative_density"] > rows[1]["kept"]
    True
    """
    asked = [float(threshold) for threshold in thresholds]
    if not asked or not all(0 <= threshold < math.inf for threshold in asked):
        raise ValueError(f"thresholds={asked}: expected at least one, all finite numbers ≥ 0")
    surface = LossSurface(model, loss_fn, batches, None, reduction)
    found = blocks_of(model, inputs, blocks, "pruning")
    rows: dict[float, dict[str, Any]] = {}
    with undisturbed(model), surface.still(), ExitStack() as stack:
        droppings = [_Dropping(block) for block in found]
        for each in droppings:
            site = site_of(each.block)
            stack.callback(site.release, each.drop)
            site.transform_layers(each.drop)
        with Seen(found, {"density": {}}, None, Weighing("sum"), always=True) as seen:
            exact = _gradient(surface, droppings, 0.0)
        summary = seen.summary("inference") or {"blocks": []}
        counted = {row["block"]: row for row in summary["blocks"]}
        of = sloped = 0
        for label, each in zip(seen.blocks, droppings, strict=True):
            if each.reached and label in counted:
                entries = counted[label]["tokens"] * each.block.d_hidden
                of += entries
                sloped += round(entries * counted[label]["derivative_density"])
        for threshold in sorted({0.0, *asked}):
            pruned = _gradient(surface, droppings, threshold) if threshold else exact
            rows[threshold] = {
                "threshold": threshold,
                "kept": sum(each.kept for each in droppings) / of if of else None,
                "derivative_density": sloped / of if of else None,
                **_compared(exact, pruned),
            }
            del pruned  # before the next comes
    return [rows[threshold] for threshold in asked]


class _Dropping:
    """Drops small η of one block, and counts what it keeps at unpadded tokens."""

    def __init__(self, block: MLPBlock) -> None:
        self.block = block
        self.unpadded = Watch(block, {}, None, Weighing(), always=True).keep
        self.threshold, self.kept, self.reached = 0.0, 0, False

    def drop(self, site: Site, output: Tensor, x: Tensor, layer: Layer) -> Tensor:
        """The output as it is; its gradient without what is small."""
        source = site.block.pre_activation
        if layer.module is not source.module:
            return output
        keep = self.unpadded(site, output)
        if keep is not None:
            keep = site.tokens.restore(keep.unsqueeze(-1), like=output[..., :1])
        return change_gradient(output, partial(self.backward, keep), source.rows)

    def backward(self, keep: Tensor | None, gradient: Tensor) -> Tensor:
        """η̂ [..., H] of η; ``keep`` [..., 1] is False at padding."""
        left = without_small(gradient, self.threshold)
        counted = left != 0 if keep is None else (left != 0) & keep
        self.kept += int(counted.sum())
        self.reached = True
        return left


def _gradient(surface: LossSurface, droppings: list[_Dropping], threshold: float) -> list[Tensor]:
    """Σ_b ∇ℓ_b in each parameter, with what ``threshold`` drops in each batch left out."""
    total = [torch.zeros_like(p, dtype=surface.dtype) for p in surface.chosen]
    for each in droppings:
        each.threshold, each.kept = threshold, 0

    def visit(output: Any, samples: int) -> None:
        with torch.enable_grad():
            if isinstance(output, Tensor):
                loss = output * samples
            else:
                loss = sample_losses(output[0], output[1], surface.reduction).sum()
        parts = torch.autograd.grad(loss, surface.chosen, allow_unused=True)
        for into, part in zip(total, parts, strict=True):
            if part is not None:
                into += part
        if not all(bool(into.isfinite().all()) for into in total):
            raise ArithmeticError(f"a gradient of batch {surface.batch} is NaN or infinite")

    surface.sweep("hessian", visit)
    return total


def _compared(exact: list[Tensor], pruned: list[Tensor]) -> dict[str, float | None]:
    """Error and cosine; the mean's 1/B is in neither."""
    difference = math.fsum(_dot(p - e, p - e) for p, e in zip(pruned, exact, strict=True))
    inner = math.fsum(_dot(p, e) for p, e in zip(pruned, exact, strict=True))
    one, two = (math.fsum(_dot(g, g) for g in each) for each in (pruned, exact))
    return {
        "error": math.sqrt(difference / two) if two else None,
        "cosine": min(inner / math.sqrt(one * two), 1.0) if one and two else None,
    }


def _dot(a: Tensor, b: Tensor) -> float:
    return float((a.double() * b.double()).sum())

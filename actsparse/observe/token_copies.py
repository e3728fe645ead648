"""The Gauss–Newton trace when each token has its own copy of every MLP weight.

``tr G`` is the expectation over drawn labels ŷ of augmented flatness, of the losses
``Σ_t √w_bt ℓ_bt(ŷ_bt)`` (:mod:`actsparse.observe.loss` has the weights w): what flatness is an
estimate of (arXiv 2605.25612).
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable
from dataclasses import asdict, dataclass
from typing import Any

import torch
from torch import nn

from actsparse.blocks.block import MLPBlock
from actsparse.observe.backward_passes import (
    backward,
    generator_of,
    how_of,
    running_flatness,
    standard_error,
)
from actsparse.observe.curvature_product import LossSurface
from actsparse.observe.gradient_measure import Weighing
from actsparse.observe.loss import LossFn, Reduction
from actsparse.observe.session import Seen


@dataclass(frozen=True)
class CopiesTrace:
    """As :class:`actsparse.observe.curvature.Trace`, split by the layers' roles."""

    value: float
    standard_error: float
    probes: int
    by_layer: dict[str, float]
    samples: int
    positions: float | None
    reduction: Reduction | None

    def to_json(self) -> dict[str, Any]:
        """As plain values."""
        return asdict(self)


def token_copies(
    model: nn.Module,
    loss_fn: LossFn,
    batches: Iterable[Any],
    *,
    blocks: list[MLPBlock],
    parameters: Iterable[str],
    reduction: Reduction,
    probes: int,
    seed: int,
    progress: Callable[[int, int], None] | None,
) -> CopiesTrace:
    """The trace for up, gate and down of ``blocks``, as a mean over ``probes`` draws.

    Arguments are those of :func:`actsparse.measure`; ``parameters`` tell the
    device and that the loss depends on the model, and change no number.

    Raises:
        ValueError: as ``measure``.
        ArithmeticError: a gradient is not finite.
    """
    surface = LossSurface(model, loss_fn, batches, parameters, reduction, probes, progress)
    generator = generator_of(surface, seed)
    values: list[dict[str, float]] = []
    rows: list[int] = []
    weighing = Weighing("sum")
    with surface.still(), Seen(blocks, {"flatness": {}}, None, weighing, always=True) as seen:
        for _ in range(probes):

            def visit(output: Any, samples: int) -> None:
                logits, weights = surface.predictions(output)
                drawn = torch.multinomial(logits.detach().softmax(-1), 1, generator=generator)
                with torch.enable_grad():
                    nats = nn.functional.cross_entropy(logits, drawn[:, 0], reduction="none")
                    backward((nats * weights.sqrt()).sum(), seen)
                rows.append(len(output[1]))
                surface.tick()

            surface.sweep("gauss_newton", visit)
            values.append(running_flatness(seen, len(values) + 1, rows, surface))
    grads = [leaf.grad for leaf in seen.leaves("inference") if leaf.grad is not None]
    if any(grad[-1] for grad in grads):  # passes skipped
        raise ArithmeticError("a gradient of token_copies is NaN or infinite")
    layers = [key for key in values[0] if key != "flatness"]
    totals = [math.fsum(value[key] for key in layers) for value in values]
    each = {key.removeprefix("flatness_"): values[-1][key] for key in layers}
    return CopiesTrace(totals[-1], standard_error(totals), probes, each, **how_of(surface))

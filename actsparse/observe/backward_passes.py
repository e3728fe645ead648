"""The passes of ``measure`` that read gradients, summed over draws of labels."""

from __future__ import annotations

import math
from typing import Any, Literal

import torch
from torch import Tensor

from actsparse.blocks.block import MLPBlock
from actsparse.observe.curvature_product import LossSurface
from actsparse.observe.gradient_measure import Weighing
from actsparse.observe.loss import IGNORE, Reduction, check_logits, draw_labels, sample_losses
from actsparse.observe.registry import Mask
from actsparse.observe.session import Seen

Labels = Literal["data", "model"]
_FLATNESS = ("flatness", "flatness_up", "flatness_gate", "flatness_down")


def observed(
    surface: LossSurface,
    blocks: list[MLPBlock],
    options: dict[str, dict[str, Any]],
    mask: Mask | None,
    labels: Labels,
    draws: int,
    seed: int,
    right: list[Tensor] | None = None,
) -> tuple[dict[str, Any] | None, dict[str, MLPBlock]]:
    """The passive measures, over ``draws`` sweeps, and the blocks as they are called there.

    ``right``: of each batch the samples that measures of gradients are of, as from
    `correct_samples`; None: all.

    Raises:
        ValueError: ``right`` holds no sample.
    """
    if right is not None and not any(bool(each.any()) for each in right):
        raise ValueError("correct=True: the model classifies no sample of these batches correctly")
    generator = generator_of(surface, seed)
    values: list[dict[str, float]] = []
    rows: list[int] = []
    chosen = None if right is None else lambda count: right[surface.batch]
    weighing = Weighing("sum", samples=chosen)
    with surface.still(), Seen(blocks, options, mask, weighing, always=True) as seen:
        for _ in range(draws):

            def visit(output: Any, samples: int) -> None:
                if right is not None:
                    output = output[0], _without(output[1], ~right[surface.batch])
                    rows.append(int(right[surface.batch].sum()))
                else:
                    rows.append(samples if isinstance(output, Tensor) else len(output[1]))
                backward(_loss(output, samples, labels, surface.reduction, generator), seen)
                surface.tick()

            surface.sweep("gauss_newton" if labels == "model" else "hessian", visit)
            if right is not None:
                surface.samples = sum(map(int, map(torch.sum, right)))
            values.append(running_flatness(seen, len(values) + 1, rows, surface))
    summary = seen.summary("inference")
    if summary is None:
        return None, seen.blocks
    found = _per_draw(summary, draws, rows, surface)
    found["blocks"] = [_per_draw(row, draws, rows, surface) for row in summary["blocks"]]
    if labels == "model":
        found |= {f"{key}_error": standard_error([v[key] for v in values]) for key in values[0]}
    return found, seen.blocks


def correct_samples(surface: LossSurface) -> list[Tensor]:
    """Of each batch bool [B]: all predicted positions of a sample have their target as the largest
    logit.

    Raises:
        ValueError: a loss is a scalar.
    """
    right: list[Tensor] = []

    def visit(output: Any, samples: int) -> None:
        logits, targets = check_logits(output, "correct=True")
        hit = (logits.argmax(-1) == targets) | (targets == IGNORE)
        some = (targets != IGNORE).reshape(len(targets), -1).any(1)
        right.append(hit.reshape(len(targets), -1).all(1) & some)

    with surface.still():
        surface.sweep("hessian", visit)
    return right


def _without(targets: Tensor, left_out: Tensor) -> Tensor:
    """The targets [B, ...], with nothing to predict in the samples ``left_out`` [B]."""
    return targets.masked_fill(left_out.reshape(-1, *[1] * (targets.ndim - 1)), IGNORE)


def _loss(
    output: Any, samples: int, labels: Labels, reduction: Reduction, generator: torch.Generator
) -> Tensor:
    """The sum of a batch's per-sample losses."""
    with torch.enable_grad():
        if isinstance(output, Tensor):
            return output * samples
        logits, targets = output
        if labels == "model":
            targets = draw_labels(logits, targets, generator)
        return sample_losses(logits, targets, reduction).sum()


def backward(loss: Tensor, seen: Seen) -> None:
    """Into the readings alone: no parameter's gradient is computed or touched."""
    leaves = seen.leaves("inference")
    if leaves:
        torch.autograd.backward(loss, inputs=leaves)


def running_flatness(
    seen: Seen, draws: int, rows: list[int], surface: LossSurface
) -> dict[str, float]:
    """Flatness of each layer, the mean over the ``draws`` so far.

    ``rows`` counts the samples of each pass, also those that predict nothing.
    """
    found = _per_draw(seen.summary("inference"), draws, rows, surface)
    return {key: found[key] for key in _FLATNESS if found.get(key) is not None}


def _per_draw(
    summary: dict[str, Any] | None, draws: int, rows: list[int], surface: LossSurface
) -> dict[str, Any]:
    """Of ``draws`` draws as if of one, with means over samples over those that predict anything."""
    known = dict(summary or {})
    share = sum(rows) / (draws * surface.samples)
    for key in (*_FLATNESS, "tokens_per_sample"):
        if known.get(key) is not None:
            known[key] *= share
    if "samples" in known:
        known["samples"] = round(known["samples"] / (share * draws))
    if "tokens" in known:
        known["tokens"] //= draws
    return known


def standard_error(running: list[float]) -> float:
    """Standard error of the last of ``running`` means over 1, 2, … draws."""
    draws = len(running)
    sums = [0.0, *(count * mean for count, mean in enumerate(running, start=1))]
    each = torch.tensor(sums, dtype=torch.float64).diff()
    return float(each.std()) / math.sqrt(draws)


def how_of(surface: LossSurface) -> dict[str, Any]:
    """On what the last sweep was, and how a sample's loss was made."""
    predicted = surface.predicted / surface.samples if surface.predicted else None
    return {
        "samples": surface.samples,
        "positions": predicted,
        "reduction": surface.reduction if surface.predicted else None,
    }


def generator_of(surface: LossSurface, seed: int) -> torch.Generator:
    """Where draws come from, on the parameters' device."""
    return torch.Generator(surface.chosen[0].device).manual_seed(seed)

"""Robustness: loss and accuracy under attacks on inputs, and noise on features and weights.

Attacks are those of :mod:`actsparse.observe.attack`. Relative noise is Gaussian; its size is a
share of the size of what it is added to. Source: Peng et al. 2023, arXiv 2309.03004, who see
sparse gradients as a step towards robustness against perturbed hidden features and parameters.

Models run in eval mode. Parameters, gradients, modes, hooks and global random numbers are
afterwards as they were, also after an error. What :func:`actsparse.observe` watches on the model
sees these passes too: close it first.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator, Mapping
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from functools import partial
from typing import Any, Literal

import torch
from torch import Tensor, nn

from actsparse.blocks.block import Layer, MLPBlock, base_layer
from actsparse.blocks.resolve import blocks_of
from actsparse.blocks.site import Site, site_of
from actsparse.blocks.trace import undisturbed
from actsparse.observe.attack import Attack, Bounds, Predict, attacked, normal
from actsparse.observe.loss import (
    IGNORE,
    check_logits,
    position_weights,
    predicted_logits,
    sample_losses,
)


@dataclass(frozen=True)
class RelativeNoise:
    """Gaussian noise on features or weights, of standard deviation ``level`` times their rms.

    Args:
        at: what it is added to. ``"x"``: the input of every MLP block, as its layers see it (with a
            zeroth bias); ``level · ‖x_t‖/√D`` for each token, drawn anew for every entry. ``"d"``:
            in the same way the input of down, which is a, behind a norm where there is one.
            ``"weights"``: up, gate and down of every block, ``level · rms(W)``, one draw for each
            batch; of layers with adapters the base weight.
        level: the size of the noise, above 0.

    Raises:
        ValueError: an unknown place, or a level that is not finite and > 0.

    >>> RelativeNoise("weights", 0.1).row()
    {'disturbance': 'noise', 'size': 0.1, 'at': 'weights'}
    """

    at: Literal["x", "d", "weights"]
    level: float

    def __post_init__(self) -> None:
        if self.at not in ("x", "d", "weights"):
            raise ValueError(f"RelativeNoise(at={self.at!r}): expected 'x', 'd' or 'weights'")
        if not 0 < self.level < math.inf:
            raise ValueError(f"RelativeNoise(level={self.level!r}): expected a finite number > 0")

    def row(self) -> dict[str, Any]:
        """The noise as plain values.

        Returns:
            Values by name, for JSON.
        """
        return {"disturbance": "noise", "size": self.level, "at": self.at}


def robustness(
    model: nn.Module,
    predict: Predict,
    batches: Iterable[Any],
    against: Iterable[Attack | RelativeNoise],
    *,
    inputs: Any = None,
    blocks: Iterable[MLPBlock] | None = None,
    key: str | int | None = None,
    bounds: Bounds | None = None,
    seed: int = 0,
) -> list[dict[str, Any]]:
    """Loss and accuracy on clean data, and under each of several attacks and noises.

    Each attack or noise draws from a generator of its own, all of the same ``seed``. So numbers do
    not depend on what else is asked for, and levels of noise share their draws, as do models of the
    same shape.

    Args:
        model: any model, modified or not.
        predict: ``predict(model, batch)`` returns logits [B, ..., C] and integer targets [B, ...],
            −100 where nothing is predicted.
        batches: the data; read once.
        against: attacks and noises.
        inputs, blocks: the MLP blocks, for noise, as for :func:`actsparse.observe`.
        key, bounds: for attacks, as for :func:`perturb`.
        seed: of all draws.

    Returns:
        A row for the clean data, then one for each attack or noise: what it is (``disturbance``,
        ``size``, …); means over samples of ``loss`` (nats) and ``accuracy`` (the share of a
        sample's predicted positions at which the largest logit is the target's); the number of
        ``samples`` that predict anything, and of predicted ``positions``.

    Raises:
        ValueError: no batch, no MLP block for noise, and what :func:`perturb` says of inputs.
        ArithmeticError: a gradient is not finite.

    >>> mlp = nn.Sequential(nn.Linear(8, 32), nn.ReLU(), nn.Linear(32, 8))
    >>> batch = (torch.randn(64, 8), torch.randint(8, (64,)))
    >>> def predict(model, batch):
    ...     return model(batch[0]), batch[1]
    >>> against = [Attack("fgsm", 0.1), Attack("pgd", 0.1), RelativeNoise("weights", 0.1)]
    >>> rows = robustness(mlp, predict, [batch], against, inputs=batch[0])
    >>> [row["disturbance"] for row in rows], rows[1]["loss"] > rows[0]["loss"]
    (['clean', 'fgsm', 'pgd', 'noise'], True)
    """
    chosen = list(against)
    for each in chosen:
        if not isinstance(each, Attack | RelativeNoise):
            raise ValueError(f"against holds {each!r}; expected Attack(...) or RelativeNoise(...)")
    if isinstance(batches, Tensor | Mapping):
        raise ValueError(f"batches must be a list of batches, got a {type(batches).__name__}")
    noisy = any(isinstance(each, RelativeNoise) for each in chosen)
    found = blocks_of(model, inputs, blocks, "robustness") if noisy else []
    device = next((p.device for p in model.parameters()), torch.device("cpu"))
    generators = [torch.Generator(device).manual_seed(seed) for _ in chosen]
    rows = [{"disturbance": "clean", "size": 0.0}, *(each.row() for each in chosen)]
    with undisturbed(model), torch.inference_mode(False), torch.no_grad():
        totals = torch.zeros(len(rows), 4, dtype=torch.float64)
        for index, batch in enumerate(batches):
            score = partial(_score, model, predict, where=f"predict on batch {index}")
            totals[0] += score(batch)
            for i, (each, generator) in enumerate(zip(chosen, generators, strict=True), start=1):
                if isinstance(each, Attack):
                    totals[i] += score(
                        attacked(model, predict, batch, each, key, bounds, generator)
                    )
                else:
                    with _noise(found, each, generator):
                        totals[i] += score(batch)
    if not totals[0, 2]:
        raise ValueError("batches is empty; give at least one batch")
    for row, (loss, right, samples, positions) in zip(rows, totals.tolist(), strict=True):
        row |= {"loss": loss / samples, "accuracy": right / samples}
        row |= {"samples": int(samples), "positions": int(positions)}
    return rows


def _score(model: nn.Module, predict: Predict, batch: Any, where: str) -> Tensor:
    """Sums over samples of loss and accuracy, the number of samples, and of positions: [4]."""
    logits, targets = check_logits(predict(model, batch), "robustness", where)
    losses = sample_losses(logits, targets).double()
    predicted = targets != IGNORE
    right = predicted_logits(logits, targets).argmax(-1) == targets[predicted]
    weights = position_weights(targets, "mean", torch.float64)
    samples = predicted.reshape(len(targets), -1).any(1)
    sums = [losses.sum(), (weights * right).sum(), samples.sum(), predicted.sum()]
    return torch.stack([value.double() for value in sums]).cpu()


@contextmanager
def _noise(
    blocks: list[MLPBlock], noise: RelativeNoise, generator: torch.Generator
) -> Iterator[None]:
    """The noise inside; at the end all is as it was."""

    def add(x: Tensor) -> Tensor:
        size = torch.linalg.vector_norm(x, dim=-1, keepdim=True, dtype=_wide(x))
        std = noise.level / x.shape[-1] ** 0.5 * size
        return x + (std * normal(x, generator)).to(x.dtype)

    def add_to_x(site: Site, x: Tensor) -> Tensor:
        return add(x)

    def add_to_d(module: nn.Module, args: tuple[Any, ...]) -> tuple[Any, ...]:
        return (add(args[0]), *args[1:])

    def look(site: Site, stages: dict[str, Tensor]) -> None:
        """Nothing; but where a tap wants d, no executor runs in the layers' place."""

    with ExitStack() as stack:
        for block in blocks:
            site = site_of(block)
            stack.callback(site.release, add_to_x, look)
            if noise.at == "x":
                site.transform_input(add_to_x)  # behind a zeroth bias, once for gate and up
            else:
                site.tap(look, "d")
            if noise.at == "d":
                hook = block.down.module.register_forward_pre_hook(add_to_d)
                stack.callback(hook.remove)
        if noise.at == "weights":
            stack.enter_context(_noisy_weights(blocks, noise.level, generator))
        yield


@contextmanager
def _noisy_weights(
    blocks: list[MLPBlock], level: float, generator: torch.Generator
) -> Iterator[None]:
    layers: dict[Any, tuple[Layer, nn.Parameter]] = {}
    for block in blocks:
        for layer in (block.up, block.gate, block.down):
            if layer is None:
                continue
            weight = base_layer(layer.module).weight
            if not isinstance(weight, nn.Parameter) or not weight.is_floating_point():
                raise ValueError(
                    f"noise on weights needs float parameters; {layer.name}.weight is "
                    f"{type(weight).__name__} of {getattr(weight, 'dtype', 'no type')}"
                )
            layers.setdefault((id(weight), str(layer.rows)), (layer, weight))
    kept = {weight: weight.data for _, weight in layers.values()}
    try:
        for weight, data in kept.items():
            # other memory for a while: the values themselves, and graphs on them, stay untouched
            weight.data = data.clone()
        for layer, _ in layers.values():
            part = layer.weight.data
            rms = torch.linalg.vector_norm(part, dtype=_wide(part)) / part.numel() ** 0.5
            part += (level * rms * normal(part, generator)).to(part.dtype)
        yield
    finally:
        for weight, data in kept.items():
            weight.data = data


def _wide(x: Tensor) -> torch.dtype:
    return torch.promote_types(x.dtype, torch.float32)

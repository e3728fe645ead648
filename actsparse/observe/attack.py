"""Attacks on inputs: FGSM and PGD find inputs near the clean ones at which the loss is large.

An attack changes each sample by at most ε. FGSM takes one step, ``x + ε·sign(∇_x ℓ_b)``
(Goodfellow, Shlens, Szegedy 2015, arXiv 1412.6572). PGD takes many smaller ones, each projected
back into the ball of radius ε (Madry et al. 2018, arXiv 1706.06083). In L2 a step goes along
``∇_x ℓ_b / ‖∇_x ℓ_b‖``.

The loss ℓ_b of a sample is that of :mod:`actsparse.observe.loss`, the mean over its predicted
positions. Models run in eval mode. Parameters, gradients, modes, hooks and global random numbers
are afterwards as they were, also after an error.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import partial
from typing import Any, Literal

import torch
from torch import Tensor, nn

from actsparse.blocks.trace import undisturbed
from actsparse.observe.loss import IGNORE, check_logits, predicted_logits

Predict = Callable[[nn.Module, Any], tuple[Tensor, Tensor]]
Bounds = tuple[float | Tensor, float | Tensor]


@dataclass(frozen=True)
class Attack:
    """An attack on inputs, FGSM or PGD: how far it goes, in which norm and in which steps.

    Args:
        method: ``"fgsm"``, one step of size ε from the clean input, or ``"pgd"``.
        epsilon: ε, the largest change of a sample, in the inputs' own units (after any
            normalisation), above 0.
        norm: how the change is measured: ``"linf"``, or ``"l2"`` over all entries of a sample.
        steps: PGD only: the number of steps; None: 10.
        step_size: PGD only: the length of a step; None: 2.5·ε/steps, with which every point of the
            ball can be reached from every other.
        random_start: PGD only: start from a uniformly random point of the ball instead of the clean
            input; None: True.

    Raises:
        ValueError: an unknown method or norm, a number out of range, or PGD's options for FGSM.

    >>> attack = Attack("pgd", 0.1, norm="l2", steps=20)
    >>> attack.project(torch.tensor([[3.0, 4.0]]))
    tensor([[0.0600, 0.0800]])
    >>> attack.direction(torch.tensor([[3.0, 4.0]]))
    tensor([[0.6000, 0.8000]])
    >>> attack.start(torch.zeros(2, 8), torch.Generator()).norm(dim=1) <= 0.1
    tensor([True, True])
    """

    method: Literal["fgsm", "pgd"]
    epsilon: float
    norm: Literal["linf", "l2"] = "linf"
    steps: int | None = None
    step_size: float | None = None
    random_start: bool | None = None

    def __post_init__(self) -> None:
        if self.method not in ("fgsm", "pgd"):
            raise ValueError(f"Attack(method={self.method!r}): expected 'fgsm' or 'pgd'")
        if self.norm not in ("linf", "l2"):
            raise ValueError(f"Attack(norm={self.norm!r}): expected 'linf' or 'l2'")
        for name, size in (("epsilon", self.epsilon), ("step_size", self.step_size)):
            if size is not None and not 0 < size < math.inf:
                raise ValueError(f"Attack({name}={size!r}): expected a finite number > 0")
        if self.steps is not None and not (isinstance(self.steps, int) and self.steps >= 1):
            raise ValueError(f"Attack(steps={self.steps!r}): expected an int of at least 1")
        if self.method == "fgsm" and (self.steps, self.step_size, self.random_start) != (None,) * 3:
            raise ValueError(
                "Attack('fgsm') is one step of size epsilon from the clean input and takes no "
                "steps, step_size or random_start; 'pgd' does"
            )

    def row(self) -> dict[str, Any]:
        """The attack as plain values, with every default filled in.

        Returns:
            Values by name, for JSON.

        >>> Attack("fgsm", 0.1).row()
        {'disturbance': 'fgsm', 'size': 0.1, 'norm': 'linf', 'steps': 1, 'step_size': 0.1,
         'random_start': False}
        """
        pgd = self.method == "pgd"
        steps = (self.steps or 10) if pgd else 1
        return {
            "disturbance": self.method,
            "size": self.epsilon,
            "norm": self.norm,
            "steps": steps,
            "step_size": self.step_size or (2.5 * self.epsilon / steps if pgd else self.epsilon),
            "random_start": pgd and self.random_start is not False,
        }

    def start(self, like: Tensor, generator: torch.Generator) -> Tensor:
        """Draw a uniformly random change of each sample within its ball.

        Args:
            like: a tensor of the inputs' shape [B, ...] and dtype.
            generator: where the numbers are drawn from.

        Returns:
            The change [B, ...].
        """
        draw = partial(torch.rand, generator=generator, device=generator.device)
        if self.norm == "linf":
            return self.epsilon * (2 * draw(like.shape).to(like) - 1)
        radius = draw(len(like)).to(like.device).double() ** (len(like) / like.numel())
        return self.epsilon * _per_sample(radius, like).to(like) * _unit(normal(like, generator))

    def direction(self, gradient: Tensor) -> Tensor:
        """The direction of a step, in which the loss rises fastest in the attack's norm.

        Args:
            gradient: ∇_x of each sample's loss [B, ...].

        Returns:
            The direction [B, ...]; zero where the gradient is zero.
        """
        return gradient.sign() if self.norm == "linf" else _unit(gradient)

    def project(self, change: Tensor) -> Tensor:
        """Project the change of each sample into its ball: the nearest change that is allowed.

        Args:
            change: the change of the inputs [B, ...].

        Returns:
            The nearest change within the ball [B, ...].
        """
        if self.norm == "linf":
            return change.clamp(-self.epsilon, self.epsilon)
        shrink = (self.epsilon / _norms(change)).clamp(max=1)
        return change * _per_sample(shrink, change).to(change)


def perturb(
    model: nn.Module,
    predict: Predict,
    batch: Any,
    attack: Attack,
    *,
    key: str | int | None = None,
    bounds: Bounds | None = None,
    generator: torch.Generator | None = None,
) -> Any:
    """Attack a batch: replace its inputs by adversarial ones.

    A model does not withstand an attack by being so sure that its softmax rounds to 0 or 1: each
    sample's gradient is scaled before it can vanish, which leaves its direction as it is. A sample
    that still has no gradient takes no step.

    Args:
        model: any model.
        predict: as for :func:`actsparse.observe.robustness`.
        batch: a dict, tuple or list that holds the inputs, a float tensor [B, ...].
        attack: which attack.
        key: where in ``batch`` the inputs are; None: they are its only float tensor.
        bounds: the least and the greatest value an input may take: numbers, or tensors that
            broadcast to the inputs (for pixels that were normalised by channel: [C, 1, 1]).
        generator: where PGD's start is drawn from; None: one of seed 0.

    Returns:
        A new batch of the same kind.

    Raises:
        ValueError: there is no float input, or more than one and no ``key``; the clean inputs are
            outside ``bounds``; logits that do not depend on the inputs by operations with a
            gradient; what :func:`actsparse.observe.loss.check_logits` says of ``predict``.
        ArithmeticError: a gradient is NaN or infinite.

    >>> model = nn.Linear(2, 2, bias=False)
    >>> _ = model.weight.data.copy_(torch.tensor([[1.0, -3.0], [0.0, 0.0]]))
    >>> batch = {"x": torch.tensor([[0.5, 0.5]]), "y": torch.tensor([0])}
    >>> def predict(model, batch):
    ...     return model(batch["x"]), batch["y"]
    >>> perturb(model, predict, batch, Attack("fgsm", 0.25))["x"]
    tensor([[0.2500, 0.7500]])
    """
    generator = generator or torch.Generator().manual_seed(0)
    with undisturbed(model), torch.inference_mode(False), torch.no_grad():
        return attacked(model, predict, batch, attack, key, bounds, generator)


def attacked(
    model: nn.Module,
    predict: Predict,
    batch: Any,
    attack: Attack,
    key: str | int | None,
    bounds: Bounds | None,
    generator: torch.Generator,
) -> Any:
    """:func:`perturb`, inside its care for the model."""
    key = _key(batch, key)
    clean = batch[key].detach().clone()  # no inference tensor, nor part of someone's graph
    low, high = (torch.as_tensor(bound).to(clean) for bound in bounds or (-math.inf, math.inf))
    if bool((clean < low).any() or (clean > high).any()):
        raise ValueError(
            f"the clean inputs are outside bounds: they reach from {float(clean.min()):g} to "
            f"{float(clean.max()):g}; give the range of {key!r} as the model gets it"
        )
    plan = attack.row()
    x = clean
    if plan["random_start"]:
        x = (clean + attack.start(clean, generator)).clamp(low, high)
    for _ in range(plan["steps"]):
        step = plan["step_size"] * attack.direction(_gradient(model, predict, batch, key, x))
        # bounds hold clean, so that clamping to them moves towards it and stays in the ball
        x = (clean + attack.project(x + step - clean)).clamp(low, high)
    return _put(batch, key, x)


def _gradient(model: nn.Module, predict: Predict, batch: Any, key: Any, x: Tensor) -> Tensor:
    """∇_x of each sample's loss, times a number of each sample."""
    x = x.detach().requires_grad_()
    with torch.enable_grad():
        logits, targets = check_logits(predict(model, _put(batch, key, x)), "an attack", "predict")
        if logits.requires_grad:
            slope = _slope(logits.detach(), targets)
            found = torch.autograd.grad(logits, x, slope.to(logits.dtype), allow_unused=True)[0]
            if found is not None:
                if not found.isfinite().all():
                    raise ArithmeticError(f"the gradient at input {key!r} is NaN or infinite")
                return found
    raise ValueError(
        f"predict returned logits that do not depend on input {key!r} by operations that have a "
        f"gradient: it is unused, or something is detached or computed under no_grad"
    )


def _slope(logits: Tensor, targets: Tensor) -> Tensor:
    """∂ℓ_b/∂logits, times a number of each sample; float64, as ``logits`` [B, ..., C].

    It is ``p_c`` and, at the target, minus the sum of the others, which does not round to zero
    where ``p − 1`` does; in logarithms, which do not where p does. All predicted positions of a
    sample weigh alike in its loss, whatever the reduction.
    """
    predicted = targets != IGNORE
    sample, target = predicted.nonzero()[:, 0], targets[predicted].long()[:, None]
    logs = predicted_logits(logits, targets).double().log_softmax(-1)
    logs = logs.scatter(1, target, -math.inf)
    largest = logs.new_full((len(targets),), -math.inf)
    largest = largest.scatter_reduce(0, sample, logs.logsumexp(1), "amax")
    largest = largest.where(largest > -math.inf, 0.0)  # no other class is possible: no slope
    slope = (logs - largest[sample, None]).exp()
    slope = slope.scatter(1, target, -slope.sum(1, keepdim=True))
    return slope.new_zeros(logits.shape).index_put((predicted,), slope)


def _key(batch: Any, key: str | int | None) -> Any:
    """Where in ``batch`` the inputs are."""
    if not isinstance(batch, Mapping | tuple | list):
        raise ValueError(
            f"an attack needs a batch that is a dict, tuple or list, got {type(batch).__name__}"
        )
    held = dict(batch.items() if isinstance(batch, Mapping) else enumerate(batch))
    floats = [k for k, v in held.items() if isinstance(v, Tensor) and v.is_floating_point()]
    if key is not None and key not in floats:
        raise ValueError(f"the batch holds no float tensor {key!r}; float tensors: {floats}")
    if not floats:
        raise ValueError(
            f"an attack changes float inputs, and the batch holds none (keys: {list(held)}): token "
            f"ids cannot be moved by a gradient; give their embeddings as inputs, or use noise"
        )
    if key is None and len(floats) > 1:
        raise ValueError(f"the batch holds several float tensors; say which by key=: {floats}")
    return floats[0] if key is None else key


def _put(batch: Any, key: Any, x: Tensor) -> Any:
    if isinstance(batch, Mapping):
        return {**batch, key: x}
    return type(batch)(x if i == key else value for i, value in enumerate(batch))


def normal(like: Tensor, generator: torch.Generator) -> Tensor:
    """A standard normal draw, in float32 or wider."""
    draw = torch.randn(
        like.shape,
        generator=generator,
        device=generator.device,
        dtype=torch.promote_types(like.dtype, torch.float32),
    )
    return draw.to(like.device)


def _norms(x: Tensor) -> Tensor:
    """L2 of each sample, float64 [B]: squares of small gradients vanish in float32."""
    return torch.linalg.vector_norm(x.reshape(len(x), -1), dim=1, dtype=torch.float64)


def _unit(x: Tensor) -> Tensor:
    norms = _norms(x)
    return (x / _per_sample(norms + (norms == 0), x)).to(x.dtype)


def _per_sample(values: Tensor, like: Tensor) -> Tensor:
    """[B] as [B, 1, ...]."""
    return values.reshape(-1, *[1] * (like.ndim - 1))

"""Find the loss in a model's output, add a penalty to it, and a loss for soft labels."""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor, nn

from actsparse.blocks.pass_state import sites_asleep
from actsparse.blocks.trace import undisturbed
from actsparse.modify import Handle
from actsparse.observe import Seen
from actsparse.train.processes import everywhere, mean_of


def loss_of(output: Any) -> Tensor | None:
    """The scalar loss in a model's output, or None."""
    first = output.get("loss") if isinstance(output, dict) else output
    if isinstance(first, tuple | list) and first:
        first = first[0]
    return first if isinstance(first, Tensor) and first.dim() == 0 else None


def with_loss(output: Any, loss: Tensor) -> Any:
    """The output with another loss."""
    if isinstance(output, dict):
        output["loss"] = loss
        return output
    return loss if isinstance(output, Tensor) else type(output)((loss, *output[1:]))


def divides_by_items(model: nn.Module, args: Any, kwargs: dict[str, Any]) -> bool | None:
    """Whether the model's loss heeds ``num_items_in_batch``; many take it and do not.

    None where this batch does not tell.
    """
    if kwargs.get("labels") is None:  # Trainer makes the loss itself, and heeds it
        return True
    items = kwargs["num_items_in_batch"]
    with undisturbed(model), sites_asleep(), torch.no_grad():
        once, half = (
            loss_of(model(*args, **{**kwargs, "num_items_in_batch": count}))
            for count in (items, 2 * items)
        )
    return bool(once != half) if once else None


class TrainingFailed(RuntimeError):
    """Training cannot go on, because the loss is not finite or the model cannot be measured.

    Args:
        step: the number of optimizer steps done.
        reason: why.

    >>> raise TrainingFailed(7, "the loss is nan")
    Traceback (most recent call last):
    ...
    actsparse.train.loss.TrainingFailed: stopped after 7 steps: the loss is nan
    """

    def __init__(self, step: int, reason: str) -> None:
        super().__init__(f"stopped after {step} steps: {reason}")
        self.step, self.reason = step, reason


class JoinedLoss:
    """The hooks on a model's loss in training: a penalty joins it, and no NaN leaves it.

    ``group`` batches make an optimizer step. ``devices`` is what Trainer multiplies a loss by that
    it averages over all devices' tokens, ``scaler`` Accelerate's, under fp16. What the gradients
    are of, which ``seen`` reads, follows from these.
    """

    def __init__(self, handle: Handle, seen: Seen | None) -> None:
        self.handle, self.seen = handle, seen
        self.step, self.group, self.devices = 0, 1, 1
        self.scaler: Any = None
        self.shared: bool | None = None  # whether the model divides by the step's items
        self.missing = False  # Trainer makes the loss itself
        self.penalised = False
        self.reset()

    def begin(self, step: int, group: int, loader: Any) -> None:
        """Begin an optimizer step of ``group`` batches; an epoch's last may have fewer."""
        self.step, self.group = step, group
        if group > 1 and hasattr(loader, "__len__"):
            batches = len(loader)
            done = step % max(1, math.ceil(batches / group)) * group
            self.group = min(group, batches - done)

    def reset(self) -> None:
        """Begin a line of the record."""
        self.sum = 0.0  # of the loss without penalty
        self.penalty: float | Tensor = 0.0

    def attach(self, model: nn.Module) -> list[Any]:
        """Hook on to the model."""
        return [
            model.register_forward_pre_hook(self._on_call, with_kwargs=True),
            model.register_forward_hook(self._on_forward, with_kwargs=True),
        ]

    def means(self, steps: int, logged: float, device: torch.device) -> tuple[float, float | None]:
        """Loss and penalty of all processes, over the steps since the last line.

        ``logged`` is Trainer's figure for both together.
        """
        loss, penalty = mean_of([self.sum / steps, float(self.penalty) / steps], device)
        return logged - penalty if self.missing else loss, penalty if self.penalised else None

    def state_dict(self) -> dict[str, Any]:
        """The line that was begun."""
        return {"sum": self.sum, "penalty": float(self.penalty), "penalised": self.penalised}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Go on with it."""
        self.sum, self.penalty = state["sum"], state["penalty"]
        self.penalised = state["penalised"]

    def _on_call(self, model: nn.Module, args: Any, kwargs: dict[str, Any]) -> None:
        """Say whose gradients the readings of this pass are."""
        if not model.training or self.seen is None or not self.seen.leaves("train"):
            return
        items = kwargs.get("num_items_in_batch")
        if items is not None and self.shared is None and self.group * self.devices > 1:
            self.shared = divides_by_items(model, args, kwargs)
        weighing = self.seen.weighing
        amp = 1.0 if self.scaler is None else self.scaler.get_scale()
        if items is None:
            weighing.reduction, weighing.scale = "mean", amp / self.group
            return
        if self.shared is False:  # its loss is the mean over its own batch, come what may
            items = kwargs["labels"].ne(-100).sum()
        weighing.reduction, weighing.scale = "sum", amp * self.devices / float(items)

    def _on_forward(self, model: nn.Module, args: Any, kwargs: dict[str, Any], output: Any) -> Any:
        if not model.training or not torch.is_grad_enabled():
            return None
        # Given num_items_in_batch, the loss is a share of the step's, else Trainer divides it.
        shared = kwargs.get("num_items_in_batch") is not None
        share = self.group * self.devices if shared else 1
        loss = loss_of(output)
        penalty = self.handle.penalty()
        if loss is None:
            self.missing = True
            if penalty.requires_grad:
                raise ValueError(
                    f"the penalty has no loss to join: {type(model).__name__} was called without "
                    f"labels, as Trainer does for label_smoothing_factor and compute_loss_func; "
                    f"leave these out, or add handle.penalty() to your loss yourself"
                )
            return None
        total = loss
        if penalty.requires_grad:
            self.penalised = True
            self.penalty = self.penalty + penalty.detach() / self.group
            total = loss + penalty / share
        value = total.item()
        if not everywhere(math.isfinite(value), total.device):
            here = not math.isfinite(value)
            what = value if here else "NaN or infinite in another process"
            raise TrainingFailed(self.step, f"the loss became {what}")
        own = value if total is loss else loss.item()
        self.sum += own * self.devices if shared else own / self.group
        return output if total is loss else with_loss(output, total)


class SoftCrossEntropy:
    """Cross-entropy with classes [B] or their probabilities [B, C], in nats, mean over samples.

    ``smoothing`` applies in training mode alone. It stands in for a model's ``loss_function``:
    transformers reads probabilities as several labels at once.

    >>> loss = SoftCrossEntropy(nn.Identity().eval(), 0.1)
    >>> round(loss(torch.tensor([1]), torch.zeros(1, 4)).item(), 4)
    1.3863
    """

    def __init__(self, model: nn.Module, smoothing: float = 0.0) -> None:
        self.model = model
        self.smoothing = smoothing

    def __call__(self, labels: Tensor, logits: Tensor, config: Any = None, **kwargs: Any) -> Tensor:
        """A scalar."""
        smoothing = self.smoothing if self.model.training else 0.0
        return nn.functional.cross_entropy(
            logits.float(), labels.to(logits.device), label_smoothing=smoothing
        )

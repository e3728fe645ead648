"""The loss in what a model returns: finding it, adding to it, and one for soft labels."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from actsparse.blocks.passage import sites_asleep
from actsparse.blocks.trace import undisturbed


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

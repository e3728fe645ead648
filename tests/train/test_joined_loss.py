"""A penalty joins the loss in the same share, however the step's loss is made."""

from __future__ import annotations

import copy

import pytest
import torch
from torch import Tensor, nn

from actsparse import ActivationPenalty, sparsify
from actsparse.train.loss import JoinedLoss

B, T, D, H, CLASSES = 2, 3, 4, 6, 5


class Model(nn.Module):
    """Classifies tokens; ``heeds``: its loss is a sum over ``num_items_in_batch``."""

    def __init__(self, heeds: bool) -> None:
        super().__init__()
        self.heeds = heeds
        self.up, self.act, self.down = nn.Linear(D, H), nn.GELU(), nn.Linear(H, D)
        self.head = nn.Linear(D, CLASSES)
        self.double()

    def forward(
        self, x: Tensor, labels: Tensor | None = None, num_items_in_batch: int | None = None
    ) -> dict[str, Tensor]:
        scores = self.head(x + self.down(self.act(self.up(x))))
        if labels is None:
            return {"logits": scores}
        heeded = num_items_in_batch if self.heeds else None
        items = labels.numel() if heeded is None else heeded
        total = nn.functional.cross_entropy(scores.flatten(0, 1), labels.flatten(), reduction="sum")
        return {"loss": total / items, "logits": scores}


def batch() -> tuple[Tensor, Tensor]:
    x = torch.randn(B, T, D, dtype=torch.float64)
    return x, torch.randint(CLASSES, (B, T))


@pytest.mark.parametrize("group", [1, 3])
@pytest.mark.parametrize("heeds", [True, False, None], ids=["heeds", "ignores", "not given"])
def test_a_step_pays_the_mean_of_its_batches_penalties(heeds: bool | None, group: int) -> None:
    model = Model(bool(heeds))
    batches = [batch() for _ in range(group)]
    by_hand, config = copy.deepcopy(model), ActivationPenalty("l1", weight=50.0)
    handle = sparsify(by_hand, config, inputs=batches[0][0])
    penalties, losses = [], []
    for x, labels in batches:
        loss = by_hand(x, labels)["loss"]
        losses.append(loss.item())
        penalties.append(handle.penalty().item())

    joined = JoinedLoss(sparsify(model, config, inputs=batches[0][0]), None)
    joined.group = group
    joined.attach(model)
    given = {} if heeds is None else {"num_items_in_batch": group * B * T}
    for (x, labels), loss_alone, penalty in zip(batches, losses, penalties, strict=True):
        total = model(x, labels=labels, **given)["loss"].item()
        # a share of the step's loss with a share of the penalty, or a batch's own with its own
        share = 1 if heeds is None else group
        loss_alone = loss_alone / group if heeds else loss_alone
        assert total == pytest.approx(loss_alone + penalty / share, rel=1e-13)
    assert float(joined.penalty) == pytest.approx(sum(penalties) / group, rel=1e-13)

"""GELU checkpoints: mixing begins at the very GELU and ends silent."""

from __future__ import annotations

import copy
import math
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from actsparse import SwapActivation, observe, sparsify
from actsparse.modify.adapters import lora_config
from tests.modify.lora_models import built, outputs

peft = pytest.importorskip("peft")

# peft 0.21 of transformers 5.23
pytestmark = pytest.mark.filterwarnings("ignore:`is_gradient_checkpointing` is deprecated")


GELUS = ["gelu", "gelu_new", "gelu_pytorch_tanh", "gelu_fast", "quick_gelu", "gelu_python"]


class Functional(nn.Module):
    """A block that calls its GELU as a function."""

    def __init__(self, approximate: str) -> None:
        super().__init__()
        self.norm, self.up, self.down = nn.LayerNorm(8), nn.Linear(8, 32), nn.Linear(32, 8)
        self.approximate = approximate

    def forward(self, x: Tensor) -> Tensor:
        z = self.up(self.norm(x))
        return x + self.down(nn.functional.gelu(z, approximate=self.approximate))


def gelu_model(kind: str) -> tuple[nn.Module, Any]:
    if kind.startswith("F."):
        return Functional(kind.removeprefix("F.")), torch.randn(2, 5, 8)
    if kind.startswith("nn."):
        act = nn.GELU(kind.removeprefix("nn."))
        layers = (nn.LayerNorm(8), nn.Linear(8, 32), act, nn.Linear(32, 8))
        return nn.Sequential(*layers), torch.randn(2, 5, 8)
    model, inputs = built("vit-classifier")
    config = copy.deepcopy(model.config)
    config.hidden_act = kind
    return type(model)(config).eval(), inputs


@pytest.mark.parametrize("to", ["relu", "jsrelu"])
@pytest.mark.parametrize("kind", [*GELUS, "nn.none", "nn.tanh", "F.none", "F.tanh"])
def test_mixing_begins_at_the_checkpoints_gelu_and_ends_at_the_new_activation(
    kind: str, to: str
) -> None:
    model, inputs = gelu_model(kind)
    before = outputs(model, inputs)
    swapped = copy.deepcopy(model)
    sparsify(swapped, SwapActivation(to), inputs=inputs)
    handle = sparsify(model, SwapActivation(to, mix=4), inputs=inputs)
    for first, second in zip(before, outputs(model, inputs), strict=True):
        assert torch.equal(first, second)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.0)
    handle.attach(optimizer)
    for _ in range(4):
        between = outputs(model, inputs)
        optimizer.step()
    last = outputs(model, inputs)
    assert not torch.equal(between[0], last[0])
    assert not torch.equal(before[0], between[0])
    for first, second in zip(outputs(swapped, inputs), last, strict=True):
        assert torch.equal(first, second)


@pytest.mark.parametrize("way", ["full", "lora"])
def test_the_papers_finetuning_silences_a_gelu_checkpoint(way: str) -> None:
    model, inputs = built("vit-classifier")
    assert model.config.hidden_act == "gelu"
    if way == "lora":
        model = peft.get_peft_model(model, lora_config(model, inputs, r=8, keep="classifier"))
    handle = sparsify(model, "paper-finetune", inputs=inputs)
    trained = [p for p in model.parameters() if p.requires_grad]
    optimizer = torch.optim.AdamW(trained, lr=3e-3)
    handle.attach(optimizer, steps=30)
    images, labels = torch.randn(8, 3, 16, 16), torch.arange(8)

    def density() -> float:
        with observe(model.eval(), "density") as seen, torch.no_grad():
            model(pixel_values=images)
        return seen.summary("inference")["density"]

    first, losses = density(), []
    for _ in range(30):
        optimizer.zero_grad()
        loss = model.train()(pixel_values=images, labels=labels).loss
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    assert handle.step == 30
    assert all(map(math.isfinite, losses))
    assert losses[-1] < losses[0]
    assert first > 0.999  # GELU is zero nowhere but far out
    assert density() < 0.75
    assert all(bool((b.norm.parameter("scale").abs() >= 1).all()) for b in handle.blocks)

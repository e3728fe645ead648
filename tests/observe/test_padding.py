"""What counts as a token, and what as an activation, where the model says so only by the way."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from transformers import T5Config, T5ForConditionalGeneration

from actsparse import observe


@pytest.mark.parametrize("compiled", [False, True])
def test_a_decoder_counts_no_token_whose_label_is_padding(compiled: bool) -> None:
    config = T5Config(
        vocab_size=50, d_model=16, d_ff=32, d_kv=8, num_layers=1, num_heads=2,
        decoder_start_token_id=0,
    )  # fmt: skip
    model = T5ForConditionalGeneration(config)
    ids, labels = torch.randint(2, 50, (2, 6)), torch.randint(2, 50, (2, 8))
    labels[0, 3:], labels[1, 5:] = -100, -100
    with observe(model, inputs={"input_ids": ids, "labels": labels}) as seen:
        run = torch.compile(model, backend="eager", fullgraph=True) if compiled else model
        run(input_ids=ids, labels=labels)
        summary = seen.summary("train")
        assert summary is not None
        assert [row["tokens"] for row in summary["blocks"]] == [12, 3 + 5]
        seen.reset()
        model(input_ids=ids, decoder_input_ids=labels.clamp(min=0))  # no old labels here
        again = seen.summary("train")
    assert again is not None
    assert [row["tokens"] for row in again["blocks"]] == [12, 16]


class InPlace(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.up, self.down = nn.Linear(8, 64), nn.Linear(64, 8)
        self.hidden: Tensor | None = None

    def forward(self, x: Tensor) -> Tensor:
        a = F.relu(self.up(x))
        self.hidden = a.detach().clone()
        return x + self.down(F.dropout(a, 0.5, self.training, inplace=True))


def test_density_is_taken_before_a_dropout_that_works_in_place() -> None:
    model, x = InPlace().train(), torch.randn(5, 4, 8)
    with observe(model, inputs=x) as seen:
        model(x)
        summary = seen.summary("train")
    assert summary is not None
    assert model.hidden is not None
    assert summary["density"] == (model.hidden != 0).double().mean().item()

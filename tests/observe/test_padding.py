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


class Masked(nn.Module):
    """A model that is told of padding under a name of its own."""

    def __init__(self) -> None:
        super().__init__()
        self.embed, self.mlp = nn.Embedding(40, 8), InPlace()

    def forward(self, ids: Tensor, **told: Tensor) -> Tensor:
        return self.mlp(self.embed(ids))


@pytest.mark.parametrize(
    "name", ["pad_mask", "src_mask", "valid", "is_pad", "lengths", "seq_lens", "token_masks"]
)
def test_padding_that_is_told_under_another_name_is_asked_for(name: str) -> None:
    model, ids = Masked().eval(), torch.randint(0, 40, (3, 5))
    lengths = torch.tensor([2, 3, 5])
    keep = torch.arange(5) < lengths[:, None]
    told = lengths if "len" in name else keep
    with torch.no_grad(), observe(model, inputs={"ids": ids}):
        with pytest.raises(ValueError, match=rf"called with {name} of shape"):
            model(ids, **{name: told})
        model(ids, **{name: torch.full_like(told, 5)})  # hides nothing
    with torch.no_grad(), observe(model, inputs={"ids": ids}, mask=keep) as seen:
        model(ids, **{name: told})
    summary = seen.summary("inference")
    assert summary is not None
    assert summary["blocks"][0]["tokens"] == 10


@pytest.mark.parametrize(
    "name", ["encoder_attention_mask", "head_mask", "cross_mask", "global_attention_mask"]
)
def test_masks_of_other_things_than_padding_are_let_pass(name: str) -> None:
    model, ids = Masked().eval(), torch.randint(0, 40, (3, 5))
    with torch.no_grad(), observe(model, inputs={"ids": ids}) as seen:
        model(ids, **{name: torch.rand(3, 5) > 0.5})
    summary = seen.summary("inference")
    assert summary is not None
    assert summary["blocks"][0]["tokens"] == 15

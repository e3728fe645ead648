"""Second derivatives through the attention that Hugging Face models use by default."""

from __future__ import annotations

from typing import Any

import pytest
import torch
import transformers as hf
from torch import Tensor, nn

from actsparse.observe.curvature_product import Matrix
from actsparse.observe.loss import IGNORE
from tests.observe.test_curvature_product import MATRICES, PRODUCTS, Batch, columns, tolerance


def vit(attention: str) -> tuple[nn.Module, dict[str, Tensor]]:
    config = hf.ViTConfig(
        hidden_size=8, num_hidden_layers=2, num_attention_heads=2, intermediate_size=16,
        image_size=8, patch_size=4, num_labels=3, attn_implementation=attention,
    )  # fmt: skip
    batch = {"pixel_values": torch.randn(2, 3, 8, 8).double(), "labels": torch.tensor([0, 2])}
    return hf.ViTForImageClassification(config).double(), batch


def gpt2(attention: str) -> tuple[nn.Module, dict[str, Tensor]]:
    config = hf.GPT2Config(
        n_embd=8, n_layer=2, n_head=2, vocab_size=11, n_positions=6, bos_token_id=0,
        eos_token_id=0, attn_implementation=attention,
    )  # fmt: skip
    ids, keep = torch.randint(11, (2, 6)), torch.ones(2, 6, dtype=torch.long)
    keep[1, 4:] = 0
    batch = {"input_ids": ids, "attention_mask": keep, "labels": ids.where(keep == 1, IGNORE)}
    return hf.GPT2LMHeadModel(config).double(), batch


def of_hugging_face(model: nn.Module, batch: dict[str, Tensor]) -> Batch:
    inputs = {key: value for key, value in batch.items() if key != "labels"}
    logits, labels = model(**inputs).logits, batch["labels"]
    return (logits, labels) if labels.ndim == 1 else (logits[:, :-1], labels[:, 1:])


@pytest.mark.parametrize("matrix", MATRICES)
@pytest.mark.parametrize("build", [vit, gpt2])
def test_default_attention_has_second_derivatives(build: Any, matrix: Matrix) -> None:
    fused, batch = build("sdpa")
    eager, _ = build("eager")
    eager.load_state_dict(fused.state_dict())
    v = {name: torch.randn_like(p) for name, p in fused.named_parameters()}
    product = columns(PRODUCTS[matrix](fused, of_hugging_face, [batch], v))
    expected = columns(PRODUCTS[matrix](eager, of_hugging_face, [batch], v))
    # each entry: 12 positions or 10 tokens, through two blocks of some 2000 products; but eager ViT
    # takes its two softmaxes in float32, which enter the product a few times each
    error = tolerance(expected, terms=12 * 2 * 2000)
    if build is vit:
        error += 16 * 2**-24 * float(expected.abs().max())
    assert (product - expected).abs().max() < error

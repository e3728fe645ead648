"""What the papers' finetuning recipe would do to models with RMSNorm, it says or refuses."""

from __future__ import annotations

import pytest
import torch
from transformers import LlamaConfig, LlamaForCausalLM

from actsparse import NormFloor, ZerothBias, sparsify

IDS = torch.arange(12).view(2, 6)


def llama(positions: int) -> LlamaForCausalLM:
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=40, hidden_size=64, intermediate_size=96, num_hidden_layers=1,
        num_attention_heads=2, num_key_value_heads=2, max_position_embeddings=positions,
    )  # fmt: skip
    model = LlamaForCausalLM(config).eval()
    with torch.no_grad():
        model.model.layers[0].post_attention_layernorm.weight.fill_(0.2)
    return model


def test_a_floor_far_above_trained_scales_is_refused_with_the_factor() -> None:
    model = llama(64)
    with pytest.raises(ValueError, match=r"median 0\.2, 5 times.*at most 0\.6"):
        sparsify(model, "paper-finetune", inputs=IDS)
    sparsify(model, NormFloor(0.55, uplift=0.5), inputs=IDS)


def test_zeroth_biases_of_long_contexts_take_the_length_of_the_inputs_and_say_their_size() -> None:
    model = llama(2**17)
    handle = sparsify(model, ZerothBias(finetune=True), inputs=IDS)
    note = handle.rows()[0]["change"]
    assert "6 positions (the length seen in inputs" in note
    assert f"{2**17 * 64:,} parameters" in note
    with pytest.raises(ValueError, match="beyond the zeroth bias table of 6 positions"):
        model(torch.arange(9)[None])
    (given,) = sparsify(llama(64), ZerothBias(length=2**15), inputs=IDS).rows()
    assert "2,097,152 parameters" in given["change"]
    assert "64 positions" in sparsify(llama(64), ZerothBias(), inputs=IDS).rows()[0]["change"]

"""Small decoders with large zeroth biases, and two prompts for them."""

# ruff: noqa: C408  (a table of keyword arguments reads as one)
from __future__ import annotations

import copy
import functools
import inspect
from collections.abc import Callable
from typing import Any

import torch
import transformers as hf
from torch import Tensor, nn

from actsparse import ZerothBias, sparsify

V, D, H, LONGEST, NEW = 61, 32, 64, 40, 12
TOKENS = dict(vocab_size=V, bos_token_id=None, eos_token_id=None, pad_token_id=0)
SIZE = dict(hidden_size=D, num_hidden_layers=2, num_attention_heads=4, **TOKENS)
# its name from transformers 5.24 on, and before
CACHE = (
    "cache" if "cache" in inspect.signature(hf.LlamaModel.forward).parameters else "past_key_values"
)
SHORT, LONG = [5, 9, 3], [7, 2, 11, 4, 8, 6]  # two prompts; a batch pads the first on the left


def gpt2() -> nn.Module:
    size = dict(n_embd=D, n_inner=H, n_layer=2, n_head=4, n_positions=LONGEST)
    return hf.GPT2LMHeadModel(hf.GPT2Config(**size, **TOKENS))


def llama() -> nn.Module:
    config = hf.LlamaConfig(**SIZE, intermediate_size=H, max_position_embeddings=LONGEST)
    return hf.LlamaForCausalLM(config)


def opt() -> nn.Module:
    config = hf.OPTConfig(**SIZE, ffn_dim=H, word_embed_proj_dim=D, max_position_embeddings=LONGEST)
    return hf.OPTForCausalLM(config)


def bloom() -> nn.Module:  # ALiBi: its forward takes no position_ids
    return hf.BloomForCausalLM(hf.BloomConfig(hidden_size=D, n_layer=2, n_head=4, **TOKENS))


def t5() -> nn.Module:
    config = dict(d_model=D, d_kv=8, d_ff=H, num_layers=2, num_heads=4, **TOKENS)
    return hf.T5ForConditionalGeneration(hf.T5Config(**config, decoder_start_token_id=0))


def jamba() -> nn.Module:  # its first layers have a state in place of keys
    layers = dict(attn_layer_period=2, attn_layer_offset=1, expert_layer_period=2, num_experts=1)
    mamba = dict(mamba_d_state=4, mamba_d_conv=2, mamba_dt_rank=4, use_mamba_kernels=False)
    config = dict(intermediate_size=H, num_key_value_heads=2, num_experts_per_tok=1)
    return hf.JambaForCausalLM(hf.JambaConfig(**SIZE, **config, **layers, **mamba))


def mistral() -> nn.Module:  # attends, and keeps keys, four tokens back
    config = dict(intermediate_size=H, num_key_value_heads=2, max_position_embeddings=LONGEST)
    return hf.MistralForCausalLM(hf.MistralConfig(**SIZE, **config, sliding_window=4))


MODELS: dict[str, Callable[[], nn.Module]] = {
    "gpt2": gpt2, "llama": llama, "t5": t5, "opt": opt, "bloom": bloom, "jamba": jamba,
    "mistral": mistral,
}  # fmt: skip


@functools.cache
def built(name: str) -> nn.Module:
    torch.manual_seed(4)
    model = MODELS[name]().eval()
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.dim() == 2:  # weights large enough that tokens differ, logits are not flat
                parameter.copy_(torch.randn_like(parameter) * parameter.shape[-1] ** -0.5)
    ids = torch.tensor([LONG])
    inputs = {"input_ids": ids}
    if name == "t5":
        inputs["decoder_input_ids"] = ids[:, :2]
    sparsify(model, ZerothBias(length=LONGEST), inputs=inputs)
    return model


def tables(model: nn.Module) -> list[nn.Parameter]:
    return [p for name, p in model.named_parameters() if name.endswith("zeroth_bias")]


def biased(name: str, size: float = 4.0) -> nn.Module:
    """The model with random tables, four times as large as what its norms put out."""
    model = copy.deepcopy(built(name))
    generator = torch.Generator().manual_seed(8)
    with torch.no_grad():
        for table in tables(model):
            table.copy_(size * torch.randn(table.shape, generator=generator))
    return model


def unpadded(prompt: list[int]) -> dict[str, Tensor]:
    ids = torch.tensor([prompt])
    return {"input_ids": ids, "attention_mask": torch.ones_like(ids)}


def left_padded() -> dict[str, Tensor]:
    width = len(LONG)
    rows = [[0] * (width - len(p)) + p for p in (SHORT, LONG)]
    ids = torch.tensor(rows)
    return {"input_ids": ids, "attention_mask": (ids != 0).long()}


def generate(model: nn.Module, inputs: dict[str, Tensor], **options: Any) -> tuple[Tensor, Tensor]:
    """The NEW tokens [B, NEW] and the logits [B, NEW, V] of each step, greedy."""
    options = dict(do_sample=False, max_new_tokens=NEW, min_new_tokens=NEW) | options
    out = model.generate(**inputs, **options, return_dict_in_generate=True, output_logits=True)
    return out.sequences[:, -NEW:], torch.stack(out.logits, 1)

"""Decoder-only models and mixtures of experts of transformers 5.23, and peft, read from source."""

# ruff: noqa: C408  (a table of keyword arguments reads as one)
from __future__ import annotations

from typing import Any

import transformers as hf
from torch import nn

from .case import Block, Build, Case, D, H, Inputs, V, blocks, ids, numbered, seeded
from .hf_encoders import SMALL, VIT, images

TOKENS = dict(vocab_size=V, bos_token_id=1, eos_token_id=2, pad_token_id=0)
SIZE = dict(
    hidden_size=D,
    intermediate_size=H,
    num_hidden_layers=2,
    num_attention_heads=2,
    max_position_embeddings=16,
    **TOKENS,
)
GROUPED = dict(SIZE, num_key_value_heads=1, head_dim=8)


def lm(model: type, config: type, ignore: tuple[str, ...] = (), **kwargs: Any) -> Build:
    return seeded(lambda: (model(config(**kwargs)), {"input_ids": ids()}), ignore)


# --- with two matrices -------------------------------------------------------------------------

GPT = dict(n_embd=D, n_inner=H, n_layer=2, n_head=2, n_positions=16, **TOKENS)
GPT2 = dict(
    name="mlp",
    up="mlp.c_fc",
    down="mlp.c_proj",
    act="mlp.act",
    fn="gelu_tanh",
    norm="ln_2",
    pos="pre",
    layout="Conv1D",
)
GPTJ = dict(
    name="mlp",
    up="mlp.fc_in",
    down="mlp.fc_out",
    act="mlp.act",
    fn="gelu_tanh",
    norm="ln_1",
    pos="pre",
    feeds=("attn.q_proj", "attn.k_proj", "attn.v_proj"),
)
NEOX = dict(
    name="mlp",
    up="mlp.dense_h_to_4h",
    down="mlp.dense_4h_to_h",
    act="mlp.act",
    fn="gelu",
    norm="post_attention_layernorm",  # parallel too: NeoX has a norm of its own for the MLP
    pos="pre",
)
PHI = dict(
    name="mlp",
    up="mlp.fc1",
    down="mlp.fc2",
    act="mlp.activation_fn",
    fn="gelu_tanh",
    norm="input_layernorm",
    pos="pre",
    feeds=("self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj"),
)
FALCON = dict(
    name="mlp",
    up="mlp.dense_h_to_4h",  # FalconLinear: input @ weight.T + bias
    down="mlp.dense_4h_to_h",
    act="mlp.act",
    fn="gelu",
    pos="pre",
)
QKV = ("self_attention.query_key_value",)
BLOOM = dict(FALCON, act="mlp.gelu_impl", fn="gelu_tanh", norm="post_attention_layernorm", h=4 * D)


def opt(**kwargs: Any) -> Build:
    size = dict(SIZE, ffn_dim=H, word_embed_proj_dim=D)
    del size["intermediate_size"]
    return lm(hf.OPTForCausalLM, hf.OPTConfig, **{**size, **kwargs})


def falcon(**kwargs: Any) -> Build:
    size = dict(hidden_size=D, ffn_hidden_size=H, num_hidden_layers=2, num_attention_heads=2)
    return lm(hf.FalconForCausalLM, hf.FalconConfig, **size, **TOKENS, **kwargs)


def bloom(**kwargs: Any) -> Build:
    return lm(
        hf.BloomForCausalLM, hf.BloomConfig, hidden_size=D, n_layer=2, n_head=2, **TOKENS, **kwargs
    )


def neox(parallel: bool) -> Build:
    return lm(hf.GPTNeoXForCausalLM, hf.GPTNeoXConfig, **SIZE, use_parallel_residual=parallel)


OPT = dict(up="fc1", down="fc2", act="activation_fn", fn="relu")
TWO_MATRICES = [
    Case(
        "gpt2",
        lm(hf.GPT2LMHeadModel, hf.GPT2Config, **GPT),
        blocks(numbered("transformer.h.{}"), **GPT2),
    ),
    Case(  # fc1 sees (B·T, D); the last norm of a layer feeds the MLP
        "opt-pre-norm",
        opt(),
        blocks(numbered("model.decoder.layers.{}"), **OPT, norm="final_layer_norm", pos="pre"),
    ),
    Case(
        "opt-post-norm-350m",
        opt(do_layer_norm_before=False, word_embed_proj_dim=8),
        blocks(
            numbered("model.decoder.layers.{}"),
            **OPT,
            norm="self_attn_layer_norm",
            pos="post",
            feeds=("residual",),
        ),
    ),
    Case(  # a norm with no parameter at all is a norm
        "opt-no-norm-weights-no-biases",
        opt(layer_norm_elementwise_affine=False, enable_bias=False),
        blocks(numbered("model.decoder.layers.{}"), **OPT, norm="final_layer_norm", pos="pre"),
    ),
    Case("neox-parallel", neox(True), blocks(numbered("gpt_neox.layers.{}"), **NEOX)),
    Case("neox-sequential", neox(False), blocks(numbered("gpt_neox.layers.{}"), **NEOX)),
    Case(
        "gptj",
        lm(hf.GPTJForCausalLM, hf.GPTJConfig, **GPT, rotary_dim=4),
        blocks(numbered("transformer.h.{}"), **GPTJ),
    ),
    Case(
        "phi",
        lm(hf.PhiForCausalLM, hf.PhiConfig, **SIZE),
        blocks(numbered("model.layers.{}"), **PHI),
    ),
    Case(  # 7b: attention and MLP read one norm
        "falcon-7b-parallel",
        falcon(),
        blocks(numbered("transformer.h.{}"), **FALCON, norm="input_layernorm", feeds=QKV),
    ),
    Case(  # 40b: two norms; mlp_output += attention_output, in place
        "falcon-40b-two-norms",
        falcon(new_decoder_architecture=True, num_kv_heads=1),
        blocks(numbered("transformer.h.{}"), **FALCON, norm="ln_mlp"),
    ),
    Case(  # 11b: new architecture with one norm
        "falcon-11b-one-norm",
        falcon(new_decoder_architecture=True, num_kv_heads=1, num_ln_in_parallel_attn=1),
        blocks(numbered("transformer.h.{}"), **FALCON, norm="input_layernorm", feeds=QKV),
    ),
    Case(
        "falcon-rw-sequential",
        falcon(parallel_attn=False, multi_query=False, alibi=True, bias=True),
        blocks(numbered("transformer.h.{}"), **FALCON, norm="post_attention_layernorm"),
    ),
    Case(  # GELU in an autograd.Function; the residual is added inside the MLP's forward
        "bloom",
        bloom(),
        blocks(numbered("transformer.h.{}"), **BLOOM),
    ),
    Case(
        "bloom-residual-after-norm",
        bloom(apply_residual_connection_post_layernorm=True),
        blocks(numbered("transformer.h.{}"), **{**BLOOM, "pos": "post", "feeds": ("residual",)}),
    ),
]

# --- gated -------------------------------------------------------------------------------------

LLAMA = dict(
    name="mlp",
    gate="mlp.gate_proj",
    up="mlp.up_proj",
    down="mlp.down_proj",
    act="mlp.act_fn",
    fn="silu",
    norm="post_attention_layernorm",
    pos="pre",
)
GEMMA = dict(LLAMA, fn="gelu_tanh", offset=1.0)
GEMMA2 = dict(GEMMA, norm="pre_feedforward_layernorm")  # a second norm acts on y
PHI3 = dict(
    LLAMA,
    gate="mlp.gate_up_proj",
    up="mlp.gate_up_proj",
    rows=(range(H), range(H, 2 * H)),
    act="mlp.activation_fn",
)
LAYERS = numbered("model.layers.{}")

GATED = [
    Case("llama", lm(hf.LlamaForCausalLM, hf.LlamaConfig, **GROUPED), blocks(LAYERS, **LLAMA)),
    Case(
        "llama-relu",  # ReLU-fied, with biases
        lm(hf.LlamaForCausalLM, hf.LlamaConfig, **GROUPED, hidden_act="relu", mlp_bias=True),
        blocks(LAYERS, **dict(LLAMA, fn="relu")),
    ),
    Case("qwen2", lm(hf.Qwen2ForCausalLM, hf.Qwen2Config, **GROUPED), blocks(LAYERS, **LLAMA)),
    Case("qwen3", lm(hf.Qwen3ForCausalLM, hf.Qwen3Config, **GROUPED), blocks(LAYERS, **LLAMA)),
    Case(
        "mistral", lm(hf.MistralForCausalLM, hf.MistralConfig, **GROUPED), blocks(LAYERS, **LLAMA)
    ),
    Case("gemma", lm(hf.GemmaForCausalLM, hf.GemmaConfig, **GROUPED), blocks(LAYERS, **GEMMA)),
    Case("gemma2", lm(hf.Gemma2ForCausalLM, hf.Gemma2Config, **GROUPED), blocks(LAYERS, **GEMMA2)),
    Case(
        "gemma3-text",
        lm(hf.Gemma3ForCausalLM, hf.Gemma3TextConfig, **GROUPED),
        blocks(LAYERS, **GEMMA2),
    ),
    Case(  # norms act on what attention and MLP return; the MLP reads the bare stream
        "olmo2",
        lm(hf.Olmo2ForCausalLM, hf.Olmo2Config, **SIZE),
        blocks(LAYERS, **dict(LLAMA, norm=None, pos="none")),
    ),
    Case("phi3", lm(hf.Phi3ForCausalLM, hf.Phi3Config, **SIZE), blocks(LAYERS, **PHI3)),
]

# --- mixtures of experts: batched weights, refused by name -------------------------------------

EXPERTS = numbered("model.layers.{}.mlp.experts")
SHARED = dict(
    name="shared_expert",
    gate="shared_expert.gate_proj",
    up="shared_expert.up_proj",
    down="shared_expert.down_proj",
    act="shared_expert.act_fn",
    fn="silu",
    norm="post_attention_layernorm",
    pos="pre",
    # the router (a bare F.linear on its own weight), the batched experts and the shared expert's
    # scalar gate read the same norm: whatever is added to its output reaches all of them
    feeds=("mlp.gate", "mlp.experts", "mlp.shared_expert_gate"),
    h=24,
)


def mixtral() -> Build:
    return lm(
        hf.MixtralForCausalLM,
        hf.MixtralConfig,
        **GROUPED,
        num_local_experts=4,
        num_experts_per_tok=2,
    )


def qwen2_moe(**kwargs: Any) -> Build:
    size = dict(SIZE, num_key_value_heads=1, moe_intermediate_size=20, num_experts=4)
    expert = dict(num_experts_per_tok=2, shared_expert_intermediate_size=24)
    return lm(hf.Qwen2MoeForCausalLM, hf.Qwen2MoeConfig, **size, **expert, **kwargs)


def shared_expert(layer: str) -> tuple[Block, ...]:
    return blocks([f"{layer}.mlp"], **SHARED, at_norm=layer)


MIXTURES = [
    Case("mixtral", mixtral(), (), refused=tuple(EXPERTS)),
    Case(
        "qwen2-moe-shared-expert",
        qwen2_moe(),
        shared_expert("model.layers.0") + shared_expert("model.layers.1"),
        refused=tuple(EXPERTS),
    ),
    Case(
        "qwen2-moe-first-layer-dense",
        qwen2_moe(mlp_only_layers=[0]),
        blocks(["model.layers.0"], **LLAMA) + shared_expert("model.layers.1"),
        refused=(EXPERTS[1],),
    ),
]


# --- peft --------------------------------------------------------------------------------------


PEFT_ASKS = "`is_gradient_checkpointing` is deprecated"  # peft 0.21 of transformers 5.23


def lora(make: Build, targets: list[str], transposed: bool = False) -> Build:
    """`make`'s model with LoRA on `targets`; imports peft only when built."""

    def build() -> tuple[nn.Module, Inputs]:
        import peft

        model, inputs = make()
        config = peft.LoraConfig(
            r=2,
            target_modules=targets,
            lora_dropout=0.1,
            init_lora_weights=False,
            fan_in_fan_out=transposed,
        )
        return peft.get_peft_model(model, config), inputs

    return seeded(build, (PEFT_ASKS,))


LORA = [
    Case(
        "lora-vit-mlp",
        lora(images(hf.ViTModel, hf.ViTConfig, **SMALL), ["fc1", "fc2"]),
        blocks(numbered("base_model.model.layers.{}"), **VIT),
    ),
    Case(
        "lora-llama-mlp",
        lora(GATED[0].build, ["gate_proj", "up_proj", "down_proj"]),
        blocks(numbered("base_model.model.model.layers.{}"), **LLAMA),
    ),
    Case(
        "lora-gpt2-mlp",
        lora(TWO_MATRICES[0].build, ["c_fc"], transposed=True),
        blocks(numbered("base_model.model.transformer.h.{}"), **GPT2),
    ),
    Case(  # the norm feeds the LoRA layers of the attention, not their insides
        "lora-phi-attention",
        lora(lm(hf.PhiForCausalLM, hf.PhiConfig, **SIZE), ["q_proj", "v_proj"]),
        blocks(numbered("base_model.model.model.layers.{}"), **PHI),
    ),
]

DECODERS = TWO_MATRICES + GATED + MIXTURES

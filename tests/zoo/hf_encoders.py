"""Encoders, vision, speech and encoder–decoders of transformers 5.23, read from their source."""

# ruff: noqa: C408  (a table of keyword arguments reads as one)
from __future__ import annotations

from typing import Any

import transformers as hf
from torch import nn

from .case import B, Build, Case, D, H, Inputs, V, blocks, ids, numbered, pixels, seeded, stream

# --- vision ------------------------------------------------------------------------------------

VIT = dict(
    name="mlp",
    up="mlp.fc1",
    down="mlp.fc2",
    act="mlp.activation_fn",
    fn="gelu",
    norm="layernorm_after",
    pos="pre",
)
SMALL = dict(hidden_size=D, intermediate_size=H, num_hidden_layers=2, num_attention_heads=2)
IMAGE = dict(image_size=16, patch_size=8)


def images(model: type, config: type, **kwargs: Any) -> Build:
    return seeded(lambda: (model(config(**IMAGE, **kwargs)), {"pixel_values": pixels()}))


def clip() -> tuple[nn.Module, Inputs]:
    text = dict(
        **SMALL,
        vocab_size=V,
        max_position_embeddings=8,
        bos_token_id=1,
        eos_token_id=6,
        pad_token_id=0,
    )
    vision = dict(SMALL, **IMAGE, intermediate_size=H + 8)
    config = hf.CLIPConfig(text_config=text, vision_config=vision, projection_dim=8)
    return hf.CLIPModel(config), {"input_ids": ids(), "pixel_values": pixels()}


CLIP = dict(VIT, fn="quick_gelu", norm="layer_norm2")
# depths 2 and 1: the width doubles between the stages
SWIN = dict(depths=[2, 1], num_heads=[1, 2], window_size=2, embed_dim=8, mlp_ratio=2.5)
DINO = dict(VIT, norm="norm2")
DINO_SIZE = dict(hidden_size=D, num_hidden_layers=2, num_attention_heads=2)

VISION = [
    Case(
        "vit-classifier",
        images(hf.ViTForImageClassification, hf.ViTConfig, num_labels=D, **SMALL),
        blocks(numbered("vit.layers.{}"), **VIT),
    ),
    Case(
        "vit-pooler-relu",
        images(hf.ViTModel, hf.ViTConfig, hidden_act="relu", **SMALL),
        blocks(numbered("layers.{}"), **dict(VIT, fn="relu")),
    ),
    Case(
        "deit-teacher",
        images(hf.DeiTForImageClassificationWithTeacher, hf.DeiTConfig, **SMALL),
        blocks(numbered("deit.layers.{}"), **VIT),
    ),
    Case(
        "dinov2",
        images(hf.Dinov2Model, hf.Dinov2Config, mlp_ratio=3, **DINO_SIZE),
        blocks(numbered("encoder.layer.{}"), **DINO, h=3 * D),
    ),
    Case(
        "dinov2-swiglu",
        images(
            hf.Dinov2Model,
            hf.Dinov2Config,
            mlp_ratio=3,
            use_swiglu_ffn=True,
            **DINO_SIZE,
        ),
        blocks(
            numbered("encoder.layer.{}"),
            name="mlp",
            gate="mlp.gate_proj",
            up="mlp.up_proj",
            down="mlp.down_proj",
            act="mlp.act_fn",
            fn="silu",
            norm="norm2",
            pos="pre",
            h=32,  # 48 · 2/3, a multiple of 8
        ),
    ),
    Case(
        "swin",
        seeded(
            lambda: (
                hf.SwinModel(hf.SwinConfig(image_size=16, patch_size=2, **SWIN)),
                {"pixel_values": pixels()},
            )
        ),
        blocks(numbered("encoder.layers.0.blocks.{}"), **VIT, d=8, h=20)
        + blocks(["encoder.layers.1.blocks.0"], **VIT, d=16, h=40),
    ),
    Case(
        "clip",
        seeded(clip),
        blocks(numbered("vision_model.encoder.layers.{}"), **CLIP, h=H + 8)
        + blocks(numbered("text_model.encoder.layers.{}"), **CLIP),
        ordered=False,  # vision runs first, text is declared first
    ),
]

# --- BERT and its family: post-norm, the residual adds the norm's output -----------------------

BERT = dict(
    up="intermediate.dense",
    down="output.dense",
    act="intermediate.intermediate_act_fn",
    fn="gelu",
    norm="attention.output.LayerNorm",
    pos="post",
    feeds=("residual",),
)


def text(model: type, config: type, vocab: int = V, **kwargs: Any) -> Build:
    fixed = dict(vocab_size=vocab, bos_token_id=None, eos_token_id=None, pad_token_id=0)
    return seeded(lambda: (model(config(**{**fixed, **kwargs})), {"input_ids": ids(vocab)}))


def bert(model: type, vocab: int = V, **kwargs: Any) -> Build:
    return text(model, hf.BertConfig, vocab, max_position_embeddings=16, **{**SMALL, **kwargs})


def roberta(model: type, vocab: int = V, **kwargs: Any) -> Build:
    return text(model, hf.RobertaConfig, vocab, max_position_embeddings=16, **SMALL, **kwargs)


DISTIL = dict(
    name="ffn",
    up="ffn.lin1",
    down="ffn.lin2",
    act="ffn.activation",
    fn="gelu",
    norm="sa_layer_norm",
    pos="post",
    feeds=("residual",),
)


def distilbert(model: type, vocab: int = V, **kwargs: Any) -> Build:
    size = dict(dim=D, hidden_dim=H, n_layers=2, n_heads=2, max_position_embeddings=16)
    return text(model, hf.DistilBertConfig, vocab, **size, **kwargs)


ALBERT = dict(
    up="ffn",
    down="ffn_output",
    act="activation",
    fn="gelu_tanh",
    norm="attention.LayerNorm",
    pos="post",
    feeds=("residual",),
)


def albert(model: type, vocab: int = V, **kwargs: Any) -> Build:
    size = dict(SMALL, num_hidden_layers=4, embedding_size=8, max_position_embeddings=16)
    return text(model, hf.AlbertConfig, vocab, **size, **kwargs)


MODERNBERT = dict(
    name="mlp",
    gate="mlp.Wi",  # act(input) * gate: what ModernBERT calls "input" is the gate here
    up="mlp.Wi",
    rows=(range(H), range(H, 2 * H)),
    down="mlp.Wo",
    act="mlp.act",
    fn="gelu",
    norm="mlp_norm",
    pos="pre",
    between=("mlp.drop",),
)


def modernbert(model: type, vocab: int = V, **kwargs: Any) -> Build:
    special = dict.fromkeys(("cls_token_id", "sep_token_id"))
    size = dict(SMALL, max_position_embeddings=16, local_attention=4)
    return text(model, hf.ModernBertConfig, vocab, **size, **special, **kwargs)


ALBERT_LAYER = "albert.encoder.albert_layer_groups.{}.albert_layers.0"
BERT_FAMILY = [
    Case("bert-pooler", bert(hf.BertModel), blocks(numbered("encoder.layer.{}"), **BERT)),
    Case(
        "bert-no-pooler",
        seeded(
            lambda: (
                hf.BertModel(hf.BertConfig(vocab_size=V, **SMALL), add_pooling_layer=False),
                {"input_ids": ids()},
            )
        ),
        blocks(numbered("encoder.layer.{}"), **BERT),
    ),
    Case(
        "bert-masked-lm",
        bert(hf.BertForMaskedLM),
        blocks(numbered("bert.encoder.layer.{}"), **BERT),
    ),
    Case(
        "bert-masked-lm-vocab-is-d_model",
        bert(hf.BertForMaskedLM, vocab=D),
        blocks(numbered("bert.encoder.layer.{}"), **BERT),
    ),
    Case(
        "bert-pretraining",
        bert(hf.BertForPreTraining),
        blocks(numbered("bert.encoder.layer.{}"), **BERT),
    ),
    Case(
        "bert-classifier",
        bert(hf.BertForSequenceClassification, num_labels=3),
        blocks(numbered("bert.encoder.layer.{}"), **BERT),
    ),
    Case(
        "bert-classifier-labels-is-d_model",
        bert(hf.BertForSequenceClassification, num_labels=D),
        blocks(numbered("bert.encoder.layer.{}"), **BERT),
    ),
    Case(  # feed_forward_chunk runs T/2 times a layer on slices of the norm's output
        "bert-chunked",
        bert(hf.BertModel, chunk_size_feed_forward=2),
        blocks(numbered("encoder.layer.{}"), **BERT),
    ),
    Case(
        "roberta-masked-lm",
        roberta(hf.RobertaForMaskedLM),
        blocks(numbered("roberta.encoder.layer.{}"), **BERT),
    ),
    Case(
        "roberta-classifier-labels-is-d_model",  # its tanh is torch.tanh, inline
        roberta(hf.RobertaForSequenceClassification, num_labels=D),
        blocks(numbered("roberta.encoder.layer.{}"), **BERT),
    ),
    Case(
        "distilbert-masked-lm-vocab-is-d_model",
        distilbert(hf.DistilBertForMaskedLM, vocab=D),
        blocks(numbered("distilbert.transformer.layer.{}"), **DISTIL),
    ),
    Case(
        "distilbert-classifier-labels-is-d_model",  # D → D, ReLU, dropout, D → D, all on one token
        distilbert(hf.DistilBertForSequenceClassification, num_labels=D),
        blocks(numbered("distilbert.transformer.layer.{}"), **DISTIL),
    ),
    Case(
        "albert-one-layer-used-four-times",
        albert(hf.AlbertForMaskedLM),
        blocks([ALBERT_LAYER.format(0)], **ALBERT),
    ),
    Case(
        "albert-two-groups",
        albert(hf.AlbertForSequenceClassification, num_labels=D, num_hidden_groups=2),
        blocks(numbered(ALBERT_LAYER), **ALBERT),
    ),
    Case(
        "modernbert",
        modernbert(hf.ModernBertModel, mlp_dropout=0.1),
        blocks(numbered("layers.{}"), **MODERNBERT),
    ),
    Case(
        "modernbert-masked-lm-vocab-is-d_model",  # head: dense, act, norm, decoder, all D wide
        modernbert(hf.ModernBertForMaskedLM, vocab=D),
        blocks(numbered("model.layers.{}"), **MODERNBERT),
    ),
]

# --- encoder–decoders and speech ---------------------------------------------------------------

T5 = dict(
    name="DenseReluDense",
    up="DenseReluDense.wi",
    down="DenseReluDense.wo",
    act="DenseReluDense.act",
    fn="relu",
    norm="layer_norm",
    pos="pre",
    between=("DenseReluDense.dropout",),
)
GATED_T5 = dict(
    T5, gate="DenseReluDense.wi_0", up="DenseReluDense.wi_1", fn="gelu_tanh"
)  # gelu_new: the tanh formula written out
T5_LAYERS = numbered("encoder.block.{}.layer.1") + numbered("decoder.block.{}.layer.2")


def t5(model: type = hf.T5ForConditionalGeneration, act: str = "relu") -> Build:
    config = dict(vocab_size=V, d_model=D, d_kv=8, d_ff=H, num_layers=2, num_heads=2)
    extra = {} if model is hf.T5EncoderModel else {"decoder_input_ids": ids()[:, :4]}
    return seeded(
        lambda: (model(hf.T5Config(**config, feed_forward_proj=act)), {"input_ids": ids(), **extra})
    )


SEQ = dict(
    d_model=D,
    encoder_layers=2,
    decoder_layers=2,
    encoder_attention_heads=2,
    decoder_attention_heads=2,
    encoder_ffn_dim=H,
    decoder_ffn_dim=H + 8,
    vocab_size=V,
    bos_token_id=1,
    pad_token_id=0,
    eos_token_id=2,
    decoder_start_token_id=2,
)
FC = dict(up="fc1", down="fc2", act="activation_fn", fn="gelu", between=("dropout()",))
BART = dict(FC, pos="post", feeds=("residual",))
WHISPER = dict(FC, norm="final_layer_norm", pos="pre")


def bart() -> tuple[nn.Module, Inputs]:
    config = hf.BartConfig(
        **SEQ, max_position_embeddings=16, activation_dropout=0.1, forced_eos_token_id=2
    )
    return hf.BartModel(config), {"input_ids": ids(), "decoder_input_ids": ids()[:, :4]}


def whisper() -> tuple[nn.Module, Inputs]:
    # activation_dropout is 0 here; F.dropout is called all the same
    size = dict(num_mel_bins=8, max_source_positions=10, max_target_positions=16)
    config = hf.WhisperConfig(**SEQ, **size, suppress_tokens=None, begin_suppress_tokens=None)
    return hf.WhisperModel(config), {
        "input_features": stream(B, 8, 20),
        "decoder_input_ids": ids()[:, :4],
    }


SPEECH = dict(
    name="feed_forward",
    up="feed_forward.intermediate_dense",
    down="feed_forward.output_dense",
    act="feed_forward.intermediate_act_fn",
    fn="gelu",
    between=("feed_forward.intermediate_dropout",),
)


def wav2vec2(**kwargs: Any) -> Build:
    conv = dict(conv_dim=(8, 8), conv_stride=(4, 4), conv_kernel=(8, 4), num_feat_extract_layers=2)
    small = dict(num_conv_pos_embeddings=4, num_conv_pos_embedding_groups=2, vocab_size=V)
    still = dict(apply_spec_augment=False, layerdrop=0.0)
    config = {**SMALL, **conv, **small, **still, **kwargs}
    return seeded(
        lambda: (hf.Wav2Vec2Model(hf.Wav2Vec2Config(**config)), {"input_values": stream(B, 160)})
    )


SPEECH_POST = dict(norm="layer_norm", pos="post", feeds=("residual",))

SEQ2SEQ = [
    Case("t5-relu", t5(), blocks(T5_LAYERS, **T5)),
    Case("t5-encoder", t5(hf.T5EncoderModel), blocks(T5_LAYERS[:2], **T5)),
    Case("t5-gated-gelu", t5(act="gated-gelu"), blocks(T5_LAYERS, **GATED_T5)),
    Case(
        "bart",  # post-norm; between cross attention and fc1 it is the decoder's second norm
        seeded(bart),
        blocks(numbered("encoder.layers.{}"), **BART, norm="self_attn_layer_norm")
        + blocks(numbered("decoder.layers.{}"), **BART, norm="encoder_attn_layer_norm", h=H + 8),
    ),
    Case(
        "whisper",
        seeded(whisper),
        blocks(numbered("encoder.layers.{}"), **WHISPER)
        + blocks(numbered("decoder.layers.{}"), **WHISPER, h=H + 8),
    ),
    Case(
        "wav2vec2-post-norm",
        wav2vec2(),
        blocks(
            numbered("encoder.layers.{}"),
            **SPEECH,
            norm="layer_norm",
            pos="post",
            feeds=("residual",),
        ),
    ),
    Case(
        "wav2vec2-stable",
        wav2vec2(do_stable_layer_norm=True, feat_extract_norm="layer"),
        blocks(numbered("encoder.layers.{}"), **SPEECH, norm="final_layer_norm", pos="pre"),
    ),
]

ENCODERS = VISION + BERT_FAMILY + SEQ2SEQ

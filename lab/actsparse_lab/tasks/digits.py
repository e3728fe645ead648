"""Digits: a ViT of two blocks on scikit-learn's 8×8 images, a minute on one core."""

from __future__ import annotations

from typing import Any

Settings = dict[str, Any]


def digits(quick: bool = False) -> Settings:
    """A ViT of two blocks, D = 48: a minute on one core, so the quick form is the same."""
    return {
        "steps": 1500,
        "batch_size": 64,
        "lr": 5e-3,
        "weight_decay": 0.5,
        "log_every": 50,
        "eval_every": 100,
        # A ViT that classifies from the mean over patches: BEiT's class, without its layer scale
        # and relative positions. From the class token, as Hugging Face's own ViT does it, the last
        # block's MLP would get no gradient at any other token, and its density would stay at one
        # half.
        "model": {
            "image_size": 8,
            "patch_size": 2,
            "num_channels": 1,
            "hidden_size": 48,
            "num_hidden_layers": 2,
            "num_attention_heads": 4,
            "intermediate_size": 192,
            "hidden_act": "relu",
            "use_absolute_position_embeddings": True,
            "layer_scale_init_value": 0.0,
            "drop_path_rate": 0.0,
            "initializer_range": 0.08,  # ViT-Base's 0.02, scaled by sqrt(768 / 48)
            "attn_implementation": "eager",  # the fastest at this size
        },
    }

"""T5 by span corruption: the papers' C4, from scratch and finetuned, and a small one on the web."""

from __future__ import annotations

from typing import Any

from actsparse_lab.tasks.finetune import finetuned, with_lora

Settings = dict[str, Any]

_BASE: Settings = {  # T5 1.0: ReLU, no gate
    "d_model": 768,
    "d_ff": 3072,
    "d_kv": 64,
    "num_heads": 12,
    "num_layers": 12,
    "num_decoder_layers": 12,
    "dropout_rate": 0.1,
    "feed_forward_proj": "relu",
}
_SMALL: Settings = _BASE | {
    "d_model": 512,
    "d_ff": 2048,
    "num_heads": 8,
    "num_layers": 6,
    "num_decoder_layers": 6,
}
_QUICK: Settings = {
    "steps": 300,
    "batch_size": 16,
    "warmup": 30,
    "gradient_checkpointing": False,
    "log_every": 50,
    "eval_every": 100,
    "save_every": None,
    "validate_on": 128,
    "workers": 0,
    "model": _BASE
    | {
        "d_model": 96,
        "d_ff": 384,
        "d_kv": 24,
        "num_heads": 4,
        "num_layers": 2,
        "num_decoder_layers": 2,
        "dropout_rate": 0.0,
    },
}


def t5_c4(quick: bool = False) -> Settings:
    """T5-Base on C4 from scratch, as in arXiv 2309.03004 (experiments, C4).

    100,000 steps of 256 rows of 512 tokens, AdamW at 0.01, 10,000 steps of warm-up and then
    1/√step. What has "bias" in its name does not decay (relative positions, zeroth biases); norm
    scales do. The quick form has two blocks a side, D = 96, and rows of 128.
    """
    settings: Settings = {
        "steps": 100_000,
        "batch_size": 256,
        "lr": 0.01,
        "schedule": "inverse_sqrt",
        "warmup": 10_000,
        "weight_decay": 1e-3,
        "no_decay": ("named_bias",),
        "clip": 1.0,
        "precision": "float32",
        "gradient_checkpointing": True,
        "log_every": 100,
        "eval_every": 2000,
        "save_every": 1000,
        "workers": 2,  # the order of the data depends on their number
        "report_to": ("tensorboard",),
        "model": _BASE,
        "data": {
            "shards": None,
            "tokenizer": None,
            "length": 512,
            "noise_density": 0.15,
            "mean_span": 3.0,
            "rows": 2048,
        },
    }
    if not quick:
        return settings
    return settings | _QUICK | {"data": settings["data"] | {"length": 128, "rows": 256}}


def t5_c4_finetune(quick: bool = False) -> Settings:
    """A trained T5-Base finetuned for sparsity: 10,000 steps, warm-up 1000, LoRA of rank 192.

    The recipe mixes the activation in and lifts the norms over 3000 steps.
    """
    settings = t5_c4(quick)
    steps: Settings = {"steps": 10_000, "warmup": 1000, "ramp": 3000}
    if quick:
        steps = {"steps": 150, "warmup": 15, "ramp": 45}
    return with_lora(finetuned(settings | steps))


def t5_web(quick: bool = False) -> Settings:
    """T5-small on a few thousand pages: minutes on one GPU."""
    if quick:
        return t5_c4(quick)
    return t5_c4() | {
        "steps": 3000,
        "batch_size": 128,
        "warmup": 300,
        "precision": "bf16",
        "gradient_checkpointing": False,
        "log_every": 50,
        "eval_every": 300,
        "save_every": 300,
        "model": _SMALL,
    }

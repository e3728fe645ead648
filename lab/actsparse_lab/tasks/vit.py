"""Vision Transformers: the papers' ImageNet-1K, from scratch and finetuned, and CIFAR-10."""

from __future__ import annotations

import os
from typing import Any

from actsparse_lab.tasks.finetune import finetuned, with_lora

Settings = dict[str, Any]

# Loading is by workers, and does not change what is loaded.
_WORKERS = min(8, os.cpu_count() or 1)

_SIZE_BASE: Settings = {
    "image_size": 224,
    "patch_size": 16,
    "hidden_size": 768,
    "num_hidden_layers": 12,
    "num_attention_heads": 12,
    "intermediate_size": 3072,
    "hidden_act": "relu",
    "layer_norm_eps": 1e-6,
    "hidden_dropout_prob": 0.0,
    "attention_probs_dropout_prob": 0.0,
}
_SIZE_SMALL: Settings = _SIZE_BASE | {
    "image_size": 32,
    "patch_size": 4,
    "hidden_size": 384,
    "num_attention_heads": 6,
    "intermediate_size": 1536,
}
_SIZE_QUICK: Settings = _SIZE_SMALL | {
    "hidden_size": 96,
    "num_hidden_layers": 4,
    "num_attention_heads": 4,
    "intermediate_size": 384,
}
_QUICK: Settings = {
    "steps": 400,
    "epochs": None,
    "batch_size": 64,
    "lr": 3e-3,
    "warmup": 0.1,
    "weight_decay": 1.0,
    "precision": "float32",
    "log_every": 50,
    "eval_every": 200,
    "save_every": None,
    "validate_on": 500,
    "workers": 0,
    "model": _SIZE_QUICK,
}


def vit_imagenet(quick: bool = False) -> Settings:
    """ViT-Base/16 on ImageNet-1K from scratch, as in arXiv 2309.03004 (experiments, ImageNet-1K).

    300 epochs of 625 whole batches of 2048 out of 1,281,167 images. All parameters decay, norm
    scales and biases too. The cosine falls once an epoch; no warm-up. The quick form is a small ViT
    at 32 px, with the same augmentation.
    """
    settings: Settings = {
        "steps": 187_500,
        "epochs": 300,
        "batch_size": 2048,
        "lr": 3e-3,
        "warmup": 0,
        "weight_decay": 0.3,
        "clip": 1.0,
        "label_smoothing": 0.11,
        "precision": "mixed",
        "log_every": 125,
        "eval_every": 3125,
        "save_every": 625,
        "workers": _WORKERS,
        "report_to": ("tensorboard",),
        "model": _SIZE_BASE,
        "data": {
            "path": None,
            "size": 224,
            "randaugment": (2, 9),
            "crop": (0.08, 1.0),
            "repeats": 3,  # of DeiT's sampler: a third of the images an epoch
            "mixup": 0.2,
            "cutmix": 1.0,
        },
    }
    if not quick:
        return settings
    return settings | _QUICK | {"data": settings["data"] | {"size": 32, "crop": (0.5, 1.0)}}


def vit_imagenet_finetune(quick: bool = False) -> Settings:
    """A trained ViT-Base/16 finetuned for sparsity: 15 epochs, LoRA of rank 192.

    Learning rate, decay and batch as from scratch; the recipe mixes the activation in and lifts
    the norms over 5 of the epochs (arXiv 2309.03004, finetuning for sparsity).
    """
    settings = vit_imagenet(quick)
    steps: Settings = {"steps": 200} if quick else {"steps": 9375, "epochs": 15}
    return with_lora(finetuned(settings | steps)) | {"program_swaps_at_once": True}


def vit_cifar10_finetune(quick: bool = False) -> Settings:
    """The ViT-S of `vit_cifar10`, finetuned whole for a third of its steps."""
    settings = vit_cifar10(quick)
    return finetuned(settings | {"steps": settings["steps"] // 3, "lr": 0.4 * settings["lr"]})


def cifar10(quick: bool = False) -> Settings:
    """A small ViT that classifies from the mean over patches, on 32 px images held in memory.

    As in `digits`, so that the last block's MLP gets a gradient at every token. A minute on one
    core, so the quick form is the same.
    """
    return {
        "steps": 2000,
        "batch_size": 64,
        "lr": 1e-3,
        "weight_decay": 0.1,
        "log_every": 100,
        "eval_every": 200,
        "data": {"path": None, "size": 32, "held_out": 0.1},
        "model": {
            "image_size": 32,
            "patch_size": 16,  # of few tokens: attention alone does not do it
            "hidden_size": 96,
            "num_hidden_layers": 2,
            "num_attention_heads": 4,
            "intermediate_size": 768,
            "hidden_act": "relu",
            "use_absolute_position_embeddings": True,
            "layer_scale_init_value": 0.0,
            "drop_path_rate": 0.0,
            "initializer_range": 0.057,  # ViT-Base's 0.02, scaled by sqrt(768 / 96)
            "attn_implementation": "eager",  # the fastest at this size
        },
    }


def vit_cifar10(quick: bool = False) -> Settings:
    """ViT-S, patches of 4 × 4, on 32 px images: minutes on one GPU.

    The quick form is a ViT of four blocks, D = 96, 400 steps. Neither trains to the end.
    """
    settings: Settings = {
        "steps": 7800,  # 100 epochs of 20,000 images
        "batch_size": 256,
        "lr": 1e-3,
        "warmup": 0.05,
        "weight_decay": 1.0,
        "label_smoothing": 0.11,
        "precision": "bf16",
        "log_every": 100,
        "eval_every": 780,
        "save_every": 780,
        "workers": _WORKERS,
        "report_to": ("tensorboard",),
        "model": _SIZE_SMALL,
        "data": {
            "path": None,
            "size": 32,
            "randaugment": (2, 9),
            "crop": 4,
            "repeats": 1,
            "mixup": 0.2,
            "cutmix": 1.0,
            "held_out": 0.05,
        },
    }
    if not quick:
        return settings
    plain = {"randaugment": None, "mixup": 0.0, "cutmix": 0.0}
    return settings | _QUICK | {"label_smoothing": 0.0, "data": settings["data"] | plain}

"""Finetuning for sparsity: settings that begin from a checkpoint instead of random weights."""

from __future__ import annotations

from typing import Any

from actsparse_lab.tasks.digits import digits
from actsparse_lab.tasks.lm import lm

Settings = dict[str, Any]


def finetuned(settings: Settings) -> Settings:
    """The settings, from the checkpoint that ``start`` names; its config says what the model is."""
    return settings | {"model": {}, "start": ""}


def with_lora(settings: Settings) -> Settings:
    """The settings with adapters of rank 192, as in the papers, on all linear layers.

    What the papers leave open is as in their authors' program: alpha is 1, biases and norms train.
    """
    return settings | {"lora": {"r": 192, "alpha": 1.0, "targets": "all-linear", "biases": True}}


def digits_finetune(quick: bool = False) -> Settings:
    """The digits' ViT, finetuned whole for a third of the steps it was trained for."""
    return finetuned(digits(quick) | {"steps": 500, "lr": 2e-3})


def lm_finetune(quick: bool = False) -> Settings:
    """The byte-level language model, finetuned whole for a third of its steps."""
    return finetuned(lm(quick) | {"steps": 500, "lr": 4e-3})

"""A causal language model on bytes: GPT-2's architecture with ReLU, on Python's documentation."""

from __future__ import annotations

from typing import Any

# Larger models and more steps go on learning (the loss falls by 3 to 5 % over the last fifth of
# every run that was tried, up to 2000 steps): expect the page to mark this one undertrained.
LM: dict[str, Any] = {
    "steps": 1500,
    "batch_size": 32,
    "lr": 1e-2,
    "weight_decay": 0.5,
    "log_every": 50,
    "eval_every": 100,
    "validate_on": 256,
    "data": {"block": 64},
    "model": {
        "n_positions": 64,
        "n_embd": 48,
        "n_layer": 2,
        "n_head": 4,
        "n_inner": 192,
        "activation_function": "relu",
        "resid_pdrop": 0.0,
        "embd_pdrop": 0.0,
        "attn_pdrop": 0.0,
        "attn_implementation": "eager",
    },
}

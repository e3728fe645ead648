"""Small models of every family, and what a reader of their source finds in them."""

from __future__ import annotations

from .case import Block, Build, Case, Inputs, Layer, call, seeded
from .hf_decoders import DECODERS, LORA
from .hf_encoders import ENCODERS
from .plain import NOTHING, USERS
from .torch_own import TORCHS

CASES: list[Case] = ENCODERS + DECODERS + USERS + TORCHS
BY_ID: dict[str, Case] = {case.id: case for case in CASES + LORA}

__all__ = [
    "BY_ID",
    "CASES",
    "LORA",
    "NOTHING",
    "Block",
    "Build",
    "Case",
    "Inputs",
    "Layer",
    "call",
    "seeded",
]

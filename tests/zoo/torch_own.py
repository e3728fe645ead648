"""torch 2.13's own Transformer modules, whose layers may hold their activation as a function."""

# ruff: noqa: C408  (a table of keyword arguments reads as one)
from __future__ import annotations

from typing import Any

import torch.nn.functional as F
from torch import Tensor, nn

from .case import Build, Case, D, H, Inputs, blocks, numbered, seeded, stream

TORCH = dict(up="linear1", down="linear2", act="activation", between=("dropout",))
PRE = dict(pos="pre")
POST = dict(pos="post", feeds=("residual",))
KINDS = dict(d_model=D, nhead=2, dim_feedforward=H)
NESTED = "enable_nested_tensor is True"  # nn.Transformer asks for it whatever it was told


def squared_relu(x: Tensor) -> Tensor:
    return F.relu(x) ** 2


def encoder(**kwargs: Any) -> Build:
    def make() -> tuple[nn.Module, Inputs]:
        layer = nn.TransformerEncoderLayer(**KINDS, **kwargs)
        return nn.TransformerEncoder(layer, 2, enable_nested_tensor=False), stream()

    return seeded(make)


def decoder(norm_first: bool) -> Build:
    def make() -> tuple[nn.Module, Inputs]:
        layer = nn.TransformerDecoderLayer(**KINDS, norm_first=norm_first, batch_first=True)
        return nn.TransformerDecoder(layer, 2), (stream(), stream())

    return seeded(make)


def transformer(**kwargs: Any) -> Build:
    sizes = dict(KINDS, num_encoder_layers=2, num_decoder_layers=2)
    return seeded(lambda: (nn.Transformer(**sizes, **kwargs), (stream(), stream())), (NESTED,))


TORCHS = [
    *(
        Case(
            f"torch-encoder-{act}-{('post', 'pre')[first]}-{('time', 'batch')[batch]}_first",
            encoder(activation=act, norm_first=first, batch_first=batch),
            blocks(
                numbered("layers.{}"),
                **TORCH,
                fn=act,
                **(dict(PRE, norm="norm2") if first else dict(POST, norm="norm1")),
            ),
        )
        for act in ("relu", "gelu")
        for first in (True, False)
        for batch in (True, False)
    ),
    Case(
        "torch-encoder-activation-module",
        encoder(activation=nn.SiLU(), batch_first=True),
        blocks(numbered("layers.{}"), **TORCH, fn="silu", **POST, norm="norm1"),
    ),
    Case(  # a Python function of two calls, held as an attribute
        "torch-encoder-activation-own-function",
        encoder(activation=squared_relu, batch_first=True),
        blocks(numbered("layers.{}"), **TORCH, fn="squared_relu", **POST, norm="norm1"),
    ),
    Case(
        "torch-decoder-pre",
        decoder(norm_first=True),
        blocks(numbered("layers.{}"), **TORCH, fn="relu", **PRE, norm="norm3"),
    ),
    Case(
        "torch-decoder-post",
        decoder(norm_first=False),
        blocks(numbered("layers.{}"), **TORCH, fn="relu", **POST, norm="norm2"),
    ),
    Case(
        "torch-transformer",
        transformer(activation="gelu"),
        blocks(numbered("encoder.layers.{}"), **TORCH, fn="gelu", **POST, norm="norm1")
        + blocks(numbered("decoder.layers.{}"), **TORCH, fn="gelu", **POST, norm="norm2"),
    ),
]

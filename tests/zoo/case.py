"""What a person reads in a model's source: the facts the MLP-block finder has to reproduce.

The tables in this package are written by reading the forward functions of transformers 5.23, torch
2.13 and peft; no finder was run to make them. Names inside a table are relative to the layer path.
"""

from __future__ import annotations

import warnings
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

Inputs = Tensor | tuple[Any, ...] | dict[str, Any]
Build = Callable[[], tuple[nn.Module, Inputs]]

B, T, D, H = 3, 6, 16, 40  # batch, tokens, d_model, d_hidden: all different, H not a multiple of D
V = 37  # vocabulary, where it is free
OUTSIDE = ("residual", "dropout()")  # words that are not paths


@dataclass(frozen=True)
class Layer:
    """A linear layer, or some output rows of a fused one."""

    name: str
    rows: range | None = None
    layout: str = "Linear"


@dataclass(frozen=True)
class Block:
    """One MLP block. `activation` may be a pattern (fnmatch) where the house leaves a choice."""

    name: str
    up: Layer
    down: Layer
    activation: str
    function: str | None
    d_model: int
    d_hidden: int
    gate: Layer | None
    norm: str | None
    offset: float
    norm_position: str
    norm_feeds: tuple[str, ...]
    between: tuple[tuple[str, str], ...]


@dataclass(frozen=True)
class Case:
    """A model, and every block in it (in order of execution, unless `ordered` is False)."""

    id: str
    build: Build
    blocks: tuple[Block, ...]
    refused: tuple[str, ...] = ()
    ordered: bool = True

    def __str__(self) -> str:
        return self.id


def join(at: str, name: str) -> str:
    """The path of `name` below the layer `at`; "" is the root, words outside the tree are kept."""
    return name if name in OUTSIDE else ".".join(part for part in (at, name) if part)


def block(
    at: str,
    *,
    name: str = "",
    up: str,
    down: str,
    act: str,
    fn: str | None,
    gate: str | None = None,
    norm: str | None = None,
    at_norm: str | None = None,
    offset: float = 0.0,
    pos: str = "none",
    feeds: tuple[str, ...] = (),
    between: tuple[str | tuple[str, str], ...] = (),
    layout: str = "Linear",
    rows: tuple[range, range] | None = None,
    d: int = D,
    h: int = H,
) -> Block:
    """The block of the layer at path `at`; `rows` are (gate's, up's) of one fused layer.

    `at_norm` is the path the norm and what it feeds are relative to, where that is not `at`.
    """
    above = at if at_norm is None else at_norm
    gate_rows, up_rows = rows or (None, None)
    kinds = (b if isinstance(b, tuple) else (b, "dropout") for b in between)
    return Block(
        name=join(at, name),
        up=Layer(join(at, up), up_rows, layout),
        down=Layer(join(at, down), None, layout),
        activation=join(at, act),
        function=fn,
        d_model=d,
        d_hidden=h,
        gate=Layer(join(at, gate), gate_rows, layout) if gate is not None else None,
        norm=join(above, norm) if norm is not None else None,
        offset=offset,
        norm_position=pos,
        norm_feeds=tuple(join(above, f) for f in feeds),
        between=tuple((join(at, n), kind) for n, kind in kinds),
    )


def blocks(layers: Iterable[str], **fields: Any) -> tuple[Block, ...]:
    """The same table for several layers."""
    return tuple(block(at, **fields) for at in layers)


def numbered(path: str, n: int = 2) -> list[str]:
    """`path` with `{}` replaced by 0 … n-1."""
    return [path.format(i) for i in range(n)]


def ids(vocab: int = V) -> Tensor:
    """Token ids [B, T], all below `vocab`, none 0 (often padding)."""
    return 1 + torch.arange(B * T).reshape(B, T) % (vocab - 1)


def pixels(size: int = 16, channels: int = 3) -> Tensor:
    """Images [B, channels, size, size]."""
    return torch.randn(B, channels, size, size)


def stream(*shape: int) -> Tensor:
    """A residual stream, [B, T, D] unless told."""
    return torch.randn(*(shape or (B, T, D)))


def trained(model: nn.Module) -> nn.Module:
    """Move norms off their initial 1 (Gemma: 0), and biases off 0, as training would."""
    for module in model.modules():
        own = dict(module.named_parameters(recurse=False))
        is_norm = type(module).__name__.endswith("Norm")
        with torch.no_grad():
            if is_norm and own.get("weight") is not None:
                own["weight"].add_(0.1 * torch.randn_like(own["weight"]))
            if own.get("bias") is not None:
                own["bias"].add_(0.1 * torch.randn_like(own["bias"]))
    return model


def seeded(make: Build, ignore: tuple[str, ...] = ()) -> Build:
    """`make` under a fixed seed, leaving the global random state alone, norms moved.

    `ignore`: messages (regular expressions) the library itself warns with while building.
    """

    def build() -> tuple[nn.Module, Inputs]:
        with torch.random.fork_rng(devices=[]), warnings.catch_warnings():
            for message in ignore:
                warnings.filterwarnings("ignore", message=message)
            torch.manual_seed(0)
            model, inputs = make()
            return trained(model), inputs

    return build


def call(model: nn.Module, inputs: Inputs) -> Any:
    """One forward pass: a dict is keywords, a tuple is positions, a tensor is the one argument."""
    if isinstance(inputs, dict):
        return model(**inputs)
    return model(*inputs) if isinstance(inputs, tuple) else model(inputs)

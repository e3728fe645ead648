"""Which modules compute one block and can do nothing else."""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from transformers import LlamaConfig
from transformers.models.llama.modeling_llama import LlamaMLP

from actsparse import find_mlp_blocks
from actsparse.blocks.computes_only import computing_only

X = torch.randn(2, 8)
SEEN: list[Any] = []


class Gated(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.gate, self.up, self.down = nn.Linear(8, 32), nn.Linear(8, 32), nn.Linear(32, 8)
        self.act, self.drop = nn.SiLU(), nn.Dropout(0.1)

    def forward(self, x: Tensor) -> Tensor:
        return self.down(self.act(self.gate(x)) * self.up(x))


class Turned(Gated):
    def forward(self, x: Tensor) -> Tensor:
        u = self.up(x)
        return self.down(self.drop(u * self.act(self.gate(x))))


class Plain(Gated):
    def forward(self, x: Tensor) -> Tensor:
        x = self.up(x)
        x = self.act(x)
        return self.down(x)


class Residual(Gated):
    def forward(self, x: Tensor) -> Tensor:
        return x + self.down(self.act(self.up(x)))


class Scaled(Gated):
    def forward(self, x: Tensor) -> Tensor:
        return self.down(self.act(self.up(x))) * 2


class Counts(Gated):
    def forward(self, x: Tensor) -> Tensor:
        self.down.calls = 1
        return self.down(self.act(self.up(x)))


class Tells(Gated):
    def forward(self, x: Tensor) -> Tensor:
        SEEN.append(1)
        return self.down(self.act(self.up(x)))


class Chooses(Gated):
    def forward(self, x: Tensor) -> Tensor:
        return self.down(self.act(self.up(x))) if x.shape[0] > 1 else x


class Trains(Gated):
    def forward(self, x: Tensor) -> Tensor:
        return self.down(self.act(self.up(x))) if not self.training else x


class Twice(Gated):
    def forward(self, x: Tensor) -> Tensor:
        self.drop(x)
        return self.down(self.act(self.up(x)))


class Inner(Gated):
    def forward(self, x: Tensor) -> Tensor:
        return (lambda: self.down(self.act(self.up(x))))()


class Calls(Gated):
    def __call__(self, *args: Any) -> Any:
        return super().__call__(*args)

    def forward(self, x: Tensor) -> Tensor:
        return self.down(self.act(self.up(x)))


def told(forward: Callable[..., Any]) -> Callable[..., Any]:
    @functools.wraps(forward)
    def wrapped(self: Any, x: Tensor) -> Any:
        SEEN.append(x)
        return forward(self, x)

    return wrapped


class Wrapped(Gated):
    @told
    def forward(self, x: Tensor) -> Tensor:
        return self.down(self.act(self.up(x)))


class OnInstance(Gated):
    def __init__(self) -> None:
        super().__init__()
        self.forward = lambda x: self.down(self.act(self.up(x)))  # type: ignore[method-assign]


def sequential(*more: nn.Module) -> nn.Sequential:
    return nn.Sequential(nn.Linear(8, 32), nn.ReLU(), nn.Linear(32, 8), *more)


def llama() -> LlamaMLP:
    return LlamaMLP(LlamaConfig(hidden_size=8, intermediate_size=32, num_attention_heads=2))


@pytest.mark.parametrize("make", [Gated, Turned, Plain, sequential, llama])
def test_these_compute_nothing_else(make: Callable[[], nn.Module]) -> None:
    model = make().eval()
    (block,) = find_mlp_blocks(model, X)
    assert computing_only(block) is model


@pytest.mark.parametrize(
    "make",
    [
        Residual, Scaled, Twice, Counts, Tells, Chooses, Trains, Inner, Calls, Wrapped, OnInstance,
        lambda: sequential(nn.LayerNorm(8)), lambda: sequential(nn.Dropout(0.1)),
    ],
)  # fmt: skip
def test_these_may_do_more(make: Callable[[], nn.Module]) -> None:
    model = make().eval()
    (block,) = find_mlp_blocks(model, X)
    assert computing_only(block) is None

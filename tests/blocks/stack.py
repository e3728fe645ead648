"""A stack that only looks, and what tests of its calls share."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from actsparse.blocks.token_map import TokenMap
from actsparse.blocks.tokens import tokens_of

MASK = torch.tensor([[0, 0, 1, 1], [1, 1, 1, 1]])


class Stack(nn.Module):
    """Takes what a Transformer takes, and returns what its blocks would know of this call."""

    def forward(
        self,
        input_ids: Tensor | None = None,
        attention_mask: Tensor | None = None,
        position_ids: Tensor | None = None,
        past_key_values: Any = None,
        inputs_embeds: Tensor | None = None,
        cache_position: Tensor | None = None,
        src_key_padding_mask: Tensor | None = None,
        **kwargs: Any,
    ) -> TokenMap:
        return tokens_of((self,)).now


def attached() -> Stack:
    """A stack that is listened to."""
    stack = Stack()
    tokens_of((stack,)).attach()
    return stack


class Cache:
    def __init__(self, length: int | Tensor) -> None:
        self.length = length

    def get_seq_length(self) -> int | Tensor:
        return self.length


def ids(batch: int, length: int) -> Tensor:
    return torch.zeros(batch, length, dtype=torch.long)

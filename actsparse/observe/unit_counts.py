"""Counts for each hidden unit of a block: integers, exact for any number of steps."""

from __future__ import annotations

from typing import Any, ClassVar, Self

import torch
from torch import Tensor

from actsparse.blocks.block import MLPBlock


class Counts:
    """Counters of one block in one phase, int64 tensors on its device.

    ``counters`` names them with whether they are one for each hidden unit, [H], or one, [];
    ``tokens`` [], of how many tokens, is always among them.
    """

    counters: ClassVar[dict[str, bool]]
    tokens: Tensor

    def __init__(self, block: MLPBlock) -> None:
        self.units = block.d_hidden
        device = next((p.device for p in block.down.module.parameters() if not p.is_meta), None)
        with torch.inference_mode(False):  # else no later step outside it could add to them
            for name, by_unit in self.counters.items():
                shape = (self.units,) if by_unit else ()
                setattr(self, name, torch.zeros(shape, dtype=torch.int64, device=device))

    def follow(self, device: torch.device) -> None:
        """Be on ``device``, where the model may have moved.

        Raises:
            ValueError: ``device`` is 'meta', where there is nothing to count.
        """
        if device.type == "meta":
            raise ValueError("activations are on 'meta', without values: there is nothing to count")
        if self.tokens.device != device:
            for name in self.counters:
                setattr(self, name, getattr(self, name).to(device))

    def reset(self) -> None:
        """Forget what was counted."""
        for counter in self.state():
            counter.zero_()

    def state(self) -> list[Tensor]:
        """The counters."""
        return [getattr(self, name) for name in self.counters]

    def load(self, state: list[Tensor]) -> None:
        """Go on from these counts."""
        for counter, count in zip(self.state(), state, strict=True):
            counter.copy_(count)

    @staticmethod
    def shares(parts: list[Any]) -> dict[str, Any]:
        """The numbers of several blocks together; each has seen a token."""
        raise NotImplementedError

    @classmethod
    def summary(cls, parts: dict[str, Self]) -> dict[str, Any] | None:
        """Of the blocks called ``parts`` together and, under ``blocks``, of each.

        Blocks weigh by units × tokens, and those that no token passed are left out; None if no
        block is left.
        """
        counted = {name: part for name, part in parts.items() if int(part.tokens)}
        if not counted:
            return None
        rows = [
            {"block": name, "tokens": int(part.tokens), **cls.shares([part])}
            for name, part in counted.items()
        ]
        return {**cls.shares(list(counted.values())), "blocks": rows}

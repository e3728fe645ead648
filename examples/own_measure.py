"""A measure of your own, beside density: in how many tokens a block has no active neuron.

python examples/own_measure.py
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from actsparse import observe
from actsparse.observe.registry import MEASURES


class Silent:
    """The share of tokens for which no neuron is active, of one block in one phase."""

    columns: ClassVar[dict[str, tuple[str, Callable[[Any], str]]]] = {
        "silent tokens": ("silent", lambda share: f"{share:.2%}"),
    }

    def __init__(self, block: Any) -> None:
        self.counts = torch.zeros(2, dtype=torch.int64)  # silent tokens, all tokens

    @staticmethod
    def stages(site: Any) -> tuple[str, ...]:
        """Which tensors ``update`` gets: x, z (before φ), a (after it), y."""
        return ("a",)

    def update(self, site: Any, stages: dict[str, Tensor], keep: Tensor | None) -> None:
        """One pass; ``keep`` is False at padding."""
        silent = (stages["a"] == 0).all(-1)
        counted = torch.ones_like(silent) if keep is None else keep
        self.counts += torch.stack([(silent & counted).sum(), counted.sum()])

    def reset(self) -> None:
        self.counts = torch.zeros_like(self.counts)

    def state(self) -> list[Tensor]:
        """What several processes add up."""
        return [self.counts]

    def load(self, state: list[Tensor]) -> None:
        self.counts = state[0].clone()

    @staticmethod
    def summary(parts: dict[str, Silent]) -> dict[str, Any] | None:
        """All blocks together, and a row for each."""
        silent, tokens = sum(part.counts for part in parts.values()).tolist()
        if not tokens:
            return None  # no pass was seen
        rows = [
            {"block": name, "silent": int(part.counts[0]) / max(1, int(part.counts[1]))}
            for name, part in parts.items()
        ]
        return {"silent": silent / tokens, "blocks": rows}


def main() -> None:
    torch.manual_seed(0)
    MEASURES["silent"] = Silent  # from now on observe, measure and the command know it
    model = nn.Sequential(nn.Linear(16, 8), nn.ReLU(), nn.Linear(8, 16)).eval()
    nn.init.constant_(model[0].bias, -1.0)
    with observe(model, ["density", "silent"], inputs=torch.randn(2, 16)) as seen:
        model(torch.randn(8, 10, 16))
    print(seen)


if __name__ == "__main__":
    main()

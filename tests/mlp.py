"""The MLP block that tests are written about."""

from __future__ import annotations

from torch import Tensor, nn


class Mlp(nn.Module):
    """x + down(φ(up(norm(x)))); gated: x + down(φ(gate(norm(x))) · up(norm(x)))."""

    def __init__(
        self, act: nn.Module, d: int, h: int, *, norm: nn.Module | None = None, gated: bool = False
    ) -> None:
        super().__init__()
        self.norm, self.act = norm or nn.Identity(), act
        self.up, self.down = nn.Linear(d, h), nn.Linear(h, d)
        self.gate = nn.Linear(d, h) if gated else None

    def forward(self, x: Tensor) -> Tensor:
        h = self.norm(x)
        a = self.act(self.up(h)) if self.gate is None else self.act(self.gate(h)) * self.up(h)
        return x + self.down(a)

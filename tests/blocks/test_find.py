"""What the zoo does not have: rows of rows, and models that change when they run."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from actsparse import NoMLPFound, find_mlp_blocks, observe
from tests.zoo import BY_ID


class RowsOfRows(nn.Module):
    """One layer for a value [8], a gate [16] and an up [16]; the last two are split twice."""

    def __init__(self) -> None:
        super().__init__()
        self.wide = nn.Linear(8, 40)
        self.down = nn.Linear(16, 8)

    def forward(self, x: Tensor) -> Tensor:
        _, hidden = self.wide(x).split([8, 32], -1)
        gate, up = hidden.chunk(2, -1)
        return x + self.down(F.relu(gate) * up)


def test_rows_of_rows_are_those_of_the_layer() -> None:
    (block,) = find_mlp_blocks(RowsOfRows(), torch.randn(2, 3, 8))
    assert block.gate is not None
    assert (block.gate.rows, block.up.rows) == (slice(8, 24), slice(24, 40))
    assert block.d_hidden == 16


class Restless(nn.Module):
    """Draws random numbers in its activation and counts its calls in a buffer it exchanges."""

    def __init__(self) -> None:
        super().__init__()
        self.up, self.act, self.down = nn.Linear(8, 32), nn.RReLU(), nn.Linear(32, 8)
        self.register_buffer("calls", torch.zeros(()))

    def forward(self, x: Tensor) -> Tensor:
        self.calls = self.calls + 1
        return x + self.down(self.act(self.up(x)))


def test_finding_and_watching_draw_no_random_numbers_and_run_no_counter() -> None:
    model, x = Restless().train(), torch.randn(2, 3, 8)
    before, buffer = torch.get_rng_state(), model.calls
    blocks = find_mlp_blocks(model, x)
    observe(model, blocks=blocks).close()
    assert torch.equal(torch.get_rng_state(), before)
    assert model.calls is buffer
    assert int(buffer) == 0
    assert model.training


def test_an_error_holds_what_was_refused() -> None:
    model, inputs = BY_ID["mixtral"].build()
    with pytest.raises(NoMLPFound) as caught:
        find_mlp_blocks(model, inputs)
    assert any("experts" in refused.name for refused in caught.value.refused)

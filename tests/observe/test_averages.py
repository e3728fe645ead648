"""A session that averages over a whole training says so, once, and how to reset it."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from actsparse import observe

STEPS = 210


def trained(model: nn.Module, steps: int) -> None:
    optimizer = torch.optim.SGD(model.parameters(), lr=1e-3)
    for _ in range(steps):
        model(torch.randn(4, 8)).sum().backward()
        optimizer.step()
        optimizer.zero_grad()


def mlp() -> nn.Sequential:
    return nn.Sequential(nn.Linear(8, 32), nn.ReLU(), nn.Linear(32, 8))


def test_an_average_over_a_training_says_how_to_reset_it() -> None:
    model = mlp()
    with observe(model, inputs=torch.randn(2, 8)) as seen:
        trained(model, STEPS)
    with pytest.warns(UserWarning, match=r"seen\.reset\('train'\) after each reading") as told:
        seen.summary("train")
    assert told[0].filename == __file__
    seen.summary("train")  # once
    print(seen)


def test_readings_between_resets_evaluations_and_few_steps_are_told_nothing() -> None:
    model = mlp()
    with observe(model, inputs=torch.randn(2, 8)) as seen:
        for _ in range(4):
            trained(model, STEPS // 2)
            seen.summary("train")
            seen.reset("train")
        trained(model, 2 * STEPS)
        model.eval()(torch.randn(2, 8))
        seen.summary("inference")
        seen.whole = True
        seen.summary("train")

"""What training is told when it forgets the optimizer, the steps or the penalty."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn

from actsparse import ActivationPenalty, Handle, handle_of, sparsify

D, H = 8, 12
STILL = r"schedules stand still \(ActivationPenalty\): call handle\.attach\(optimizer, steps=...\)"


def block() -> nn.Sequential:
    return nn.Sequential(nn.Linear(D, H), nn.ReLU(), nn.Linear(H, D))


def sgd(model: nn.Module) -> torch.optim.Optimizer:
    return torch.optim.SGD(model.parameters(), lr=0.1)


def stream() -> Tensor:
    return torch.randn(2, 5, D)


def test_schedules_that_no_optimizer_moves_are_told_once() -> None:
    model, x = block(), stream()
    handle = sparsify(model, inputs=x)
    model.eval()(x)
    handle.penalty()  # warnings are errors here
    model.train()(x)
    with pytest.warns(UserWarning, match=STILL) as told:
        handle.penalty()
    assert told[0].filename == __file__
    handle.penalty()


def test_an_optimizer_that_is_attached_or_a_recipe_without_schedules_is_told_nothing() -> None:
    model, x = block(), stream()
    handle = sparsify(model, ActivationPenalty("l1"), inputs=x)
    model(x)
    assert handle.penalty() > 0
    handle.remove()
    handle = sparsify(model, inputs=x, optimizer=sgd(model), steps=10)
    model(x)
    handle.penalty()


def test_steps_go_with_the_optimizer() -> None:
    model, x = block(), stream()
    with pytest.raises(ValueError, match=r"steps=10 needs optimizer="):
        sparsify(model, inputs=x, steps=10)
    with pytest.raises(ValueError, match="needs the number of steps"):
        sparsify(model, ActivationPenalty("l1", ramp=0.5), inputs=x, optimizer=sgd(model))
    assert handle_of(model) is None
    optimizer = sgd(model)
    recipe = ActivationPenalty("l1", ramp=0.5)
    handle = sparsify(model, recipe, inputs=x, optimizer=optimizer, steps=4)
    for _ in range(2):
        (model(x).sum() + handle.penalty()).backward()
        optimizer.step()
    assert (handle.step, handle.steps) == (2, 4)
    model(x)
    assert handle.penalty() > 0  # the ramp has ended


def test_a_forward_beside_the_one_that_was_penalised_is_no_alarm() -> None:
    model, x = block(), stream()
    optimizer = sgd(model)
    handle = sparsify(model, ActivationPenalty("l1"), inputs=x, optimizer=optimizer)
    (model(x).sum() + handle.penalty()).backward()
    model(x)  # for a metric, say
    optimizer.step()
    model(x).sum().backward()
    with pytest.warns(UserWarning, match=r"before backward: loss = loss \+ handle\.penalty\(\)"):
        optimizer.step()


def trained(handle: Handle, model: nn.Module, optimizer: torch.optim.Optimizer, x: Tensor) -> None:
    optimizer.zero_grad()
    (model(x).square().mean() + handle.penalty()).backward()
    optimizer.step()


def test_more_steps_than_were_told_are_said_once_at_the_first() -> None:
    model, x = block(), stream()
    optimizer = sgd(model)
    handle = sparsify(model, inputs=x, optimizer=optimizer, steps=2)
    for _ in range(2):
        trained(handle, model, optimizer, x)  # warnings are errors here
    with pytest.warns(UserWarning, match=r"step 3 of 2: .* over all epochs") as told:
        trained(handle, model, optimizer, x)
    assert told[0].filename == __file__
    trained(handle, model, optimizer, x)


def test_a_training_that_goes_on_after_its_schedules_or_has_none_is_told_nothing() -> None:
    model, x = block(), stream()
    optimizer = sgd(model)
    handle = sparsify(model, inputs=x, optimizer=optimizer, steps=1)
    trained(handle, model, optimizer, x)
    handle.attach(sgd(model), start=1)
    for recipe in (None, ActivationPenalty("l1")):
        if recipe is not None:
            handle.remove()
            handle = sparsify(model, recipe, inputs=x)
        optimizer = sgd(model)
        handle.attach(optimizer, steps=1)
        if recipe is None:
            handle.attach(optimizer, steps=1, start=1)
        for _ in range(3):
            trained(handle, model, optimizer, x)

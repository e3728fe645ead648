"""Which optimizer is followed, what is said where none steps, and penalties of one pass alone."""

from __future__ import annotations

import warnings
from collections.abc import Iterable
from typing import Any

import pytest
import torch
from accelerate import Accelerator
from torch import Tensor, nn
from torch.optim import SGD, Optimizer

from actsparse import (
    ActivationPenalty,
    Handle,
    NormFloor,
    SwapActivation,
    ZerothBias,
    sparsify,
)

D, H = 8, 32
RECIPE = (NormFloor(), SwapActivation(mix=6))


def stream() -> Tensor:
    return torch.randn(4, 6, D)


def net() -> nn.Sequential:
    return nn.Sequential(nn.LayerNorm(D), nn.Linear(D, H), nn.ReLU(), nn.Linear(H, D))


def backward(model: nn.Module) -> None:
    model(stream()).square().mean().backward()


def low(model: nn.Sequential) -> None:
    """Put the norm below its floor, for a projection to bring it back."""
    model[0].weight.data.fill_(0.5)


# --- optimizers that step through others ---------------------------------------------------------


class Sam(Optimizer):
    """Two steps, the second by the optimizer it keeps under the name that is given."""

    def __init__(self, parameters: Iterable[Any], attribute: str) -> None:
        super().__init__(parameters, {"rho": 0.05})
        self.base = attribute
        setattr(self, attribute, SGD(self.param_groups, lr=0.1))
        self.param_groups = getattr(self, attribute).param_groups

    def two_steps(self, model: nn.Module) -> None:
        backward(model)
        with torch.no_grad():
            for parameter in model.parameters():
                parameter.add_(0.01)
        backward(model)
        with torch.no_grad():
            for parameter in model.parameters():
                parameter.sub_(0.01)
        getattr(self, self.base).step()

    def step(self, closure: Any = None) -> None:
        raise NotImplementedError


class Wrapper(Optimizer):
    """opacus' way: an Optimizer that never ran ``Optimizer.__init__``."""

    def __init__(self, original: Optimizer) -> None:
        self.original_optimizer = original

    @property
    def param_groups(self) -> list[dict[str, Any]]:  # type: ignore[override]
        return self.original_optimizer.param_groups

    def step(self, closure: Any = None) -> None:
        self.original_optimizer.step()

    def state_dict(self) -> dict[str, Any]:
        return self.original_optimizer.state_dict()

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        self.original_optimizer.load_state_dict(state_dict)


class Several(Optimizer):
    """Steps through all that it keeps."""

    def __init__(self, *parts: Optimizer) -> None:
        groups = [group for part in parts for group in part.param_groups]
        super().__init__([p for group in groups for p in group["params"]], {})
        self.parts = list(parts)

    def step(self, closure: Any = None) -> None:
        for part in self.parts:
            part.step()


@pytest.mark.parametrize("attribute", ["base_optimizer", "optimizer", "anything"])
def test_the_optimizer_that_sam_keeps_is_followed(attribute: str) -> None:
    model = net()
    handle = sparsify(model, RECIPE, inputs=stream())
    optimizer = Sam(model.parameters(), attribute)
    handle.attach(optimizer, steps=10)
    for step in range(5):
        low(model)
        optimizer.two_steps(model)
        assert handle.step == step + 1
        assert model[0].weight.min() >= 1


def test_wrappers_that_run_no_hooks_are_looked_through() -> None:
    model = net()
    handle = sparsify(model, RECIPE, inputs=stream())
    inner = SGD(model.parameters(), lr=0.1)
    optimizer = Accelerator(cpu=True).prepare_optimizer(Wrapper(inner))
    handle.attach(optimizer, steps=10)
    for _ in range(5):
        backward(model)
        optimizer.step()
    assert handle.step == 5


def test_a_step_through_several_optimizers_counts_once_and_projects_after_each() -> None:
    model = net()
    handle = sparsify(model, RECIPE, inputs=stream())
    weights = [p for p in model.parameters() if p.dim() == 2]
    others = [p for p in model.parameters() if p.dim() == 1]
    optimizer = Several(SGD(weights, lr=0.1), SGD(others, lr=0.1))
    handle.attach(optimizer, steps=10)
    for step in range(5):
        low(model)
        backward(model)
        optimizer.step()
        assert handle.step == step + 1
        assert model[0].weight.min() >= 1


def test_an_outer_optimizer_that_moves_weights_after_the_inner_one_is_projected_too() -> None:
    class Slow(Several):
        def step(self, closure: Any = None) -> None:
            super().step()
            low(model)

    model = net()
    handle = sparsify(model, RECIPE, inputs=stream())
    optimizer = Slow(SGD(model.parameters(), lr=0.1))
    handle.attach(optimizer, steps=10)
    for _ in range(3):
        backward(model)
        optimizer.step()
    assert handle.step == 3
    assert model[0].weight.min() >= 1


def test_a_zeroth_bias_joins_its_block_s_optimizer_once() -> None:
    model = net()
    norm = SGD(model[0].parameters(), lr=0.1)
    rest = SGD([*model[1].parameters(), *model[3].parameters()], lr=0.1)
    handle = sparsify(model, (ZerothBias(),), inputs=stream())
    table = model[1].actsparse.zeroth_bias

    def held(optimizer: Optimizer) -> int:
        return sum(p is table for group in optimizer.param_groups for p in group["params"])

    handle.attach(Several(norm, rest))
    handle.attach(Several(norm, rest))
    assert (held(norm), held(rest)) == (0, 1)
    handle.remove()
    assert (held(norm), held(rest)) == (0, 0)


def test_a_class_that_steps_by_its_parent_steps_once() -> None:
    class Own(SGD):
        def step(self, closure: Any = None) -> None:
            super().step(closure)

    model = net()
    handle = sparsify(model, RECIPE, inputs=stream())
    SGD(net().parameters())  # now the parent's step runs hooks of its own
    optimizer = Own(model.parameters(), lr=0.1)
    handle.attach(optimizer, steps=10)
    for _ in range(3):
        backward(model)
        optimizer.step()
    assert handle.step == 3


def test_an_optimizer_of_another_model_is_refused() -> None:
    model = net()
    handle = sparsify(model, RECIPE, inputs=stream())
    with pytest.raises(ValueError, match="SGD holds no parameter of the model that was sparsified"):
        handle.attach(SGD(net().parameters()), steps=10)
    with pytest.raises(ValueError, match=r"start=-1: expected the number of steps done"):
        handle.attach(SGD(model.parameters()), steps=10, start=-1)


# --- steps that are not seen ---------------------------------------------------------------------


def unseen(model: nn.Module, handle: Handle, optimizer: Optimizer, rounds: int = 5) -> list[str]:
    """What is said in so many rounds of training."""
    with warnings.catch_warnings(record=True) as said:
        warnings.simplefilter("always")
        for _ in range(rounds):
            optimizer.zero_grad()
            (model(stream()).square().mean() + handle.penalty()).backward()
            optimizer.step()
    return [str(each.message) for each in said]


def test_training_without_an_attached_optimizer_is_said_once() -> None:
    model = net()
    handle = sparsify(model, NormFloor(), inputs=stream())
    (said,) = unseen(model, handle, SGD(model.parameters(), lr=0.1), rounds=9)
    assert "no optimizer step is seen, so NormFloor stood still: call handle.attach(" in said


def test_an_optimizer_made_anew_in_training_is_noticed() -> None:
    model = net()
    handle = sparsify(model, RECIPE, inputs=stream())
    first = SGD(model.parameters(), lr=0.1)
    handle.attach(first, steps=100)
    assert unseen(model, handle, first) == []
    (said,) = unseen(model, handle, SGD(model.parameters(), lr=0.1))
    assert "NormFloor, SwapActivation stood still: the optimizer that was attached" in said


def test_a_penalty_that_no_loss_ever_has_is_noticed_without_an_optimizer_too() -> None:
    model = net()
    sparsify(model, ActivationPenalty(), inputs=stream())
    optimizer = SGD(model.parameters(), lr=0.1)
    for _ in range(3):
        backward(model)
        optimizer.step()
    with pytest.warns(UserWarning, match="has a penalty that the loss lacked"):
        backward(model)


def test_nothing_is_said_where_nothing_waits_for_steps_or_weights_stay() -> None:
    model = net()
    handle = sparsify(model, SwapActivation(), inputs=stream())
    assert unseen(model, handle, SGD(model.parameters(), lr=0.1)) == []
    model = net()
    handle = sparsify(model, RECIPE, inputs=stream())
    optimizer = SGD(model.parameters(), lr=0.1)
    handle.attach(optimizer, steps=10)
    for _ in range(3):
        for _ in range(8):  # accumulated
            backward(model)
        optimizer.step()
    closures = torch.optim.LBFGS(model.parameters(), max_iter=10)
    handle.attach(closures)

    def closure() -> Tensor:
        closures.zero_grad()
        loss: Tensor = model(stream()).square().mean()
        loss.backward()
        return loss

    closures.step(closure)
    assert handle.step == 4
    model.eval()
    with torch.no_grad():
        for _ in range(5):
            model[1].weight.mul_(0.9)
            model(stream())


# --- penalties of one pass -----------------------------------------------------------------------


class Skipping(nn.Module):
    """Blocks that a pass may leave out."""

    def __init__(self) -> None:
        super().__init__()
        self.blocks = nn.ModuleList([net(), net()])
        self.runs = [True, True]

    def forward(self, x: Tensor) -> Tensor:
        for run, block in zip(self.runs, self.blocks, strict=True):
            x = x + block(x) if run else x
        return x


def test_a_block_that_did_not_run_in_this_pass_adds_nothing_of_an_earlier_one() -> None:
    model, config = Skipping(), ActivationPenalty("l1", weight=1.0)
    handle = sparsify(model, config, inputs=stream())
    alone = Skipping()
    alone.load_state_dict(model.state_dict())
    theirs = sparsify(alone, config, inputs=stream())
    x = stream()
    model(x)  # whose penalty nobody asked for
    model.runs = alone.runs = [True, False]
    loss = model(x).square().mean()
    alone(x)
    got, want = handle.penalty(), theirs.penalty()
    assert want > 0
    assert torch.equal(got, want)
    (loss + got).backward()


def test_a_pass_in_which_no_block_ran_has_no_penalty() -> None:
    model = Skipping()
    handle = sparsify(model, ActivationPenalty(), inputs=stream())
    x = stream().requires_grad_()
    model(x).sum().backward()
    model.runs = [False, False]
    loss = model(x).sum()
    assert handle.penalty().item() == 0
    (loss + handle.penalty()).backward()


def test_a_step_ends_what_the_passes_before_it_have_left() -> None:
    model = Skipping()
    handle = sparsify(model, ActivationPenalty(), inputs=stream())
    optimizer = SGD(model.parameters(), lr=0.1)
    handle.attach(optimizer)
    model(stream()).sum().backward()
    with pytest.warns(UserWarning, match="has a penalty that this step's loss lacked"):
        optimizer.step()
    assert handle.penalty().item() == 0


def test_compiled_passes_forget_the_one_before_as_well() -> None:
    model = Skipping()
    handle = sparsify(model, ActivationPenalty("l1", weight=1.0), inputs=stream())
    compiled, x = torch.compile(model, backend="eager"), stream()
    compiled(x)
    model.runs = [True, False]
    compiled(x)
    got = handle.penalty()
    model(x)
    assert torch.allclose(got, handle.penalty())

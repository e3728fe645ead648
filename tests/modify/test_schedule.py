"""Schedules: ramps, the mixing of activations, going on after a checkpoint, and torch.compile."""

from __future__ import annotations

import copy
import json
from collections.abc import Iterator
from fractions import Fraction
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor, nn
from torch._dynamo.testing import CompileCounter

from actsparse import (
    ActivationPenalty,
    Handle,
    NormFloor,
    SwapActivation,
    ZerothBias,
    handle_of,
    load,
    save,
    sparsify,
)
from actsparse.blocks.site import site_of
from actsparse.modify.schedule import Ramp

B, T, D, H = 2, 5, 8, 32
EPS64 = torch.finfo(torch.float64).eps


def block(act: nn.Module | None = None) -> nn.Sequential:
    return nn.Sequential(nn.LayerNorm(D), nn.Linear(D, H), act or nn.GELU(), nn.Linear(H, D))


def stream() -> Tensor:
    return torch.randn(B, T, D)


# --- ramps -------------------------------------------------------------------------------------


@given(st.integers(1, 10**6), st.integers(0, 10**6))
def test_a_ramp_over_steps_is_their_share_up_to_one(over: int, step: int) -> None:
    exact = min(Fraction(1), Fraction(step, over))
    for steps in (None, 1, 10**6):
        # one division, correctly rounded
        assert Ramp(over).value(step, steps) == float(exact)


@given(
    st.floats(0, 1, exclude_min=True, allow_subnormal=False),
    st.integers(1, 10**6),
    st.integers(0, 10**6),
)
def test_a_ramp_over_a_fraction_is_that_share_of_all_steps(
    over: float, steps: int, step: int
) -> None:
    exact = min(Fraction(1), Fraction(step) / (Fraction(over) * steps))
    # a product and a division
    assert Ramp(over).value(step, steps) == pytest.approx(float(exact), rel=4 * EPS64)


def test_one_is_a_step_and_one_point_zero_is_the_whole_training() -> None:
    assert Ramp(1).value(1, 100) == 1.0
    assert Ramp(1.0).value(1, 100) == 0.01
    assert Ramp(1.0).value(100, 100) == 1.0
    assert Ramp(1 / 3).value(100, 300) == 1.0


@pytest.mark.parametrize("over", [0, -1, 0.0, -0.5, 1.5, float("nan"), float("inf")])
def test_impossible_ramps_are_refused_wherever_they_are_given(over: float) -> None:
    for build in (
        Ramp,
        lambda over: NormFloor(uplift=over),
        lambda over: SwapActivation(mix=over),
        lambda over: ActivationPenalty(ramp=over),
    ):
        with pytest.raises(ValueError, match=r"\w+\(\w+=.*number of steps.*fraction"):
            build(over)


FRACTIONS = {
    "uplift": NormFloor(uplift=0.5),
    "mix": SwapActivation(mix=0.5),
    "ramp": ActivationPenalty(ramp=0.5),
}


@pytest.mark.parametrize("name", FRACTIONS)
@pytest.mark.parametrize("early", [True, False])
def test_a_fraction_without_the_number_of_steps_fails_at_attach(name: str, early: bool) -> None:
    model, x = block(), stream()
    state = copy.deepcopy(model.state_dict())
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    message = r"number of steps: call handle.attach\(optimizer, steps="
    if early:
        with pytest.raises(ValueError, match=message):
            sparsify(model, FRACTIONS[name], inputs=x, optimizer=optimizer)
        assert handle_of(model) is None
        assert not model[1]._forward_hooks
    else:
        handle = sparsify(model, FRACTIONS[name], inputs=x)
        with pytest.raises(ValueError, match=message):
            handle.attach(optimizer)
    optimizer.step()  # nothing was registered that would fail here
    assert all(torch.equal(value, model.state_dict()[name]) for name, value in state.items())


# --- mixing ------------------------------------------------------------------------------------

OLD = {
    "relu": (nn.ReLU(), lambda z: z.relu(), lambda z: (z > 0).double()),
    "gelu": (
        nn.GELU(),
        lambda z: z * torch.special.ndtr(z),
        lambda z: torch.special.ndtr(z) + z * torch.exp(-z * z / 2) / (2 * torch.pi) ** 0.5,
    ),
    "silu": (
        nn.SiLU(),
        lambda z: z / (1 + torch.exp(-z)),
        lambda z: (1 + torch.exp(-z) + z * torch.exp(-z)) / (1 + torch.exp(-z)) ** 2,
    ),
}


@pytest.mark.parametrize("old", OLD)
def test_mixing_is_the_weighted_sum_and_so_is_its_derivative(old: str) -> None:
    act, value, slope = OLD[old]
    model, x = block(act).double(), stream().double()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.0)
    handle = sparsify(model, SwapActivation("jsrelu", mix=2), inputs=x, optimizer=optimizer)
    site = site_of(handle.blocks[0])
    seen: list[Tensor] = []
    model[2].register_forward_hook(lambda *hook: seen.append(hook[-1]))
    z = model[1](model[0](x)).detach()
    for k in (0.0, 0.5, 1.0, 1.0):
        new = torch.where(z > 0, ((z + 1) ** 2 - 1) / 2, 0.0)
        expected = (1 - k) * value(z) + k * new
        expected_slope = (1 - k) * slope(z) + k * torch.where(z > 0, z + 1, 0.0)
        model(x)
        # a dozen roundings
        tolerance = {"rtol": 0, "atol": 16 * EPS64 * expected.abs().max().item()}
        torch.testing.assert_close(seen[-1], expected, **tolerance)
        torch.testing.assert_close(site.derivative(z), expected_slope, **tolerance)
        leaf = z.clone().requires_grad_()
        hook = model[1].register_forward_hook(lambda *_, leaf=leaf: leaf)
        model(x)
        hook.remove()
        (grad,) = torch.autograd.grad(seen[-1].sum(), leaf)
        torch.testing.assert_close(grad, expected_slope, **tolerance)
        assert site.function == ("jsrelu" if k == 1 else None)
        optimizer.step()


def test_gates_are_mixed_and_the_product_is_not() -> None:
    class Gated(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.norm, self.act = nn.LayerNorm(D), nn.SiLU()
            self.gate, self.up, self.down = nn.Linear(D, H), nn.Linear(D, H), nn.Linear(H, D)

        def forward(self, x: Tensor) -> Tensor:
            x = self.norm(x)
            return self.down(self.act(self.gate(x)) * self.up(x))

    model, x = Gated().double(), stream().double()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.0)
    sparsify(model, SwapActivation("relu", mix=4), inputs=x, optimizer=optimizer)
    optimizer.step()
    n = model.norm(x).detach()
    z, u = (
        F.linear(n, model.gate.weight, model.gate.bias),
        F.linear(n, model.up.weight, model.up.bias),
    )
    a = (0.75 * z * torch.sigmoid(z) + 0.25 * z.clamp(min=0)) * u
    expected = F.linear(a, model.down.weight, model.down.bias)
    atol = 64 * H * EPS64  # sums over H terms of size one
    torch.testing.assert_close(model(x), expected, rtol=0, atol=atol)


# --- paper-finetune ----------------------------------------------------------------------------


def trained(act: nn.Module | None = None) -> nn.Sequential:
    model = block(act)
    with torch.no_grad():
        model[0].weight.copy_(torch.tensor([-1.5, -0.5, 0.0, 0.1, 0.5, 0.9, 1.0, 2.0]))
        model[0].bias.copy_(torch.linspace(-1, 1, D))
    return model


@pytest.mark.parametrize("act", [nn.ReLU, nn.GELU, nn.SiLU, nn.Tanh])
def test_finetuning_starts_with_the_same_outputs_and_keeps_norm_biases_at_their_values(
    act: type[nn.Module],
) -> None:
    model, x = trained(act()), stream()
    model[1].weight.data[0] = 40 * torch.ones(D)  # large pre-activations too
    before, bias = model(x), model[0].bias.detach().clone()
    optimizer = torch.optim.AdamW(model.parameters(), lr=0.05, weight_decay=0.3)
    handle = sparsify(model, "paper-finetune", inputs=x)
    assert torch.equal(model(x), before)
    handle.attach(optimizer, steps=9)
    assert torch.equal(model(x), before)
    for _ in range(9):
        optimizer.zero_grad()
        (model(x) - x.roll(1, -1)).square().mean().backward()
        optimizer.step()
        assert torch.equal(model[0].bias, bias)
    assert not torch.equal(model(x), before)
    assert model[1].actsparse.zeroth_bias.abs().max() > 0


def test_after_the_ramp_the_activation_is_jsrelu_exactly() -> None:
    model, x = trained(), stream()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.0)
    sparsify(model, "paper-finetune", inputs=x).attach(optimizer, steps=9)
    seen: list[tuple[Tensor, Tensor]] = []
    model[2].register_forward_hook(lambda m, args, out: seen.append((args[0], out)))
    exact = []
    for _ in range(5):
        model(x)
        z, a = seen[-1]
        r = z.relu()
        exact.append(torch.equal(a, torch.addcmul(r, r, r, value=0.5)))
        assert bool((a[z <= 0] == 0).all()) == exact[-1]
        optimizer.step()
    assert exact == [False, False, False, True, True]  # a third of 9 steps


# --- going on after a checkpoint ---------------------------------------------------------------

RECIPE = (
    ZerothBias(finetune=True),
    NormFloor(uplift=0.75),
    SwapActivation(mix=6),
    ActivationPenalty("l1", weight=0.5, ramp=7),
)


def train(model: nn.Module, handle: Handle, optimizer: Any, steps: int) -> list[float]:
    losses = []
    generator = torch.Generator().manual_seed(handle.step)
    for _ in range(steps):
        x = torch.randn(B, T, D, generator=generator)
        optimizer.zero_grad()
        loss = (model(x) - x.roll(1, -1)).square().mean() + handle.penalty()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    return losses


def start() -> tuple[nn.Module, Handle, torch.optim.Optimizer]:
    torch.manual_seed(5)
    model = trained()
    handle = sparsify(model, RECIPE, inputs=torch.zeros(B, T, D))
    return model, handle, torch.optim.AdamW(model.parameters(), lr=0.02)


def test_a_resumed_run_continues_schedules_exactly() -> None:
    model, handle, optimizer = start()
    handle.attach(optimizer, steps=10)
    train(model, handle, optimizer, 4)
    state = json.loads(json.dumps(handle.state_dict()))
    checkpoint = copy.deepcopy((model.state_dict(), optimizer.state_dict()))
    expected = train(model, handle, optimizer, 6)

    again, handle2, optimizer2 = start()
    again.load_state_dict(checkpoint[0])
    optimizer2.load_state_dict(checkpoint[1])
    handle2.load_state_dict(state)
    handle2.attach(optimizer2)  # the number of steps is in the state
    assert train(again, handle2, optimizer2, 6) == expected
    assert all(torch.equal(v, model.state_dict()[n]) for n, v in again.state_dict().items())
    assert handle2.state_dict() == handle.state_dict() == {"step": 10, "steps": 10}


def test_loading_earlier_weights_or_an_earlier_state_takes_schedules_back() -> None:
    model, handle, optimizer = start()
    x = stream()
    handle.attach(optimizer, steps=10)
    before, state = model(x), copy.deepcopy(model.state_dict())
    train(model, handle, optimizer, 8)
    model.load_state_dict(state)
    assert (handle.step, handle.steps) == (0, 10)
    assert torch.equal(model(x), before)
    handle.load_state_dict({"step": 8, "steps": 10})
    assert not torch.equal(model(x), before)
    handle.load_state_dict({"step": 0, "steps": None})
    assert torch.equal(model(x), before)


def test_a_model_that_was_never_attached_can_be_saved_and_loaded(tmp_path) -> None:
    model, x = trained(), stream()
    sparsify(model, "paper-finetune", inputs=x)
    save(model, tmp_path / "m")
    again = load(tmp_path / "m", model=block())
    assert torch.equal(again(x), model(x))
    with pytest.raises(ValueError, match="number of steps"):
        handle_of(again).attach(torch.optim.SGD(again.parameters()))


def test_a_foreign_state_is_refused() -> None:
    handle = sparsify(block(), "paper-finetune", inputs=stream())
    with pytest.raises(ValueError, match=r"not a handle's state.*epoch"):
        handle.load_state_dict({"epoch": 3})


# --- torch.compile -----------------------------------------------------------------------------


@pytest.fixture
def fresh_compiler() -> Iterator[None]:
    torch._dynamo.reset()
    yield
    torch._dynamo.reset()


# dynamo instantiates an autograd.Function while tracing it
@pytest.mark.filterwarnings("ignore:.*should not be instantiated:DeprecationWarning")
@pytest.mark.usefixtures("fresh_compiler")
def test_moving_schedules_recompile_where_one_begins_or_ends_and_never_between() -> None:
    model, x = trained(), stream()
    recipe = (
        ZerothBias(finetune=True),
        NormFloor(uplift=6),
        SwapActivation(mix=4),
        ActivationPenalty("l1", ramp=5),
    )
    handle = sparsify(model, recipe, inputs=x)
    optimizer = torch.optim.AdamW(model.parameters(), lr=0.01)
    handle.attach(optimizer)
    counter = CompileCounter()
    compiled = torch.compile(model, backend=counter, fullgraph=True)
    frames = []
    for _ in range(8):
        optimizer.zero_grad()
        y = compiled(x)
        penalty = handle.penalty()
        (y.square().mean() + penalty).backward()
        eager = model(x)
        tolerance = 8 * torch.finfo().eps  # issue 2, item 4
        atol = tolerance * eager.abs().max().item()
        torch.testing.assert_close(y, eager, rtol=0, atol=atol)
        torch.testing.assert_close(handle.penalty(), penalty, rtol=tolerance, atol=0)
        optimizer.step()
        frames.append(counter.frame_count)
    # k, the floor and the weight move at every step; only a penalty that begins to weigh
    # anything, and the end of mixing, are new code
    assert frames == [1, 2, 2, 2, 3, 3, 3, 3]

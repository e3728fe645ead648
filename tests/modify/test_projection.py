"""Projections: where they put parameters, and that they follow the optimizer's real steps only."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn

from actsparse import Handle, NormFloor, Recipe, SwapActivation, ZerothBias, sparsify

B, T, D, H = 2, 5, 8, 32
EPS = torch.finfo(torch.float32).eps


class OffsetNorm(nn.Module):
    """RMSNorm that multiplies by 1 + w, as Gemma's."""

    def __init__(self) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.zeros(D))

    def forward(self, x: Tensor) -> Tensor:
        return x * torch.rsqrt(x.square().mean(-1, keepdim=True) + 1e-6) * (1 + self.weight)


def block(norm: nn.Module | None = None) -> nn.Sequential:
    return nn.Sequential(norm or nn.LayerNorm(D), nn.Linear(D, H), nn.ReLU(), nn.Linear(H, D))


def inputs() -> Tensor:
    return torch.randn(B, T, D, generator=torch.Generator().manual_seed(1))


def table_of(model: nn.Sequential) -> nn.Parameter:
    return model[1].actsparse.zeroth_bias


def still(model: nn.Module) -> torch.optim.Optimizer:
    """An optimizer whose steps change nothing, so that only the projection does."""
    return torch.optim.SGD(model.parameters(), lr=0.0)


def loss_of(model: nn.Module, scale: float = 1.0) -> Tensor:
    x = inputs()
    return scale * (model(x) - x.roll(1, -1)).square().mean()


def floored(norm: nn.Module, config: NormFloor) -> tuple[Handle, torch.optim.Optimizer]:
    model = block(norm).to(norm.weight.dtype)
    optimizer = still(model)
    handle = sparsify(model, config, inputs=inputs().to(norm.weight.dtype))
    handle.attach(optimizer, steps=8)
    return handle, optimizer


values = st.floats(-4, 4, width=32)
scales = st.lists(values, min_size=D, max_size=D).map(torch.tensor)
floors = st.floats(0.125, 3, width=32)


@settings(max_examples=30)  # each builds a model and finds its block
@given(weight=scales, floor=floors, offset=st.booleans())
def test_from_scratch_the_scale_becomes_the_larger_of_itself_and_the_floor(
    weight: Tensor, floor: float, offset: bool
) -> None:
    norm = OffsetNorm() if offset else nn.LayerNorm(D)
    norm.weight.data.copy_(weight)
    _, optimizer = floored(norm, NormFloor(floor))
    optimizer.step()
    # s = w + o: the floor on w is f − o, in float32 as w is
    expected = torch.maximum(weight, torch.full_like(weight, floor - offset))
    assert torch.equal(norm.weight, expected)
    optimizer.step()
    assert torch.equal(norm.weight, expected), "not idempotent"


def test_before_a_step_the_floor_leaves_what_the_step_takes_away() -> None:
    norm = nn.LayerNorm(D)
    norm.weight.data.fill_(0.25)
    model = block(norm)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.5)
    sparsify(model, NormFloor(before=True), inputs=inputs(), optimizer=optimizer)
    for expected in (0.9, 0.9):  # raised to 1, then moved by 0.5 · 0.2
        norm.weight.grad = torch.full((D,), 0.2)
        optimizer.step()
        torch.testing.assert_close(norm.weight.detach(), torch.full((D,), expected))


@settings(max_examples=30)
@given(weight=scales, floor=floors, offset=st.booleans(), step=st.integers(1, 8))
def test_uplift_lifts_the_magnitude_to_the_ramped_floor_and_keeps_the_sign(
    weight: Tensor, floor: float, offset: bool, step: int
) -> None:
    norm = OffsetNorm() if offset else nn.LayerNorm(D)
    norm.double().weight.data.copy_(weight)
    handle, optimizer = floored(norm, NormFloor(floor, uplift=4))
    before = norm.weight.detach() + offset
    handle.load_state_dict({"step": step - 1, "steps": 8})
    optimizer.step()
    after = norm.weight.detach() + offset

    needed = floor * min(1.0, step / 4)
    sign = torch.where(before < 0, -1.0, 1.0).double()  # sgn(0) = +1, −0 too
    expected = sign * before.abs().clamp(min=needed)
    # one addition and one subtraction of the offset in float64
    tolerance = 4 * torch.finfo(torch.float64).eps * max(1, floor)
    torch.testing.assert_close(after, expected, rtol=0, atol=tolerance)
    assert bool((after.abs() >= before.abs() - tolerance).all()), "|s| was lowered"
    assert bool((after.abs() >= needed - tolerance).all())


@settings(max_examples=30)
@given(weight=scales)
def test_uplift_leaves_what_is_high_enough_bit_for_bit(weight: Tensor) -> None:
    """w + 1 − 1 would round small weights away at every step (bfloat16: all below 2⁻⁸)."""
    for dtype in (torch.float32, torch.bfloat16):
        norm = OffsetNorm()
        norm.weight.data.copy_(0.01 * weight)
        norm.to(dtype)
        before = norm.weight.detach().clone()
        model = block(norm).to(dtype)
        optimizer = still(model)
        sparsify(model, NormFloor(0.5, uplift=1), inputs=inputs().to(dtype), optimizer=optimizer)
        optimizer.step()
        assert torch.equal(norm.weight, before)


def test_uplift_does_nothing_at_step_zero_and_all_of_it_after_the_ramp() -> None:
    norm = nn.LayerNorm(D)
    norm.weight.data.copy_(torch.tensor([-2.0, -0.5, -0.0, 0.0, 0.1, 0.5, 1.0, 2.0]))
    start = norm.weight.detach().clone()
    _, optimizer = floored(norm, NormFloor(1.0, uplift=0.5))  # 4 of 8 steps
    assert torch.equal(norm.weight, start)
    seen = []
    for _ in range(6):
        optimizer.step()
        seen.append(norm.weight.abs().min().item())
    assert seen == [0.25, 0.5, 0.75, 1.0, 1.0, 1.0]
    assert norm.weight.tolist() == [-2.0, -1.0, 1.0, 1.0, 1.0, 1.0, 1.0, 2.0]


@settings(max_examples=30)
@given(weight=scales, entries=scales, clip=st.floats(0.0625, 2, width=32), offset=st.booleans())
def test_zeroth_biases_are_clipped_to_the_share_of_the_scale(
    weight: Tensor, entries: Tensor, clip: float, offset: bool
) -> None:
    norm = OffsetNorm() if offset else nn.LayerNorm(D)
    norm.weight.data.copy_(weight)
    model = block(norm)
    optimizer = still(model)
    sparsify(model, ZerothBias(clip), inputs=inputs(), optimizer=optimizer)
    table = table_of(model)
    table.data.copy_(entries.expand(T, D))
    optimizer.step()
    bound = clip * (weight.double() + offset).abs()
    expected = torch.maximum(torch.minimum(entries.double(), bound), -bound)
    # the bound: an addition, a product and two roundings in float32
    tolerance = 4 * EPS * clip * (1 + weight.abs().max().item())
    torch.testing.assert_close(table.double(), expected.expand(T, D), rtol=0, atol=tolerance)
    once = table.detach().clone()
    optimizer.step()
    assert torch.equal(table, once), "not idempotent"


@pytest.mark.parametrize("recipe", [(ZerothBias(), NormFloor()), (NormFloor(), ZerothBias())])
def test_the_norm_is_floored_before_the_zeroth_bias_is_clipped(recipe: tuple) -> None:
    model = block()
    model[0].weight.data.fill_(0.25)
    optimizer = still(model)
    sparsify(model, recipe, inputs=inputs(), optimizer=optimizer)
    table_of(model).data.fill_(5.0)
    optimizer.step()
    assert torch.equal(table_of(model), torch.full((T, D), 0.1))  # 0.025 in the other order


def test_without_a_norm_the_zeroth_bias_is_clipped_to_the_share_itself() -> None:
    model = nn.Sequential(nn.Identity(), nn.Linear(D, H), nn.ReLU(), nn.Linear(H, D))
    optimizer = still(model)
    sparsify(model, ZerothBias(0.25), inputs=inputs(), optimizer=optimizer)
    table_of(model).data[:2] = torch.tensor([[-3.0], [0.125]])
    optimizer.step()
    assert table_of(model)[:3, 0].tolist() == [-0.25, 0.125, 0.0]


# --- which steps -------------------------------------------------------------------------------


def paper(model: nn.Sequential, **kwargs: object) -> Handle:
    return sparsify(model, "paper", inputs=inputs(), **kwargs)


def check_bounds(model: nn.Sequential) -> None:
    scale, table = model[0].weight.detach(), table_of(model).detach()
    assert scale.min() >= 1
    assert bool((table.abs() <= 0.1 * scale.abs() * (1 + 2 * EPS)).all())  # product and rounding


def check_both_bounds_were_reached(model: nn.Sequential) -> None:
    """Else a test of the bounds would hold without any projection."""
    scale, table = model[0].weight.detach(), table_of(model).detach()
    assert bool((scale == 1).any())
    assert bool((table.abs() >= 0.1 * scale.abs() * (1 - 2 * EPS)).any())


ENGINES = {
    "sgd": lambda p: torch.optim.SGD(p, lr=2.0, momentum=0.9, weight_decay=0.01),
    "adamw": lambda p: torch.optim.AdamW(p, lr=0.05, weight_decay=0.3, foreach=False),
    "adamw-foreach": lambda p: torch.optim.AdamW(p, lr=0.05, weight_decay=0.3, foreach=True),
    "adamw-fused": lambda p: torch.optim.AdamW(p, lr=0.05, weight_decay=0.3, fused=True),
    "rmsprop": lambda p: torch.optim.RMSprop(p, lr=0.05),
}


@pytest.mark.parametrize("engine", ENGINES)
def test_floor_and_clip_hold_after_every_step(engine: str) -> None:
    model = block()
    handle = paper(model)
    optimizer = ENGINES[engine](model.parameters())
    handle.attach(optimizer)
    for step in range(6):
        optimizer.zero_grad()
        loss_of(model).backward()
        optimizer.step()
        check_bounds(model)
        assert handle.step == step + 1
    check_both_bounds_were_reached(model)


def test_an_optimizer_with_a_closure_projects_once_for_each_step() -> None:
    model = block()
    handle = paper(model)
    optimizer = torch.optim.LBFGS(model.parameters(), lr=1.0, max_iter=4)
    handle.attach(optimizer)
    calls = 0

    def closure() -> Tensor:
        nonlocal calls
        calls += 1
        optimizer.zero_grad()
        loss = loss_of(model)
        loss.backward()
        return loss

    before = loss_of(model).item()
    for _ in range(3):
        optimizer.step(closure)
        check_bounds(model)
    assert handle.step == 3
    assert calls > 3  # several evaluations a step, and no projection between them
    assert loss_of(model).item() < before
    check_both_bounds_were_reached(model)


def test_accumulating_gradients_projects_and_counts_at_the_step_only() -> None:
    model = block()
    handle = paper(model)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    handle.attach(optimizer)
    model[0].weight.data.fill_(0.5)
    for _ in range(3):
        (loss_of(model) / 3).backward()
        assert handle.step == 0
        assert torch.equal(model[0].weight, torch.full((D,), 0.5))
    optimizer.step()
    assert handle.step == 1
    check_bounds(model)


@pytest.mark.parametrize("engine", ["adamw", "adamw-foreach", "adamw-fused"])
def test_a_step_that_gradscaler_skips_neither_projects_nor_counts(engine: str) -> None:
    """A fused optimizer is called even then, and skips inside its kernel."""
    model = block()
    handle = paper(model)
    optimizer = ENGINES[engine](model.parameters())
    handle.attach(optimizer)
    scaler = torch.amp.GradScaler("cpu", init_scale=4.0)
    for overflow in (False, True, False):
        model[0].weight.data.fill_(0.5)
        steps = handle.step
        optimizer.zero_grad()
        scaler.scale(loss_of(model, float("inf") if overflow else 1.0)).backward()
        scaler.step(optimizer)
        scaler.update()
        assert handle.step == steps + (not overflow)
        if overflow:
            assert torch.equal(model[0].weight, torch.full((D,), 0.5))
        else:
            check_bounds(model)


@pytest.fixture
def accelerator() -> Iterator[object]:
    from accelerate import Accelerator
    from accelerate.state import AcceleratorState, GradientState, PartialState

    yield Accelerator(cpu=True, gradient_accumulation_steps=2)
    for state in (AcceleratorState, GradientState, PartialState):
        state._reset_state()


def test_accelerates_wrapped_optimizer_projects_at_its_real_steps(accelerator) -> None:
    model = block()
    handle = paper(model)
    optimizer = ENGINES["adamw"](model.parameters())
    prepared_model, prepared = accelerator.prepare(model, optimizer)
    assert type(prepared) is not type(optimizer)  # else this test shows nothing
    handle.attach(prepared)
    real = []
    for _ in range(4):
        with accelerator.accumulate(prepared_model):
            accelerator.backward(loss_of(prepared_model))
            prepared.step()
            prepared.zero_grad()
        real.append(handle.step)
    assert real == [0, 1, 1, 2]
    check_bounds(model)


def test_attaching_twice_projects_once() -> None:
    model = block()
    handle = sparsify(model, NormFloor(uplift=4), inputs=inputs())
    model[0].weight.data.zero_()
    optimizer = still(model)
    handle.attach(optimizer)
    handle.attach(optimizer)
    optimizer.step()
    assert handle.step == 1
    assert torch.equal(model[0].weight, torch.full((D,), 0.25))


def test_after_attaching_to_a_new_optimizer_the_old_one_is_not_followed() -> None:
    model = block()
    handle = sparsify(model, NormFloor(uplift=4), inputs=inputs())
    old, new = still(model), still(model)
    handle.attach(old)
    old.step()
    state = handle.state_dict()
    handle.load_state_dict(state)
    handle.attach(new)
    old.step()
    assert handle.step == 1
    new.step()
    assert handle.step == 2


def test_without_attach_nothing_is_projected() -> None:
    model = block()
    paper(model)
    optimizer = still(model)
    model[0].weight.data.fill_(0.5)
    optimizer.step()
    assert torch.equal(model[0].weight, torch.full((D,), 0.5))


def test_attach_refuses_what_is_no_optimizer() -> None:
    handle = paper(block())
    with pytest.raises(TypeError, match=r"torch\.optim\.Optimizer.*Linear"):
        handle.attach(nn.Linear(2, 2))
    with pytest.raises(ValueError, match="steps=0"):
        handle.attach(still(handle.model), steps=0)


# --- an optimizer made before sparsify ---------------------------------------------------------


@pytest.mark.parametrize("named", [False, True])
def test_an_older_optimizer_gets_the_zeroth_biases_in_the_group_of_up(named: bool) -> None:
    model = block()
    parts = dict(model.named_parameters())
    up = {name: p for name, p in parts.items() if name.startswith("1.")}
    rest = {name: p for name, p in parts.items() if name not in up}
    groups = [
        {"params": list(group.items()) if named else list(group.values()), "lr": lr}
        for group, lr in ((rest, 0.0), (up, 0.5))
    ]
    optimizer = torch.optim.SGD(groups)
    schedule = torch.optim.lr_scheduler.StepLR(optimizer, step_size=1, gamma=0.5)
    handle = sparsify(model, ZerothBias(clip=100), inputs=inputs(), optimizer=optimizer)
    table = table_of(model)
    assert [any(p is table for p in g["params"]) for g in optimizer.param_groups] == [False, True]
    if named:
        assert optimizer.param_groups[1]["param_names"][-1] == "1.actsparse.zeroth_bias"

    for rate in (0.5, 0.25, 0.125):  # the scheduler made before sparsify drives the new one too
        before = table.detach().clone()
        optimizer.zero_grad()
        loss_of(model).backward()
        optimizer.step()
        assert table.grad.abs().max() > 0
        # SGD by hand; one product and one subtraction
        torch.testing.assert_close(table, before - rate * table.grad, rtol=4 * EPS, atol=EPS)
        schedule.step()
    handle.attach(optimizer)
    assert sum(p is table for g in optimizer.param_groups for p in g["params"]) == 1
    again = torch.optim.SGD([dict(g, params=list(g["params"])) for g in optimizer.param_groups])
    again.load_state_dict(optimizer.state_dict())


def test_a_norm_bias_frozen_in_training_is_not_moved_by_momentum_or_decay() -> None:
    """An optimizer skips parameters without a gradient, so a gradient left over must go."""
    model = block()
    optimizer = torch.optim.AdamW(model.parameters(), lr=0.05, weight_decay=0.3)
    for _ in range(2):
        optimizer.zero_grad(set_to_none=False)
        loss_of(model).backward()
        optimizer.step()
    bias = model[0].bias.detach().clone()
    assert bias.abs().min() > 0
    finetune = Recipe("f", (ZerothBias(finetune=True), SwapActivation(mix=1)))
    sparsify(model, finetune, inputs=inputs(), optimizer=optimizer)
    for _ in range(2):
        optimizer.zero_grad(set_to_none=False)
        loss_of(model).backward()
        optimizer.step()
    assert torch.equal(model[0].bias, bias)

"""Schedules stand where the weights are: in averages, copies, snapshots and files."""

from __future__ import annotations

import copy
import io
import warnings
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.optim.swa_utils import (
    AveragedModel,
    get_ema_avg_fn,
    get_ema_multi_avg_fn,
    get_swa_avg_fn,
    update_bn,
)

from actsparse import (
    ActivationPenalty,
    Handle,
    NormFloor,
    SwapActivation,
    TopK,
    find_mlp_blocks,
    handle_of,
    sparsify,
)
from actsparse.modify.step_buffer import BUFFER

D, H, STEPS = 8, 32, 30
SCHEDULES = {"mix": SwapActivation(mix=0.8), "top-k": TopK(0.1, ramp=0.8)}
AVERAGES: dict[str, dict[str, Any]] = {
    "mean": {},
    "ema": {"multi_avg_fn": get_ema_multi_avg_fn(0.9)},
    "one-by-one": {"avg_fn": get_ema_avg_fn(0.9)},
    "mean-one-by-one": {"avg_fn": get_swa_avg_fn()},
}


def stream() -> Tensor:
    return torch.randn(4, 6, D)


def net() -> nn.Sequential:
    return nn.Sequential(nn.LayerNorm(D), nn.Linear(D, H), nn.GELU(), nn.Linear(H, D))


def start(recipe: Any = SCHEDULES["mix"]) -> tuple[nn.Module, Handle, torch.optim.Optimizer]:
    model = net()
    handle = sparsify(model, recipe, inputs=stream())
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2)
    handle.attach(optimizer, steps=STEPS)
    return model, handle, optimizer


def train(
    model: nn.Module,
    optimizer: torch.optim.Optimizer,
    steps: int,
    after: Callable[[], object] = lambda: None,
) -> None:
    for _ in range(steps):
        optimizer.zero_grad()
        model.train()(stream()).square().mean().backward()
        optimizer.step()
        after()


def own(model: nn.Module) -> Handle:
    handle = handle_of(model)
    assert handle is not None
    return handle


def as_if_at(step: int, weights: nn.Module, recipe: Any) -> nn.Module:
    """The reference: the same weights in a model made anew, its schedules put to ``step``."""
    model = net().eval()
    handle = sparsify(model, recipe, inputs=stream())
    model.load_state_dict(dict(weights.named_parameters()), strict=False)
    handle.load_state_dict({"step": step, "steps": STEPS})
    return model


# --- averages ------------------------------------------------------------------------------------


@pytest.mark.parametrize("done", [7, STEPS])
@pytest.mark.parametrize("use_buffers", [True, False])
@pytest.mark.parametrize("average", AVERAGES)
@pytest.mark.parametrize("recipe", SCHEDULES)
@pytest.mark.filterwarnings("ignore:the weights that were loaded")  # of the reference
def test_an_average_made_before_training_stands_where_its_original_does(
    recipe: str, average: str, use_buffers: bool, done: int
) -> None:
    model, _, optimizer = start(SCHEDULES[recipe])
    ema = AveragedModel(model, use_buffers=use_buffers, **AVERAGES[average])
    train(model, optimizer, done, lambda: ema.update_parameters(model))
    x = stream()
    want = as_if_at(done, ema.module, SCHEDULES[recipe])(x)
    assert torch.equal(ema.eval()(x), want)
    assert own(ema.module).state_dict() == {"step": done, "steps": STEPS}
    again = copy.deepcopy(model).eval()
    again.load_state_dict(ema.module.state_dict())
    assert torch.equal(again(x), want)


def test_an_average_is_saved_where_it_stands_though_it_was_never_called() -> None:
    model, _, optimizer = start()
    ema = AveragedModel(model, use_buffers=True, multi_avg_fn=get_ema_multi_avg_fn(0.9))
    train(model, optimizer, 7, lambda: ema.update_parameters(model))
    assert ema.module.state_dict()[BUFFER][:2].tolist() == [7, STEPS]


def test_an_average_is_right_in_compiled_code() -> None:
    model, _, optimizer = start()
    ema = AveragedModel(model, use_buffers=True, multi_avg_fn=get_ema_multi_avg_fn(0.9))
    compiled, x = torch.compile(ema.eval(), backend="eager"), stream()
    compiled(x)
    train(model, optimizer, 7, lambda: ema.update_parameters(model))
    got = compiled(x)
    assert torch.equal(got, ema(x))
    assert own(ema.module).step == 7


def test_an_average_of_parameters_alone_says_that_its_schedules_stand_still() -> None:
    model, _, optimizer = start()
    ema = copy.deepcopy(model).eval()

    def update() -> None:
        with torch.no_grad():
            for mine, theirs in zip(ema.parameters(), model.parameters(), strict=True):
                mine.lerp_(theirs, 0.1)

    train(model, optimizer, 7, update)
    with pytest.warns(UserWarning, match="schedules stand at step 0, the original's at 7"):
        ema(stream())


def test_what_was_averaged_is_not_taken_for_a_step_where_the_original_is_gone() -> None:
    model, _, optimizer = start()
    ema = AveragedModel(model, use_buffers=True, multi_avg_fn=get_ema_multi_avg_fn(0.9))
    train(model, optimizer, 7, lambda: ema.update_parameters(model))
    handle = own(ema.module)
    with torch.no_grad():
        getattr(ema.module, BUFFER).add_(1)
    handle._clock.unfollowed()
    with pytest.warns(UserWarning, match="was averaged or overwritten; schedules stay at step 7"):
        ema.eval()(stream())


def test_batch_norm_statistics_can_be_renewed_for_an_average() -> None:
    model, _, optimizer = start()
    ema = AveragedModel(model)
    train(model, optimizer, 3, lambda: ema.update_parameters(model))
    update_bn([stream()], ema)
    assert own(ema.module).step == 3


# --- copies --------------------------------------------------------------------------------------


def test_a_snapshot_keeps_its_place_while_the_original_trains_on() -> None:
    model, handle, optimizer = start()
    train(model, optimizer, 7)
    x = stream()
    want, best = model.eval()(x), copy.deepcopy(model)
    train(model, optimizer, 7)
    assert torch.equal(best.eval()(x), want)
    assert (handle.step, own(best).step) == (14, 7)


def test_a_copy_is_trained_by_an_optimizer_of_its_own() -> None:
    model, handle, optimizer = start((SCHEDULES["mix"],))
    train(model, optimizer, 5)
    twin = copy.deepcopy(model)
    theirs = torch.optim.SGD(twin.parameters(), lr=0.1)
    own(twin).attach(theirs)
    train(twin, theirs, 3)
    train(model, optimizer, 1)
    assert (handle.step, own(twin).step) == (6, 8)
    twin.eval()(stream())


def test_a_copy_takes_no_optimizer_along() -> None:
    model, _, optimizer = start("paper-finetune")
    train(model, optimizer, 1)
    memo: dict[int, Any] = {}
    copy.deepcopy(model, memo)
    assert id(optimizer) not in memo


@pytest.mark.parametrize("recipe", [NormFloor(uplift=0.8), ActivationPenalty(ramp=0.8)], ids=str)
def test_a_whole_model_that_was_pickled_goes_on(recipe: Any) -> None:
    model, _, optimizer = start(recipe)
    train(model.requires_grad_(), optimizer, 0)
    own(model).load_state_dict({"step": 9, "steps": STEPS})
    file = io.BytesIO()
    torch.save(model, file)
    file.seek(0)
    again, x = torch.load(file, weights_only=False), stream()
    assert torch.equal(again.eval()(x), model.eval()(x))
    assert own(again).state_dict() == {"step": 9, "steps": STEPS}
    own(again).remove()
    assert own(model).step == 9


def test_training_goes_on_where_it_was_after_an_average_was_swapped_in_and_out() -> None:
    model, handle, optimizer = start()
    ema = AveragedModel(model)
    train(model, optimizer, 3, lambda: ema.update_parameters(model))
    train(model, optimizer, 4)
    kept = copy.deepcopy(model.state_dict())
    with torch.no_grad():
        for mine, theirs in zip(
            model.state_dict().values(), ema.module.state_dict().values(), strict=True
        ):
            mine.copy_(theirs)
        model.eval()(stream())
        assert handle.step == 3
        for mine, theirs in zip(model.state_dict().values(), kept.values(), strict=True):
            mine.copy_(theirs)
    train(model, optimizer, 1)
    assert handle.state_dict() == {"step": 8, "steps": STEPS}


# --- state dicts ---------------------------------------------------------------------------------


def test_weights_bring_their_place_with_them() -> None:
    model, handle, optimizer = start()
    first = copy.deepcopy(model.state_dict())
    train(model, optimizer, 7)
    best, x = copy.deepcopy(model.state_dict()), stream()
    want = model.eval()(x)
    train(model, optimizer, 20)
    model.load_state_dict(best)
    assert torch.equal(model.eval()(x), want)
    train(model, optimizer, 1)
    assert handle.state_dict() == {"step": 8, "steps": STEPS}
    model.load_state_dict(first)  # as who looks for a learning rate does
    assert handle.step == 0
    other, theirs, _ = start()
    other.load_state_dict(best, assign=True)
    assert torch.equal(other.eval()(x), want)
    assert theirs.step == 7


def test_a_state_dict_without_it_loads_and_asks_where_it_stands() -> None:
    model, _, optimizer = start()
    train(model, optimizer, 7)
    old = {name: value for name, value in model.state_dict().items() if name != BUFFER}
    again = net()
    handle = sparsify(again, SCHEDULES["mix"], inputs=stream())
    with pytest.warns(UserWarning, match=r"attach\(optimizer, steps=\.\.\., start=N\) tells"):
        again.load_state_dict(old)  # strict
    assert BUFFER not in old
    again.load_state_dict(old)  # said once
    handle.attach(torch.optim.SGD(again.parameters()), steps=STEPS, start=7)
    x = stream()
    assert torch.equal(again.eval()(x), model.eval()(x))


def test_plain_weights_and_those_of_a_sparsified_model_load_into_each_other() -> None:
    model, handle, _ = start()
    missing = net().load_state_dict(model.state_dict(), strict=False)
    assert (missing.missing_keys, missing.unexpected_keys) == ([], [BUFFER])
    with pytest.warns(UserWarning, match="do not say where"):
        model.load_state_dict(net().state_dict())
    handle.remove()
    model.load_state_dict(net().state_dict())


class Two(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.first, self.second = net(), net()

    def forward(self, x: Tensor) -> Tensor:
        return self.second(self.first(x))


@pytest.mark.parametrize("told", [0, 1, 2, None])
def test_weights_in_several_files_need_to_say_it_once(told: int | None) -> None:
    model, x = Two(), stream()
    handle = sparsify(model, SCHEDULES["mix"], inputs=x)
    handle.load_state_dict({"step": 7, "steps": STEPS})
    state = model.state_dict()
    parts = [
        {name: value for name, value in state.items() if name.startswith(part)}
        for part in ("first", "second", "neither")
    ]
    if told is not None:
        parts[told][BUFFER] = state[BUFFER]
    again = Two()
    theirs = sparsify(again, SCHEDULES["mix"], inputs=x)
    for part in parts:
        again.load_state_dict(part, strict=False)
    if told is None:
        with pytest.warns(UserWarning, match="do not say where"):
            again.eval()(x)
    else:
        assert torch.equal(again.eval()(x), model.eval()(x))
        assert theirs.step == 7


def test_a_change_of_dtype_or_of_the_tensors_moves_nothing() -> None:
    model, handle, optimizer = start()
    train(model, optimizer, 7)
    model.half()
    assert getattr(model, BUFFER).dtype == torch.int64
    model.double().eval()(stream().double())
    assert handle.step == 7


def test_recipes_without_schedules_add_nothing_to_the_state_dict() -> None:
    model = net()
    before = list(model.state_dict())
    sparsify(model, SwapActivation(), inputs=stream())
    assert list(model.state_dict()) == before


def test_a_model_made_under_inference_mode_can_be_moved() -> None:
    with torch.inference_mode():
        model, x = net().eval(), stream()
        handle = sparsify(model, SCHEDULES["mix"], blocks=find_mlp_blocks(model, x))
        before = model(x)
    handle.load_state_dict({"step": STEPS, "steps": STEPS})
    with torch.inference_mode():
        assert not torch.equal(model(x), before)


@pytest.mark.filterwarnings("ignore:There is a performance drop")  # of vmap's own
def test_shapes_can_be_asked_on_meta_and_copies_be_stacked_under_vmap() -> None:
    model, handle, optimizer = start()
    train(model, optimizer, 3)
    x = stream()
    want = model.eval()(x)
    parameters, buffers = torch.func.stack_module_state([model, copy.deepcopy(model)])
    found = torch.vmap(lambda p, b: torch.func.functional_call(model, (p, b), (x,)))(
        parameters, buffers
    )
    assert torch.allclose(found[1], want, atol=1e-6)
    assert model.to("meta")(x.to("meta")).shape == want.shape
    assert handle.step == 3


def test_the_name_of_the_buffer_is_not_taken_from_a_model() -> None:
    model = net()
    model.register_buffer(BUFFER, torch.zeros(1))
    with pytest.raises(ValueError, match="has a buffer 'actsparse_progress' already"):
        sparsify(model, SCHEDULES["mix"], inputs=stream())
    with warnings.catch_warnings():
        assert getattr(model, BUFFER).shape == (1,)

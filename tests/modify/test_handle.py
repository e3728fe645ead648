"""The handle: what it says, and that it takes everything back."""

from __future__ import annotations

import copy
import itertools
import json
from collections.abc import Callable

import pytest
import torch
from torch import Tensor, nn

from actsparse import (
    ActivationPenalty,
    Handle,
    LeaveOutMLP,
    NormFloor,
    SwapActivation,
    WeightNoise,
    ZerothBias,
    find_mlp_blocks,
    handle_of,
    sparsify,
)
from actsparse.blocks.site import Site, site_of
from tests.zoo import BY_ID, call

B, T, D, H = 2, 5, 8, 32
EVERYTHING = (ZerothBias(), NormFloor(), SwapActivation(mix=4), ActivationPenalty(), WeightNoise())


class Net(nn.Module):
    """An MLP after a norm of its own, one after no norm at all."""

    def __init__(self) -> None:
        super().__init__()
        self.norm = nn.LayerNorm(D)
        self.first = nn.Sequential(nn.Linear(D, H), nn.ReLU(), nn.Linear(H, D))
        self.second = nn.Sequential(nn.Linear(D, H), nn.ReLU(), nn.Linear(H, D))

    def forward(self, x: Tensor) -> Tensor:
        x = x + self.first(self.norm(x))
        return x + self.second(x)


def stream() -> Tensor:
    return torch.randn(B, T, D)


def step(model: nn.Module, optimizer: torch.optim.Optimizer, x: Tensor) -> None:
    optimizer.zero_grad()
    (model(x) - x.roll(1, -1)).square().mean().backward()
    optimizer.step()


# --- what it says ------------------------------------------------------------------------------


def test_printing_names_every_modification_and_what_was_left_alone_and_why() -> None:
    handle = sparsify(Net(), EVERYTHING, inputs=stream())
    lines = str(handle).splitlines()
    names = " + ".join(type(m).__name__ for m in EVERYTHING)
    assert lines[0] == f"{names}: 2 MLP blocks of Net"
    for modification in EVERYTHING:
        name = type(modification).__name__
        assert any(line.split()[0] == name and "left alone" not in line for line in lines[1:])
    (left,) = [line for line in lines if "left alone" in line]
    assert left.split()[:2] == ["NormFloor", "second:"]
    assert left.endswith("left alone: no norm feeds its up layer")
    assert any("relu → jsrelu" in line for line in lines)
    assert any(
        "5 positions (the length seen in inputs), norm.bias frozen" in line for line in lines
    )
    assert any("hoyer, weight 0.5" in line for line in lines)
    assert any("ρ = 0.1 on up and down" in line for line in lines)


def test_what_is_the_same_in_every_layer_is_printed_once() -> None:
    model, inputs = BY_ID["gpt2"].build()
    handle = sparsify(model, (ZerothBias(finetune=True), NormFloor()), inputs=inputs)
    assert str(handle).splitlines()[1:] == [
        "  ZerothBias         transformer.h.0.mlp … transformer.h.1.mlp: "
        "16 positions (config.max_position_embeddings), transformer.h.*.ln_2.bias frozen",
        "  NormFloor          transformer.h.0.mlp … transformer.h.1.mlp: "
        "transformer.h.*.ln_2.weight ≥ 1",
    ]


def test_blocks_that_were_refused_are_printed_with_the_reason() -> None:
    model, inputs = BY_ID["qwen2-moe-shared-expert"].build()
    handle = sparsify(model, SwapActivation(), inputs=inputs)
    refused = [line for line in str(handle).splitlines() if "refused" in line]
    assert len(refused) == 2
    assert "model.layers.0.mlp.experts" in refused[0]


def test_rows_are_plain_values_one_for_each_modification_and_block() -> None:
    handle = sparsify(Net(), EVERYTHING, inputs=stream())
    rows = handle.rows()
    assert json.loads(json.dumps(rows)) == rows
    pairs = {(row["modification"], row["block"]) for row in rows}
    assert pairs == {(type(m).__name__, b) for m in EVERYTHING for b in ("first", "second")}
    assert len(rows) == len(pairs)
    assert all(("change" in row) != ("left_alone" in row) for row in rows)
    assert [row["block"] for row in rows if "left_alone" in row] == ["second"]


def test_a_modification_that_fits_no_block_is_an_error_with_the_reason_and_changes_nothing() -> (
    None
):
    model, x = nn.Sequential(nn.Linear(D, H), nn.ReLU(), nn.Linear(H, D)), stream()
    keys = set(model.state_dict())
    with pytest.raises(ValueError, match=r"NormFloor fits none of the 1 blocks.*no norm feeds"):
        sparsify(model, "paper", inputs=x)
    assert set(model.state_dict()) == keys
    assert handle_of(model) is None


def test_the_model_knows_its_handle_until_it_is_removed() -> None:
    model, x = Net(), stream()
    handle = sparsify(model, SwapActivation(), inputs=x)
    assert handle_of(model) is handle
    with pytest.raises(ValueError, match=r"sparsified already.*SwapActivation.*remove\(\)"):
        sparsify(model, SwapActivation(), inputs=x)
    handle.remove()
    assert handle_of(model) is None
    sparsify(model, SwapActivation(), inputs=x).remove()


# --- taking back -------------------------------------------------------------------------------


def test_remove_takes_its_hook_off_the_optimizer() -> None:
    model, x = Net(), stream()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    users: list[int] = []
    optimizer.register_step_post_hook(lambda *hook: users.append(1))
    before = dict(optimizer._optimizer_step_post_hooks)
    handle = sparsify(model, "paper-finetune", inputs=x)
    handle.attach(optimizer, steps=4)
    assert len(optimizer._optimizer_step_post_hooks) == 2
    handle.remove()
    assert dict(optimizer._optimizer_step_post_hooks) == before
    model.norm.weight.data.fill_(0.5)
    step(model, optimizer, x)
    assert handle.step == 0
    assert model.norm.weight.max() < 1
    assert users == [1]


def test_a_removed_handle_has_nothing_left_to_say_or_to_do() -> None:
    model, x = Net(), stream()
    handle = sparsify(model, EVERYTHING, inputs=x)
    model(x)
    handle.remove()
    handle.remove()
    assert handle.penalty().item() == 0
    assert not any("change" in row for row in handle.rows())


def test_after_remove_training_goes_on_with_the_same_optimizer_and_frozen_biases_thaw() -> None:
    model, x = Net(), stream()
    optimizer = torch.optim.AdamW(model.parameters(), lr=0.05, weight_decay=0.3)
    handle = sparsify(model, "paper-finetune", blocks=find_mlp_blocks(model, x)[:1])
    handle.attach(optimizer, steps=4)
    for _ in range(2):
        step(model, optimizer, x)
    assert torch.equal(model.norm.bias, torch.zeros(D))
    handle.remove()
    for _ in range(2):
        step(model, optimizer, x)
    assert model.norm.bias.abs().min() > 0


def test_a_bias_that_the_user_had_frozen_stays_frozen_after_remove() -> None:
    model, x = Net(), stream()
    model.norm.bias.requires_grad_(False)
    sparsify(model, ZerothBias(), inputs=x).remove()
    assert not model.norm.bias.requires_grad


class Tap:
    """Reads the hidden activations, as an observer does."""

    def __init__(self, model: nn.Module, x: Tensor) -> None:
        self.sites = [site_of(block) for block in find_mlp_blocks(model, x)]
        self.shares: list[float] = []

    def attach(self) -> None:
        for site in self.sites:
            site_of(site.block).tap(self.read, ["a", "z"])

    def read(self, site: Site, stages: dict[str, Tensor]) -> None:
        self.shares.append((stages["a"] != 0).double().mean().item())

    def release(self) -> None:
        for site in self.sites:
            site_of(site.block).release(self.read)


ORDERS = [
    order
    for order in itertools.permutations(("sparsify", "tap", "attach", "remove", "release"))
    if order.index("sparsify") < order.index("attach") < order.index("remove")
    and order.index("tap") < order.index("release")
]


@pytest.mark.parametrize("order", ORDERS, ids="-".join)
@pytest.mark.filterwarnings("ignore:schedules stand still")  # until the optimizer has come
def test_changes_taps_and_optimizer_come_and_go_in_any_order(order: tuple[str, ...]) -> None:
    torch.manual_seed(1)
    model, x = Net(), stream()
    before, tree = model(x), {name: dict(vars(m)) for name, m in model.named_modules()}
    optimizer = torch.optim.SGD(model.parameters(), lr=0.0)
    tap = Tap(model, x)
    handles: list[Handle] = []
    actions: dict[str, Callable[[], object]] = {
        "sparsify": lambda: handles.append(sparsify(model, EVERYTHING, inputs=x)),
        "tap": tap.attach,
        "attach": lambda: handles[0].attach(optimizer),
        "remove": lambda: handles[0].remove(),
        "release": tap.release,
    }
    modified = tapped = False
    for name in order:
        actions[name]()
        modified = {"sparsify": True, "remove": False}.get(name, modified)
        tapped = {"tap": True, "release": False}.get(name, tapped)
        tap.shares.clear()
        y = model(x)
        assert torch.equal(y, before) == (not modified)  # weight noise
        assert len(tap.shares) == 2 * tapped
        if handles:
            assert (handles[0].penalty().item() > 0) == modified
    optimizer.step()
    assert handles[0].step == 0
    assert not optimizer._optimizer_step_post_hooks
    for name, module in model.named_modules():
        assert vars(module).keys() == tree[name].keys(), name
        assert not module._forward_hooks
        assert not module._forward_pre_hooks


def test_a_deep_copy_taken_in_training_has_a_handle_of_its_own() -> None:
    model, x = Net(), stream()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    recipe = (ZerothBias(), SwapActivation(mix=4))
    handle = sparsify(model, recipe, inputs=x, optimizer=optimizer)
    step(model, optimizer, x)
    twin = copy.deepcopy(model)
    step(model, optimizer, x)
    own = handle_of(twin)
    assert (handle.step, own.step) == (2, 1)
    own.remove()
    assert handle_of(model) is handle
    assert not any("zeroth_bias" in name for name in twin.state_dict())
    assert any("zeroth_bias" in name for name in model.state_dict())


def test_wrapping_a_layer_after_sparsify_is_noticed_at_attach() -> None:
    model, x = Net(), stream()
    handle = sparsify(model, "paper-finetune", inputs=x)
    model.first[0] = nn.Sequential(model.first[0])
    with pytest.raises(ValueError, match=r"'first\.0' was replaced or wrapped after sparsify"):
        handle.attach(torch.optim.SGD(model.parameters()), steps=1)


def test_the_control_without_mlps_prints_as_such() -> None:
    model, inputs = BY_ID["vit-classifier"].build()
    handle = sparsify(model, LeaveOutMLP(), inputs=inputs)
    assert "output replaced by zero" in str(handle)
    seen: list[Tensor] = []
    handle.blocks[0].down.module.register_forward_hook(lambda *hook: seen.append(hook[-1]))
    call(model, inputs)
    assert bool((seen[0] == 0).all())

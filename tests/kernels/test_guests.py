"""Whoever hangs on a layer that sparse execution would skip: the layers run, and print says why."""

from __future__ import annotations

import types
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn.utils import parametrizations, prune

from actsparse import SwapActivation, accelerate, find_mlp_blocks, sparsify

D, H = 8, 32


class Block(nn.Module):
    def __init__(self, act: nn.Module | None = None, drop: nn.Module | None = None) -> None:
        super().__init__()
        self.up, self.act, self.down = nn.Linear(D, H), act or nn.ReLU(), nn.Linear(H, D)
        self.drop = drop or nn.Dropout(0.5)

    def forward(self, x: Tensor) -> Tensor:
        return x + self.down(self.drop(self.act(self.up(x))))


@pytest.fixture(autouse=True)
def no_grad() -> Iterator[None]:
    with torch.no_grad():
        yield


X = torch.linspace(-2, 2, 5 * D).reshape(5, D)
PARTS = ("up", "act", "drop", "down")


def close(one: Tensor, two: Tensor) -> bool:
    return torch.allclose(one, two, rtol=1e-4, atol=1e-5)


class Lora(nn.Linear):
    """An adapter under the name of a linear layer."""

    def forward(self, x: Tensor) -> Tensor:
        return super().forward(x) + x.mean(-1, keepdim=True)


Lora.__name__ = "Linear"


class Doubled(torch.Tensor):
    """A tensor that is more than its numbers: linear layers with it give twice their output."""

    @classmethod
    def __torch_function__(cls, func: Any, kinds: Any, args: Any = (), kwargs: Any = None) -> Any:
        out = super().__torch_function__(func, kinds, args, kwargs or {})
        return 2 * out.as_subclass(Tensor) if func is nn.functional.linear else out


def exchange(name: str, new: Callable[[], nn.Module]) -> Callable[[Block], None]:
    return lambda model: setattr(model, name, new())


def give_forward(name: str) -> Callable[[Block], None]:
    def change(model: Block) -> None:
        layer = getattr(model, name)
        own = layer.forward
        layer.forward = lambda x: own(x) + 1

    return change


def own_forward_of_the_block(model: Block) -> None:
    def forward(self: Block, x: Tensor) -> Tensor:
        return x + self.down(self.drop(self.act(self.up(x)) * 2))

    model.forward = types.MethodType(forward, model)  # type: ignore[method-assign]


def wrap_weight(model: Block) -> None:
    model.down.weight = nn.Parameter(model.down.weight.as_subclass(Doubled), requires_grad=False)


CHANGES: dict[str, Callable[[Block], Any]] = {
    **{f"{part} is exchanged": exchange(part, lambda: nn.Identity()) for part in ("act", "drop")},
    "up is exchanged": exchange("up", lambda: Lora(D, H)),
    "down is exchanged": exchange("down", lambda: nn.Linear(H, D)),
    **{f"{part} has a forward of its own": give_forward(part) for part in PARTS},
    **{
        f"{part} has a forward hook": lambda m, part=part: getattr(m, part).register_forward_hook(
            lambda _, args, out: out + 1
        )
        for part in PARTS
    },
    **{
        f"{part} has a forward pre-hook": lambda m, part=part: getattr(
            m, part
        ).register_forward_pre_hook(lambda _, args: (args[0] + 1,))
        for part in PARTS
    },
    "up has weight norm": lambda m: parametrizations.weight_norm(m.up),
    "up is pruned by a hook": lambda m: prune.l1_unstructured(m.up, "weight", 0.5),
    "down's weight is of a subclass": wrap_weight,
    "the block has a forward of its own": own_forward_of_the_block,
    "the block has another class": lambda m: setattr(m, "__class__", Twice),
}


NEUTRAL = [CHANGES["drop is exchanged"], CHANGES["up has weight norm"]]  # the numbers stay


class Twice(Block):
    def forward(self, x: Tensor) -> Tensor:
        return 2 * super().forward(x)


@pytest.mark.parametrize("change", CHANGES.values(), ids=CHANGES)
def test_a_guest_that_comes_after_accelerate_is_noticed(change: Callable[[Block], Any]) -> None:
    torch.manual_seed(3)
    model = Block().eval()
    handle = accelerate(model, inputs=X, mode="sparse")
    before = model(X)
    torch.manual_seed(3)
    twin = Block().eval()
    assert close(before, twin(X))
    change(model)
    torch.manual_seed(3)
    twin = Block().eval()
    change(twin)
    torch.manual_seed(4)
    model.eval(), twin.eval()
    if model.up.weight.shape == twin.up.weight.shape:  # what a change has drawn
        twin.load_state_dict(model.state_dict())
    for _ in range(2):
        got = model(X)
    assert close(got, twin(X))
    assert change in NEUTRAL or not close(got, before)
    assert "its layers" in str(handle)


@pytest.mark.parametrize("change", CHANGES.values(), ids=CHANGES)
def test_a_guest_that_was_there_before_is_respected(change: Callable[[Block], Any]) -> None:
    model = Block().eval()
    blocks = find_mlp_blocks(model, X)
    change(model)
    want = model.eval()(X)
    refused = ""
    try:
        handle = accelerate(model, blocks=blocks, mode="sparse")
    except ValueError as error:
        refused = str(error)
    else:
        assert close(model(X), want)
        assert "its layers" in str(handle)
        handle.remove()
    assert close(model(X), want)
    if refused:
        assert "no block can be run sparse" in refused or "is not part of" in refused


@pytest.mark.parametrize("part", PARTS)
def test_backward_hooks_see_their_gradients(part: str) -> None:
    model, seen = Block().eval(), []
    handle = accelerate(model, inputs=X, mode="sparse")
    layer = getattr(model, part)
    layer.register_full_backward_hook(lambda _, into, out: seen.append(out[0].clone()))
    with torch.enable_grad():
        model(X.clone().requires_grad_()).sum().backward()
    assert len(seen) == 1
    assert bool(seen[0].any())
    assert f"{part} has a hook" in str(handle)


def test_a_guest_that_leaves_is_forgotten() -> None:
    model = Block().eval()
    handle = accelerate(model, inputs=X, mode="sparse")
    hook = model.act.register_forward_hook(lambda *_: None)
    model(X)
    hook.remove()
    model(X)
    assert [row["program"] for row in handle.table()] == ["dense", "sparse"]


class Capturing(Block):
    """Keeps what it computes, and computes with it."""

    def forward(self, x: Tensor) -> Tensor:
        a = self.act(self.up(x))
        return x + self.down(a) + a.mean(-1, keepdim=True)


class Parallel(nn.Module):
    """Attention's and the MLP's first layers are one, as in ViT-22B."""

    def __init__(self) -> None:
        super().__init__()
        self.both, self.act, self.down = nn.Linear(D, H + D), nn.ReLU(), nn.Linear(H, D)

    def forward(self, x: Tensor) -> Tensor:
        hidden, values = self.both(x).split([H, D], -1)
        return x + self.down(self.act(hidden)) + values


class Apart(nn.Module):
    """Gate and up read the same numbers from two tensors."""

    def __init__(self) -> None:
        super().__init__()
        self.gate, self.up, self.down = nn.Linear(D, H), nn.Linear(D, H), nn.Linear(H, D)
        self.act = nn.ReLU()

    def forward(self, x: Tensor) -> Tensor:
        return x + self.down(self.act(self.gate(x)) * self.up(x.clone()))


class Clipped(nn.Module):
    """ReLU for what the finder tries, something else for others."""

    def forward(self, z: Tensor) -> Tensor:
        return torch.relu(z) if z.abs().max() < 1e12 else z


class Capped(nn.Module):
    """ReLU as far as half precision reaches."""

    def forward(self, z: Tensor) -> Tensor:
        return torch.relu(z).clamp(max=65504)


class Leaky(nn.Module):
    """ReLU in evaluation alone."""

    def forward(self, z: Tensor) -> Tensor:
        return nn.functional.leaky_relu(z, 0.1) if self.training else torch.relu(z)


class Squared(nn.Module):
    """Anybody's squared ReLU."""

    def forward(self, z: Tensor) -> Tensor:
        return torch.relu(z).square()


MODELS: dict[str, tuple[Callable[[], nn.Module], str]] = {
    "a hidden layer that others read": (Capturing, "also feeds"),
    "a fused layer that others read": (Parallel, "also feeds"),
    "gate and up on two tensors": (Apart, "same tensor"),
    "an activation that looks at all it gets": (lambda: Block(Clipped()), "also feeds"),
    "an activation with a far cap": (lambda: Block(Capped()), "no known name"),
    "an activation of evaluation alone": (lambda: Block(Leaky()), "in training"),
    "alpha dropout": (lambda: Block(drop=nn.AlphaDropout(0.5)), "AlphaDropout"),
}


@pytest.mark.parametrize(("make", "why"), MODELS.values(), ids=MODELS)
def test_blocks_that_are_more_than_products_keep_to_their_layers(
    make: Callable[[], nn.Module], why: str
) -> None:
    model = make().eval()
    want = model(X)
    try:
        said = str(accelerate(model, inputs=X, mode="sparse"))
    except ValueError as error:
        said = str(error)
    assert torch.equal(model(X), want)
    assert why in said


def test_numbers_of_an_activation_that_change_are_noticed() -> None:
    model = nn.Sequential(nn.Linear(D, H), nn.LeakyReLU(0.0), nn.Linear(H, D)).eval()
    handle = accelerate(model, inputs=X, mode="sparse")
    before = model(X)
    model[1].negative_slope = 0.1
    got = model(X)
    assert "1 was relu, now None" in str(handle)
    handle.remove()
    assert close(got, model(X))
    assert not close(got, before)


@pytest.mark.parametrize("swap", [None, "relu"])
def test_a_strangers_activation_is_known_by_its_values(swap: str | None) -> None:
    model = Block(Squared()).eval()
    if swap:
        sparsify(model, [SwapActivation(swap)], inputs=X)
    want = model.eval()(X)
    handle = accelerate(model, inputs=X, mode="sparse")
    assert close(model(X), want)
    assert handle.table()[0]["program"] == "sparse"


@pytest.mark.parametrize(
    ("reason", "run"),
    [
        ("torch.func", lambda model: torch.vmap(model)(X)),
        ("forward-mode", lambda model: _dual(model)),
        ("float16 on cpu", lambda model: _autocast(model)),
        ("float64", lambda model: model.double()(X.double())),
        ("float16", lambda model: model.half()(X.half())),
        ("not a plain tensor", lambda model: model(X.as_subclass(Doubled))),
    ],
)
def test_calls_that_kernels_do_not_take_are_run_by_the_layers(
    reason: str, run: Callable[[nn.Module], Any]
) -> None:
    model = Block().eval()
    handle = accelerate(model, inputs=X, mode="sparse")
    run(model)
    (row,) = handle.table()
    assert row["program"] == "dense"
    assert reason in row["reason"]
    assert reason in str(handle)


def _dual(model: nn.Module) -> None:
    with torch.autograd.forward_ad.dual_level():
        dual = torch.autograd.forward_ad.make_dual(X, torch.ones_like(X))
        assert torch.autograd.forward_ad.unpack_dual(model(dual)).tangent is not None


def _autocast(model: nn.Module) -> None:
    with torch.autocast("cpu", torch.float16):
        model(X)

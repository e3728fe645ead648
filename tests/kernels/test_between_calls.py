"""What a call leaves behind, and what changes before the next one: neither harms a result."""

from __future__ import annotations

import copy
import gc
import weakref
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from actsparse import DropSmall, SwapActivation, accelerate, find_mlp_blocks, sparsify
from actsparse.blocks.site import site_of
from actsparse.kernels import build, dense
from actsparse.kernels.choose import Trial, Trials
from actsparse.kernels.prepared import Prepared
from actsparse.kernels.programs import Weights
from actsparse.modify.drop_small import set_thresholds

X = torch.randn(3, 16)


class Shared(nn.Module):
    """Its activation runs outside of the block too, and a call may stop inside of it."""

    def __init__(self) -> None:
        super().__init__()
        self.stem, self.act = nn.Linear(16, 16), nn.ReLU()
        self.up, self.down = nn.Linear(16, 64), nn.Linear(64, 16)
        self.dropout = nn.Dropout(0.5)
        self.stops = False

    def forward(self, x: Tensor) -> Tensor:
        x = self.act(self.stem(x))
        h = self.up(x)
        if self.stops:
            raise KeyboardInterrupt
        return x + self.down(self.dropout(self.act(h)))


def stopped(model: Shared) -> None:
    model.stops = True
    with pytest.raises(KeyboardInterrupt):
        model(X)
    model.stops = False


def mlp(act: nn.Module) -> nn.Sequential:
    return nn.Sequential(nn.Linear(16, 64), act, nn.Linear(64, 16)).eval()


@pytest.fixture
def packed(monkeypatch: pytest.MonkeyPatch) -> None:
    if build.level() == "reference" or not dense.has_onednn():
        pytest.skip("nothing compiled or packed here")

    def run(trials: Trials, kind: Any, density: float, programs: Any, *_: Any) -> Trial:
        won = {"packed": 1.0} if "packed" in programs else {}
        return Trial(density, {"dense": 2.0, **won})

    monkeypatch.setattr(Trials, "run", run)
    monkeypatch.setattr("actsparse.kernels.plan.LEAST", 0)


def same(one: Tensor, two: Tensor) -> bool:
    return torch.allclose(one, two, atol=1e-5)


@pytest.mark.parametrize("grad", [False, True])
def test_a_call_that_was_broken_off_takes_no_later_activation(grad: bool) -> None:
    model = Shared().eval()
    twin = copy.deepcopy(model)
    accelerate(model, inputs=X, mode="sparse")
    with torch.set_grad_enabled(grad):
        for _ in range(4):
            assert same(model(X), twin(X))
            stopped(model)
            assert same(model(X), twin(X))
            stopped(model)
            assert len(find_mlp_blocks(model, X)) == 1


@pytest.mark.parametrize("grad", [False, True])
def test_nothing_of_a_call_is_left_for_the_garbage_collector(grad: bool) -> None:
    model = mlp(nn.ReLU())
    accelerate(model, inputs=X, mode="sparse")
    gc.collect()
    gc.disable()
    try:
        with torch.set_grad_enabled(grad):
            for _ in range(5):
                x = torch.randn(3, 16, requires_grad=grad) * 2
                held = weakref.ref(x)
                model(x)
                del x
                assert held() is None
    finally:
        gc.enable()


def test_a_packed_block_does_not_hold_its_last_input(packed: None) -> None:
    model = mlp(nn.ReLU())
    handle = accelerate(model, inputs=X)
    with torch.no_grad():
        for _ in range(6):
            x = torch.randn(3, 16)
            held = weakref.ref(x)
            model(x)
            del x
    assert set(handle.ran().values()) == {"packed"}
    assert held() is None


@pytest.mark.parametrize("learns", ["0.bias", "2.bias"])
def test_a_bias_alone_learns(learns: str, packed: None) -> None:
    model = mlp(nn.ReLU()).requires_grad_(False)
    model.get_parameter(learns).requires_grad_()
    twin = copy.deepcopy(model)
    accelerate(model, inputs=X)
    for _ in range(4):
        found = [
            torch.autograd.grad(each(X).square().sum(), each.get_parameter(learns))[0]
            for each in (model, twin)
        ]
        assert same(*found)


@pytest.mark.parametrize(
    ("act", "name", "value"),
    [
        (nn.ELU(), "alpha", 3.0),
        (nn.LeakyReLU(), "negative_slope", 0.7),
        (nn.GELU(), "approximate", "tanh"),
    ],
)
def test_an_activation_that_is_cut_changes(act: nn.Module, name: str, value: object) -> None:
    model = mlp(act).requires_grad_(False)
    (block,) = sparsify(model, DropSmall(), inputs=X).blocks
    set_thresholds(model, {block.name: torch.rand(64) * 0.2})
    twin = copy.deepcopy(model)
    accelerate(model, inputs=X, mode="sparse")
    assert same(model(X), twin(X))
    x = X * 4
    for each in (model, twin):
        setattr(each[1], name, value)
    assert torch.allclose(model(x), twin(x), atol=2e-6)


def test_layers_that_are_compiled_one_by_one_keep_copies_each(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    if build.level() == "reference":
        pytest.skip("nothing compiled here")
    torch._dynamo.reset()
    model = nn.Sequential(*(mlp(nn.ReLU()) for _ in range(3)))
    twin = copy.deepcopy(model)
    accelerate(model, inputs=X, mode="sparse")
    for layer in model:
        layer.compile(backend="aot_eager")
    made: list[Weights] = []
    real = Weights.prepare

    def prepare(weights: Weights) -> Prepared:
        made.append(weights)
        return real(weights)

    monkeypatch.setattr(Weights, "prepare", prepare)
    with torch.no_grad():
        for changed in range(1, 3):
            for each in (model, twin):
                each[1][2].weight.fill_(changed)
            for _ in range(3):
                assert same(model(X), twin(X))
            assert len(made) == 2 + changed
        other = copy.deepcopy(model)
        for _ in range(3):
            assert same(other(X), twin(X))
    assert len(made) <= 8


class Halves(nn.Module):
    """Its hidden layer leaves one module and enters another, as in BERT."""

    def __init__(self) -> None:
        super().__init__()
        self.one = nn.Sequential(nn.Linear(16, 64), nn.ReLU())
        self.two = nn.Sequential(nn.Dropout(0.1), nn.Linear(64, 16))

    def forward(self, x: Tensor) -> Tensor:
        return x + self.two(self.one(x))


def test_a_hook_on_a_half_of_the_block_sees_the_hidden_layer() -> None:
    model = Halves().eval()
    accelerate(model, inputs=X, mode="sparse")
    with torch.no_grad():
        for _ in range(4):
            model(X)
        seen: list[Tensor] = []
        with model.one.register_forward_hook(lambda module, args, out: seen.append(out.mean())):
            model(X)
        with model.two.register_forward_pre_hook(lambda module, args: seen.append(args[0].mean())):
            model(X)
        assert seen[0].isfinite()
        assert seen[0] == seen[1]


def test_a_swap_is_mixed_again_between_calls() -> None:
    model = mlp(nn.GELU())
    (block,) = sparsify(model, SwapActivation("relu"), inputs=X).blocks
    accelerate(model, inputs=X, mode="sparse")
    with torch.no_grad():
        for _ in range(4):
            model(X)
        phi: Any = site_of(block).phi
        phi.done = False  # as a schedule that begins again has it
        phi.k.fill_(0.5)
        z = F.linear(X, *model[0].parameters())
        a = 0.5 * F.gelu(z) + 0.5 * z.relu()
        assert same(model(X), F.linear(a, *model[2].parameters()))


@pytest.mark.parametrize(
    ("act", "name", "value"), [(nn.ELU(), "alpha", 3.0), (nn.GELU(), "approximate", "tanh")]
)
def test_compiled_code_sees_that_a_number_of_phi_changed(
    act: nn.Module, name: str, value: object
) -> None:
    torch._dynamo.reset()
    model = nn.Sequential(nn.Linear(16, 64), copy.deepcopy(act), nn.Linear(64, 16)).eval()
    handle = sparsify(model, DropSmall(), inputs=X)
    set_thresholds(model, {handle.blocks[0].name: torch.full((64,), 0.1)})
    twin = copy.deepcopy(model)
    accelerate(model, inputs=X, mode="sparse")
    code = torch.compile(model, backend="aot_eager")
    with torch.no_grad():
        assert torch.allclose(code(X), twin(X), atol=1e-5)
        for each in (model, twin):
            setattr(each[1], name, value)
        far = 4 * X
        assert torch.allclose(code(far), twin(far), atol=1e-6)

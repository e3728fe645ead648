"""Layers that multiply by packed copies: as right as the layers, whatever happens between calls."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from actsparse import accelerate, observe
from actsparse.kernels import build, dense
from actsparse.kernels.accelerated import Accelerated
from actsparse.kernels.choose import Trial, Trials
from actsparse.kernels.met import EVERY

X = torch.randn(3, 8)


class Gated(nn.Module):
    """up is called before gate."""

    def __init__(self) -> None:
        super().__init__()
        self.up, self.gate, self.down = nn.Linear(8, 32), nn.Linear(8, 32), nn.Linear(32, 8)
        self.act = nn.ReLU()

    def forward(self, x: Tensor) -> Tensor:
        """y of x."""
        u = self.up(x)
        return self.down(self.act(self.gate(x)) * u)


def plain() -> nn.Sequential:
    return nn.Sequential(nn.Linear(8, 32), nn.ReLU(), nn.Linear(32, 8))


@pytest.fixture(autouse=True)
def packed_wins(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    if build.level() == "reference" or not dense.has_onednn():
        pytest.skip("nothing packed here")

    def run(trials: Trials, kind: Any, density: float, programs: Any, *_: Any) -> Trial:
        return Trial(density, {"dense": 2.0, "packed": 1.0})

    monkeypatch.setattr(Trials, "run", run)
    monkeypatch.setattr("actsparse.kernels.plan.LEAST", 0)
    with torch.no_grad():
        yield


@pytest.fixture
def packed(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """One entry for each of oneDNN's products."""
    products: list[int] = []
    real = dense.product

    def product(x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
        products.append(len(x))
        return real(x, weight, bias)

    monkeypatch.setattr(dense, "product", product)
    return products


def met(model: nn.Module, calls: int = 5) -> Accelerated:
    """The model's handle after some calls on X, the last of which ask nothing."""
    handle = accelerate(model, inputs=X)
    for _ in range(calls):
        model(X)
    return handle


def close(one: Tensor, two: Tensor) -> bool:
    return torch.allclose(one, two, atol=1e-5)


@pytest.mark.parametrize("make", [plain, Gated])
def test_results_are_the_layers_and_a_look_comes_at_times(
    make: Callable[[], nn.Module], packed: list[int]
) -> None:
    model = make().eval()
    want = model(X)
    handle = accelerate(model, inputs=X)
    for _ in range(EVERY + 5):
        assert close(model(X), want)
    (row,) = handle.table()
    assert row["calls"] == {"dense": 1, "packed": EVERY + 4}
    layers = 3 if make is Gated else 2
    assert len(packed) == layers * (EVERY + 4)
    handle.remove()
    assert torch.equal(model(X), want)


def test_whoever_hangs_on_the_hidden_layer_sees_it(packed: list[int]) -> None:
    model = plain().eval()
    met(model)
    want = (X @ model[0].weight.t() + model[0].bias).relu()
    seen: list[Tensor] = []
    with model[1].register_forward_hook(lambda module, args, output: seen.append(output)):
        before = len(packed)
        model(X)
    assert close(seen[0], want)
    assert len(packed) == before + 2
    with observe(model, "density", inputs=X) as counted:
        model(X)
    assert counted.summary("inference")["blocks"][0]["tokens"] == 3


@pytest.mark.parametrize("layer", [0, 2])
@pytest.mark.parametrize("how", ["in place", "data", "parameter", "bias"])
def test_a_changed_weight_is_noticed(layer: int, how: str, packed: list[int]) -> None:
    model = plain().eval()
    met(model)
    linear = model[layer]
    if how == "in place":
        linear.weight[0, 0] += 1
    elif how == "data":
        linear.weight.data += 1
    elif how == "parameter":
        linear.weight = nn.Parameter(torch.randn_like(linear.weight))
    else:
        linear.bias = nn.Parameter(torch.randn_like(linear.bias))
    before = len(packed)
    for _ in range(4):
        hidden = (X @ model[0].weight.t() + model[0].bias).relu()
        assert close(model(X), hidden @ model[2].weight.t() + model[2].bias)
    assert len(packed) >= before + 6  # copied anew


def test_what_oneDNN_cannot_do_runs_otherwise(packed: list[int]) -> None:
    model = plain().eval()
    want = model(X)
    met(model)
    before = len(packed)
    assert close(torch.func.vmap(model)(X[:, None])[:, 0], want)
    _, tangent = torch.func.jvp(model, (X,), (torch.ones_like(X),))
    assert tangent.any()
    with torch.enable_grad():
        assert model(X).requires_grad
    with torch.autocast("cpu", torch.bfloat16):
        assert model(X).dtype is torch.bfloat16
    assert len(packed) == before
    with pytest.raises(RuntimeError):
        model(X[:, :4])
    assert close(model(X), want)


@pytest.mark.parametrize("make", [plain, Gated])
def test_a_pass_that_was_broken_off_leaves_nothing(make: Callable[[], nn.Module]) -> None:
    model = make().eval()
    want = model(X)
    met(model)
    act: Any = model.act if isinstance(model, Gated) else model[1]  # type: ignore[index]

    def stop(*_: Any) -> None:
        raise KeyboardInterrupt

    for _ in range(EVERY + 1):  # passes of either kind
        with act.register_forward_pre_hook(stop), pytest.raises(KeyboardInterrupt):
            model(X)
        assert close(model(X), want)


def test_threads_have_passes_of_their_own() -> None:
    from concurrent.futures import ThreadPoolExecutor

    model = Gated().eval()
    want = model(X)
    met(model)

    def call(_: int) -> bool:
        with torch.no_grad():
            return close(model(X), want)

    with ThreadPoolExecutor(4) as pool:
        assert all(pool.map(call, range(400)))

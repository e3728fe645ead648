"""What a model does after its blocks were found: the layers run then, or the call is refused."""

from __future__ import annotations

import copy
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.nn.modules import module as every
from torch.overrides import TorchFunctionMode

from actsparse import accelerate


class MLP(nn.Module):
    """One that may do more than it did, by ``way``; ``then`` is called between up and φ."""

    def __init__(self, gated: bool = False) -> None:
        super().__init__()
        self.up, self.act, self.down = nn.Linear(8, 32), nn.ReLU(), nn.Linear(32, 8)
        self.gate = nn.Linear(8, 32) if gated else None
        self.way = "plain"
        self.then: Callable[[], object] = lambda: None

    def forward(self, x: Tensor) -> Tensor:
        z = self.up(x) if self.gate is None else self.gate(x)
        self.then()
        z = z + 0.5 if self.way == "shift" else z
        a = self.act(z)
        a = a if self.gate is None else a * self.up(x)
        if self.way == "scale":
            a = a * 1.5
        if self.way == "loss":
            self.loss = a.abs().mean()
        return self.down(torch.zeros_like(x).repeat(1, 4) if self.way == "other" else a)


X = torch.randn(4, 8)


@contextmanager
def exchanged(cls: type[nn.Module], forward: Any) -> Iterator[None]:
    own = cls.forward
    cls.forward = forward(own)  # type: ignore[method-assign]
    try:
        yield
    finally:
        cls.forward = own  # type: ignore[method-assign]


def doubled(own: Any) -> Any:
    return lambda self, x: own(self, x) * 2


@pytest.mark.parametrize("gated", [False, True])
@pytest.mark.parametrize("way", ["shift", "scale", "loss", "other"])
def test_what_is_computed_with_the_hidden_layer_since_is_refused(way: str, gated: bool) -> None:
    model = MLP(gated)
    accelerate(model, inputs=X, mode="sparse")
    model(X)
    model.way = way
    with pytest.raises(RuntimeError, match=r"block '.*' runs sparse, without its hidden layer"):
        model(X)
    model.way = "plain"
    model(X)


@pytest.mark.parametrize("gated", [False, True])
@pytest.mark.parametrize("way", ["shift", "scale", "loss", "other"])
def test_what_is_computed_in_training_alone_is_never_compiled_away(way: str, gated: bool) -> None:
    class Trained(MLP):
        def forward(self, x: Tensor) -> Tensor:
            self.way = way if self.training else "plain"
            return super().forward(x)

    model = Trained(gated)
    model.eval()
    plain = copy.deepcopy(model)
    accelerate(model, inputs=X, mode="sparse")
    torch._dynamo.reset()
    compiled = torch.compile(model, backend="aot_eager", fullgraph=True)
    torch.testing.assert_close(compiled(X), plain(X))
    model.train()
    plain.train()
    try:
        torch.testing.assert_close(compiled(X), plain(X))
        if way == "loss":
            torch.testing.assert_close(model.loss, plain.loss)
    except RuntimeError as error:
        assert "runs sparse, without its hidden layer" in str(error)  # noqa: PT017


@pytest.mark.parametrize("gated", [False, True])
def test_a_block_trains_compiled_and_sparse_after_a_call_that_is_not_compiled(gated: bool) -> None:
    model = MLP(gated)
    handle = accelerate(model, inputs=X, mode="sparse")
    model.train()
    assert "compiled code trains it sparse after one training call" in str(handle)
    want = model(X)
    assert "compiled code" not in str(handle)
    torch._dynamo.reset()
    graphs: list[Any] = []

    def note(graph: Any, inputs: Any) -> Any:
        graphs.append(graph)
        return graph

    torch.testing.assert_close(torch.compile(model, backend=note, fullgraph=True)(X), want)
    assert any("actsparse" in str(node.target) for graph in graphs for node in graph.graph.nodes)


def test_a_call_that_meets_remove_between_its_layers_is_refused() -> None:
    model = MLP()
    handle = accelerate(model, inputs=X, mode="sparse")
    model.then = handle.remove
    with pytest.raises(RuntimeError, match=r"was remove\(\) called"):
        model(X)


@pytest.mark.parametrize("cls", [nn.Linear, nn.ReLU, MLP])
def test_a_forward_exchanged_on_the_class_is_run(cls: type[nn.Module]) -> None:
    model = MLP()
    plain = copy.deepcopy(model)
    accelerate(model, inputs=X, mode="sparse")
    model(X)
    with exchanged(cls, doubled):
        assert torch.equal(model(X), plain(X))
    assert torch.allclose(model(X), plain(X), atol=1e-5)


def test_layers_whose_class_has_another_forward_are_left_alone() -> None:
    with exchanged(nn.Linear, doubled), pytest.raises(ValueError, match="replaced, for all"):
        accelerate(MLP(), inputs=X, mode="sparse")


def test_hooks_for_all_modules_see_the_hidden_layer() -> None:
    model, seen = MLP(), []
    plain = copy.deepcopy(model)
    handle = accelerate(model, inputs=X, mode="sparse")
    model(X)
    hook = every.register_module_forward_hook(
        lambda module, args, output: seen.append(output) if module is model.act else None
    )
    try:
        model(X)
    finally:
        hook.remove()
    assert torch.equal(seen[0], plain.act(plain.up(X)))
    assert "hook for all modules" in str(handle)


class _Shifted(TorchFunctionMode):
    def __torch_function__(
        self, func: Any, types: Any, args: Any = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        result = func(*args, **(kwargs or {}))
        return result + 1 if func is nn.functional.linear else result


def test_modes_of_others_see_the_layers() -> None:
    model = MLP()
    plain = copy.deepcopy(model)
    handle = accelerate(model, inputs=X, mode="sparse")
    with _Shifted():
        assert torch.equal(model(X), plain(X))
    with torch.device("cpu"):  # a mode as well, but of no importance
        model(X)
    assert "TorchFunctionMode" in str(handle)
    assert "1 sparse" in str(handle)


def test_calls_that_overlap_in_one_thread_are_refused() -> None:
    model = MLP()
    accelerate(model, inputs=X, mode="sparse")
    model(X)
    first = model.act(model.up(X))
    model.act(model.up(X + 1))
    with pytest.raises(RuntimeError, match="do two calls overlap"):
        model.down(first)


def test_threads_do_not_overlap() -> None:
    model = MLP()
    accelerate(model, inputs=X, mode="sparse")
    hidden = model.act(model.up(X))
    other = threading.Thread(target=model, args=(X + 1,))
    other.start()
    other.join()
    assert torch.isfinite(model.down(hidden)).all()


def test_fake_tensors_pass_through_the_layers() -> None:
    model = MLP()
    accelerate(model, inputs=X, mode="sparse")
    with FakeTensorMode(allow_non_fake_inputs=True) as fake:
        assert model(fake.from_tensor(X)).shape == X.shape

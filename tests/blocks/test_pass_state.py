"""What one pass keeps is its own: under threads, nested and aborted calls, and in compiled code."""

from __future__ import annotations

import copy
import pickle
import threading
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from actsparse import (
    ActivationPenalty,
    SwapActivation,
    accelerate,
    find_mlp_blocks,
    observe,
    sparsify,
)
from actsparse.blocks.pass_state import sites_asleep
from tests.mlp import Mlp


class Halt(Exception):
    """Breaks a pass off."""


def gated() -> nn.Module:
    return nn.Sequential(*(Mlp(nn.ReLU(), 8, 32, gated=True) for _ in range(2))).eval()


def plain(act: type[nn.Module]) -> nn.Module:
    return nn.Sequential(nn.Linear(8, 32), act(), nn.Linear(32, 8)).eval()


def swapped(model: nn.Module, x: Tensor) -> None:
    sparsify(model, [SwapActivation("jsrelu")], inputs=x)
    model.eval()


def sparse(model: nn.Module, x: Tensor) -> None:
    accelerate(model, inputs=x, mode="sparse")


Attach = Callable[[nn.Module, Tensor], None]
WAYS: list[tuple[str, Callable[[], nn.Module], Attach]] = [
    ("swapped", lambda: plain(nn.GELU), swapped),
    ("sparse", lambda: plain(nn.ReLU), sparse),
    ("swapped-gated", gated, swapped),
    ("sparse-gated", gated, sparse),
]
ways = pytest.mark.parametrize(("make", "attach"), [w[1:] for w in WAYS], ids=[w[0] for w in WAYS])


def inner(model: nn.Module) -> Iterator[nn.Module]:
    return (m for m in model.modules() if not list(m.children()))


@pytest.fixture(autouse=True)
def no_grad() -> Iterator[None]:
    with torch.no_grad():
        yield


@ways
def test_a_second_thread_in_the_middle_of_a_pass_changes_nothing(
    make: Callable[[], nn.Module], attach: Attach
) -> None:
    model, xs = make(), [torch.randn(3, 8), torch.randn(5, 8)]
    attach(model, xs[0])
    want = [model(x) for x in xs]
    for at in inner(model):
        entered, finished = threading.Event(), threading.Event()
        out: dict[int, Tensor] = {}
        first = threading.Thread(target=lambda out=out: out.setdefault(0, model(xs[0])))

        def pause(
            *_: Any, first: Any = first, entered: Any = entered, done: Any = finished
        ) -> None:
            if threading.current_thread() is first:
                entered.set()
                assert done.wait(20)

        hook = at.register_forward_pre_hook(pause)
        first.start()
        assert entered.wait(20)
        out[1] = model(xs[1])
        finished.set()
        first.join()
        hook.remove()
        for i in (0, 1):  # with a hook inside a block its layers run: other roundings
            torch.testing.assert_close(out[i], want[i], rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("kind", ["l1", "hoyer"])
def test_each_thread_has_the_penalty_of_its_own_pass(kind: str) -> None:
    model, xs = plain(nn.ReLU), [torch.randn(3, 8), 2 * torch.randn(5, 8)]
    handle = sparsify(model, [ActivationPenalty(kind, weight=1.0)], inputs=xs[0])
    model.train()
    want = []
    for x in xs:
        model(x)
        want.append(handle.penalty().item())
    got: dict[int, float] = {}
    forward, asked = threading.Event(), threading.Event()

    def first() -> None:
        model(xs[0])
        forward.set()
        assert asked.wait(20)
        got[0] = handle.penalty().item()

    worker = threading.Thread(target=first)
    worker.start()
    assert forward.wait(20)
    model(xs[1])
    got[1] = handle.penalty().item()
    asked.set()
    worker.join()
    assert [got[0], got[1]] == want


@pytest.mark.parametrize("kind", ["l1", "hoyer"])
@pytest.mark.parametrize("at", ["before", "between", "after"])
@pytest.mark.parametrize("learns", [True, False])
def test_a_pass_inside_a_pass_is_a_part_of_its_penalty(kind: str, at: str, learns: bool) -> None:
    model = nn.Sequential(plain(nn.ReLU), nn.Linear(8, 8), plain(nn.ReLU))
    x, other = torch.randn(3, 8), 2 * torch.randn(5, 8)
    handle = sparsify(model, [ActivationPenalty(kind, weight=1.0)], inputs=x)
    model.train()

    @torch.enable_grad()
    def penalty(x: Tensor) -> Tensor:
        model(x)
        return handle.penalty()

    outer, within = penalty(x), penalty(other)
    depth = [0]

    def call_again(*_: Any) -> None:
        depth[0] += 1
        if depth[0] == 1:
            with torch.set_grad_enabled(learns):
                model(other)
        depth[0] -= 1

    if at == "after":
        model[2].register_forward_hook(call_again)
    else:
        model[0 if at == "before" else 1].register_forward_pre_hook(call_again)
    want = (outer + within) / 2 if learns else outer  # a mean of means: of every call of a block
    torch.testing.assert_close(penalty(x), want)


@ways
def test_a_call_inside_a_call_changes_nothing(
    make: Callable[[], nn.Module], attach: Attach
) -> None:
    model, x, other = make(), torch.randn(3, 8), torch.randn(5, 8)
    attach(model, x)
    want = model(x)
    for at in inner(model):
        depth = [0]

        def call_again(*_: Any, depth: list[int] = depth) -> None:
            depth[0] += 1
            if depth[0] == 1:
                model(other)
            depth[0] -= 1

        hook = at.register_forward_pre_hook(call_again)
        torch.testing.assert_close(model(x), want, rtol=1e-4, atol=1e-5)
        hook.remove()


@ways
def test_a_call_that_was_broken_off_leaves_nothing(
    make: Callable[[], nn.Module], attach: Attach
) -> None:
    model, x = make(), torch.randn(3, 8)
    attach(model, x)
    want = model(x)

    def halt(*_: Any) -> None:
        raise Halt

    for at in inner(model):
        hook = at.register_forward_pre_hook(halt)
        with pytest.raises(Halt):
            model(x)
        hook.remove()
        assert torch.equal(model(x), want)
        # an activation that was waited for is not the next one that anybody calls
        act = next(m for m in model.modules() if isinstance(m, nn.GELU | nn.ReLU))
        z = torch.linspace(-2, 2, 32)
        assert torch.equal(act(z), type(act)()(z))


def test_what_is_seen_in_a_pass_that_was_broken_off_does_not_count() -> None:
    model, x = plain(nn.ReLU), torch.randn(3, 8)
    seen = observe(model, inputs=x)
    hook = model[2].register_forward_pre_hook(
        lambda *_: (_ for _ in ()).throw(Halt()), prepend=True
    )
    with pytest.raises(Halt):
        model(x)
    hook.remove()
    assert seen.summary("inference") is None
    model(x)
    assert seen.summary("inference")["blocks"][0]["tokens"] == 3


def test_a_finder_sleeps_in_its_own_thread_alone() -> None:
    model, x = plain(nn.GELU), torch.randn(3, 8)
    vanilla = model(x)
    swapped(model, x)
    want, out = model(x), []
    with sites_asleep():
        worker = threading.Thread(target=lambda: out.append(model(x)))
        worker.start()
        worker.join()
        assert torch.equal(model(x), vanilla)
    assert torch.equal(out[0], want)


@ways
def test_copies_and_pickles_run_alone(make: Callable[[], nn.Module], attach: Attach) -> None:
    model, x = make(), torch.randn(3, 8)
    attach(model, x)
    want = model(x)
    twin = copy.deepcopy(model)
    assert torch.equal(twin(x), want)
    for parameter in twin.parameters():
        parameter.mul_(0.5)
    assert torch.equal(model(x), want)
    assert not torch.equal(twin(x), want)


def acts(model: nn.Module) -> nn.Module:
    return next(m for m in model.modules() if isinstance(m, nn.ReLU | nn.GELU))


@ways
def test_a_pickle_of_a_whole_model_computes_the_same(
    make: Callable[[], nn.Module], attach: Attach
) -> None:
    model, x = make(), torch.randn(3, 8)
    attach(model, x)
    assert torch.equal(pickle.loads(pickle.dumps(model))(x), model(x))
    holder = nn.ModuleList([acts(model), model])  # the activation comes first
    again = pickle.loads(pickle.dumps(holder))[1]
    assert torch.equal(again(x), model(x))


def test_replicas_of_data_parallel_are_refused_by_name() -> None:
    model, x = plain(nn.GELU), torch.randn(3, 8)
    swapped(model, x)
    replica = model._replicate_for_data_parallel()
    for name, child in model._modules.items():
        assert child is not None
        replica._modules[name] = child._replicate_for_data_parallel()
        replica._modules[name].__dict__.update(weight=getattr(child, "weight", None))
    with pytest.raises(RuntimeError, match=r"replica of nn.DataParallel.*DistributedDataParallel"):
        replica(x)


@pytest.mark.parametrize("before", ["vanilla", "swapped", "observed", "sparse"])
def test_a_tap_that_comes_after_the_first_compiled_call_fires(before: str) -> None:
    torch._dynamo.reset()
    model, x = plain(nn.ReLU), torch.randn(3, 8)
    blocks = find_mlp_blocks(model, x)
    if before == "swapped":
        swapped(model, x)
    if before == "sparse":
        sparse(model, x)
    held = observe(model, blocks=blocks) if before == "observed" else None
    compiled = torch.compile(model, backend="eager")
    want = compiled(x)
    resets = []
    seen = observe(model, "density", blocks=blocks)
    for _ in range(3):  # as around steps that are logged
        with Resets() as count:
            seen.open()
            torch.testing.assert_close(compiled(x), want)
            seen.close()
            torch.testing.assert_close(compiled(x), want)
        resets.append(count())
    assert seen.summary("inference")["blocks"][0]["tokens"] == 9
    assert held is None or held.summary("inference")["blocks"][0]["tokens"] == 21
    # where the block has its hooks already, guards notice the tap by themselves
    assert resets == ([1, 2, 2] if before == "vanilla" else [0, 0, 0])


class Resets:
    """How often the compiler forgot everything while this was open."""

    def __enter__(self) -> Callable[[], int]:
        self.calls, self.reset = 0, torch._dynamo.reset

        def reset() -> None:
            self.calls += 1
            self.reset()

        torch._dynamo.reset = reset
        return lambda: self.calls

    def __exit__(self, *_: object) -> None:
        torch._dynamo.reset = self.reset


@pytest.mark.parametrize("transform", ["vmap", "grad", "trace"])
def test_stages_that_have_no_values_yet_are_refused_by_name(transform: str) -> None:
    model, x = plain(nn.ReLU), torch.randn(4, 3, 8)
    run = {
        "vmap": torch.vmap(model),
        "grad": torch.func.grad(lambda x: model(x).sum()),
        "trace": lambda x: torch.jit.trace(model, x, check_trace=False),
    }[transform]
    with observe(model, inputs=x), pytest.raises(RuntimeError, match="cannot be read"):
        run(x)

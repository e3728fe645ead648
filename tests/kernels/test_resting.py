"""What calls do not pay for: hooks where nothing else is attached, questions where layers won."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from actsparse import accelerate, observe
from actsparse.kernels import build
from actsparse.kernels.choose import Trial, Trials
from actsparse.kernels.fit import Fit
from actsparse.kernels.met import EVERY
from actsparse.kernels.plan import SHAPES

X = torch.randn(3, 8)


@pytest.fixture(autouse=True)
def no_grad() -> Iterator[None]:
    with torch.no_grad():
        yield


@pytest.fixture
def asked(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """One entry for each call that asks whether the kernels may run; the layers win all trials."""
    if build.level() == "reference":
        pytest.skip("no compiled kernels here, and auto keeps to the layers")
    asks: list[int] = []
    real: Callable[[Fit], str | None] = Fit.reason

    def reason(fit: Fit) -> str | None:
        asks.append(1)
        return real(fit)

    def run(
        trials: Trials, kind: Any, density: float, programs: Any, cold: bool, device: Any
    ) -> Trial:
        return Trial(density, {"dense": 1.0, "sparse": 2.0})

    monkeypatch.setattr(Fit, "reason", reason)
    monkeypatch.setattr(Trials, "run", run)
    monkeypatch.setattr("actsparse.kernels.plan.LEAST", 0)
    return asks


def plain() -> nn.Sequential:
    return nn.Sequential(nn.Linear(8, 32), nn.ReLU(), nn.Linear(32, 8)).eval()


def test_blocks_whose_layers_won_ask_nothing_between_two_looks(asked: list[int]) -> None:
    model = plain()
    want = model(X)
    handle = accelerate(model, inputs=X)
    for _ in range(2 * EVERY + 2):
        assert torch.equal(model(X), want)
    # at a look, and at the call after it, which decides
    assert len(asked) == 2 * 3
    (row,) = handle.table()
    assert row["calls"] == {"dense": 2 * EVERY + 2}
    assert row["tokens"] == 3


def test_a_look_finds_that_the_density_has_moved(asked: list[int]) -> None:
    model = plain()
    handle = accelerate(model, inputs=X)
    for _ in range(EVERY):
        model(X)
    (before,) = handle.table()
    model[0].bias.fill_(-100.0)
    for _ in range(EVERY):
        model(X)
    (after,) = handle.table()
    assert after["density"] < 0.8 * before["density"]
    known = len(asked)
    model(X)
    assert len(asked) == known + 1 or after["calls"]["dense"] % EVERY > 1


def test_whoever_hangs_on_a_block_that_rests_sees_its_tensors(asked: list[int]) -> None:
    model = plain()
    accelerate(model, inputs=X)
    for _ in range(5):
        model(X)
    seen: list[Tensor] = []
    model[1].register_forward_hook(lambda module, args, output: seen.append(output))
    model(X)
    assert torch.equal(seen[0], model[0](X).relu())
    with observe(model, "density", inputs=X) as counted:
        model(X)
    assert counted.summary("inference")["blocks"][0]["tokens"] == 3


def test_shapes_that_are_known_do_not_pile_up(asked: list[int]) -> None:
    model = plain()
    handle = accelerate(model, inputs=X)
    (run,) = handle.runs.values()
    for tokens in range(1, SHAPES + 20):
        for _ in range(3):
            model(X[:1].expand(tokens, 8))
    assert 0 < len(run._known) <= SHAPES


def test_a_block_with_nothing_but_an_executor_has_no_hooks() -> None:
    model = plain()
    handle = accelerate(model, inputs=X, mode="sparse")
    want = model(X)
    assert handle.ran() == {"0": "sparse"}
    assert not any(m._forward_hooks or m._forward_pre_hooks for m in model.modules())
    with observe(model, inputs=X):
        model(X)
    assert torch.equal(model(X), want)
    assert "2 sparse" in str(handle)


def test_a_replica_of_a_block_without_hooks_is_refused_by_name() -> None:
    model = plain()
    handle = accelerate(model, inputs=X, mode="sparse")
    with pytest.raises(RuntimeError, match=r"replica of nn.DataParallel.*DistributedDataParallel"):
        model[0]._replicate_for_data_parallel()
    handle.remove()
    assert isinstance(model[0]._replicate_for_data_parallel(), nn.Linear)

"""``accelerate``: the same numbers, whatever is attached beside it, and nothing left behind."""

from __future__ import annotations

import copy
import itertools
import sys
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from actsparse import SwapActivation, ZerothBias, find_mlp_blocks, observe, sparsify
from actsparse.kernels import accelerate, build
from actsparse.kernels.accelerated import Accelerated
from actsparse.kernels.choose import Trial, Trials
from actsparse.kernels.met import EVERY
from actsparse.kernels.plan import MANY
from tests.zoo import BY_ID, call

RECIPE = [ZerothBias(finetune=True), SwapActivation("jsrelu")]
ORDERS = list(itertools.permutations(("sparsify", "observe", "accelerate")))
EPS = torch.finfo(torch.float32).eps
SILENT = [
    "vit-pooler-relu", "t5-relu", "t5-encoder", "opt-pre-norm", "opt-post-norm-350m",
    "opt-no-norm-weights-no-biases", "llama-relu", "nanochat-inline-squared-relu",
    "one-activation-held-by-each-layer", "time-first", "bare-sequential", "batchnorm-stem",
    "torch-encoder-relu-pre-batch_first", "torch-encoder-relu-post-time_first",
    "torch-encoder-activation-own-function", "torch-decoder-pre",
]  # fmt: skip


def tensors(out: Any) -> list[Tensor]:
    if isinstance(out, Tensor):
        return [out]
    parts = out.values() if isinstance(out, dict) else out if isinstance(out, tuple | list) else ()
    return [t for part in parts for t in tensors(part)]


def results(model: nn.Module, inputs: Any) -> list[Tensor]:
    """Outputs and gradients of a pass in eval mode, where no dropout draws."""
    model.eval().zero_grad()
    out = [t for t in tensors(call(model, inputs)) if t.requires_grad]
    sum((t * torch.linspace(-1, 2, t.numel()).reshape(t.shape)).sum() for t in out).backward()  # type: ignore[union-attr]
    grads = [p.grad.clone() for p in model.parameters() if p.grad is not None]
    return [*(t.detach().clone() for t in out), *grads]


def alike(one: list[Tensor], two: list[Tensor]) -> bool:
    """To rounding: sums of up to thousands of products, through a few layers."""
    scale = max(float(t.abs().max()) for t in one)
    return len(one) == len(two) and all(
        float((a - b).abs().max()) <= 1000 * EPS * scale for a, b in zip(one, two, strict=True)
    )


def same(one: list[Tensor], two: list[Tensor]) -> bool:
    return all(torch.equal(a, b) for a, b in zip(one, two, strict=True))


@pytest.mark.parametrize("name", SILENT)
@pytest.mark.filterwarnings("ignore:The PyTorch API of nested tensors")
def test_models_give_the_same_numbers_and_come_back_as_they_were(name: str) -> None:
    model, inputs = BY_ID[name].build()
    before, keys = results(model, inputs), list(model.state_dict())
    handle = accelerate(model, inputs=inputs, mode="sparse")
    after = results(model, inputs)
    assert alike(before, after)
    assert all(calls(handle, "sparse"))
    assert list(model.state_dict()) == keys
    handle.remove()
    handle.remove()
    assert same(before, results(model, inputs))
    assert not [m for m in model.modules() if "forward" in m.__dict__ or m._forward_hooks]


@pytest.mark.parametrize("order", ORDERS)
@pytest.mark.parametrize("away", ORDERS)
def test_with_sparsify_and_observe_in_every_order(
    order: tuple[str, ...], away: tuple[str, ...]
) -> None:
    model, inputs = BY_ID["vit-pooler-relu"].build()
    blocks = find_mlp_blocks(model, inputs)
    plain = results(model, inputs)
    twin = copy.deepcopy(model)
    sparsify(twin, RECIPE, inputs=inputs)
    modified = results(twin, inputs)
    attach = {
        "sparsify": lambda: sparsify(model, RECIPE, blocks=blocks),
        "observe": lambda: observe(model, blocks=blocks),
        "accelerate": lambda: accelerate(model, blocks=blocks, mode="sparse"),
    }
    held: dict[str, Any] = {name: attach[name]() for name in order}
    assert alike(modified, results(model, inputs))
    seen = held["observe"].summary("inference")
    assert 0 < seen["density"] < 1  # counted by a pass of the layers, which needs all of a
    for name in away:
        held[name].close() if name == "observe" else held[name].remove()
        del held[name]
        now = results(model, inputs)
        assert alike(modified if "sparsify" in held else plain, now)
        if "accelerate" in held and "observe" not in held:
            assert any(calls(held["accelerate"], "sparse"))
    assert same(plain, now)


class Block(nn.Module):
    def __init__(self, act: nn.Module, p: float = 0.0) -> None:
        super().__init__()
        self.up, self.act, self.drop = nn.Linear(16, 256), act, nn.Dropout(p)
        self.down = nn.Linear(256, 16)

    def forward(self, x: Tensor) -> Tensor:
        return x + self.down(self.drop(self.act(self.up(x))))


@pytest.mark.parametrize(("name", "activation"), [("phi3", "activation_fn"), ("modernbert", "act")])
def test_up_and_gate_may_be_one_layer(name: str, activation: str) -> None:
    model, inputs = BY_ID[name].build()
    for module in model.modules():
        if hasattr(module, activation):
            setattr(module, activation, nn.ReLU())
    before = results(model, inputs)
    handle = accelerate(model, inputs=inputs, mode="screened")
    assert alike(before, results(model, inputs))
    assert all(calls(handle, "screened"))
    handle.remove()
    assert same(before, results(model, inputs))


def calls(handle: Accelerated, program: str) -> list[int]:
    """Calls that ran so, of each block."""
    return [sum(met.calls.get(program, 0) for met in run.met()) for run in handle.runs.values()]


def silent(share: float) -> Block:
    block = Block(nn.ReLU())
    with torch.no_grad():
        block.up.bias.fill_(-10.0)
        block.up.bias[: round(256 * share)] = 10.0
    return block


@pytest.fixture
def any_size(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sys.modules["actsparse.kernels.plan"], "LEAST", 0)
    if build.level() == "reference":
        pytest.skip("no compiled kernels here, and auto keeps to the layers")


def test_small_blocks_keep_to_their_layers() -> None:
    model, x = silent(0.05), torch.randn(2, 16)
    handle = accelerate(model, inputs=x)
    for _ in range(3):
        model(x)
    (row,) = handle.table()
    assert row["program"] == "dense"
    assert row["reason"] == "too small: 4096 weights in up, 2 tokens"
    assert row["calls"] == {"dense": 3}
    lines = str(handle).splitlines()
    assert lines[0] == f"up: training, T = 2: its layers, {row['reason']} (3 dense)"
    here = build.level()
    assert lines[1].startswith(f"native kernels: {'none' if here == 'reference' else here}")


@pytest.mark.skipif(build.level() == "reference", reason="no compiled kernels here")
def test_small_blocks_are_timed_in_calls_of_many_tokens() -> None:
    model, x = silent(0.05), torch.randn(MANY // (16 * 256), 16)
    handle = accelerate(model, inputs=x)
    with torch.no_grad():
        for tokens in (x[1:], x, x):
            model(tokens)
    small, row = handle.table()
    assert small["reason"] == f"too small: 4096 weights in up, {len(x) - 1} tokens"
    assert row["tokens"] == len(x)
    assert row["ratio"] is not None
    assert sum(row["calls"].values()) == 2


class Timed:
    """In the place of real timings: as fractions of dense, of forms that were measured."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.at: list[float] = []
        monkeypatch.setattr(Trials, "run", self.run_in(Trials.run))

    def run_in(self, real: Any) -> Any:
        def run(
            trials: Trials, kind: Any, density: float, programs: Any, cold: bool, device: Any
        ) -> Trial:
            real(trials, kind, density, programs, cold, device)  # the programs can run
            self.at.append(density)
            known = {"dense": 1.0, "sparse": 0.4 + 2.5 * density, "screened": 0.1 + 7 * density}
            seconds = {name: known.get(name, 1.1) for name in programs}
            trials.known[kind][-1] = trial = Trial(density, seconds)
            return trial

        return run


def fill(model: Block, share: float) -> None:
    with torch.no_grad():
        model.up.bias.fill_(-10.0)
        model.up.bias[: round(256 * share)] = 10.0


@pytest.fixture
def timed(any_size: None, monkeypatch: pytest.MonkeyPatch) -> Timed:
    return Timed(monkeypatch)


def test_auto_follows_the_density_with_hysteresis(timed: Timed) -> None:
    model, x = silent(0.6), torch.randn(4, 32, 16)
    handle = accelerate(model, inputs=x)
    (run,) = handle.runs.values()
    with torch.no_grad():
        for share, program in [
            (0.6, "dense"),  # above the ceiling: only dense programs are timed
            (0.3, "dense"),
            (0.235, "dense"),  # a gain of 1 % is none
            (0.15, "sparse"),
            (0.21, "sparse"),
            (0.23, "sparse"),  # kept while it does not lose
            (0.4, "dense"),
            (0.02, "screened"),
        ]:
            fill(model, share)
            want = Block.forward(copy.deepcopy(model), x)
            for _ in range(40 * EVERY):
                assert torch.allclose(model(x), want, atol=1e-4)
                if len(run.met()) and abs(run.met()[0].density / share - 1) < 0.02:  # type: ignore[operator]
                    break
            model(x)
            (met,) = run.met()
            assert met.program == program, share


@pytest.mark.parametrize("training", [False, True])
def test_a_kind_of_call_is_timed_once_for_blocks_that_are_alike(
    timed: Timed, training: bool
) -> None:
    model = nn.Sequential(*(silent(0.05) for _ in range(4)))
    x = torch.randn(4, 32, 16, requires_grad=True)
    handle = accelerate(model, inputs=x)
    for tokens in (4, 4, 4, 1, 1, 4):
        with torch.set_grad_enabled(training):
            model(x[:tokens])
    assert len(timed.at) == 2
    assert len(handle.table()) == 8
    for row in handle.table():
        assert row["training"] is training
        assert row["program"] == "screened"
        assert row["ratio"] == pytest.approx(1 / 0.45, rel=0.1)
        assert row["density"] == pytest.approx(0.05, abs=0.003)
        assert sum(row["calls"].values()) == (4 if row["tokens"] == 128 else 2)
    assert "screened at density 0.05" in str(handle)


def test_dropout_does_not_count_as_silence(timed: Timed) -> None:
    model, x = Block(nn.ReLU(), p=0.5).train(), torch.randn(64, 32, 16)
    fill(model, 0.3)
    handle = accelerate(model, inputs=x)
    model(x)
    (met,) = next(iter(handle.runs.values())).met()
    # 0.3 · 256 · 2048 kept units, each with probability 1/2: 4 standard deviations
    assert met.density == pytest.approx(77 / 256, abs=4 / (2048 * 256) ** 0.5)


@pytest.mark.usefixtures("any_size")
@pytest.mark.parametrize("reentrant", [False, True])
def test_checkpointing_recomputes_what_the_forward_ran(
    monkeypatch: pytest.MonkeyPatch, reentrant: bool
) -> None:
    model, x = silent(0.1), torch.randn(4, 32, 16, requires_grad=True)
    times = iter([0.1, 9.0] * 50)  # each look at the clock decides the other way

    def run(
        trials: Trials, kind: Any, density: float, programs: Any, cold: bool, device: Any
    ) -> Trial:
        return Trial(density, {"dense": 1.0, "sparse": next(times)})

    monkeypatch.setattr(Trials, "run", run)
    handle = accelerate(model, inputs=x)
    (wanted,) = torch.autograd.grad(model(x).sum(), x)
    for _ in range(6):
        for met in next(iter(handle.runs.values())).met():
            met.decided_at = None  # decide anew at each call
        y = checkpoint(model, x, use_reentrant=reentrant)
        for met in next(iter(handle.runs.values())).met():
            met.decided_at = None
        (grad,) = torch.autograd.grad(y.sum(), x) if not reentrant else (backward(y, x),)
        assert torch.allclose(grad, wanted, atol=1e-4)


def backward(y: Tensor, x: Tensor) -> Tensor:
    x.grad = None
    y.sum().backward()
    assert x.grad is not None
    return x.grad


def test_frozen_weights_get_no_gradients() -> None:
    model, x = silent(0.1), torch.randn(4, 16, requires_grad=True)
    want = results(model, x)[0]
    model.requires_grad_(False)
    (plain,) = torch.autograd.grad(model(x).sum(), x)
    handle = accelerate(model, inputs=x, mode="sparse")
    y = model(x)
    (grad,) = torch.autograd.grad(y.sum(), x)
    assert alike([want, plain], [y.detach(), grad])
    assert calls(handle, "sparse") == [1]


def test_a_weight_that_changes_is_met_by_the_next_call() -> None:
    model, x = silent(0.05), torch.randn(1, 16)
    accelerate(model, inputs=x, mode="sparse")
    with torch.no_grad():
        for change in (
            lambda: model.down.weight.mul_(2),
            lambda: model.down.weight.data.mul_(2),
            lambda: setattr(model.down.weight, "data", model.down.weight.data * 2),
            lambda: model.up.weight.data.mul_(-1),
        ):
            model(x)
            change()
            plain = (
                x
                + model.down.weight @ torch.relu(model.up.weight @ x[0] + model.up.bias)
                + model.down.bias
            )
            assert torch.allclose(model(x), plain, atol=1e-4)


def test_dropout_drops_and_keeps_the_mean() -> None:
    model, x = Block(nn.ReLU(), p=0.5), torch.randn(1, 16)
    model.eval()
    with torch.no_grad():
        want = model(x)
        accelerate(model.train(), inputs=x, mode="sparse")
        draws = torch.stack([model(x) for _ in range(2000)])
    assert (draws[0] - draws[1]).abs().max() > 0
    error = draws.std(0) / len(draws) ** 0.5
    assert ((draws.mean(0) - want).abs() <= 5 * error).all()


def test_compiled_in_one_graph() -> None:
    model, x = silent(0.1), torch.randn(4, 8, 16)
    want = results(model, x)
    accelerate(model, inputs=x, mode="sparse")
    compiled = torch.compile(model, backend="aot_eager", fullgraph=True)
    assert alike(want, results(compiled, x))


@pytest.mark.parametrize("name", ["relu(threshold=0.3)", "jsrelu(cap=2)", "s_shape(dx=1.6, dy=0)"])
@pytest.mark.parametrize("mode", ["sparse", "screened"])
def test_activations_with_numbers_of_their_own_run_sparse(name: str, mode: Any) -> None:
    model, x = Block(nn.ReLU()), torch.randn(4, 8, 16)
    sparsify(model, SwapActivation(name), inputs=x)
    want = results(model, x)
    handle = accelerate(model, mode=mode)
    assert alike(want, results(model, x))
    assert calls(handle, mode) == [1]
    if not name.startswith("s_shape"):  # torch warns of a cache it passes by
        torch._dynamo.reset()
        compiled = torch.compile(model, backend="aot_eager", fullgraph=True)
        assert alike(want, results(compiled, x))


def test_what_cannot_run_sparse_says_why() -> None:
    model, x = Block(nn.GELU()), torch.randn(2, 16)
    with pytest.raises(ValueError, match="up: gelu is never exactly zero"):
        accelerate(model, inputs=x)
    with pytest.raises(ValueError, match="unknown mode 'fast'"):
        accelerate(model, inputs=x, mode="fast")  # type: ignore[arg-type]
    with pytest.raises(ValueError, match="accelerate needs inputs="):
        accelerate(model)


def test_other_dtypes_run_by_the_layers() -> None:
    model, x = silent(0.05).double(), torch.randn(2, 16).double()
    want = model(x)
    handle = accelerate(model, inputs=x, mode="sparse")
    assert torch.equal(model(x), want)
    assert not any(calls(handle, "sparse"))

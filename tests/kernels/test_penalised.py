"""Blocks with a penalty run sparse in training: the same penalty and gradients as by the layers."""

from __future__ import annotations

import copy
import sys
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from actsparse import ActivationPenalty, Handle, SwapActivation, WeightNoise, observe, sparsify
from actsparse.kernels import Accelerated, accelerate, build
from actsparse.modify.penalty import PENALTIES
from tests.zoo import BY_ID, call

EPS = torch.finfo(torch.float32).eps
MODELS = [
    "gpt2", "t5-relu", "t5-gated-gelu", "phi3", "opt-pre-norm", "bare-sequential", "time-first",
    "albert-one-layer-used-four-times", "nanochat-inline-squared-relu",
]  # fmt: skip


def ready(name: str, kind: str) -> tuple[nn.Module, Any, Handle]:
    """A model with a penalty, its blocks training, no dropout anywhere, tokens padded."""
    model, inputs = BY_ID[name].build()
    if name == "gpt2":
        mask = torch.ones_like(inputs["input_ids"])
        mask[0, :3] = 0
        inputs = {**inputs, "attention_mask": mask}
    recipe = [SwapActivation("relu"), ActivationPenalty(kind, weight=20.0)]
    handle = sparsify(model, recipe, inputs=inputs)
    model.eval()
    for block in handle.blocks:
        block.up.module.train()
    return model, inputs, handle


def sizes(out: Any) -> Tensor:
    if isinstance(out, Tensor):
        return out.square().sum()
    parts = out.values() if isinstance(out, dict) else out
    first = next(t for t in parts if isinstance(t, Tensor) and t.requires_grad)
    return first.square().sum()


def step(model: nn.Module, inputs: Any, handle: Handle) -> tuple[float, dict[str, Tensor]]:
    model.zero_grad()
    loss = sizes(call(model, inputs))
    penalty = handle.penalty()
    (loss / loss.detach().abs() + penalty).backward()
    grads = {name: p.grad for name, p in model.named_parameters() if p.grad is not None}
    return float(penalty.detach()), grads


def alike(one: dict[str, Tensor], two: dict[str, Tensor]) -> None:
    """To rounding: sums of up to thousands of products, through a few layers."""
    assert one.keys() == two.keys()
    scale = max(float(t.abs().max()) for t in one.values())
    for name, t in one.items():
        torch.testing.assert_close(two[name], t, rtol=0, atol=1000 * EPS * scale, msg=name)


def ran(handle: Accelerated) -> set[str]:
    return {name for row in handle.table() for name in row["calls"]}


@pytest.mark.parametrize("kind", PENALTIES)
@pytest.mark.parametrize("name", MODELS)
def test_penalty_and_gradients_are_those_of_the_layers(name: str, kind: str) -> None:
    model, inputs, handle = ready(name, kind)
    penalty, want = step(model, inputs, handle)
    fast = accelerate(model, mode="sparse")
    ours, got = step(model, inputs, handle)
    assert ran(fast) == {"sparse"}
    assert penalty > 0
    assert ours == pytest.approx(penalty, rel=1000 * EPS)
    alike(want, got)
    fast.remove()
    assert step(model, inputs, handle)[0] == penalty


class Block(nn.Module):
    def __init__(self, p: float = 0.0) -> None:
        super().__init__()
        self.norm, self.up, self.act = nn.LayerNorm(16), nn.Linear(16, 256), nn.ReLU()
        self.drop, self.down = nn.Dropout(p), nn.Linear(256, 16)

    def forward(self, x: Tensor) -> Tensor:
        return x + self.down(self.drop(self.act(self.up(self.norm(x)))))


def tokens() -> Tensor:
    return torch.randn(4, 6, 16)


def test_dropout_between_leaves_the_penalty_alone() -> None:
    model, x = Block(p=0.5), tokens()
    handle = sparsify(model, ActivationPenalty("hoyer", weight=1.0), inputs=x)
    results = []
    for fast in (False, True):
        if fast:
            accelerate(model, mode="sparse")
        model(x)
        penalty = handle.penalty()
        inner = [model.norm.weight, model.up.weight, model.up.bias]
        results.append([penalty, *torch.autograd.grad(penalty, inner)])
    for want, got in zip(*results, strict=True):
        scale = float(want.detach().abs().max())
        torch.testing.assert_close(got, want, rtol=0, atol=1000 * EPS * scale)


@pytest.mark.parametrize("sparse", [False, True])
def test_checkpointing_counts_once_and_gives_the_same_gradient(sparse: bool) -> None:
    model, x = nn.Sequential(Block(), Block()), tokens()
    handle = sparsify(model, ActivationPenalty("hoyer", weight=1.0), inputs=x)
    if sparse:
        accelerate(model, mode="sparse")
    results = []
    for again in (False, True):
        model.zero_grad()
        y = x
        for block in model:
            y = checkpoint(block, y, use_reentrant=False) if again else block(y)
        penalty = handle.penalty()
        (y.square().mean() + penalty).backward()
        assert float(handle.penalty()) == 0.0, "the second forward, in backward, was counted"
        grads = {name: p.grad for name, p in model.named_parameters() if p.grad is not None}
        results.append((float(penalty.detach()), grads))
    (penalty, want), (ours, got) = results
    assert ours == penalty
    assert all(torch.equal(got[name], grad) for name, grad in want.items())


def test_training_is_sparse_and_what_needs_the_whole_hidden_layer_makes_it_dense() -> None:
    model, x = Block(), tokens()
    penalised = sparsify(model, ActivationPenalty("hoyer", weight=0.1), inputs=x)
    handle = accelerate(model, mode="sparse")
    want = Block.forward(copy.deepcopy(model), x)

    def runs(training: bool) -> tuple[int, bool]:
        before = sum(row["calls"].get("sparse", 0) for row in handle.table())
        model.train(training)
        torch.testing.assert_close(model(x), want, rtol=0, atol=256 * EPS)
        after = sum(row["calls"].get("sparse", 0) for row in handle.table())
        return after - before, float(penalised.penalty().detach()) > 0

    assert [runs(training) for training in (True, False, True)] == [
        (1, True),
        (1, False),
        (1, True),
    ]
    with observe(model, blocks=penalised.blocks):
        assert [runs(training) for training in (True, False)] == [(0, True), (0, False)]
    assert runs(True) == (1, True)


def test_noise_on_down_alone_is_drawn_from_the_layers() -> None:
    """It is in proportion to down's input, which no executor hands on."""
    model, x = Block(), tokens()
    sparsify(model, WeightNoise(layers=("down",)), inputs=x)
    accelerate(model, mode="sparse")
    assert not torch.equal(model(x), model(x))


def test_compiled_in_one_graph() -> None:
    model, x = Block(), tokens()
    handle = sparsify(model, ActivationPenalty("hoyer", weight=5.0), inputs=x)
    accelerate(model, mode="sparse")
    want, expected = step(model, x, handle)
    torch._dynamo.reset()
    compiled = torch.compile(model, backend="aot_eager", fullgraph=True)
    got, grads = step(compiled, x, handle)
    assert got == pytest.approx(want, rel=16 * EPS)
    alike(expected, {name.removeprefix("_orig_mod."): grad for name, grad in grads.items()})


@pytest.mark.parametrize("learns", ["everything", "down alone"])
def test_auto_times_the_block_with_its_norms(monkeypatch: pytest.MonkeyPatch, learns: str) -> None:
    if build.level() == "reference":
        pytest.skip("no compiled kernels here, and auto keeps to the layers")
    monkeypatch.setattr(sys.modules["actsparse.kernels.plan"], "LEAST", 0)
    model, x = Block(), tokens()
    if learns == "down alone":
        model.requires_grad_(False)
        model.down.requires_grad_(True)
    handle = sparsify(model, ActivationPenalty("hoyer", weight=1.0), inputs=x)
    with torch.no_grad():
        model.up.bias.sub_(1.5)
    penalty, want = step(model, x, handle)
    fast = accelerate(model)
    for _ in range(3):
        ours, got = step(model, x, handle)
        assert ours == pytest.approx(penalty, rel=1000 * EPS)
        alike(want, got)
    (row,) = fast.table()
    assert row["ratio"] is not None
    assert sum(row["calls"].values()) == 3

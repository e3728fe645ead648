"""Rows by hand, noise of the stated size, and no trace of any of it."""

from __future__ import annotations

from contextlib import nullcontext
from typing import Any, Literal

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from actsparse import ZerothBias, find_mlp_blocks, sparsify
from actsparse.kernels import accelerate
from actsparse.observe.attack import Attack, perturb
from actsparse.observe.coverage import covering
from actsparse.observe.disturbances import RelativeNoise, robustness
from actsparse.observe.loss import IGNORE
from tests.observe.brute import D, Mlp
from tests.observe.test_measure import half_way, state

Batch = dict[str, Any]
C, T, F_IN = 4, 3, 5


def predict(model: nn.Module, batch: Batch) -> tuple[Tensor, Tensor]:
    return model(batch["x"]), batch["y"]


class Keeping(nn.Linear):
    """A linear layer that keeps what it read."""

    def forward(self, x: Tensor) -> Tensor:
        self.read = x.detach().clone()
        return super().forward(x)


class Net(nn.Module):
    """x [B, T, 5] → logits [B, T, C]; each position's logits depend on all tokens up to it."""

    def __init__(self, first: str = "relu", second: str = "gelu", gated: bool = False) -> None:
        super().__init__()
        self.embed, self.head = nn.Linear(F_IN, D), nn.Linear(D, C)
        self.drop, self.norm = nn.Dropout(0.5), nn.BatchNorm1d(T)
        self.first, self.second = Mlp(first), Mlp(second, gated)

    def forward(self, x: Tensor) -> Tensor:
        mixed = self.norm(self.drop(self.first(self.embed(x)).cumsum(1)))
        out: Tensor = self.head(self.second(mixed))
        return out


def net(gated: bool = True) -> tuple[Net, list[Batch]]:
    """Five samples in two batches: of 3, 1, 2 and 3 predicted positions, and of none."""
    y = torch.randint(C, (5, T))
    y[1, 1:] = y[2, 0] = y[4] = IGNORE
    x = torch.rand(5, T, F_IN).double()
    return Net(gated=gated).double(), [{"x": x[:3], "y": y[:3]}, {"x": x[3:], "y": y[3:]}]


PLACES: tuple[Literal["x", "d", "weights"], ...] = ("x", "d", "weights")
FGSM, PGD = Attack("fgsm", 0.1), Attack("pgd", 0.5, "l2", steps=3)
AGAINST: list[Attack | RelativeNoise] = [FGSM, PGD, *(RelativeNoise(at, 0.3) for at in PLACES)]


def test_rows_are_means_over_samples_of_loss_and_accuracy() -> None:
    model, batches = net()
    rows = robustness(model, predict, batches, [FGSM])
    attacked = [perturb(model, predict, batch, FGSM) for batch in batches]
    for row, data in zip(rows, (batches, attacked), strict=True):
        losses, rights = [], []
        for batch in data:
            with torch.no_grad():
                pair = predict(model.eval(), batch)
            for logits, targets in zip(*pair, strict=True):
                kept = [(z, int(t)) for z, t in zip(logits, targets, strict=True) if t != IGNORE]
                if kept:
                    losses.append(sum(float(-z.log_softmax(0)[t]) for z, t in kept) / len(kept))
                    rights.append(sum(int(z.argmax()) == t for z, t in kept) / len(kept))
        assert (row["samples"], row["positions"]) == (4, 9)
        assert row["loss"] == pytest.approx(sum(losses) / 4, rel=1e-12)
        assert row["accuracy"] == pytest.approx(sum(rights) / 4, rel=1e-12)
    assert rows[1]["loss"] > rows[0]["loss"]


def test_a_row_does_not_depend_on_what_else_is_asked_for() -> None:
    model, batches = net()
    rows = robustness(model, predict, batches, AGAINST, inputs=batches[0]["x"])
    torch.rand(3)
    for i, each in enumerate(AGAINST, start=1):
        alone = robustness(model, predict, iter(batches), [each], inputs=batches[0]["x"])
        assert alone == [rows[0], rows[i]]
        other = robustness(model, predict, batches, [each], inputs=batches[0]["x"], seed=1)
        assert (other == alone) == (each == FGSM)  # FGSM alone draws nothing
    assert len({row["loss"] for row in rows}) == len(rows)


def normal(values: Tensor) -> bool:
    """Whether n values may be standard normal draws, by their mean and mean square.

    P(|χ²_n/n − 1| > 2√(t/n) + 2t/n) ≤ 2e⁻ᵗ (Laurent, Massart 2000), with t = 25.
    """
    n = values.numel()
    if abs(float(values.mean())) > (50 / n) ** 0.5:  # P ≤ 2e⁻²⁵, too
        return False
    return abs(float(values.square().mean()) - 1) < 2 * (25 / n) ** 0.5 + 50 / n


@pytest.mark.parametrize("modified", [False, True])
@pytest.mark.parametrize("gated", [False, True])
def test_noise_has_the_stated_size(gated: bool, modified: bool) -> None:
    wide, hidden, level = 600, 800, 0.2
    mlp: Any = Mlp("relu", gated).double()
    layers = {"up": Keeping(wide, hidden), "gate": Keeping(wide, hidden)}
    layers = layers if gated else {"up": layers["up"]}
    layers["down"] = Keeping(hidden, wide)
    for name, layer in layers.items():
        setattr(mlp, name, layer.double())
    mlp.norm = nn.Identity()
    scale = torch.tensor([1e-3, 1.0, 1e3]).double()[:, None]  # of tokens
    x = (1 + torch.rand(1, 3, wide).double()) * scale
    batch = {"x": x, "y": torch.zeros(1, 3).long()}
    if modified:  # x is then the sum with d, the larger part of two tokens
        sparsify(mlp, ZerothBias(finetune=True), inputs=x)
        mlp.up.actsparse.zeroth_bias.data.normal_(std=100.0)
    seen: dict[str, tuple[Tensor, Tensor]] = {}

    def reading(model: nn.Module, batch: Batch) -> tuple[Tensor, Tensor]:
        out = predict(model, batch)
        seen.update({n: (layer.read, layer.weight.detach().clone()) for n, layer in layers.items()})
        return out

    robustness(mlp, reading, [batch], [])
    clean = dict(seen)
    for at in PLACES:
        robustness(mlp, reading, [batch], [RelativeNoise(at, level)], inputs=batch["x"])
        for name, layer in layers.items():
            (x, weight), (x_now, weight_now) = clean[name], seen[name]
            assert torch.equal(layer.weight, weight)
            if at == "weights":
                rms = weight.square().mean().sqrt()
                assert normal((weight_now - weight) / (level * rms))
                continue
            assert torch.equal(weight_now, weight)
            if at == ("d" if name == "down" else "x"):
                rms = x.square().mean(-1, keepdim=True).sqrt()
                assert all(map(normal, ((x_now - x) / (level * rms))[0]))  # token by token
            elif name != "down":
                assert torch.equal(x_now, x)
        if gated:
            assert torch.equal(seen["gate"][0], seen["up"][0])


def test_rows_are_the_same_where_an_executor_runs_in_the_layers_place() -> None:
    model, [batch, _] = net(gated=False)
    model, batch = model.float(), {**batch, "x": batch["x"].float()}
    blocks = find_mlp_blocks(model, batch["x"])
    dense = robustness(model, predict, [batch], AGAINST, blocks=blocks)
    with accelerate(model, blocks=blocks[:1], mode="sparse"):
        sparse = robustness(model, predict, [batch], AGAINST, blocks=blocks)
    for one, two in zip(dense, sparse, strict=True):
        # float32 sums of some 30 products through two blocks
        assert one["loss"] == pytest.approx(two["loss"], rel=1e4 * 2**-24)
    losses = [row["loss"] for row in dense]
    assert len(set(losses)) == len(losses)


class Fused(nn.Module):
    """Gate and up by one layer."""

    def __init__(self) -> None:
        super().__init__()
        self.gate_up, self.down = nn.Linear(30, 1000), nn.Linear(500, 30)
        self.gate_up.weight.data[:500] *= 100

    def forward(self, x: Tensor) -> Tensor:
        gate, up = self.gate_up(x).chunk(2, -1)
        out: Tensor = self.down(F.silu(gate) * up)
        return out


def test_noise_on_a_fused_layer_is_relative_to_gate_and_up_each() -> None:
    model, batch = Fused(), {"x": torch.randn(2, 30), "y": torch.zeros(2).long()}
    clean, noisy = model.gate_up.weight.detach().clone(), []

    def reading(model: Any, batch: Batch) -> tuple[Tensor, Tensor]:
        noisy.append(model.gate_up.weight.detach().clone())
        return predict(model, batch)

    against = [RelativeNoise("weights", 0.5)]
    robustness(model, reading, [batch], against, inputs=batch["x"])
    for before, after in zip(clean.split(500), noisy[1].split(500), strict=True):
        assert normal((after - before) / (0.5 * before.square().mean().sqrt()))


def every(model: nn.Module, batches: list[Batch], how: Any) -> None:
    x = batches[0]["x"]
    pair = (batches[0], perturb(model, how, batches[0], PGD))
    robustness(model, how, batches, AGAINST, inputs=x)
    covering(model, how, [pair], inputs=x)


@pytest.mark.parametrize("error", [None, RuntimeError, KeyboardInterrupt], ids=str)
def test_nothing_is_left_behind_whatever_happens(error: Any) -> None:
    model, batches = net()
    half_way(model)
    pending = model(batches[0]["x"]).sum()
    before, pointers = state(model), [p.data_ptr() for p in model.parameters()]
    calls, fatal = 0, 0

    def how(model: nn.Module, batch: Batch) -> tuple[Tensor, Tensor]:
        nonlocal calls
        calls += 1
        torch.rand(1)
        assert not any(module.training for module in model.modules())
        out = predict(model, batch)
        if error and calls == fatal:
            raise error("mine")
        return out

    every(model, batches, how)
    assert state(model) == before
    for number in range(1, calls + 1 if error else 1):
        calls, fatal = 0, number
        with pytest.raises(error):
            every(model, batches, how)
        assert state(model) == before
    assert [p.data_ptr() for p in model.parameters()] == pointers
    with torch.inference_mode() if error else nullcontext():
        every(model, batches, predict)
    assert state(model) == before
    pending.backward()  # a graph of someone's own is as good as before


GOOD = {"x": torch.zeros(2, 3), "y": torch.zeros(2).long()}


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: RelativeNoise("y", 0.1), "at='y'"),  # type: ignore[arg-type]
        (lambda: RelativeNoise("x", -1), "level=-1"),
        (lambda: robustness(nn.Linear(3, 2), predict, [], []), "batches is empty"),
        (lambda: robustness(nn.Linear(3, 2), predict, GOOD, []), "got a dict"),
        (lambda: robustness(nn.Linear(3, 2), predict, [GOOD], ["fgsm"]), "holds 'fgsm'"),  # type: ignore[list-item]
        (lambda: robustness(nn.Linear(3, 2), predict, [GOOD], AGAINST), "robustness needs inputs="),
    ],
    ids=range(6),
)
def test_bad_settings_are_refused(call: Any, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        call()

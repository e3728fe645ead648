"""Rows by hand, laws of the threshold, and no trace of any of it."""

from __future__ import annotations

import json
import math
from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from itertools import pairwise
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn
from torch.utils.data import DataLoader

from actsparse import PruneGradient, find_mlp_blocks, sparsify
from actsparse.kernels import accelerate
from actsparse.observe.gradient_pruning import pruning
from actsparse.observe.loss import IGNORE, sample_losses
from tests.observe import test_robustness
from tests.observe.brute import D, Mlp
from tests.observe.test_measure import Broken, half_way, state
from tests.observe.test_robustness import F_IN, Batch, C, T, predict


class Net(test_robustness.Net):
    """Counts its calls."""

    def __init__(self, gated: bool = True) -> None:
        super().__init__("relu6", "relu", gated)
        self.register_buffer("calls", torch.zeros(()))

    def forward(self, x: Tensor, attention_mask: Tensor | None = None) -> Tensor:
        self.calls += 1  # in eval mode too
        return super().forward(x)


def net(gated: bool = True, seed: int = 0) -> tuple[Net, list[Batch]]:
    """Five samples in two batches: of 3, 1, 2 and 3 predicted positions, and of none."""
    torch.manual_seed(seed)
    y = torch.randint(C, (5, T))
    y[1, 1:] = y[2, 0] = y[4] = IGNORE
    x = 3 * torch.randn(5, T, F_IN, dtype=torch.float64)
    return Net(gated).double(), [{"x": x[:3], "y": y[:3]}, {"x": x[3:], "y": y[3:]}]


def rows_of(model: nn.Module, batches: Any, *args: Any, **options: Any) -> list[dict[str, Any]]:
    options = {"inputs": None if "blocks" in options else batches[0]["x"]} | options
    return pruning(model, predict, batches, *args, **options)


# --- by hand -----------------------------------------------------------------------------------


def dropped(eta: Tensor, threshold: float) -> Tensor:
    """η̂, one entry after the other."""
    values = eta.flatten().tolist()
    alive = [v for v in values if v != 0]
    rms = math.sqrt(math.fsum(v * v for v in alive) / len(alive))
    left = [v if abs(v) > threshold * rms else 0.0 for v in values]
    return torch.tensor(left, dtype=eta.dtype).reshape(eta.shape)


def compared(exact: list[Tensor], pruned: list[Tensor]) -> tuple[float, float]:
    one, two = (torch.cat([g.flatten() for g in each]) for each in (exact, pruned))
    return float((two - one).norm() / one.norm()), float(one @ two / one.norm() / two.norm())


# float64: a few hundred operations, errors and cosines of order 1e-2 or more
RELATIVE = 1e-10


@pytest.mark.parametrize("phi", ["relu", "jsrelu", "relu6", "gelu"])
def test_of_one_block_by_its_closed_form(phi: str) -> None:
    """G and Ĝ of the mean of Σ (y − target)²/2 over the samples of two batches, by products."""
    torch.manual_seed(1)
    mlp = Mlp(phi).double()
    model = nn.Sequential(mlp.up, mlp.act, mlp.down)
    batches = [
        {"x": scale * torch.randn(n, D).double(), "to": torch.randn(n, D).double()}
        for n, scale in ((5, 1.0), (3, 0.1))
    ]

    def loss_fn(model: nn.Module, batch: Batch) -> Tensor:
        return (model(batch["x"]) - batch["to"]).square().sum(-1).mean() / 2

    thresholds = [0.0, 0.3, 0.8, 1e3]
    rows = pruning(model, loss_fn, batches, thresholds, inputs=batches[0]["x"])
    (u, b), (v, c) = ((layer.weight.detach(), layer.bias.detach()) for layer in (mlp.up, mlp.down))

    def gradient(threshold: float) -> tuple[list[Tensor], int, int, int]:
        total = [torch.zeros_like(p) for p in (u, b, v, c)]
        kept = sloped = entries = 0
        for batch in batches:
            x = batch["x"]
            z = (x @ u.T + b).requires_grad_()
            a = mlp.act(z)
            (slope,) = torch.autograd.grad(a.sum(), z)
            z, a = z.detach(), a.detach()
            g_y = a @ v.T + c - batch["to"]
            eta = dropped(g_y @ v * slope, threshold)
            parts = [eta.T @ x, eta.sum(0), g_y.T @ a, g_y.sum(0)]
            total = [t + p / 8 for t, p in zip(total, parts, strict=True)]
            kept, sloped = kept + int((eta != 0).sum()), sloped + int((slope != 0).sum())
            entries += z.numel()
        return total, kept, sloped, entries

    exact = gradient(0.0)[0]
    for row, threshold in zip(rows, thresholds, strict=True):
        pruned, kept, sloped, entries = gradient(threshold)
        error, cosine = compared(exact, pruned)
        assert row["threshold"] == threshold
        assert row["kept"] == kept / entries
        assert row["derivative_density"] == sloped / entries
        assert row["error"] == pytest.approx(error, rel=RELATIVE)
        assert row["cosine"] == pytest.approx(cosine, rel=RELATIVE)
    # beyond the largest entry nothing comes through up, and down keeps all
    up, down = (math.hypot(*(float(g.norm()) for g in part)) for part in (exact[:2], exact[2:]))
    assert rows[3]["kept"] == 0
    assert rows[3]["error"] == pytest.approx(up / math.hypot(up, down), rel=RELATIVE)
    assert rows[3]["cosine"] == pytest.approx(down / math.hypot(up, down), rel=RELATIVE)


@contextmanager
def dropping(model: Net, threshold: float, kept: list[Tensor]) -> Iterator[None]:
    """Small η dropped by tensor hooks of our own."""

    def backward(eta: Tensor) -> Tensor:
        left = dropped(eta, threshold)
        kept.append(left != 0)
        return left

    hooks = [
        mlp.pre.register_forward_hook(lambda *hook: hook[-1].register_hook(backward) and None)
        for mlp in (model.first, model.second)
    ]
    yield
    for hook in hooks:
        hook.remove()


@pytest.mark.parametrize("reduction", ["mean", "sum"])
@pytest.mark.parametrize("gated", [False, True])
def test_of_a_whole_net_with_hooks_of_our_own(gated: bool, reduction: Any) -> None:
    model, batches = net(gated)
    thresholds = [1.0, 0.0, 0.2]
    rows = rows_of(model, batches, thresholds, reduction=reduction)
    model.eval()

    def gradient(threshold: float | None) -> tuple[list[Tensor], int]:
        kept: list[Tensor] = []
        total = [torch.zeros_like(p) for p in model.parameters()]
        for batch in batches:
            with nullcontext() if threshold is None else dropping(model, threshold, kept):
                loss = sample_losses(*predict(model, batch), reduction).sum() / 4
            parts = torch.autograd.grad(loss, list(model.parameters()))
            total = [t + p for t, p in zip(total, parts, strict=True)]
        return total, sum(int(each.sum()) for each in kept)

    exact, _ = gradient(None)
    entries = sum(len(batch["x"]) * T * 10 * 2 for batch in batches)
    for row, threshold in zip(rows, thresholds, strict=True):
        pruned, kept = gradient(threshold)
        error, cosine = compared(exact, pruned)
        assert row["kept"] == kept / entries
        assert row["error"] == pytest.approx(error, rel=RELATIVE, abs=0)
        assert row["cosine"] == pytest.approx(cosine, rel=RELATIVE)
    assert rows[1]["error"] == 0.0
    assert rows[1]["cosine"] == 1.0
    assert 0 < rows[2]["error"] < rows[0]["error"]


# --- laws --------------------------------------------------------------------------------------


@settings(deadline=None, max_examples=15)
@given(st.integers(0, 99), st.booleans(), st.lists(st.floats(0, 3), min_size=2, max_size=4))
def test_what_is_kept_falls_with_the_threshold_within_the_derivative_density(
    seed: int, gated: bool, thresholds: list[float]
) -> None:
    model, batches = net(gated, seed)
    # n entries are at most √n times their rms: 5·3·10 in the larger batch's block
    rows = rows_of(model, batches, [*sorted(thresholds), 13.0])
    densities = {row["derivative_density"] for row in rows}
    assert len(densities) == 1
    assert rows[0]["kept"] <= densities.pop() < 1
    assert all(one["kept"] >= two["kept"] for one, two in pairwise(rows))
    assert rows[-1]["kept"] == 0
    assert all(row["error"] >= 0 and abs(row["cosine"]) <= 1 for row in rows)


def test_each_batch_is_dropped_by_itself() -> None:
    model, [one, two] = net()
    two["x"] = two["x"] * 1e-3
    whole = {key: torch.cat([one[key], two[key]]) for key in one}
    (apart,), (joined,) = (rows_of(model, batches, [0.5]) for batches in ([one, two], [whole]))
    assert apart["kept"] != joined["kept"]
    assert apart["error"] != pytest.approx(joined["error"])


def test_padding_is_not_counted() -> None:
    model, [batch, _] = net()
    batch["y"] = torch.randint(C, (3, T))  # so that a gradient comes to padding too
    mask = torch.tensor([[1, 1, 1], [1, 0, 0], [1, 1, 0]])

    def loss_fn(model: nn.Module, batch: Batch) -> tuple[Tensor, Tensor]:
        return model(batch["x"], attention_mask=mask), batch["y"]

    blocks = find_mlp_blocks(model, {"x": batch["x"], "attention_mask": mask})
    rows = pruning(model, loss_fn, [batch], [0.0, 0.5], blocks=blocks)
    model.eval()
    for row in rows:
        kept: list[Tensor] = []
        with dropping(model, row["threshold"], kept):
            loss = F.cross_entropy(model(batch["x"]).flatten(0, 1), batch["y"].flatten())
            loss.backward()
        inside, outside = (sum(int(k[mask == on].sum()) for k in kept) for on in (1, 0))
        assert row["kept"] == inside / (6 * 10 * 2)
        assert outside > 0
    assert rows[0]["kept"] <= rows[0]["derivative_density"]


# --- what models may be ------------------------------------------------------------------------


def test_a_model_that_trains_with_pruned_gradients_is_measured_like_any_other() -> None:
    model, batches = net()
    plain = rows_of(model, batches)
    handle = sparsify(model, PruneGradient(1.0), inputs=batches[0]["x"])
    model.train()
    assert pruning(model, predict, batches) == plain
    handle.remove()


def test_rows_are_the_same_where_an_executor_runs_in_the_layers_place() -> None:
    torch.manual_seed(2)
    model: Any = nn.Sequential(nn.Linear(D, 16), nn.ReLU(), nn.Linear(16, D))
    batch = {"x": torch.randn(9, D), "y": torch.randint(D, (9,))}
    blocks = find_mlp_blocks(model, batch["x"])
    dense = rows_of(model, [batch], blocks=blocks)
    with accelerate(model, blocks=blocks, mode="sparse"):
        assert rows_of(model, [batch], blocks=blocks) == dense


def test_what_lies_below_all_that_is_trained_is_not_counted() -> None:
    model, batches = net()
    for part in (model.embed, model.first):
        part.requires_grad_(False)
    (row,) = rows_of(model, batches, [0.3])
    (alone,) = rows_of(model, batches, [0.3], blocks=[find_mlp_blocks(model, batches[0]["x"])[1]])
    assert row == alone
    model.requires_grad_(False)
    model.head.requires_grad_(True)
    (row,) = rows_of(model, batches, [0.3])
    assert row == {
        "threshold": 0.3, "kept": None, "derivative_density": None, "error": 0.0, "cosine": 1.0
    }  # fmt: skip


def test_where_no_gradient_is_there_is_nothing_to_compare() -> None:
    model, batches = net()
    (row,) = pruning(
        model, lambda m, b: 0 * m(b["x"]).sum(), batches, [0.3], inputs=batches[0]["x"]
    )
    assert (row["kept"], row["error"], row["cosine"]) == (0.0, None, None)


def test_half_precision_is_summed_in_float32() -> None:
    model, batches = net()
    wide = rows_of(model, batches)
    half = [{"x": b["x"].bfloat16(), "y": b["y"]} for b in batches]
    for one, two in zip(rows_of(model.bfloat16(), half, [0.0, *[r["threshold"] for r in wide]])[1:],
                        wide, strict=True):  # fmt: skip
        # 8 bits, some ten operations deep
        assert one["error"] == pytest.approx(two["error"], abs=20 * 2**-8)
        assert one["kept"] == pytest.approx(two["kept"], abs=20 * 2**-8)


def test_a_loader_that_shuffles_does_so_alike_for_every_threshold() -> None:
    model, batches = net()
    data = [{"x": x, "y": y} for b in batches for x, y in zip(b["x"], b["y"], strict=True)][:4]
    loader = DataLoader(data, batch_size=2, shuffle=True)  # type: ignore[arg-type]
    before = state(model)
    once, again = (
        pruning(model, predict, loader, [0.0, 0.3], inputs=batches[0]["x"]) for _ in range(2)
    )
    assert once == again
    assert state(model) == before
    assert json.loads(json.dumps(once, allow_nan=False)) == once


# --- no trace ----------------------------------------------------------------------------------


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
        out, y = predict(model, batch)
        if error and calls == fatal:
            raise error("mine")
        return out, y

    def every() -> None:
        pruning(model, how, batches, [0.1, 0.5], inputs=batches[0]["x"])

    every()
    assert state(model) == before
    assert calls == 2 * 3
    for number in range(1, calls + 1 if error else 1):
        calls, fatal = 0, number
        with pytest.raises(error):
            every()
        assert state(model) == before
    assert [p.data_ptr() for p in model.parameters()] == pointers
    if error is RuntimeError:  # in the backward pass of a batch
        spoilt = lambda m, b: (Broken.apply(m(b["x"])), b["y"])  # noqa: E731
        with pytest.raises(RuntimeError, match="backward fails"):
            pruning(model, spoilt, batches, inputs=batches[0]["x"])
        assert state(model) == before
    with torch.inference_mode() if error else nullcontext():
        fatal = 0
        every()
    assert state(model) == before
    pending.backward()  # a graph of someone's own is as good as before


GOOD = {"x": torch.zeros(2, 3), "y": torch.zeros(2).long()}
LINEAR = nn.Linear(3, 2)


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: pruning(LINEAR, predict, [GOOD], [-0.1]), r"thresholds=\[-0.1\]"),
        (lambda: pruning(LINEAR, predict, [GOOD], [0.1, math.nan]), r"thresholds=\[0.1, nan\]"),
        (lambda: pruning(LINEAR, predict, [GOOD], [math.inf]), "finite numbers ≥ 0"),
        (lambda: pruning(LINEAR, predict, [GOOD], []), r"thresholds=\[\].*at least one"),
        (lambda: pruning(LINEAR, predict, []), "batches must be a list of at least one batch"),
        (lambda: pruning(LINEAR, predict, iter([GOOD])), "which can be read again"),
        (lambda: pruning(LINEAR, predict, [GOOD]), "pruning needs inputs="),
        (lambda: pruning(LINEAR.requires_grad_(False), predict, [GOOD]), "none of the model needs"),
    ],
    ids=range(8),
)
def test_bad_settings_are_refused(call: Any, message: str) -> None:
    LINEAR.requires_grad_(True)
    with pytest.raises(ValueError, match=message):
        call()


@pytest.mark.parametrize("part", ["", "head.bias"], ids=["all", "one"])
def test_a_gradient_that_is_not_finite_is_an_error(part: str) -> None:
    """NaN in most parameters; in the head's bias alone it is infinite."""
    model, batches = net()
    for name, parameter in model.named_parameters():
        parameter.requires_grad_(part in name)

    def loss_fn(model: nn.Module, batch: Batch) -> tuple[Tensor, Tensor]:
        logits = model(batch["x"])
        if batch is batches[1]:
            logits.register_hook(lambda gradient: gradient + torch.inf)
        return logits, batch["y"]

    before = state(model)
    with pytest.raises(ArithmeticError, match="gradient of batch 1 is NaN or infinite"):
        pruning(model, loss_fn, batches, inputs=batches[0]["x"])
    assert state(model) == before

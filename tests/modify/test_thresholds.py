"""Thresholds: what they drop is what they say, they keep to the budget, and they come off."""

from __future__ import annotations

import copy
import math
from collections.abc import Callable
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn

from actsparse import SwapActivation, accelerate, handle_of, observe, sparsify
from actsparse.activations import named, thresholded
from actsparse.blocks import find_mlp_blocks
from actsparse.modify import TopK
from actsparse.modify.thresholds import Thresholds, calibrate_thresholds, thresholds_of
from tests.observe.brute import D, Mlp, Phi, Recorder
from tests.zoo import BY_ID, call
from tests.zoo.ready import outputs, same

X = torch.randn(8, 16, D, generator=torch.Generator().manual_seed(1))
TARGET = torch.randn(8, 16, D, generator=torch.Generator().manual_seed(2))
EPS = torch.finfo(torch.float64).eps


def mlps(*functions: str, gated: bool = False) -> nn.Module:
    return nn.Sequential(*(Mlp(name, gated) for name in functions or ("relu",))).eval()


def magnitudes(model: nn.Module, inputs: Any = X, **known: Any) -> Any:
    known = known or ({} if handle_of(model) else {"inputs": inputs})
    with observe(model, "magnitudes", **known) as seen, torch.no_grad():
        call(model, inputs)
    return seen


def loss_of(model: nn.Module) -> Callable[[], float]:
    def loss() -> float:
        with torch.no_grad():
            return nn.functional.mse_loss(model(X), TARGET).item()

    return loss


def attached(model: nn.Module) -> list[str]:
    """What of ours is left at any module."""
    return [
        key
        for module in model.modules()
        for key in [*module.__dict__, *module._forward_hooks, *module._forward_pre_hooks]
        if key == "forward" or not isinstance(key, str) or key.startswith("_actsparse")
    ]


# --- what is dropped -----------------------------------------------------------------------------


@pytest.mark.parametrize("gated", [False, True], ids=["plain", "gated"])
@pytest.mark.parametrize("function", ["relu", "jsrelu", "squared_relu"])
@pytest.mark.parametrize("share", [1e-3, 0.1])
def test_what_lies_below_the_threshold_goes_and_nothing_else(
    share: float, function: str, gated: bool
) -> None:
    model, x = mlps(function, gated=gated).double(), X.double()
    blocks = find_mlp_blocks(model, x)
    with Recorder(blocks) as brute:
        seen = magnitudes(model, x, blocks=blocks)
    ((z,), u) = brute.z["0"], brute.u["0"] or [1]
    a = named(function).value(z) * u[0]
    (row,) = (handle := calibrate_thresholds(model, seen, share=share)).rows()
    t = row["threshold"]
    assert row["function"] == thresholded(function, t).name
    left = torch.where(z > t, a, 0)
    dropped = float((a - left).square().sum() / a.square().sum())
    assert 0 < dropped <= share * (1 + 2000 * EPS)  # sums of 1280 positive numbers
    assert row["density_before"] == float((a != 0).double().mean())
    assert row["density_after"] == float((left != 0).double().mean())
    y = x.flatten(0, 1) + nn.functional.linear(left, model[0].down.weight, model[0].down.bias)
    # the same sums of 10 products; all else is the same to the bit
    torch.testing.assert_close(model(x).flatten(0, 1), y, rtol=1e-13, atol=1e-13)
    assert (handle.share, handle.loss_before, handle.loss_after) == (share, None, None)


@pytest.mark.parametrize("function", ["relu", "jsrelu", "squared_relu"])
def test_one_huge_token_silences_no_other(function: str) -> None:
    model = nn.Sequential(nn.Linear(D, 64), Phi(function), nn.Linear(64, D)).double().eval()
    x = X.flatten(0, 1).double()
    x[0] *= 1000
    hidden: list[Tensor] = []
    model[2].register_forward_pre_hook(lambda _, args: hidden.append(args[0]))
    seen = magnitudes(model, x)
    calibrate_thresholds(model, seen, share=0.01)
    hidden.clear()
    with torch.no_grad():
        model(x)
    before = named(function).value(model[0](x))
    lost = (before - hidden[0]).square().sum(-1) / before.square().sum(-1)
    # sums of 64 positive numbers
    assert 0 < lost.mean() <= 0.01 * (1 + 100 * EPS)


def test_what_was_seen_of_another_function_gives_no_threshold() -> None:
    model = mlps("gelu")
    seen = magnitudes(model)
    sparsify(model, SwapActivation("relu"), inputs=X)
    with pytest.raises(
        ValueError, match=r"not 0 at z ≤ 0 \(by another φ than relu now.*observe it"
    ):
        calibrate_thresholds(model, seen, share=0.01)
    assert thresholds_of(model) is None
    calibrate_thresholds(model, magnitudes(model), share=0.01)


def test_one_share_gives_each_block_its_own_threshold() -> None:
    model = mlps("relu", "relu")
    with torch.no_grad():
        model[1].up.weight.mul_(10)
    seen = magnitudes(model)
    first, second = calibrate_thresholds(model, seen, share=0.05).rows()
    assert second["threshold"] > 5 * first["threshold"]
    for row, name in ((first, "0"), (second, "1")):
        assert row["threshold"] == seen.part(name, "inference", "magnitudes").threshold(0.05)


@pytest.mark.parametrize("way", ["share", "budget"])
def test_without_leave_to_drop_nothing_is_touched(way: str) -> None:
    model = mlps("relu", "jsrelu")
    y, seen = model(X), magnitudes(model)
    if way == "share":
        handle = calibrate_thresholds(model, seen, share=0.0)
    else:  # whatever is dropped costs something
        losses = iter(range(99))
        handle = calibrate_thresholds(model, seen, 0.0, evaluate=lambda: float(next(losses)))
    assert attached(model) == ["_actsparse_thresholds"]
    assert torch.equal(model(X), y)
    assert [row["function"] for row in handle.rows()] == ["relu", "jsrelu"]
    assert all(row["density_before"] == row["density_after"] for row in handle.rows())
    assert str(handle).startswith("thresholds in 0 of 2 MLP blocks, which drop at most 0 of ")


# --- the budget ----------------------------------------------------------------------------------


@pytest.mark.parametrize("budget", [0.001, 0.02, 0.5])
def test_the_loss_stays_within_budget(budget: float) -> None:
    model = mlps("relu", "jsrelu")
    loss, seen, asked = loss_of(model), magnitudes(model), []

    def evaluate() -> float:
        asked.append(loss())
        return asked[-1]

    before = loss()
    handle = calibrate_thresholds(model, seen, budget, evaluate=evaluate)
    assert handle.loss_before == before == asked[0]
    assert handle.loss_after == loss() <= before + budget
    assert len(asked) <= 9
    assert all(row["threshold"] > 0 for row in handle.rows())
    assert all(row["density_after"] < row["density_before"] for row in handle.rows())
    assert f"loss {before:.6g} → {loss():.6g}" in str(handle)


def test_no_larger_share_is_within_budget_where_loss_grows_with_what_is_dropped() -> None:
    model = mlps("relu", "relu")
    seen = magnitudes(model)
    parts = [seen.part(name, "inference", "magnitudes") for name in seen.blocks]

    def cost(thresholds: list[float]) -> float:
        left = [part.density(t) for part, t in zip(parts, thresholds, strict=True)]
        return sum(part.density(0.0) for part in parts) - sum(left)

    def evaluate() -> float:
        return cost([row["threshold"] for row in thresholds_of(model).rows()])

    handle = calibrate_thresholds(model, seen, 0.1, evaluate=evaluate)
    assert handle.loss_after <= 0.1
    step = 1e-6 ** (-1 / 255)  # from one share that is tried to the next
    assert cost([part.threshold(handle.share * step) for part in parts]) > 0.1


MODEL = mlps("relu", "relu")
SEEN = magnitudes(MODEL)


@settings(max_examples=30)
@given(
    losses=st.lists(st.floats(0, 1), min_size=8, max_size=8),
    budgets=st.tuples(st.floats(0, 1), st.floats(0, 1)),
)
def test_a_larger_budget_never_gives_a_smaller_share(
    losses: list[float], budgets: tuple[float, float]
) -> None:
    """Whatever the loss does in between."""

    def evaluate() -> float:
        thresholds = [row["threshold"] for row in thresholds_of(MODEL).rows()]
        return losses[hash(tuple(thresholds)) % 8] if any(thresholds) else 0.0

    shares = []
    for budget in sorted(budgets):
        handle = calibrate_thresholds(MODEL, SEEN, budget, evaluate=evaluate)
        shares.append(handle.share)
        assert handle.loss_after <= budget
        handle.remove()
    assert shares[0] <= shares[1]


def test_a_loss_that_is_not_a_number_is_no_loss_within_budget() -> None:
    model = mlps()
    answers = iter([1.0, *[math.nan] * 99])
    handle = calibrate_thresholds(model, magnitudes(model), 1.0, evaluate=lambda: next(answers))
    assert handle.share == 0.0
    assert handle.loss_after == 1.0


# --- on and off ----------------------------------------------------------------------------------

NAMES = ["t5-relu", "llama-relu", "vit-pooler-relu", "nanochat-inline-squared-relu",
         "sequential-relu-in-place", "torch-encoder-relu-pre-batch_first"]  # fmt: skip


@pytest.mark.parametrize("name", NAMES)
def test_removed_they_leave_no_trace(name: str) -> None:
    model, inputs = BY_ID[name].build()
    model.eval()
    before, seen = outputs(model, inputs), magnitudes(model, inputs)
    handle = calibrate_thresholds(model, seen, share=0.1)
    assert all(row["threshold"] > 0 for row in handle.rows())
    handle.remove()
    assert attached(model) == []
    assert same(before, outputs(model, inputs))
    handle.remove()


def swapped() -> tuple[nn.Module, Any, Tensor, Tensor]:
    """A ReLU model, its recipe's handle, and outputs as ReLU and as JSReLU."""
    model = mlps("relu", "relu")
    plain = model(X)
    recipe = sparsify(model, SwapActivation("jsrelu"), inputs=X)
    return model, recipe, plain, model(X)


@pytest.mark.parametrize("first", ["thresholds", "recipe"])
def test_a_swapped_function_gets_the_threshold_and_either_may_go_first(first: str) -> None:
    model, recipe, plain, bent = swapped()
    handle = calibrate_thresholds(model, magnitudes(model), share=0.1)
    assert all(row["function"].startswith("jsrelu(threshold=") for row in handle.rows())
    assert not torch.equal(model(X), bent)
    if first == "thresholds":
        handle.remove()
        assert torch.equal(model(X), bent)
        recipe.remove()
    else:
        recipe.remove()
        assert torch.equal(model(X), plain)
        assert [row["threshold"] for row in handle.rows()] == [0.0, 0.0]
        handle.remove()
    assert attached(model) == []
    assert torch.equal(model(X), plain)


def test_a_threshold_that_was_there_stays_where_it_is_the_larger() -> None:
    model = mlps("relu")
    sparsify(model, SwapActivation("relu(threshold=0.5)"), inputs=X)
    y, seen = model(X), magnitudes(model)
    assert seen.part("0", "inference", "magnitudes").threshold(0.01) > 0.5
    handle = calibrate_thresholds(model, seen, share=0.01)
    assert handle.rows()[0]["threshold"] > 0.5
    handle.remove()
    assert torch.equal(model(X), y)


def test_observe_and_accelerate_go_with_them() -> None:
    model = mlps("relu")
    handle = calibrate_thresholds(model, magnitudes(model), share=0.1)
    y = model(X)
    with observe(model, inputs=X) as seen:
        model(X)
    (row,) = handle.rows()
    summary = seen.summary("inference")
    assert summary["density"] == summary["derivative_density"] == row["density_after"]
    with accelerate(model, inputs=X, mode="sparse"):
        # float32 sums of 10 terms
        torch.testing.assert_close(model(X), y, rtol=1e-5, atol=1e-5)
    model.train()
    model(X).square().mean().backward()
    assert all(bool(p.grad.isfinite().all()) for p in model.parameters())


def test_a_copy_of_the_model_has_thresholds_of_its_own() -> None:
    model = mlps("relu")
    plain, seen = model(X), magnitudes(model)
    calibrate_thresholds(model, seen, share=0.1)
    twin = copy.deepcopy(model)
    y = model(X)
    assert torch.equal(twin(X), y)
    thresholds_of(twin).remove()
    assert torch.equal(twin(X), plain)
    assert torch.equal(model(X), y)


# --- what cannot be ------------------------------------------------------------------------------


class Mine(Exception):
    pass


def fails() -> float:
    raise Mine


@pytest.mark.parametrize(
    ("answers", "error"), [([1.0, 1.0, fails], Mine), ([math.nan], ValueError)], ids=["own", "nan"]
)
def test_an_evaluation_that_fails_leaves_the_model_as_it_was(answers: Any, error: Any) -> None:
    model = mlps("relu")
    y, seen, rest = model(X), magnitudes(model), iter(answers)

    def evaluate() -> float:
        answer = next(rest)
        return answer() if callable(answer) else answer

    with pytest.raises(error):
        calibrate_thresholds(model, seen, 0.5, evaluate=evaluate)
    assert attached(model) == []
    assert torch.equal(model(X), y)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({}, "give either budget and evaluate="),
        ({"budget": 0.1}, "give either budget and evaluate="),
        ({"evaluate": fails}, "give either budget and evaluate="),
        ({"share": 0.1, "evaluate": fails}, "give either budget and evaluate="),
        ({"share": 0.1, "budget": 0.1, "evaluate": fails}, "give either budget and evaluate="),
        ({"share": 1.5}, r"share=1\.5: expected a number from 0 to 1"),
        ({"share": math.nan}, "share=nan: expected"),
        ({"budget": -1.0, "evaluate": fails}, r"budget=-1\.0: expected a finite number ≥ 0"),
        ({"budget": math.inf, "evaluate": fails}, "budget=inf: expected"),
        ({"share": 0.1, "blocks": []}, "blocks is empty"),
    ],
)
def test_arguments_that_make_no_sense_are_named(options: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        calibrate_thresholds(MODEL, SEEN, **options)
    assert attached(MODEL) == []


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (None, r"φ of block '1' takes no threshold on z: gelu\(.*leave the block out of blocks="),
        (SwapActivation("jsrelu", mix=5), "φ of block '0' is still being mixed"),
        (TopK(0.5), "φ of block '0' is a function of all units"),
    ],
    ids=["gelu", "mixed", "top-k"],
)
def test_functions_that_take_no_threshold_are_refused(change: Any, message: str) -> None:
    model = mlps("relu", "gelu")
    if change is not None:
        sparsify(model, change, inputs=X).attach(torch.optim.SGD(model.parameters(), 0.1))
    y, seen, left = model(X), magnitudes(model), attached(model)
    with pytest.raises(ValueError, match=message):
        calibrate_thresholds(model, seen, share=0.1)
    assert attached(model) == left
    assert torch.equal(model(X), y)
    if change is None:
        handle = calibrate_thresholds(model, seen, share=0.1, blocks=[seen.blocks["0"]])
        assert isinstance(handle, Thresholds)
        assert not torch.equal(model(X), y)


def test_what_was_seen_must_fit() -> None:
    model = mlps("relu")
    with observe(model, inputs=X) as seen:
        model(X)
    with pytest.raises(ValueError, match="magnitudes is not observed; measures: density"):
        calibrate_thresholds(model, seen, share=0.1)
    with observe(model, "magnitudes", inputs=X) as seen:
        model.train()(X)
    with pytest.raises(ValueError, match="has seen no token in phase 'inference'"):
        calibrate_thresholds(model, seen, share=0.1)
    seen = magnitudes(model.eval())
    with pytest.raises(ValueError, match="not part of this Sequential"):
        calibrate_thresholds(copy.deepcopy(model), seen, share=0.1)
    calibrate_thresholds(model, seen, share=0.1)
    with pytest.raises(ValueError, match=r"has thresholds already; thresholds_of\(model\).remove"):
        calibrate_thresholds(model, seen, share=0.1)

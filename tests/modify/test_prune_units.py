"""Dead units leave, and nothing else: outputs on the data seen, in any model, with anything on."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
from torch import Tensor

from actsparse import (
    ActivationPenalty,
    NormFloor,
    Recipe,
    SwapActivation,
    WeightNoise,
    ZerothBias,
    accelerate,
    observe,
    sparsify,
)
from actsparse.blocks import find_mlp_blocks
from actsparse.modify.prune_units import prune_dead_units
from tests.modify.dead_units import X, kill, mlps, pruned, widths
from tests.observe.brute import D, H, Mlp
from tests.zoo import BY_ID
from tests.zoo.ready import outputs, same

DTYPES = pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)


# --- exactness -----------------------------------------------------------------------------------


def rounding(mlp: Mlp, x: Tensor) -> Tensor:
    """How far two ways to sum may lie apart in ``mlp(x)``, elementwise.

    A sum of n products in any order is off by γ·Σ|terms| at most, γ = nε/(1 − nε). z's error
    passes on through |φ′| ≤ max(1, 1 + |z|) and V, then a is summed over H, and x is added.
    """
    eps = torch.finfo(x.dtype).eps
    h, u, v = mlp.norm(x).abs(), mlp.pre.weight.abs(), mlp.down.weight.abs()
    z = (D + 2) * eps * (h @ u.T + mlp.pre.bias.abs())
    a = mlp.act(mlp.pre(mlp.norm(x))).abs()
    slope = 1 + mlp.pre(mlp.norm(x)).abs()
    if mlp.gate is not None:
        other = mlp.up(mlp.norm(x)).abs()
        error = (D + 2) * eps * (h @ mlp.up.weight.abs().T + mlp.up.bias.abs())
        z, a = slope * z * other + a * error, a * other
    else:
        z = slope * z
    terms = a @ v.T + mlp.down.bias.abs() + x.abs()
    return 2 * ((H + 4) * eps * terms + z @ v.T)  # either way to sum is off by so much


@DTYPES
@pytest.mark.parametrize("gated", [False, True], ids=["plain", "gated"])
@pytest.mark.parametrize("function", ["relu", "jsrelu"])
def test_outputs_on_the_data_seen_stay_up_to_rounding(
    function: str, gated: bool, dtype: torch.dtype
) -> None:
    model, x = mlps(function, gated=gated).to(dtype), X.to(dtype)
    before, bound = model(x), rounding(model[0], x)
    handle = pruned(model, x)
    assert widths(model, x) == [H - 5]
    assert handle.rows == [("0", H, H - 5)]
    assert bool(((model(x) - before).abs() <= bound).all())
    # a living unit missing would show
    assert float(bound.detach().max()) < 1e-3 * float((before - x).detach().abs().max())


ZOO = ["vit-pooler-relu", "bert-masked-lm", "albert-one-layer-used-four-times", "t5-relu",
       "t5-gated-gelu", "gpt2", "opt-post-norm-350m", "llama", "gemma", "falcon-rw-sequential",
       "nanochat-inline-squared-relu", "swiglu", "time-first", "sequential-relu-in-place",
       "torch-encoder-relu-pre-batch_first", "torch-transformer"]  # fmt: skip


@pytest.mark.parametrize("name", ZOO)
def test_models_of_every_family_stay_as_they_are_and_come_back(name: str) -> None:
    model, inputs = BY_ID[name].build()
    model.eval().double()
    inputs = doubled(inputs)
    blocks = find_mlp_blocks(model, inputs)
    for i, block in enumerate(blocks):
        kill(block, slice(i, 9))
    whole, before = copy.deepcopy(model.state_dict()), outputs(model, inputs)
    parameters = sum(p.numel() for p in model.parameters())
    handle = pruned(model, inputs)
    assert widths(model, inputs) == [after for _, _, after in handle.rows]
    # units of a ReLU that no token happens to wake go as well
    assert all(old - new >= 9 - i for i, (_, old, new) in enumerate(handle.rows))
    assert parameters - sum(p.numel() for p in model.parameters()) == handle.parameters > 0
    for one, two in zip(before, outputs(model, inputs), strict=True):
        # a few layers of sums of at most 100 terms, each norm divides by numbers not far below 1
        torch.testing.assert_close(one, two, rtol=1e-11, atol=1e-11)
    handle.remove()
    for name_, value in model.state_dict().items():
        assert torch.equal(value, whole[name_]), name_
    assert same(before, outputs(model, inputs))


def doubled(inputs: Any) -> Any:
    if isinstance(inputs, dict):
        return {key: doubled(value) for key, value in inputs.items()}
    if isinstance(inputs, tuple):
        return tuple(map(doubled, inputs))
    floating = isinstance(inputs, Tensor) and inputs.is_floating_point()
    return inputs.double() if floating else inputs


def test_a_unit_that_wakes_on_other_data_is_missing_there() -> None:
    model = mlps(dead=slice(0, 0))
    x = X[:1, :1]  # one token: some units are silent on it, and not on the others
    y, other = model(x), model(X)
    pruned(model, x)
    torch.testing.assert_close(model(x), y)
    assert not torch.allclose(model(X), other, atol=1e-3)


def test_one_unit_is_left_where_all_are_dead_and_means_over_units_stay_finite() -> None:
    model = mlps(dead=slice(None))
    y = model(X)
    assert "9 of 10 hidden units pruned" in str(pruned(model))
    assert widths(model) == [1]
    assert torch.equal(model(X), y)  # x + b′, by either way
    handle = sparsify(model, [WeightNoise(), ActivationPenalty()], inputs=X)
    model.train()
    assert bool(model(X).isfinite().all())
    assert bool(handle.penalty().isfinite())


def test_where_no_unit_is_dead_nothing_changes() -> None:
    model = mlps(dead=slice(0, 0))
    parameters = dict(model.named_parameters())
    handle = pruned(model)
    assert handle.rows == [("0", H, H)]
    assert all(parameters[name] is p for name, p in model.named_parameters())


def test_padding_has_no_say() -> None:
    model = mlps(dead=slice(0, 0))
    mask = torch.zeros(8, 16, dtype=torch.bool)
    mask[0, 0] = True
    with observe(model, inputs=X, mask=mask) as seen:
        y = model(X)
    prune_dead_units(model, seen)
    assert widths(model)[0] < H
    torch.testing.assert_close(model(X)[0, 0], y[0, 0])


# --- the layers ----------------------------------------------------------------------------------


def test_layers_say_their_widths() -> None:
    model = mlps(gated=True)
    pruned(model)
    mlp = model[0]
    assert (mlp.up.in_features, mlp.up.out_features) == (D, H - 5)
    assert (mlp.gate.in_features, mlp.gate.out_features) == (D, H - 5)
    assert (mlp.down.in_features, mlp.down.out_features) == (H - 5, D)
    assert mlp.up.bias.shape == mlp.gate.bias.shape == (H - 5,)
    gpt, inputs = BY_ID["gpt2"].build()
    for block in find_mlp_blocks(gpt, inputs):
        kill(block, slice(30, 35))
    pruned(gpt.eval(), inputs)
    up, down = gpt.transformer.h[0].mlp.c_fc, gpt.transformer.h[0].mlp.c_proj
    assert (up.nx, up.nf, down.nx, down.nf) == (16, 35, 35, 16)
    assert (up.weight.shape, up.bias.shape, down.weight.shape) == ((16, 35), (35,), (35, 16))


def test_blocks_may_be_chosen_and_frozen_layers_stay_frozen() -> None:
    model = mlps("relu", "relu")
    model[1].up.weight.requires_grad_(False)
    with observe(model, inputs=X) as seen:
        model(X)
    handle = prune_dead_units(model, seen, blocks=[seen.blocks["1"]])
    assert widths(model) == [H, H - 5]
    assert [p.requires_grad for p in model[1].up.parameters()] == [False, True]
    handle.remove()
    assert [p.requires_grad for p in model[1].up.parameters()] == [False, True]


def test_what_was_trained_comes_back_among_the_old_and_optimizers_fit_again() -> None:
    model = mlps()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    old = copy.deepcopy(model.state_dict())
    parameters = list(model.parameters())
    handle = pruned(model)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(1)
    handle.remove()
    handle.remove()
    dead = torch.zeros(H, dtype=torch.bool)
    dead[2:7] = True
    for name, value in model.state_dict().items():
        gone = torch.zeros_like(value, dtype=torch.bool)
        if name.startswith("0.up"):
            gone[dead] = True
        if name == "0.down.weight":
            gone[:, dead] = True
        assert torch.equal(value, torch.where(gone, old[name], old[name] + 1)), name
    assert all(one is two for one, two in zip(model.parameters(), parameters, strict=True))
    model(X).sum().backward()
    optimizer.step()
    assert not torch.equal(model[0].down.weight, old["0.down.weight"])


def test_a_model_that_moved_to_another_dtype_comes_back_in_it() -> None:
    model = mlps()
    handle = pruned(model)
    model.double()
    handle.remove()
    assert {p.dtype for p in model.parameters()} == {torch.float64}
    assert model(X.double()).dtype == torch.float64


def test_pruning_twice_is_undone_in_order() -> None:
    model = mlps()
    y = model(X)
    first = pruned(model)
    kill(find_mlp_blocks(model, X)[0], slice(0, 2))
    again = model(X)
    second = pruned(model)
    assert widths(model) == [H - 7]
    with pytest.raises(ValueError, match=r"0.up.weight no longer has the shape \[5, 6\]"):
        first.remove()
    assert widths(model) == [H - 7]
    second.remove()
    torch.testing.assert_close(model(X), again)
    first.remove()
    assert widths(model) == [H]
    assert not torch.allclose(model(X), y)


# --- together with what is attached --------------------------------------------------------------

RECIPE = Recipe(
    "all",
    (
        ZerothBias(finetune=True),
        NormFloor(),
        SwapActivation("jsrelu"),
        WeightNoise(),
        ActivationPenalty("l1"),
    ),
)


def test_modifications_go_on_and_may_go_first() -> None:
    model = mlps("relu", "relu").double()
    x = X.double()
    handle = sparsify(model, RECIPE, inputs=x)
    with torch.no_grad():
        for block in handle.blocks:
            block.up.module.actsparse.zeroth_bias.normal_(std=0.05)
    y = model(x)
    pruning = pruned(model, x)
    assert [block.d_hidden for block in handle.blocks] == [H - 5, H - 5]
    torch.testing.assert_close(model(x), y, rtol=1e-12, atol=1e-12)  # sums of 10 terms, 2 layers
    optimizer = torch.optim.SGD(model.parameters(), lr=0.01)
    handle.attach(optimizer)
    model.train()
    (model(x).square().mean() + handle.penalty()).backward()
    assert all(p.grad is not None for p in model.parameters() if p.requires_grad)
    optimizer.step()
    assert handle.step == 1
    with observe(model.eval()) as seen:
        y = model(x)
    assert seen.summary("inference")["units"] == 2 * (H - 5)
    handle.remove()
    assert not torch.equal(model(x), y)
    pruning.remove()
    assert widths(model, x) == [H, H]


@pytest.mark.parametrize("first", ["accelerate", "prune"])
def test_accelerated_blocks_run_on_at_their_new_width(first: str) -> None:
    model = mlps("relu", "jsrelu")
    y, bound = model(X), 1e-4  # float32, two layers; a unit missing would be seen at 1e-2
    if first == "accelerate":
        fast = accelerate(model, inputs=X, mode="sparse")
        model(X)
        handle = pruned(model)
    else:
        handle = pruned(model)
        fast = accelerate(model, inputs=X, mode="sparse")
    with torch.no_grad():
        for _ in range(3):
            torch.testing.assert_close(model(X), y, rtol=bound, atol=bound)
    assert [run.block.d_hidden for run in fast.runs.values()] == [H - 5, H - 5]
    assert sum(row["calls"].get("sparse", 0) for row in fast.table()) >= 2 * 3
    handle.remove()
    torch.testing.assert_close(model(X), y, rtol=bound, atol=bound)
    fast.remove()
    assert torch.equal(model(X), y)

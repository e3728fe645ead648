"""Measures of gradients change nothing, and come and go freely."""

from __future__ import annotations

import copy
import gc
import itertools
import warnings
from collections.abc import Iterable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from actsparse import SwapActivation, sparsify
from actsparse.blocks import find_mlp_blocks
from actsparse.observe import observe
from tests.mlp import Mlp
from tests.observe.test_gradients import (
    ALL,
    CLOSE,
    KINDS,
    B,
    D,
    H,
    X,
    close,
    found,
    losses,
    net,
    numbers,
    plain,
)  # fmt: skip


@pytest.mark.parametrize("order", list(itertools.permutations(range(3))))
def test_observers_and_modifications_come_and_go_in_any_order(order: tuple[int, ...]) -> None:
    """Each sees what is in force while it watches."""
    model = net(KINDS[1])
    blocks = find_mlp_blocks(model, X)
    before = {name: value.clone() for name, value in model.state_dict().items()}
    first = observe(model, ALL, blocks=blocks)
    second = observe(model, ALL, blocks=blocks)
    handle = sparsify(model, SwapActivation("relu"), blocks=blocks)
    closing = [first.close, second.close, handle.remove]
    losses(model(X)).mean().backward()
    swapped = found(first)
    assert numbers(found(second)) == close(swapped)
    assert 0 < swapped["density"] < 1
    for i in order:
        closing[i]()
    assert numbers(plain(model)) == close(plain(net(KINDS[1])))
    assert before.keys() == model.state_dict().keys()
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())
    assert not any(key.startswith("_actsparse") for m in model.modules() for key in vars(m))
    assert numbers(found(first)) == close(swapped)


def test_a_modification_that_comes_or_goes_while_watched() -> None:
    model = net(KINDS[1])
    blocks = find_mlp_blocks(model, X)
    with observe(model, ALL, blocks=blocks) as seen:
        handle = sparsify(model, SwapActivation("relu"), blocks=blocks)
        losses(model(X)).mean().backward()
        relu = found(seen)
        seen.reset()
        handle.remove()
        losses(model(X)).mean().backward()
        assert numbers(found(seen)) == close(plain(model))
    assert numbers(relu) == close(plain(net(KINDS[0])))


def test_training_and_inference_are_kept_apart() -> None:
    model = net()
    with observe(model, ALL, inputs=X) as seen:
        losses(model(X)).mean().backward()
        losses(model.eval()(X[:2])).mean().backward()
        with torch.no_grad():
            model(X[2:])
        assert numbers(found(seen)) == close(plain(model.train()))
        assert found(seen, "inference")["samples"] == 2
        seen.reset("train")
        assert seen.summary("train") is None
        assert found(seen, "inference")["samples"] == 2


def test_a_copy_watches_for_itself() -> None:
    model = net()
    with observe(model, ALL, inputs=X) as seen:
        losses(model(X)).mean().backward()
        copied = copy.deepcopy(model)
        losses(copied(X)).mean().backward()
        assert numbers(found(seen)) == close(plain(model))
        assert copied.state_dict().keys() == model.state_dict().keys()


def test_memory_does_not_grow_with_steps() -> None:
    model = net()
    seen = observe(model, ALL, inputs=X)

    def tensors() -> int:
        gc.collect()
        return sum(o.numel() for o in gc.get_objects() if issubclass(type(o), Tensor))

    losses(model(X)).mean().backward()
    first = tensors()
    for _ in range(5):
        losses(model(X)).mean().backward()
    assert tensors() <= first  # other tests' leftovers may go meanwhile
    seen.close()


def test_a_graph_outlives_its_observer() -> None:
    """The pass was seen while it watched; its backward comes later."""
    model = net()
    with observe(model, ALL, inputs=X) as seen:
        loss = losses(model(X)).mean()
    loss.backward()
    assert numbers(found(seen)) == close(plain(model))


class InPlace(nn.Module):
    """Overwrites what a plain model may overwrite."""

    def __init__(self, way: str) -> None:
        super().__init__()
        self.way, self.act = way, nn.GELU()
        self.up, self.down = nn.Linear(D, H), nn.Linear(H, D)
        self.gate = nn.Linear(D, H) if way in ("a *= u", "u *= a") else None

    def forward(self, x: Tensor) -> Tensor:
        if self.gate is None:
            a = F.dropout(self.act(self.up(x)), 0.3, inplace=self.way == "dropout")
        else:
            a, u = self.act(self.gate(x)), self.up(x)
            if self.way == "a *= u":
                a *= u
            else:
                u *= a
                a = u
        y = self.down(a)
        y += x
        return y


@pytest.mark.parametrize("way", ["dropout", "a *= u", "u *= a", "y += x"])
def test_models_may_write_in_place(way: str) -> None:
    """Two observers, each with several measures at one place, and the model's own gradients."""
    model = InPlace(way).double()
    results = []
    for observed in (False, True):
        model.zero_grad()
        torch.manual_seed(1)
        seen = [observe(model, ALL, inputs=X) for _ in range(2 * observed)]
        torch.manual_seed(1)
        losses(model(X)).mean().backward()
        for each in seen:
            each.close()
        results.append([p.grad.clone() for p in model.parameters() if p.grad is not None])
    assert all(torch.equal(a, b) for a, b in zip(*results, strict=True))
    assert numbers(found(seen[0])) == close(found(seen[1]))
    summary = found(seen[0])
    assert summary["derivative_density"] == pytest.approx(
        summary["density_from_flatness"], rel=CLOSE
    )


# --- what users do with gradients -----------------------------------------------------------------


@pytest.mark.parametrize("kind", KINDS)
def test_autograd_grad_gives_its_result_and_adds_nothing(kind: Any) -> None:
    model = net(kind)
    parameters = list(model.parameters())
    want = torch.autograd.grad(losses(model(X)).mean(), parameters)
    with observe(model, ALL[1:], inputs=X) as seen:
        loss = losses(model(X)).mean()
        got = torch.autograd.grad(loss, parameters, retain_graph=True)
        assert seen.summary("train") is None
        assert all(map(torch.equal, got, want))
        loss.backward()
        assert found(seen)["samples"] == B


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("by", ["grad", "backward"])
def test_hessian_products_are_right_and_only_backward_counts(kind: Any, by: str) -> None:
    model = net(kind)
    parameters = list(model.parameters())
    v = [torch.randn_like(p) for p in parameters]

    def product() -> list[Tensor]:
        loss = losses(model(X)).mean()
        if by == "grad":
            gradients: Iterable[Any] = torch.autograd.grad(loss, parameters, create_graph=True)
        else:
            with warnings.catch_warnings():
                warnings.filterwarnings("ignore", message="Using backward.. with create_graph")
                loss.backward(create_graph=True)
            gradients = [p.grad for p in parameters]
        dot = sum(((g * w).sum() for g, w in zip(gradients, v, strict=True)), start=X.new_zeros(()))
        result = torch.autograd.grad(dot, parameters, materialize_grads=True)
        for p in parameters:
            p.grad = None
        return list(result)

    products = [product()]
    with observe(model, ALL[1:], inputs=X) as seen:
        losses(model(X)).mean().backward()
        want = found(seen)
        seen.reset()
        products.append(product())
    for a, b in zip(*products, strict=True):
        # entries may cancel to nothing: relative to the largest of each tensor
        assert float((a - b).abs().max()) <= CLOSE * float(b.abs().max())
    if by == "grad":
        assert seen.summary("train") is None
    else:
        assert numbers(found(seen)) == close(want)


def test_backward_twice_counts_twice() -> None:
    model = net()
    with observe(model, ALL[1:], inputs=X) as seen:
        loss = losses(model(X)).mean()
        loss.backward(retain_graph=True)
        once = found(seen)
        loss.backward()
    assert found(seen)["samples"] == 2 * B
    for key in ("flatness", "coefficient", "gradient_l1", "gradient_anisotropy"):
        assert found(seen)[key] == pytest.approx(once[key], rel=CLOSE)


def test_an_optimizer_step_and_zero_grad_leave_sums_alone() -> None:
    model, twin = net(), net()
    optimizers = [torch.optim.AdamW(m.parameters(), lr=0.01) for m in (model, twin)]
    with observe(model, ALL, inputs=X) as seen:
        for _ in range(3):
            for m, optimizer in zip((model, twin), optimizers, strict=True):
                optimizer.zero_grad(set_to_none=True)
                losses(m(X)).mean().backward()
                optimizer.step()
    assert found(seen)["samples"] == 3 * B
    pairs = zip(model.parameters(), twin.parameters(), strict=True)
    assert all(torch.equal(a, b) for a, b in pairs)


# --- cost -----------------------------------------------------------------------------------------


class Attention(nn.Module):
    """What stands beside an MLP in a layer of a ViT."""

    def __init__(self, d: int) -> None:
        super().__init__()
        self.norm, self.qkv, self.out = nn.LayerNorm(d), nn.Linear(d, 3 * d), nn.Linear(d, d)

    def forward(self, x: Tensor) -> Tensor:
        q, k, v = self.qkv(self.norm(x)).unflatten(-1, (3, 2, -1)).unbind(2)
        each = (t.transpose(1, 2) for t in (q, k, v))
        return x + self.out(F.scaled_dot_product_attention(*each).transpose(1, 2).flatten(2))


def saved_bytes(model: nn.Module, x: Tensor, dtype: torch.dtype | None) -> int:
    """What autograd holds between forward and backward, each storage once, without parameters."""
    held = {}
    own = {p.untyped_storage().data_ptr() for p in model.parameters()}

    def pack(tensor: Tensor) -> Tensor:
        storage = tensor.untyped_storage()
        if storage.data_ptr() not in own:
            held[storage.data_ptr()] = storage  # kept alive, so that no address is used twice
        return tensor

    with (
        torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor),
        torch.autocast("cpu", dtype, enabled=dtype is not None),
    ):
        y = model(x)
    total = sum(storage.nbytes() for storage in held.values())
    y.float().sum().backward()
    return total


@pytest.mark.slow
@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("dtype", [None, torch.bfloat16])
@pytest.mark.parametrize("frozen", [False, True])
def test_readings_hold_little_that_autograd_does_not_hold_anyway(
    kind: Any, dtype: torch.dtype | None, frozen: bool
) -> None:
    """Of a ViT of a tenth of ViT-Base's widths; at a frozen layer autograd keeps no input."""
    act, gated = kind
    d, h = 76, 304
    mlps = (Mlp(act(), d, h, norm=nn.LayerNorm(d), gated=gated) for _ in range(2))
    model = nn.Sequential(*(nn.Sequential(Attention(d), mlp) for mlp in mlps))
    model.requires_grad_(not frozen)
    x = torch.randn(4, 197, d, requires_grad=True)
    without = saved_bytes(model, x, dtype)
    with observe(model, ("flatness", "gradient"), inputs=x) as seen:
        watched = saved_bytes(model, x, dtype)
    assert found(seen)["samples"] == 4
    assert without < watched <= 1.02 * without

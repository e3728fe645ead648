"""Norms of a as stages: from the layers, and from an executor that knows nothing else of a."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from actsparse.blocks import find_mlp_blocks
from actsparse.blocks.site import Site, site_of
from actsparse.blocks.stages import NORMS, OnNorms, token_norm
from tests.zoo import BY_ID, call

FAMILIES = [
    "gpt2", "opt-pre-norm", "t5-gated-gelu", "phi3", "nanogpt-inline-gelu",
    "swiglu-interleaved-rows", "like-timm-with-mlp-norm", "sequential-relu-in-place", "time-first",
    "bloom",
]  # fmt: skip


class Seen:
    def __init__(self) -> None:
        self.passes: list[dict[str, Tensor]] = []

    def __call__(self, site: Site, stages: dict[str, Tensor]) -> None:
        self.passes.append(stages)


@pytest.mark.parametrize("training", [False, True])
@pytest.mark.parametrize("name", FAMILIES)
def test_the_layers_give_the_norms_of_a(name: str, training: bool) -> None:
    model, inputs = BY_ID[name].build()
    blocks = find_mlp_blocks(model, inputs)
    taps = [Seen() for _ in blocks]
    for block, tap in zip(blocks, taps, strict=True):
        site_of(block).tap(tap, ["a", *NORMS])
    call(model.train(training), inputs)  # before any dropout, which training draws
    for tap in taps:
        (seen,) = tap.passes
        for stage, order in NORMS.items():
            assert torch.equal(seen[stage], token_norm(seen["a"], order))
            assert seen[stage].shape == (*seen["a"].shape[:-1], 1)
            assert seen[stage].requires_grad


class Twice:
    """An executor and its plan: y = 2·down(a), and norms that show whose they are."""

    def __init__(self) -> None:
        self.asked: list[bool] = []

    runs = True

    def plan(self, site: Site, x: Tensor) -> Twice:
        return self

    def __call__(self, site: Site, x: Tensor, on_norms: OnNorms | None) -> Tensor:
        self.asked.append(on_norms is not None)
        block = site.block
        a = torch.relu(x @ block.up.weight.t() + block.up.bias)
        if on_norms is not None:
            on_norms({"l1": 3 * token_norm(a, 1), "l2": 5 * token_norm(a, 2)})
        return 2 * (a @ block.down.weight.t())

    def passed(self, d: Tensor) -> None:
        raise AssertionError("the layers ran")


def ready() -> tuple[nn.Module, Tensor, Site]:
    model = nn.Sequential(nn.Linear(4, 9), nn.ReLU(), nn.Dropout(0.5), nn.Linear(9, 4))
    x = torch.randn(2, 3, 4)
    return model, x, site_of(find_mlp_blocks(model, x)[0])


STAGES: list[tuple[Any, set[str]]] = [
    (["l1"], {"l1"}),
    (["x", "l2"], {"x", "l2"}),
    (["x", "l1", "l2", "y"], {"x", "l1", "l2", "y"}),
    (["x"], {"x"}),
    ([], set()),
]


@pytest.mark.parametrize(("stages", "names"), STAGES, ids=lambda s: "-".join(sorted(s)) or "none")
def test_an_executor_hands_on_norms_to_whom_they_are_enough(stages: Any, names: set[str]) -> None:
    model, x, site = ready()
    executor, tap = Twice(), Seen()
    site.execute(executor)
    site.tap(tap, stages)
    a = torch.relu(x @ model[0].weight.t() + model[0].bias)
    for _ in range(2):
        y = model(x)
    assert executor.asked == [bool(names & {"l1", "l2"})] * 2
    want = {"x": x, "y": y, "l1": 3 * token_norm(a, 1), "l2": 5 * token_norm(a, 2)}
    assert len(tap.passes) == 2
    for seen in tap.passes:
        assert seen.keys() == names
        assert all(torch.equal(seen[name], want[name]) for name in names)


def test_early_and_late_taps_are_called_once_each() -> None:
    model, x, site = ready()
    site.execute(Twice())
    early, late = Seen(), Seen()
    site.tap(early, ["l1"])
    site.tap(late, ["l2", "y"])
    model(x)
    assert [len(early.passes), len(late.passes)] == [1, 1]
    assert early.passes[0].keys() == {"l1"}


def test_in_evaluation_nobody_asks_for_what_training_taps_read() -> None:
    model, x, site = ready()
    executor, tap = Twice(), Seen()
    site.execute(executor)
    site.tap(tap, ["l1", "l2"], in_training=True)
    for training in (True, False):
        model.train(training)
        model(x)
    assert executor.asked == [True, False]
    assert len(tap.passes) == 1


@pytest.mark.parametrize("wanted", ["z", "a", "d"])
def test_who_wants_more_of_the_hidden_layer_has_the_layers(wanted: str) -> None:
    model, x, site = ready()
    plain = copy.deepcopy(model).eval()(x)

    class Idle(Twice):
        def plan(self, site: Site, x: Tensor) -> Twice:
            self.runs = not site.needs_layers
            return self

        def passed(self, d: Tensor) -> None:
            self.asked.append(False)

    executor, norms, more = Idle(), Seen(), Seen()
    site.execute(executor)
    site.tap(norms, ["l1"])
    site.tap(more, [wanted])
    assert torch.equal(model.eval()(x), plain)
    assert executor.asked == [False]
    a = torch.relu(x @ model[0].weight.t() + model[0].bias)
    # sums of four products and of nine
    torch.testing.assert_close(norms.passes[0]["l1"], token_norm(a, 1), rtol=2e-6, atol=1e-6)

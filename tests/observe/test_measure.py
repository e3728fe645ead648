"""Passes of its own: they leave no trace, and say what is wrong before work begins."""

from __future__ import annotations

import json
import math
from collections.abc import Callable
from contextlib import nullcontext
from typing import Any, ClassVar

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn
from torch.utils.data import DataLoader

from actsparse import handle_of, sparsify
from actsparse.observe import CURVATURES, MEASURES, measure, observe
from actsparse.observe.curvature import gauss_newton_trace, hessian_trace, top_eigenvalue
from actsparse.observe.loss import IGNORE, sample_losses
from actsparse.observe.unit_counts import Counts
from tests.observe.brute import D, Mlp
from tests.observe.per_token import alike
from tests.observe.test_curvature_models import gpt2, of_hugging_face, vit

Batch = tuple[Tensor, Tensor]
C, T = 4, 3
ANY_PHI = [name for name in MEASURES if name != "occupancy"]  # the laboratory's, of S-shapes
EVERYTHING = (*ANY_PHI, *CURVATURES)


class Reader(nn.Module):
    """ids [B, T] → logits [B, T, C]; each position's logits depend on all tokens up to it."""

    def __init__(self, gated: bool = False) -> None:
        super().__init__()
        self.embed, self.head = nn.Embedding(5, D), nn.Linear(D, C)
        self.drop = nn.Dropout(0.5)
        self.first, self.second = Mlp("relu"), Mlp("jsrelu", gated)

    def forward(self, ids: Tensor) -> Tensor:
        mixed = self.drop(self.first(self.embed(ids)).cumsum(1))
        out: Tensor = self.head(self.second(mixed))
        return out


def reader(gated: bool = False) -> tuple[Reader, list[Batch]]:
    """Four samples in two batches: of 3, 1 and 2 predicted positions, and of none."""
    targets = torch.randint(C, (4, T))
    targets[1, 1:] = targets[2, 0] = targets[3] = IGNORE
    ids = torch.randint(5, (4, T))
    return Reader(gated).double(), [(ids[:2], targets[:2]), (ids[2:], targets[2:])]


def pair(model: nn.Module, batch: Batch) -> Batch:
    return model(batch[0]), batch[1]


def scalar(model: nn.Module, batch: Batch) -> Tensor:
    return sample_losses(*pair(model, batch)).mean()


def look(model: nn.Module, batches: list[Batch], *args: Any, **options: Any) -> Any:
    """What ``measure`` finds in a reader."""
    return measure(model, pair, batches, *args, inputs=batches[0][0], **options)


# --- no trace -----------------------------------------------------------------------------------


def state(model: nn.Module) -> dict[str, Any]:
    """All that passes could leave behind."""
    return {
        "modules": [
            (set(vars(m)), m.training, *(len(h) for k, h in vars(m).items() if "hooks" in k))
            for m in model.modules()
        ],
        "parameters": [(p.requires_grad, id(p.grad), p._version) for p in model.parameters()],
        "gradients": [None if p.grad is None else p.grad.tolist() for p in model.parameters()],
        "values": {name: value.tolist() for name, value in model.state_dict().items()},
        "random": torch.random.get_rng_state().tolist(),
        "grad mode": torch.is_grad_enabled(),
    }


def half_way(model: nn.Module) -> None:
    """As in someone's training: gradients, frozen parts, mixed modes."""
    for p in list(model.parameters())[::2]:
        p.grad = torch.randn_like(p)
    for p in list(model.parameters())[1::3]:
        p.requires_grad_(False)
    model.train()
    list(model.modules())[-1].eval()


class Broken(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:
        return x.clone()

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> Tensor:
        raise RuntimeError("backward fails")


def raising(error: BaseException) -> Callable[[Tensor], Tensor]:
    def fail(logits: Tensor) -> Tensor:
        raise error

    return fail


@pytest.mark.parametrize("names", [ANY_PHI, *([name] for name in CURVATURES)])
@pytest.mark.parametrize(
    ("spoil", "error"),
    [
        (lambda logits: logits, None),
        (raising(RuntimeError("mine")), RuntimeError),
        (raising(KeyboardInterrupt()), KeyboardInterrupt),
        (lambda logits: logits * torch.nan, ValueError),
        (Broken.apply, RuntimeError),
    ],
)
def test_nothing_is_left_behind_whatever_happens(spoil: Any, error: Any, names: list[str]) -> None:
    model, batches = reader(gated=True)
    half_way(model)
    before, calls = state(model), 0

    def loss_fn(model: nn.Module, batch: Batch) -> Batch:
        nonlocal calls
        calls += 1
        torch.rand(1)
        logits = model(batch[0])
        return spoil(logits) if calls == 3 else logits, batch[1]  # a batch of the first sweep

    with pytest.raises(error) if error else nullcontext():
        measure(model, loss_fn, batches, names, labels="model", inputs=batches[0][0], probes=4)
    assert state(model) == before
    assert calls >= 3


def test_a_loader_draws_its_order_and_leaves_random_numbers_as_they_were() -> None:
    model, [(ids, targets), _] = reader()
    rows = list(zip(ids.repeat(4, 1), targets.repeat(4, 1), strict=True))
    loader = DataLoader(rows, batch_size=3, shuffle=True)  # type: ignore[arg-type]
    before = state(model)
    found = [look_in(model, loader, ["flatness", "hessian"]) for _ in range(2)]
    assert state(model) == before
    assert found[0] == found[1]


def look_in(model: nn.Module, loader: Any, *args: Any, **options: Any) -> Any:
    """Blocks found with the first batch's ids."""
    return measure(model, pair, loader, *args, inputs=torch.zeros(1, T).long(), **options)


def test_modes_dropout_and_frozen_weights_change_no_number() -> None:
    model, batches = reader(gated=True)
    names = [*EVERYTHING]
    expected = look(model.eval(), batches, names, labels="model", probes=3)
    assert look(model.train(), batches, names, labels="model", probes=3) == expected
    model.requires_grad_(False)
    assert look(model, batches, names, labels="model", probes=3) == expected
    model.second.requires_grad_(True)
    assert look(model, batches, names, labels="model", probes=3) == expected


def test_curvature_of_other_parameters_leaves_flatness_and_token_copies_as_they_are() -> None:
    model, batches = reader()
    names = ["flatness", "token_copies", "hessian"]
    whole = look(model, batches, names, labels="model")
    head = look(model, batches, names, labels="model", parameters=["head.weight"])
    assert head.measures == whole.measures
    for key in ("value", "standard_error", "by_layer"):
        assert head.curvature["token_copies"][key] == whole.curvature["token_copies"][key]
    assert list(head.curvature["hessian"]["by_parameter"]) == ["head.weight"]
    assert set(whole.how["parameters"]) == {
        f"{block}.{layer}.weight" for block in ("first", "second") for layer in ("up", "down")
    }


# --- batches, losses, options -------------------------------------------------------------------


@settings(max_examples=10)
@given(st.lists(st.integers(1, 3), min_size=1, max_size=4), st.sampled_from(["mean", "sum"]))
def test_batches_split_or_whole_give_the_same(sizes: list[int], reduction: Any) -> None:
    torch.manual_seed(sum(sizes))
    model, ids = Reader().double(), torch.randint(5, (sum(sizes), T))
    targets = torch.randint(C, ids.shape).where(torch.rand(ids.shape) < 0.7, IGNORE)
    targets[:, 0] = 1
    names = ["density", "flatness", "gradient", "spectrum", "hessian"]
    whole = look(model, [(ids, targets)], names, reduction=reduction)
    parts = list(zip(ids.split(sizes), targets.split(sizes), strict=True))
    split = look(model, parts, names, reduction=reduction)
    assert alike(split.measures, whole.measures)
    # signs, and so the terms of vᵀAv, are the same; they cancel
    size = 1000 * 2**-52 * whole.curvature["hessian"]["standard_error"]
    value = whole.curvature["hessian"]["value"]
    assert split.curvature["hessian"]["value"] == pytest.approx(value, rel=1e-10, abs=size)
    assert split.how == whole.how | {"batches": len(sizes)}


def test_a_scalar_is_enough_for_the_datas_labels() -> None:
    model, [batch, _] = reader()
    names = ["density", "flatness", "gradient", "hessian", "top_eigenvalue"]
    found = measure(model, scalar, [batch], names, inputs=batch[0])
    expected = look(model, [batch], names)
    assert alike(found.measures, expected.measures)
    for name in ("hessian", "top_eigenvalue"):
        value = expected.curvature[name]["value"]
        assert found.curvature[name]["value"] == pytest.approx(value, rel=1e-9)
    assert (found.how["samples"], found.how["reduction"]) == (2, None)


def test_options_reach_their_measure() -> None:
    model, batches = reader()
    weights = look(model, batches, "density").how["parameters"]
    names = {
        "hessian": {"method": "hutch++", "probes": 12},
        "gradient": {"epsilon": 0.05},
        "gauss_newton": {},
        "token_copies": {"probes": 3},
        "top_eigenvalue": {"matrix": "gauss_newton", "iterations": 2},
    }
    found = look(model, batches, names, probes=5, seed=3)
    common: Any = {"parameters": weights, "seed": 3}
    arguments = (model, pair, batches)
    expected = {
        "hessian": hessian_trace(*arguments, **common, probes=12, method="hutch++"),
        "gauss_newton": gauss_newton_trace(*arguments, **common, probes=5),
        "top_eigenvalue": top_eigenvalue(*arguments, **common, matrix="gauss_newton", iterations=2),
    }
    for name, estimate in expected.items():
        assert found.curvature[name] == estimate.to_json()
    assert found.curvature["token_copies"]["probes"] == 3
    exactly = look(model, batches, "gradient").measures["gradient_sparsity"]
    assert found.measures["gradient_sparsity"] > exactly
    assert look(model, batches, {"gradient": {"epsilon": 1e9}}).measures["gradient_sparsity"] == 1
    assert found.how["measures"] == list(names)


def test_progress_is_told_of_each_measure_and_ends_at_its_total() -> None:
    model, batches = reader()
    told: dict[str, list[tuple[int, int]]] = {}

    def progress(name: str, done: int, total: int) -> None:
        told.setdefault(name, []).append((done, total))

    look(model, batches, EVERYTHING, labels="model", probes=3, progress=progress)
    assert told.pop("top_eigenvalue")[-1][1] == 30 * 2  # it stops where it has converged
    assert set(told) == {", ".join(ANY_PHI), "gauss_newton", "token_copies", "hessian"}
    for steps in told.values():
        assert steps == sorted(steps)
        assert steps[-1] == (6, 6)


# --- models -------------------------------------------------------------------------------------


@pytest.mark.parametrize("build", [vit, gpt2])
def test_models_of_hugging_face_run_on_their_first_batch(build: Any) -> None:
    model, batch = build("sdpa")
    found = measure(model, of_hugging_face, [batch], ["flatness", "gradient", "token_copies"])
    model.eval()
    with observe(model, ["flatness", "gradient"], inputs=batch) as seen:
        sample_losses(*of_hugging_face(model, batch)).mean().backward()
    # plain attention here, fused there; ViT's plain one takes its softmax in float32
    assert alike(found.measures, seen.summary("inference"), rel=1e-6)
    assert found.how["samples"] == 2
    assert found.curvature["token_copies"]["value"] > 0


def test_a_modified_model_is_measured_as_it_is() -> None:
    model, batches = reader()
    handle = sparsify(model, "paper", inputs=batches[0][0])
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "zeroth" in name:
                parameter.normal_()
    before = state(model)
    found = measure(model, pair, batches[:1], ["density", "flatness"])
    assert state(model) == before
    assert handle_of(model) is handle
    with observe(model.eval(), ["density", "flatness"]) as seen:
        sample_losses(*pair(model, batches[0])).mean().backward()
    assert alike(found.measures, seen.summary("inference"))


def test_bfloat16_is_near() -> None:
    model, batches = reader()
    expected = look(model, batches, "flatness").measures
    found = look(model.bfloat16(), batches, ["flatness", "token_copies"])
    # some dozen roundings on the way there and back, doubled by the square
    error = 24 * torch.finfo(torch.bfloat16).eps
    assert found.measures["flatness"] == pytest.approx(expected["flatness"], rel=error)
    assert math.isfinite(found.curvature["token_copies"]["value"])


def test_spectra_are_named_as_blocks_are() -> None:
    two = nn.Sequential(*(nn.Linear(4, 8), nn.ReLU(), nn.Linear(8, 4)) * 1)
    model = nn.Sequential(two[0], two[1], two[2], nn.Linear(4, 8), nn.ReLU(), nn.Linear(8, 4))
    batch = (torch.randn(5, 4), torch.randint(4, (5,)))
    found = measure(model, pair, [batch], ["density", "spectrum"], inputs=batch[0])
    names = [row["block"] for row in found.measures["blocks"]]
    assert len(names) == 2 == len(set(names))
    assert [(row["block"], row["layer"]) for row in found.spectra] == [
        (name, layer) for name in names for layer in ("up", "down")
    ]


# --- what cannot be -----------------------------------------------------------------------------


def never(model: nn.Module, batch: Batch) -> Batch:
    raise AssertionError("work has begun")


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({"measures": ["flatnes"]}, "unknown measure 'flatnes'; known: covering, density, flatn"),
        ({"measures": ["derivative_density"]}, "(derivative_density is a column of density)"),
        ({"measures": []}, "measures is empty; known: covering, density"),
        ({"labels": "foo"}, """labels must be "data" or "model", got 'foo'"""),
        ({"reduction": "foo"}, """reduction must be "mean" or "sum" over positions, got 'foo'"""),
        ({"probes": 1}, "probes must be at least 2 for a standard error, got 1"),
        ({"measures": {"token_copies": {"probes": 1}}}, "probes must be at least 2"),
        ({"measures": {"hessian": {"method": "hutch++", "probes": 3}}}, "at least 4"),
        ({"measures": {"hessian": {"prob": 3}}}, "no option 'prob'; known: probes, method"),
        ({"measures": {"token_copies": {"seed": 3}}}, "no option 'seed'; known: probes"),
        ({"measures": {"gradient": {"eps": 3}}}, "gradient has no option 'eps'; known: epsilon"),
        ({"measures": {"density": {"eps": 3}}}, "density has no option 'eps'; known: none"),
        ({"batches": []}, "batches must be a list of at least one batch, got an empty list"),
        ({"batches": iter([])}, r"batches must be a list.*list\(batches\) makes a list of it"),
        ({"batches": {"x": 1}}, "batches must be a list of at least one batch, got a dict"),
        ({"parameters": ["nope"]}, "no parameter of the model is called 'nope'"),
        ({"inputs": None}, "Reader does not run on a batch .* give measure inputs= or blocks="),
    ],
)
def test_what_is_wrong_is_said_before_any_work(changes: dict[str, Any], said: str) -> None:
    model, batches = reader()
    arguments = {"batches": batches, "inputs": batches[0][0]} | changes
    with pytest.raises(ValueError, match=said):
        measure(model, never, **arguments)


@pytest.mark.parametrize(
    ("options", "said"),
    [
        ({"measures": ["flatness", "token_copies"]}, "token_copies needs logits: loss_fn on"),
        ({"measures": ["flatness", "gauss_newton"]}, "gauss_newton needs logits: loss_fn on"),
        ({"labels": "model"}, 'labels="model" needs logits: loss_fn on batch 0 must return'),
    ],
)
def test_what_needs_logits_says_so_before_the_passes(options: dict[str, Any], said: str) -> None:
    model, batches = reader()
    steps: list[Any] = []
    with pytest.raises(ValueError, match=said):
        measure(
            model, scalar, batches, inputs=batches[0][0], **options,
            progress=lambda *step: steps.append(step),
        )  # fmt: skip
    assert steps == []


def test_a_gradient_that_is_not_finite_is_no_trace() -> None:
    model, batches = reader()

    def loss_fn(model: nn.Module, batch: Batch) -> Batch:
        logits = model(batch[0])
        logits.register_hook(lambda gradient: gradient * torch.inf)
        return logits, batch[1]

    with pytest.raises(ArithmeticError, match="token_copies is NaN or infinite"):
        measure(model, loss_fn, batches, "token_copies", inputs=batches[0][0])


def test_it_prints_tables_and_is_plain_values() -> None:
    model, batches = reader()
    found = look(model, batches, EVERYTHING, labels="model", probes=2)
    printed = str(found)
    for word in ("first", "second", "flatness", "η sparsity", "gauss_newton", "2 probes"):
        assert word in printed
    assert json.loads(json.dumps(found.to_json(), allow_nan=False)) == found.to_json()


class Largest(Counts):
    """The largest a of each block: a measure of somebody's own."""

    columns: ClassVar[dict[str, Any]] = {"largest": ("largest", "{:.3g}".format)}
    counters: ClassVar[dict[str, bool]] = {"largest": False, "tokens": False}
    largest: Tensor

    @staticmethod
    def stages(site: Any) -> tuple[str, ...]:
        return ("a",)

    def update(self, site: Any, stages: dict[str, Tensor], keep: Tensor | None) -> None:
        self.tokens.add_(1)
        self.largest.copy_(stages["a"].max().ceil())

    @staticmethod
    def shares(parts: list[Any]) -> dict[str, Any]:
        return {"largest": max(int(part.largest) for part in parts)}


def test_a_measure_of_ones_own_is_taken_everywhere(monkeypatch: pytest.MonkeyPatch) -> None:
    from actsparse_lab.tasks import run_config

    with pytest.raises(ValueError, match="unknown measure 'largest'"):
        observe(reader()[0], "largest", inputs=reader()[1][0][0])
    monkeypatch.setitem(MEASURES, "largest", Largest)
    model, batches = reader()
    found = measure(model, pair, batches, "largest", inputs=batches[0][0])
    assert found.measures is not None
    assert found.measures["largest"] >= 1
    assert "largest" in str(found)
    assert run_config("digits", "vanilla", 0, measures=("largest",)).measures[1] == "largest"

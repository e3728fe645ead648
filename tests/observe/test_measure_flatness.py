"""How flatness, token copies and the Gauss–Newton trace hang together, against brute force."""

from __future__ import annotations

import copy
import math
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.utils.data import DataLoader, TensorDataset

from actsparse import find_mlp_blocks
from actsparse.observe import measure, observe
from actsparse.observe.loss import IGNORE, draw_labels, sample_losses
from tests.observe.per_token import alike, by_copies, layers_of
from tests.observe.test_curvature_product import exact
from tests.observe.test_measure import Batch, look, pair, reader, scalar


def layers_summed(found: dict[str, Any]) -> float:
    keys = ("flatness_up", "flatness_gate", "flatness_down")
    return math.fsum(found[key] for key in keys if key in found)


def by_hand(
    model: nn.Module, batches: list[Batch], reduction: str, per_sample: bool = False
) -> float:
    """``tr G`` for copied weights: for each predicted position and c, the squared gradient at all
    copies of ``Lᵀ logits``, with ``L Lᵀ = diag(p) − p pᵀ``; ``per_sample`` divides by N_b.
    """
    model = copy.deepcopy(model).eval()
    blocks, traces = find_mlp_blocks(model, batches[0][0]), []
    for ids, targets in batches:
        for b in range(len(ids)):
            predicted = (targets[b] != IGNORE).nonzero().flatten().tolist()
            weight = 1 / len(predicted) if reduction == "mean" and predicted else 1.0
            squares = []
            for t in predicted:
                p = model(ids).detach()[b, t].softmax(-1)
                for factor in (p.sqrt().diag() - p.outer(p.sqrt())).T:

                    def along(
                        f: Tensor = factor, x: Tensor = ids, b: int = b, t: int = t
                    ) -> Tensor:
                        return f @ model(x)[b, t]

                    layers = [layer for block in blocks for layer in layers_of(block).values()]
                    squares += [weight * by_copies(layer, along) for layer in layers]
            if predicted:
                traces.append(math.fsum(squares) / (len(predicted) if per_sample else 1))
    return math.fsum(traces) / len(traces)


@pytest.mark.parametrize(("reduction", "gated"), [("mean", False), ("sum", True)])
def test_token_copies_is_the_gauss_newton_trace_of_copied_weights(
    reduction: Any, gated: bool
) -> None:
    model, batches = reader(gated)
    expected = by_hand(model, batches, reduction)
    found = look(model, batches, {"token_copies": {"probes": 120}}, reduction=reduction)
    trace = found.curvature["token_copies"]
    assert abs(trace["value"] - expected) < 4 * trace["standard_error"]
    assert trace["standard_error"] < expected / 10
    assert trace["value"] == pytest.approx(math.fsum(trace["by_layer"].values()), rel=1e-12)
    assert (trace["samples"], trace["positions"], trace["reduction"]) == (3, 2, reduction)


def test_with_drawn_labels_flatness_of_a_sum_estimates_the_trace() -> None:
    model, batches = reader(gated=True)
    found = look(
        model, batches, ["flatness", "token_copies"], labels="model", reduction="sum", probes=20
    )
    # the same draws, so the same number, to the rounding of a sum over layers
    trace = found.curvature["token_copies"]
    assert layers_summed(found.measures) == pytest.approx(trace["value"], rel=1e-12)
    for key, value in trace["by_layer"].items():
        assert found.measures[f"flatness_{key}"] == pytest.approx(value, rel=1e-12)


def test_with_drawn_labels_flatness_of_a_mean_estimates_the_trace_over_n() -> None:
    model, batches = reader()
    full = [(ids, targets.clamp(min=0)) for ids, targets in batches]  # N = 3 in every sample
    for some, expected in (
        (full, by_hand(model, full, "mean") / 3),
        (batches, by_hand(model, batches, "mean", per_sample=True)),
    ):
        found = look(model, some, "flatness", labels="model", probes=100).measures
        spread = sum(found[f"flatness_{layer}_error"] for layer in ("up", "down"))
        assert abs(layers_summed(found) - expected) < 4 * spread
        assert spread < expected / 5


def test_with_one_token_to_a_sample_copies_change_nothing() -> None:
    model = nn.Sequential(
        nn.Linear(3, 4, bias=False), nn.ReLU(), nn.Linear(4, 3, bias=False)
    ).double()
    batches = [(torch.randn(6, 3).double() * 2, torch.randint(3, (6,)))]
    expected = float(exact(model, batches, "gauss_newton", "mean").trace())
    found = look(model, batches, ["token_copies", "gauss_newton"], probes=150)
    for trace in found.curvature.values():
        assert abs(trace["value"] - expected) < 4 * trace["standard_error"]
        assert trace["standard_error"] < expected / 10


@pytest.mark.parametrize("reduction", ["mean", "sum"])
def test_with_the_datas_labels_it_is_what_observe_sees(reduction: Any) -> None:
    model, batches = reader(gated=True)
    names = ["density", "flatness", "gradient"]
    found = look(model, batches[:1], names, reduction=reduction)
    model.eval()
    with observe(model, names, inputs=batches[0][0]) as seen:
        logits, targets = pair(model, batches[0])
        sample_losses(logits, targets, reduction).mean().backward()
    expected = seen.summary("inference")
    assert alike(found.measures, expected)
    for got, want in zip(found.measures["blocks"], expected["blocks"], strict=True):
        assert alike(got, want, "block")
        assert got["block"] == want["block"]


def test_a_sample_that_predicts_nothing_is_no_sample() -> None:
    model, batches = reader()
    found = look(model, batches, "flatness").measures
    ids, targets = map(torch.cat, zip(*batches, strict=True))
    expected = look(model, [(ids[:3], targets[:3])], "flatness").measures
    for key in ("flatness", "flatness_up", "flatness_down", "samples"):
        assert found[key] == pytest.approx(expected[key], rel=1e-12)
    assert [row["samples"] for row in found["blocks"]] == [3, 3]


def test_the_error_of_drawn_flatness_is_that_of_the_mean_over_draws() -> None:
    model, batches = reader()
    model.eval()
    found = look(model, batches, "flatness", labels="model", probes=5, seed=7).measures
    generator = torch.Generator().manual_seed(7)
    draws = []
    for _ in range(5):
        drawn = [(ids, draw_labels(model(ids), targets, generator)) for ids, targets in batches]
        draws.append(look(model, drawn, "flatness").measures)
    for key in ("flatness", "flatness_up", "flatness_down"):
        values = torch.tensor([each[key] for each in draws], dtype=torch.float64)
        assert found[key] == pytest.approx(float(values.mean()), rel=1e-12)
        error = float(values.std()) / 5**0.5
        # of differences of running sums: a few roundings of 5 times the mean
        assert found[f"{key}_error"] == pytest.approx(error, abs=20 * 2**-52 * 5 * found[key])
    once = look(model, batches, "flatness").measures
    same = ("samples", "tokens_per_sample", "input_norm", "density_from_flatness")
    assert all(found[key] == pytest.approx(once[key], rel=1e-12) for key in same)


@pytest.mark.parametrize("gated", [False, True])
def test_of_correct_samples_alone_is_as_if_the_others_were_not_there(gated: bool) -> None:
    model, batches = reader(gated)
    ids = torch.cat([ids for ids, _ in batches])
    targets = model.eval()(ids).argmax(-1)  # right, but for one position, and none of the last
    targets[1, 2] = (targets[1, 2] + 1) % 4
    targets[3] = IGNORE

    def of(batches: Any, **options: Any) -> Any:
        names = ["flatness", "gradient"]
        return measure(model, pair, batches, names, inputs=ids, reduction="sum", **options)

    found = of([(ids[:2], targets[:2]), (ids[2:], targets[2:])], correct=True)
    alone = of([(ids[:1], targets[:1]), (ids[2:3], targets[2:3])])
    alike(found.measures, alone.measures)
    assert (found.how["correct"], found.measures["samples"]) == (True, 2)
    shuffled = DataLoader(TensorDataset(ids, targets), 3, shuffle=True)
    alike(of(shuffled, correct=True).measures, alone.measures)


def test_correct_samples_need_logits_and_one_that_is_right() -> None:
    model, batches = reader()
    ids = batches[0][0]
    with pytest.raises(ValueError, match="correct=True needs logits"):
        measure(model, scalar, batches, correct=True, inputs=ids)
    wrong = [(ids, (model.eval()(ids).argmax(-1) + 1) % 4)]
    with pytest.raises(ValueError, match="classifies no sample of these batches correctly"):
        measure(model, pair, wrong, ["flatness"], correct=True, inputs=ids)

"""Flatness over correctly classified samples in a run: against brute force, and in its record."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from actsparse.observe import measure
from actsparse_lab.engine.config import RunConfig
from actsparse_lab.engine.flatness_correct import NUMBERS
from actsparse_lab.engine.run import run


def mlp() -> nn.Sequential:
    return nn.Sequential(nn.Linear(6, 16), nn.ReLU(), nn.Linear(16, 6)).double()


def predict(model: nn.Module, batch: Any) -> tuple[Tensor, Tensor]:
    return model(batch[0]), batch[1]


def trial(model: nn.Module, batches: Any, **options: Any) -> dict[str, Any]:
    found = measure(model, predict, batches, "flatness_correct", inputs=batches[0][0], **options)
    (row,) = found.trials["flatness_correct"]
    return row


def test_it_is_the_mean_over_correct_samples_by_brute_force() -> None:
    model, x = mlp(), torch.randn(9, 6).double()
    up, _, down = model
    y = model(x).argmax(-1)
    y[::3] = (y[::3] + 1) % 6  # a third is wrong
    flatness, norms, squares, active = 0.0, 0.0, 0.0, 0
    for each, label in zip(x, y, strict=True):
        z = up(each).detach().requires_grad_()
        logits = down(z.relu())
        if logits.argmax() != label:
            continue
        (g,) = torch.autograd.grad(nn.functional.cross_entropy(logits, label), z)
        flatness += float(g.square().sum() * each.square().sum()) / 6
        norms += float(each.square().sum()) / 6
        squares, active = squares + float(g.square().sum()), active + int((z > 0).sum())
    row = trial(model, [(x[:4], y[:4]), (x[4:], y[4:])], labels="model")  # takes the data's
    assert (row["correct"], row["samples"]) == (6 / 9, 6)
    expected = {
        "flatness": flatness,
        "density_from_flatness": active / (6 * 16),
        "input_norm": norms,
        "effective_gradient": squares / active,
        "ratio": flatness / (16 * norms * squares / active),
    }
    for key, value in expected.items():
        assert row[key] == pytest.approx(value, rel=1e-12), key  # sums of some hundred terms
    assert {*row} == {"correct", "samples", *NUMBERS}


def test_where_no_sample_is_correct_there_are_no_numbers() -> None:
    model, x = mlp(), torch.randn(5, 6).double()
    wrong = (model(x).argmax(-1) + 1) % 6
    expected = {"correct": 0.0, "samples": 0, **dict.fromkeys(NUMBERS)}
    assert trial(model, [(x, wrong)]) == expected


def test_a_run_measures_it_at_the_steps_that_were_named(tmp_path: Path) -> None:
    size = {"hidden_size": 8, "num_attention_heads": 2, "intermediate_size": 12}
    config = RunConfig(
        "digits", "vanilla", 0, steps=6, batch_size=8, validate_on=16, active_on=40,
        active=("flatness", "flatness_correct"), active_every=4, active_at=(1, 2),
        model={**_model(), **size},
    )  # fmt: skip
    done = run(config, tmp_path)
    assert [line["step"] for line in done.measured] == [0, 1, 2, 4, 6]
    for line in done.measured:
        (row,) = line["trials"]["flatness_correct"]
        assert row["correct"] == row["samples"] / 40
        assert (row["flatness"] is None) == (row["samples"] == 0)


def _model() -> dict[str, Any]:
    from actsparse_lab.tasks.digits import digits

    return digits()["model"] | {"num_hidden_layers": 1}

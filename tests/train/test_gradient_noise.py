"""The gradient-noise experiment: its numbers by hand, an honest record, and clear ends."""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor
from torch.nn.functional import cross_entropy

from actsparse.observe.gradient_noise import anisotropy
from actsparse.observe.spectrum import spectrum
from actsparse.train import TrainingFailed
from actsparse_lab.data import load_digits_splits
from actsparse_lab.data.mnist import TEST, TRAIN
from actsparse_lab.engine.run_gradient_noise import (
    GradientNoiseConfig,
    ResidualMLP,
    run_gradient_noise,
)
from actsparse_lab.records import RecordError, Run, read_run, run_path

TINY: dict[str, Any] = {
    "arm": "p6", "seed": 0, "width": 6, "layers": 2, "batch_size": 8, "steps": 5, "lr": 0.1,
    "weight_decay": 0.5, "measure_every": 2, "log_every": 2, "eval_every": 3,
}  # fmt: skip


def config(**settings: Any) -> GradientNoiseConfig:
    return GradientNoiseConfig(**TINY | settings)


def said(run: Run) -> list[dict[str, Any]]:
    """All lines, without what the clock and chance say."""
    lines = [json.loads(line) for line in run.path.read_text().splitlines()]
    return [
        {key: value for key, value in line.items() if key not in ("time", "run_id")}
        for line in lines
    ]


def layers(run: Run, step: int) -> list[dict[str, Any]]:
    (line,) = (line for line in run.measured if line["step"] == step)
    rows: list[dict[str, Any]] = line["measures"]["layers"]
    return rows


# ---- the numbers


def by_hand(settings: GradientNoiseConfig) -> tuple[list[Tensor], list[Tensor], ResidualMLP]:
    """Moments of features and of gradients of single samples, and the net: SGD written out."""
    torch.manual_seed(settings.seed)
    model = ResidualMLP(64, settings.width, settings.layers, 10)
    rows = load_digits_splits().train.columns
    order = torch.randperm(
        len(rows["labels"]), generator=torch.Generator().manual_seed(settings.seed)
    )
    model.double()
    p, count = settings.width, settings.layers
    features = [torch.zeros(p, p, dtype=torch.float64) for _ in range(count)]
    gradients = [torch.zeros(p, p, dtype=torch.float64) for _ in range(count)]
    for step in range(settings.steps):
        for moment in (*features, *gradients):
            moment *= 1 - settings.lr * settings.weight_decay
        mean = [torch.zeros_like(each) for each in model.parameters()]
        size = settings.batch_size
        for index in order[step * size : (step + 1) * size]:
            logits, stages = model(rows["pixel_values"][index][None].double())
            loss = cross_entropy(logits, rows["labels"][index][None])
            entering, z = zip(*stages, strict=True)
            found = torch.autograd.grad(loss, [*z, *model.parameters()])
            for layer in range(count):
                features[layer] += entering[layer].detach().T @ entering[layer].detach()
                gradients[layer] += found[layer].T @ found[layer]
            for total, own in zip(mean, found[count:], strict=True):
                total += own / size
        with torch.no_grad():
            for parameter, gradient in zip(model.parameters(), mean, strict=True):
                parameter -= settings.lr * (gradient + settings.weight_decay * parameter)
    return features, gradients, model


def test_moments_are_those_of_single_samples_trained_by_hand(tmp_path: Path) -> None:
    settings = config()
    run = run_gradient_noise(settings, tmp_path)
    features, gradients, model = by_hand(settings)
    total = 8 * sum(0.95**age for age in range(5))
    # float32 against float64: sums of at most 64 products, through 4 layers and 5 steps, are off
    # by some 64 · 20 · 6e-8 = 8e-5 of themselves
    close = {"rel": 5e-4}
    for row, feature, gradient, layer in zip(
        layers(run, 5), features, gradients, model.layers, strict=True
    ):
        assert row["feature_anisotropy"] == pytest.approx(anisotropy(feature), **close)
        assert row["gradient_anisotropy"] == pytest.approx(anisotropy(gradient), **close)
        assert row["feature_square"] == pytest.approx(feature.trace().item() / total, **close)
        assert row["gradient_square"] == pytest.approx(gradient.trace().item() / total, **close)
        assert isinstance(layer.weight, Tensor)
        expected = spectrum(layer.weight)
        assert row["concentration"] == pytest.approx(expected.concentration, rel=5e-3)  # quotient
        assert row["weight_ks"] == pytest.approx(expected.marchenko_pastur.ks, abs=5e-3)
        assert row["anisotropy_limit"] == math.sqrt(30)
        assert row["ratio"] == 6 / 40
    test = load_digits_splits().test.columns
    with torch.no_grad():
        loss = cross_entropy(model(test["pixel_values"].double())[0], test["labels"])
    assert run.result is not None
    assert run.result["loss"] == pytest.approx(loss.item(), **close)


def test_features_are_normed_rows_of_one_dimension_less(tmp_path: Path) -> None:
    run = run_gradient_noise(config(steps=1), tmp_path)
    for row in layers(run, 1):
        # layer norm's 1e-5 takes a share of 1e-5/variance; the variance here is above 0.01
        assert row["feature_square"] == pytest.approx(6, rel=2e-3)
        # of 8 rows in 5 dimensions, and of 8 in 6
        assert row["feature_random_anisotropy"] == pytest.approx(math.sqrt(6 * (6 - 5 / 1.75)))
        assert row["gradient_random_anisotropy"] == pytest.approx(math.sqrt(6 * (6 - 6 / 1.875)))


def test_it_learns(tmp_path: Path) -> None:
    done = run_gradient_noise(config(width=32, steps=150, weight_decay=0.0), tmp_path).result
    assert done is not None
    assert done["quality"] > 0.9  # 0.1 by chance
    assert done["split"] == "test"


@pytest.mark.parametrize("seed", [0, 3])
def test_a_seed_gives_every_decay_the_same_start_and_batches(tmp_path: Path, seed: int) -> None:
    one = run_gradient_noise(config(arm="a", seed=seed, weight_decay=0.0), tmp_path)
    two = run_gradient_noise(config(arm="b", seed=seed, weight_decay=1.0), tmp_path)
    moments = ("feature_square", "feature_anisotropy", "gradient_square", "gradient_anisotropy")
    for a, b in zip(layers(one, 1), layers(two, 1), strict=True):
        assert [a[key] for key in moments] == [b[key] for key in moments]
        assert a["weight_ks"] != b["weight_ks"]
    assert one.evals[0] == two.evals[0]
    other = run_gradient_noise(config(arm="a", seed=seed + 1, weight_decay=0.0), tmp_path)
    assert other.evals[0] != one.evals[0]


def test_measuring_changes_nothing_in_training(tmp_path: Path) -> None:
    often = run_gradient_noise(config(measure_every=1), tmp_path / "often")
    never = run_gradient_noise(config(measure_every=None), tmp_path / "never")
    assert [line["step"] for line in often.measured] == [1, 2, 3, 4, 5]
    assert [line["step"] for line in never.measured] == [1, 5]
    assert [line["loss"] for line in often.train] == [line["loss"] for line in never.train]
    assert often.measured[-1] == never.measured[-1]


def test_the_callers_random_numbers_are_left_alone(tmp_path: Path) -> None:
    before = torch.random.get_rng_state()
    run_gradient_noise(config(), tmp_path)
    assert torch.equal(torch.random.get_rng_state(), before)


# ---- the record


def test_a_run_leaves_a_whole_record(tmp_path: Path) -> None:
    steps: list[int] = []
    run = run_gradient_noise(config(), tmp_path, command="make it so", on_step=steps.append)
    assert run.path == run_path(tmp_path, "p6", 0)
    assert steps == [1, 2, 3, 4, 5]
    assert (run.task, run.arm, run.seed) == ("gradient_noise", "p6", 0)
    assert run.header["command"] == "make it so"
    assert run.header["config"] == config().to_json()
    assert run.header["data_sha256"] == load_digits_splits().info["sha256"]
    assert [line["step"] for line in run.train] == [2, 4, 5]
    assert [line["step"] for line in run.evals] == [0, 3, 5]
    assert [line["step"] for line in run.measured] == [1, 2, 4, 5]
    assert run.measured[-1]["how"]["decay"] == 0.95
    assert run.measured[-1]["how"]["rows"] == run.measured[-1]["how"]["samples"] == 40
    assert 30 < run.measured[-1]["how"]["equal_samples"] < 40
    assert run.result is not None
    assert run.result["quality_name"] == "accuracy"


def test_train_lines_hold_the_mean_loss_since_the_line_before(tmp_path: Path) -> None:
    each = run_gradient_noise(config(log_every=1), tmp_path / "each").train
    losses = [line["loss"] for line in each]
    lines = run_gradient_noise(config(), tmp_path / "pairs").train
    expected = [(losses[0] + losses[1]) / 2, (losses[2] + losses[3]) / 2, losses[4]]
    assert [line["loss"] for line in lines] == pytest.approx(expected, rel=1e-12)


def test_a_finished_run_is_not_repeated_and_a_stopped_one_is(tmp_path: Path) -> None:
    first = run_gradient_noise(config(), tmp_path)
    whole, lines = first.path.read_bytes(), said(first)
    run_gradient_noise(config(), tmp_path)
    assert first.path.read_bytes() == whole
    for rest in (whole[:-20], whole[:30], b""):
        first.path.write_bytes(rest)
        assert said(run_gradient_noise(config(), tmp_path)) == lines


def test_a_run_finished_with_another_config_is_refused(tmp_path: Path) -> None:
    path = run_gradient_noise(config(), tmp_path).path
    before = path.read_bytes()
    with pytest.raises(ValueError, match=r"lr=0.1 \(now 0.2\); .*--out"):
        run_gradient_noise(config(lr=0.2), tmp_path)
    assert path.read_bytes() == before


def test_ctrl_c_leaves_nothing_that_counts_as_finished(tmp_path: Path) -> None:
    def stop(step: int) -> None:
        if step == 4:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        run_gradient_noise(config(), tmp_path, on_step=stop)
    stopped = read_run(run_path(tmp_path, "p6", 0))
    assert not stopped.finished
    assert [line["step"] for line in stopped.measured] == [1, 2, 4]
    again = run_gradient_noise(config(), tmp_path)
    assert said(again) == said(run_gradient_noise(config(), tmp_path / "undisturbed"))


def test_a_loss_that_blows_up_leaves_a_failed_record(tmp_path: Path) -> None:
    with pytest.raises(TrainingFailed, match="stopped after 1 steps: the loss became nan"):
        run_gradient_noise(config(lr=1e25, weight_decay=0.0), tmp_path)
    run = read_run(run_path(tmp_path, "p6", 0))
    assert run.failed is not None
    assert run.failed["step"] == 1
    assert not run.finished


def test_a_weight_that_blows_up_leaves_a_failed_record(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    large = lambda logits, labels: 1e35 * cross_entropy(logits, labels)  # noqa: E731
    monkeypatch.setattr("actsparse_lab.engine.run_gradient_noise.cross_entropy", large)
    with pytest.raises(TrainingFailed, match="stopped after 1 steps: a weight or gradient of lay"):
        run_gradient_noise(config(lr=1e10, weight_decay=0.0), tmp_path)
    assert read_run(run_path(tmp_path, "p6", 0)).failed is not None


def test_a_layer_without_gradient_has_null_for_its_numbers(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("actsparse_lab.engine.run_gradient_noise.relu", lambda z: z * 0)
    run = run_gradient_noise(config(), tmp_path)
    for row in layers(run, 5):
        assert row["gradient_anisotropy"] is row["gradient_ks"] is row["gradient_random"] is None
        assert row["gradient_square"] == 0
        assert row["feature_anisotropy"] > 0


def test_a_folder_that_cannot_be_written_is_an_error_before_training(tmp_path: Path) -> None:
    (tmp_path / "runs").write_text("a file where a folder should be")
    with pytest.raises(RecordError, match=r"cannot (read|write).*runs"):
        run_gradient_noise(config(), tmp_path)


def test_it_runs_on_mnist_files(tmp_path: Path) -> None:
    rng = np.random.default_rng(0)
    for name, count in ((TRAIN, 40), (TEST, 20)):
        np.savez(
            tmp_path / name,
            image=rng.integers(0, 256, (count, 28, 28), dtype=np.uint8),
            label=np.arange(count, dtype=np.uint8) % 10,
        )
    run = run_gradient_noise(config(data={"mnist": str(tmp_path)}, steps=8), tmp_path)
    assert run.result is not None
    assert run.result["data"]["name"] == "mnist"
    assert run.measured[-1]["how"]["rows"] == 64  # two epochs of 4 batches; 4 images are left out
    with pytest.raises(ValueError, match=r"batch_size=37 is more than the 36 training images"):
        run_gradient_noise(config(arm="b", data={"mnist": str(tmp_path)}, batch_size=37), tmp_path)


# ---- the config


@pytest.mark.parametrize(
    ("name", "value", "right"),
    [
        ("seed", -1, "0 or more"),
        ("width", 1, "2 or more"),
        ("width", 8.0, "a whole number"),
        ("layers", 0, "1 or more"),
        ("steps", True, "a whole number"),
        ("measure_every", 0, "1 or more"),
        ("lr", 0.0, "above 0"),
        ("lr", math.inf, "finite"),
        ("lr", "fast", "a finite number"),
        ("weight_decay", -0.1, "0 or more"),
        ("weight_decay", 10.0, "below 1/lr = 10"),
        ("weight_decay", math.nan, "0 or more"),
        ("data", {}, "'mnist'"),
        ("data", {"mnist": 3}, "'mnist'"),
        ("data", {"mnist": None, "cifar": None}, "'mnist'"),
    ],
)
def test_a_setting_that_cannot_work_is_named(name: str, value: Any, right: str) -> None:
    with pytest.raises(ValueError, match=f"{name}=.*expected .*{right}"):
        config(**{name: value})


def test_a_config_is_plain_data() -> None:
    plain = config().to_json()
    assert json.loads(json.dumps(plain)) == plain
    assert plain.pop("task") == "gradient_noise"
    assert GradientNoiseConfig(**plain) == config()

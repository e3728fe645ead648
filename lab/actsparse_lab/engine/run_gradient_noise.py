"""The experiment on gradient noise: small MLPs whose features and gradients are accumulated.

Peng et al. 2023 (arXiv 2309.03004) train nets of residual layers ``x + ReLU(W·LN(x))`` on MNIST by
plain SGD, and look at the second moments of what makes the updates of W: the features LN(x) and
the gradients η at W's output, of the per-sample loss, accumulated as weight decay accumulates the
updates themselves (`Accumulated`, ``r = 1 − lr·wd``). Here also on the embedded digits.

A run takes seconds to minutes, so there are no checkpoints: one that was stopped starts again.
"""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.functional import cross_entropy, layer_norm, relu

from actsparse.observe.spectrum import spectrum
from actsparse.train.loss import TrainingFailed
from actsparse_lab.data import Splits, TensorRows, load_digits_splits
from actsparse_lab.data.mnist import mnist_splits
from actsparse_lab.engine.accumulated import Accumulated
from actsparse_lab.engine.folder import claimed, finished_run
from actsparse_lab.engine.gradient_noise_config import GradientNoiseConfig
from actsparse_lab.records import RecordWriter, Run, environment, read_run, run_path


class ResidualMLP(nn.Module):
    """Linear to p, ``layers`` × ``x + ReLU(W·LN(x))`` with LN without scale and bias, linear to C.

    >>> model = ResidualMLP(inputs=64, width=16, layers=4, classes=10)
    >>> logits, stages = model(torch.zeros(2, 1, 8, 8))
    >>> logits.shape, len(stages)
    (torch.Size([2, 10]), 4)
    """

    def __init__(self, inputs: int, width: int, layers: int, classes: int) -> None:
        super().__init__()
        self.input = nn.Linear(inputs, width)
        self.layers = nn.ModuleList(nn.Linear(width, width, bias=False) for _ in range(layers))
        self.head = nn.Linear(width, classes)

    def forward(self, images: Tensor) -> tuple[Tensor, list[tuple[Tensor, Tensor]]]:
        """Logits [B, C] of images [B, …], and each layer's LN(x) and W·LN(x), both [B, p]."""
        x = self.input(images.flatten(1))
        stages = []
        for layer in self.layers:
            features = layer_norm(x, x.shape[1:])
            z = layer(features)
            stages.append((features, z))
            x = x + relu(z)
        return self.head(x), stages


def run_gradient_noise(
    config: GradientNoiseConfig,
    out: str | Path,
    *,
    command: str | None = None,
    on_step: Callable[[int], None] | None = None,
) -> Run:
    """Train one net and write ``out/runs/<arm>-seed<seed>/record.jsonl``; returns it, read.

    A run that is finished with the same config is not repeated; one that was stopped starts again.
    The seed gives all runs of one width the same first weights and batches. ``command`` is noted in
    the record; ``on_step`` is called with the number of steps done. Ctrl-C is a `KeyboardInterrupt`
    as ever, and leaves a record without a result.

    A ``measured`` line holds ``layers``, each a dict. ``feature_…`` is of LN(x), ``gradient_…`` of
    η [p], the gradient at W's output of the loss of a sample, both accumulated since the start:

    - ``square``: the mean of ‖v‖²; ``anisotropy``, and ``random_anisotropy``, what Gaussian rows
      would have; ``anisotropy_limit`` is √(p(p − 1)), that of a single direction;
    - ``ks``, ``ks_limit``, ``outliers``, ``random`` (whether it is accepted): Marchenko and
      Pastur's law at the paper's ``ratio`` p / samples; the same with ``equal_`` before: at p over
      `Accumulated.equal_samples`.

    ``concentration`` and ``weight_…`` are `spectrum` of W after the step. null: C or W is 0.

    Raises:
        ValueError: a setting that cannot work; data that cannot be read; the folder's run was
            finished with another config, or another process is at it.
        RecordError: the folder cannot be written, before training; or the disk refused later.
        TrainingFailed: the loss or a weight became NaN or infinite; the record says at which step.
    """
    path = run_path(out, config.arm, config.seed)
    if (old := finished_run(config, out)) is not None:
        return old
    splits = splits_of(config)
    with claimed(config, out) as old:
        if old is not None:
            return old
        header = {
            "task": config.task,
            "arm": config.arm,
            "seed": config.seed,
            "data_sha256": splits.info["sha256"],
            "config": config.to_json(),
            **environment(torch.get_num_threads()),
            **({"command": command} if command else {}),
        }
        with RecordWriter(path, header) as record:
            try:
                _train(config, splits, record, on_step)
            except TrainingFailed as failed:
                record.write("failed", step=failed.step, reason=failed.reason)
                raise
    return read_run(path)


def splits_of(config: GradientNoiseConfig) -> Splits[TensorRows]:
    """The data of a run; `ValueError` where they cannot be read or fill no batch."""
    folder = config.data["mnist"]
    splits = load_digits_splits() if folder is None else mnist_splits(folder)
    if config.batch_size > (size := len(splits.train)):
        raise ValueError(f"batch_size={config.batch_size} is more than the {size} training images")
    return splits


def _train(
    config: GradientNoiseConfig,
    splits: Splits[TensorRows],
    record: RecordWriter,
    on_step: Callable[[int], None] | None,
) -> None:
    began = time.perf_counter()
    model = _model(config, splits)
    optimizer = torch.optim.SGD(model.parameters(), config.lr, weight_decay=config.weight_decay)
    features, gradients = (
        [Accumulated(config.width, config.decay) for _ in range(config.layers)] for _ in range(2)
    )
    losses = 0.0
    _evaluate(model, splits.validation, record, "eval", split="validation", step=0)
    for step, (images, labels) in enumerate(_batches(config, splits.train), start=1):
        logits, stages = model(images)
        for _, z in stages:
            z.retain_grad()
        loss = cross_entropy(logits, labels)
        if not math.isfinite(value := loss.item()):
            raise TrainingFailed(step - 1, f"the loss became {value}")
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        for (entering, z), feature, gradient in zip(stages, features, gradients, strict=True):
            assert z.grad is not None
            feature.add(entering)
            gradient.add(z.grad * len(images))  # the loss is a mean over samples
        losses += value
        last = step == config.steps
        every = config.measure_every
        if step == 1 or last or (every and step % every == 0):
            _measure(config, model, features, gradients, step, record)
        if step % config.log_every == 0 or last:
            record.write(
                "train",
                step=step,
                loss=losses / ((step - 1) % config.log_every + 1),
                lr=config.lr,
                time={"seconds": time.perf_counter() - began},
                penalty=None,
                measures=None,
            )
            losses = 0.0
        if step % config.eval_every == 0 or last:
            _evaluate(model, splits.validation, record, "eval", split="validation", step=step)
        if on_step is not None:
            on_step(step)
    _evaluate(
        model,
        splits.test,
        record,
        "result",
        split="test",
        step=config.steps,
        quality_name="accuracy",
        higher_is_better=True,
        inference=None,
        training=None,
        skippable=None,
        baselines={},
        data=splits.info,
        time={"seconds": time.perf_counter() - began},
    )


def _model(config: GradientNoiseConfig, splits: Splits[TensorRows]) -> ResidualMLP:
    inputs = splits.train[0]["pixel_values"].numel()
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(config.seed)
        return ResidualMLP(inputs, config.width, config.layers, splits.info["classes"])


def _batches(config: GradientNoiseConfig, rows: TensorRows) -> Iterator[tuple[Tensor, Tensor]]:
    """``steps`` batches of images and labels."""
    images, labels = rows.columns["pixel_values"], rows.columns["labels"]
    generator = torch.Generator().manual_seed(config.seed)
    done = 0
    while True:
        for index in torch.randperm(len(labels), generator=generator).split(config.batch_size):
            if len(index) == config.batch_size:
                yield images[index], labels[index]
                done += 1
                if done == config.steps:
                    return


@torch.no_grad()
def _evaluate(
    model: ResidualMLP, rows: TensorRows, record: RecordWriter, kind: str, **fields: Any
) -> None:
    """Write a line of ``kind`` with the loss on a split, and the accuracy."""
    labels = rows.columns["labels"]
    logits, _ = model(rows.columns["pixel_values"])
    loss = cross_entropy(logits, labels).item()
    if not math.isfinite(loss):
        raise TrainingFailed(fields["step"], f"the loss on the {fields['split']} split is {loss}")
    right = (logits.argmax(1) == labels).double().mean().item()
    shown = {} if kind == "result" else {"measures": None}
    record.write(kind, loss=loss, quality=right, **shown, **fields)


def _measure(
    config: GradientNoiseConfig,
    model: ResidualMLP,
    features: list[Accumulated],
    gradients: list[Accumulated],
    step: int,
    record: RecordWriter,
) -> None:
    rows = []
    for number, layer in enumerate(model.layers, start=1):
        feature, gradient = features[number - 1], gradients[number - 1]
        weight = layer.weight
        assert isinstance(weight, Tensor)
        if not all(bool(each.isfinite().all()) for each in (weight, gradient.moment)):
            raise TrainingFailed(step, f"a weight or gradient of layer {number} became infinite")
        rows.append(
            {
                "layer": number,
                "ratio": config.width / feature.samples,
                "anisotropy_limit": math.sqrt(config.width * (config.width - 1)),
                **_moments("feature", feature, config.width - 1),  # its rows add up to 0
                **_moments("gradient", gradient, config.width),
                **_weight(weight),
            }
        )
    first = features[0]
    how = {
        "moments": "uncentred, summed over samples and steps",
        "decay": config.decay,
        "tau": Accumulated.tau,
        "samples": first.samples,
        "equal_samples": first.equal_samples,
        "rows": first.rows,
    }
    record.write("measured", step=step, how=how, measures={"layers": rows}, curvature={})


def _moments(name: str, seen: Accumulated, rank: int) -> dict[str, Any]:
    numbers: dict[str, Any] = {
        "square": seen.mean_square(),
        "anisotropy": seen.anisotropy(),
        "random_anisotropy": seen.random_anisotropy(rank=rank),
    }
    for kind, samples in (("", seen.samples), ("equal_", seen.equal_samples)):
        law = seen.marchenko_pastur(samples=samples, rank=rank)
        numbers |= {
            f"{kind}ks": None if law is None else law.ks,
            f"{kind}ks_limit": None if law is None else law.ks_limit,
            f"{kind}outliers": None if law is None else law.outliers,
            f"{kind}random": None if law is None else law.accepted,
        }
    return {f"{name}_{key}": value for key, value in numbers.items()}


def _weight(weight: Tensor) -> dict[str, Any]:
    if not bool(weight.any()):
        return dict.fromkeys(("concentration", "weight_ks", "weight_outliers", "weight_random"))
    found = spectrum(weight)
    law = found.marchenko_pastur
    return {
        "concentration": found.concentration,
        "weight_ks": law.ks,
        "weight_ks_limit": law.ks_limit,
        "weight_outliers": law.outliers,
        "weight_random": law.accepted,
    }

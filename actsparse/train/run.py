"""One run: data, model, Trainer, record. The same seed gives every arm the same start and data."""

from __future__ import annotations

import math
import shutil
import time
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.optim import AdamW
from torch.utils.data import Dataset, Subset
from transformers import (
    PrinterCallback,
    Trainer,
    TrainerCallback,
    TrainingArguments,
    default_data_collator,
    get_cosine_schedule_with_warmup,
)

from actsparse.modify import Handle, LeaveOutMLP, Recipe, decay_groups, save, sparsify
from actsparse.observe import Measures, measure, observe, skippable, spectra_of
from actsparse.records import RecordWriter, Run, environment, read_run, refused, run_path
from actsparse.train.callback import SparsityCallback, TrainingFailed
from actsparse.train.config import RunConfig
from actsparse.train.folder import check_folder, finished_run
from actsparse.train.tasks import Task, task_of


def run(
    config: RunConfig,
    out: str | Path,
    *,
    command: str | None = None,
    on_step: Callable[[int], None] | None = None,
) -> Run:
    """Train one arm with one seed and write its record under ``out``; returns the record, read.

    The folder ``out/runs/<arm>-seed<seed>`` gets ``record.jsonl`` and ``weights/`` (`save`): those
    of the last evaluation whose loss was finite, so at the end the final ones. A run that is
    finished with the same config is not repeated; an unfinished or failed one starts anew.

    Knobs are picked on the validation split; the test split is looked at once, at the end.
    ``command`` is noted in the record; ``on_step`` is called with the number of steps done.

    Raises:
        ValueError: unknown task or recipe; a setting that cannot work; the run is finished with
            another config.
        RecordError: the folder cannot be written, before training; or the disk refused later.
        TrainingFailed: the loss became NaN or infinite; the record says at which step.
    """
    task = task_of(config.task)
    path = run_path(out, config.arm, config.seed)
    if (old := finished_run(config, out)) is not None:
        return old
    check_folder(path.parent)
    header = {
        "task": config.task,
        "arm": config.arm,
        "seed": config.seed,
        "config": config.to_json(),
        **environment(torch.get_num_threads(), _gpu()),
    }
    if command:
        header["command"] = command
    with RecordWriter(path, header) as record:
        _clear(path.parent)
        try:
            _train(config, task, record, on_step)
        except TrainingFailed as failed:
            record.write("failed", step=failed.step, reason=failed.reason)
            raise
    return read_run(path)


def _train(
    config: RunConfig, task: Task, record: RecordWriter, on_step: Callable[[int], None] | None
) -> None:
    began = time.perf_counter()
    splits = task.splits(config)
    torch.manual_seed(config.seed)
    model = task.model(config)
    inputs = default_data_collator([splits.train[index] for index in range(2)])
    recipe = Recipe.from_json(config.recipe)
    handle = sparsify(model, recipe, inputs=inputs)
    without = any(isinstance(change, LeaveOutMLP) for change in recipe.modifications)
    seen = None if without else observe(model, config.measures, blocks=handle.blocks)
    validation = _some(splits.validation, config.validate_on)

    batches = batches_of(splits.validation, config.active_on, config.batch_size)

    def active(model: nn.Module) -> Measures:
        device = next(model.parameters()).device
        on = [{key: value.to(device) for key, value in batch.items()} for batch in batches]
        return measure(model, task.predict, on, config.active, labels="model")

    callback = SparsityCallback(
        handle,
        seen,
        record,
        quality="quality",
        loss="nats",
        active=active if config.active and not without else None,
        active_every=config.active_every,
        on_step=on_step,
        accelerate=False if without else config.accelerate,
    )
    weights = record.path.parent / "weights"
    trainer = _trainer(config, task, model, splits.train, validation, callback, weights)
    try:
        trainer.train()
        if callback.evaluation is None or callback.evaluation.step != config.steps:
            trainer.evaluate()
        trainer.evaluate(splits.test, metric_key_prefix="test")
    finally:
        callback.close()
    last = callback.evaluation
    assert last is not None
    training, accelerated = callback.training(), callback.accelerated
    record.write(
        "result",
        split="test",
        step=config.steps,
        loss=last.loss,
        quality=last.quality,
        quality_name=task.quality_name,
        higher_is_better=task.higher_is_better,
        inference=last.measures,
        training=training,
        skippable=_skippable(handle, last.measures, training),
        baselines=task.baselines(splits),
        data=splits.info,
        **({"spectra": spectra_of(seen.blocks)} if seen and "spectrum" in config.measures else {}),
        **({} if accelerated is None else {"accelerated": str(accelerated).splitlines()}),
        seconds=time.perf_counter() - began,
    )


def _trainer(
    config: RunConfig,
    task: Task,
    model: Any,
    train: Dataset[Any],
    validation: Dataset[Any],
    callback: SparsityCallback,
    weights: Path,
) -> Trainer:
    groups = decay_groups(model, config.weight_decay, config.no_decay)
    optimizer = AdamW(groups, lr=config.lr)
    warmup = math.ceil(config.warmup * config.steps)
    schedule = get_cosine_schedule_with_warmup(optimizer, warmup, config.steps)
    arguments = TrainingArguments(
        output_dir=str(weights.parent),
        seed=config.seed,
        data_seed=config.seed,
        max_steps=config.steps,
        per_device_train_batch_size=config.batch_size,
        per_device_eval_batch_size=4 * config.batch_size,
        max_grad_norm=config.clip,
        logging_steps=config.log_every,
        logging_nan_inf_filter=False,  # the callback stops at the first one instead
        eval_strategy="steps",
        eval_steps=config.eval_every,
        eval_on_start=True,
        save_strategy="no",
        remove_unused_columns=False,
        dataloader_pin_memory=torch.cuda.is_available(),
        report_to="none",
        disable_tqdm=True,
    )
    trainer = Trainer(
        model,
        arguments,
        train_dataset=train,
        eval_dataset=validation,
        optimizers=(optimizer, schedule),
        preprocess_logits_for_metrics=task.reduce,
        # Trainer's own "loss" counts sentinels too
        compute_metrics=lambda kept: {
            {"loss": "nats"}.get(name, name): value for name, value in task.score(kept).items()
        },
        callbacks=[callback, _KeepWeights(weights)],
    )
    trainer.remove_callback(PrinterCallback)
    return trainer


def batches_of(rows: Dataset[Any], count: int, batch_size: int) -> list[dict[str, Tensor]]:
    """``count`` rows of a split, evenly spread, as batches."""
    some = _some(rows, count)
    found = [some[index] for index in range(len(some))]  # type: ignore[arg-type]
    return [
        default_data_collator(found[start : start + batch_size])
        for start in range(0, len(found), batch_size)
    ]


class _KeepWeights(TrainerCallback):
    """Saves the model after each evaluation; runs after the callback that refuses a NaN."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder

    def on_evaluate(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        try:
            save(kwargs["model"], self.folder)
        except OSError as error:
            raise refused(self.folder, error) from error


def _some(rows: Dataset[Any], count: int | None) -> Dataset[Any]:
    """``count`` rows, evenly spread, or all."""
    total = len(rows)  # type: ignore[arg-type]
    if count is None or count >= total:
        return rows
    return Subset(rows, [index * total // count for index in range(count)])


def _skippable(handle: Handle, inference: Any, training: Any) -> dict[str, float] | None:
    """Forward as at inference, backward as in training."""
    if inference is None or training is None:
        return None
    return {
        "forward": skippable(inference, handle.blocks)["forward"],
        "backward": skippable(training, handle.blocks)["backward"],
    }


def _clear(folder: Path) -> None:
    """Take away what an earlier attempt left, the folder that a stop caught half-saved too."""
    (folder / "error.txt").unlink(missing_ok=True)
    for left in (folder / "weights", *folder.glob(".weights-*")):
        shutil.rmtree(left, ignore_errors=True)


def _gpu() -> str | None:
    with suppress(RuntimeError):
        return torch.cuda.get_device_name() if torch.cuda.is_available() else None
    return None

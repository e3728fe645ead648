"""One run: data, model, Trainer, record. The same seed gives every arm the same start and data."""

from __future__ import annotations

import logging
import math
import resource
import shutil
import sys
import time
from collections.abc import Callable
from contextlib import ExitStack, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.optim import AdamW
from torch.utils.data import Dataset, Subset
from transformers import (
    PrinterCallback,
    TrainerCallback,
    TrainingArguments,
    default_data_collator,
)

from actsparse.modify import (
    Handle,
    LeaveOutMLP,
    decay_groups,
    save,
)
from actsparse.observe import Measures, measure, observe, skippable, skippable_products, spectra_of
from actsparse.observe.measuring import within_bounds
from actsparse.train.callback import SparsityCallback
from actsparse.train.loss import TrainingFailed
from actsparse.train.processes import gathered, launched, meet, of_the_first
from actsparse_lab.data import Splits
from actsparse_lab.engine.arguments import schedule_of, training_arguments
from actsparse_lab.engine.checkpoint import drop_after, facts
from actsparse_lab.engine.config import RunConfig
from actsparse_lab.engine.folder import checkpoint_of, claimed, finished_run
from actsparse_lab.engine.interrupt import Interrupted, Interruption
from actsparse_lab.engine.start import model_of
from actsparse_lab.engine.tasks import Task, task_of
from actsparse_lab.engine.trainer import RunTrainer
from actsparse_lab.records import (
    RecordError,
    RecordWriter,
    Run,
    environment,
    read_run,
    refusals,
    run_path,
)

log = logging.getLogger(__name__)


def run(
    config: RunConfig,
    out: str | Path,
    *,
    command: str | None = None,
    on_step: Callable[[int], None] | None = None,
    told: Callable[[str], None] = log.warning,
) -> Run:
    """Train one arm with one seed and write its record under ``out``; returns the record, read.

    The folder ``out/runs/<arm>-seed<seed>`` gets ``record.jsonl``, ``weights/`` (`save`): those of
    the last evaluation whose loss was finite, so at the end the final ones, and
    ``checkpoint-<step>/``. A run that is finished with the same config is not repeated; an
    unfinished one goes on from its newest checkpoint that is whole, and ends as
    if it had not stopped. ``told`` is called with what is wrong with checkpoints that are not, and
    where the precision is another here than on a GPU. In
    several processes (torchrun, ``accelerate launch``) the first writes.

    Knobs are picked on the validation split; the test split is looked at once, at the end.
    ``command`` is noted in the record; ``on_step`` is called with the number of steps done.

    Raises:
        ValueError: unknown task or recipe; a setting that cannot work; the run was begun with
            another config, or in another number of processes.
        RecordError: the folder cannot be written, before training; or the disk refused later.
        TrainingFailed: the loss became NaN or infinite; the record says at which step.
        Interrupted: Ctrl-C or SIGTERM came; there is a checkpoint.
    """
    task = task_of(config.task)
    path = run_path(out, config.arm, config.seed)
    if (old := finished_run(config, out)) is not None:
        return old
    rank, processes = launched()
    arguments = training_arguments(config, path.parent, rank, processes)  # joins the processes
    with ExitStack() as lock, Interruption() as interrupted:
        splits = task.splits(config)
        model, handle = model_of(config, task, splits)
        if rank == 0 and config.precision == "mixed" and not torch.cuda.is_available():
            told("mixed precision: bf16, as there is no GPU here; on a GPU it is fp16")
        digest: str = splits.info["sha256"]
        checkpoint: Path | None = None
        problem: Exception | None = None
        finished = False
        try:
            if rank == 0:
                finished = bool(lock.enter_context(claimed(config, out, _room(config, model))))
                if not finished:
                    checkpoint = checkpoint_of(config, out, processes, digest, told)
        except (ValueError, RecordError) as error:
            problem = error
        finished, checkpoint, problem = of_the_first((finished, checkpoint, problem))
        if problem is not None:
            raise problem
        if finished:
            return read_run(path)
        record = None
        if rank == 0:
            record = _record(config, path, checkpoint, processes, digest, command)
        job = _Job(config, task, splits, arguments, record, checkpoint, on_step, interrupted)
        try:
            job.train(model, handle)
        except TrainingFailed as failed:
            if record is not None:
                record.write("failed", step=failed.step, reason=failed.reason)
            raise
        except ValueError as error:
            if "in DataLoader worker" not in str(error):
                raise
            said = str(error).strip().rpartition("ValueError: ")[2]  # the rest is a traceback
            raise ValueError(said) from error
        finally:
            if record is not None:
                record.close()
        meet()
        if rank == 0 and config.save_every is None:
            drop_after(path.parent, -1)
    return read_run(path)


def _room(config: RunConfig, model: nn.Module) -> int:
    """Bytes that weights and checkpoints (weights, and two moments of AdamW) take."""
    size = sum(each.numel() * each.element_size() for each in model.parameters())
    return size * (2 + 3 * (config.keep + 1))


def _record(
    config: RunConfig,
    path: Path,
    checkpoint: Path | None,
    processes: int,
    digest: str,
    command: str | None,
) -> RecordWriter:
    if checkpoint is not None:
        step = facts(checkpoint)["step"]
        drop_after(path.parent, step)
        _clear(path, "error.txt", *_LATER)
        return RecordWriter.resume(path, step)
    header = {
        "task": config.task,
        "arm": config.arm,
        "seed": config.seed,
        "processes": processes,
        "data_sha256": digest,
        "config": config.to_json(),
        **environment(torch.get_num_threads(), _gpu()),
    }
    if command:
        header["command"] = command
    drop_after(path.parent, -1)  # refused ones
    _clear(path, "error.txt", *_LATER, "weights")
    return RecordWriter(path, header)


@dataclass
class _Job:
    """A run's parts, and its course."""

    config: RunConfig
    task: Task
    splits: Splits[Any]
    arguments: TrainingArguments
    record: RecordWriter | None
    checkpoint: Path | None
    on_step: Callable[[int], None] | None
    interrupted: Interruption

    def train(self, model: Any, handle: Handle) -> None:
        began = time.perf_counter()
        config, task, splits = self.config, self.task, self.splits
        changes = handle.recipe.modifications
        without = any(isinstance(change, LeaveOutMLP) for change in changes)
        seen = None if without else observe(model, config.measures, blocks=handle.blocks)
        callback = SparsityCallback(
            handle,
            seen,
            self.record,
            quality="quality",
            active=self._active() if config.active and not without else None,
            active_every=config.active_every,
            active_at=config.active_at,
            on_step=self.on_step,
            interrupted=self.interrupted,
            accelerate=False if without else config.accelerate,
        )
        self.arguments.eval_on_start = self.checkpoint is None
        trainer = self._trainer(model, callback)
        resumed_at: Any = None if self.checkpoint is None else facts(self.checkpoint)["step"]
        try:
            if self.checkpoint is None:
                if config.start:
                    trainer.evaluate(splits.test, metric_key_prefix="test")
                    trainer.before = _before(callback)
                trainer.train()
            else:
                trainer.load_own(self.checkpoint)
                if resumed_at < config.steps:
                    trainer.train(resume_from_checkpoint=str(self.checkpoint))
                else:  # it was stopped on its way to the result
                    trainer.take_up(self.checkpoint)
            if trainer.state.global_step < config.steps:
                folder = Path(self.arguments.output_dir)
                raise Interrupted(
                    trainer.state.global_step, folder / f"checkpoint-{trainer.state.global_step}"
                )
            trainer.evaluate(splits.test, metric_key_prefix="test")
        finally:
            callback.close()
        last = callback.evaluation
        assert last is not None
        training, accelerated = callback.training(), callback.accelerated
        memory = max(gathered(_peak_memory()))
        if self.record is None:
            return
        self.record.write(
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
            **({} if trainer.before is None else {"before": trainer.before}),
            **(
                {"spectra": spectra_of(seen.blocks)}
                if seen and "spectrum" in config.measures
                else {}
            ),
            time={
                "seconds": time.perf_counter() - began,
                "peak_memory_mib": memory,
                "resumed_at": resumed_at,
                **({} if accelerated is None else {"accelerated": accelerated.lines()}),
            },
        )

    def _active(self) -> Callable[[nn.Module], Measures]:
        config, task = self.config, self.task
        batches = batches_of(self.splits.validation, config.active_on, config.batch_size)
        measures = within_bounds(config.active, self.splits.info)

        def active(model: nn.Module) -> Measures:
            device = next(model.parameters()).device
            on = [{key: value.to(device) for key, value in batch.items()} for batch in batches]
            return measure(model, task.predict, on, measures, labels="model")

        return active

    def _trainer(self, model: Any, callback: SparsityCallback) -> RunTrainer:
        config, task, splits = self.config, self.task, self.splits
        rank, processes = launched()
        rows, _ = config.share(processes)
        groups = decay_groups(model, config.weight_decay, config.no_decay)
        optimizer = AdamW(groups, lr=config.lr)
        trainer = RunTrainer(
            model,
            self.arguments,
            task=task,
            callback=callback,
            keep=config.keep,
            loader=task.loader and task.loader(config, rows, rank, processes),
            data_collator=task.collate(config, splits.info),
            train_dataset=splits.train,
            eval_dataset=_some(splits.validation, config.validate_on),
            optimizers=(optimizer, schedule_of(config, optimizer)),
            callbacks=[_AtEvaluations(self.arguments.output_dir, self.record, rank, config.fsdp)],
        )
        trainer.remove_callback(PrinterCallback)
        return trainer


def _before(callback: SparsityCallback) -> dict[str, Any]:
    found = callback.evaluation
    assert found is not None
    return {"loss": found.loss, "quality": found.quality, "inference": found.measures}


def _peak_memory() -> float:
    """MiB of this process, or of its GPU where it has one."""
    if torch.cuda.is_available():
        return torch.cuda.max_memory_allocated() / 2**20
    unit = 1 if sys.platform == "darwin" else 2**10  # bytes there, KiB elsewhere
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit / 2**20


def batches_of(rows: Dataset[Any], count: int, batch_size: int) -> list[dict[str, Tensor]]:
    """``count`` rows of a split, evenly spread, as batches."""
    some = _some(rows, count)
    found = [some[index] for index in range(len(some))]  # type: ignore[arg-type]
    return [
        default_data_collator(found[start : start + batch_size])
        for start in range(0, len(found), batch_size)
    ]


class _AtEvaluations(TrainerCallback):
    """Saves the model at each evaluation, before the record has a line of it.

    The last one comes before the last checkpoint, which is always made: nothing of its step may
    follow it, and the test split may be long.
    """

    def __init__(
        self, folder: str, record: RecordWriter | None, rank: int, fsdp: tuple[str, ...]
    ) -> None:
        self.folder, self.record = Path(folder) / "weights", record
        self.saves = rank == 0 or bool(fsdp)  # shards are gathered by all

    def on_train_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        state.save_steps = args.save_steps  # Trainer takes up the checkpoint's

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        if state.global_step == state.max_steps:
            control.should_evaluate = control.should_save = True

    def on_evaluate(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        if not (self.saves and all(map(math.isfinite, kwargs["metrics"].values()))):
            return  # a NaN is refused by the callback that writes the line
        if self.record is not None:
            self.record.check()  # the folder may be gone, and another's there
        with refusals(self.folder):
            save(kwargs["model"], self.folder)


def _some(rows: Dataset[Any], count: int | None) -> Dataset[Any]:
    """``count`` rows, evenly spread, or all."""
    total = len(rows)  # type: ignore[arg-type]
    if count is None or count >= total:
        return rows
    return Subset(rows, [index * total // count for index in range(count)])


def _skippable(handle: Handle, inference: Any, training: Any) -> dict[str, Any] | None:
    """Forward as at inference, backward as in training; ``products`` are all of training."""
    if inference is None or training is None:
        return None
    return {
        "forward": skippable(inference, handle.blocks)["forward"],
        "backward": skippable(training, handle.blocks)["backward"],
        "products": skippable_products(training, handle.blocks),
    }


_LATER = ("README.md", "measures.json")  # what other commands say of a run that has ended


def _clear(record: Path, *names: str) -> None:
    """Take away what an earlier attempt left beside a record."""
    for path in map(record.with_name, names):
        with refusals(path):
            if path.is_dir():
                shutil.rmtree(path.resolve())
            else:
                path.unlink(missing_ok=True)


def _gpu() -> str | None:
    with suppress(RuntimeError):
        return torch.cuda.get_device_name() if torch.cuda.is_available() else None
    return None

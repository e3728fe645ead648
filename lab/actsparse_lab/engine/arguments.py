"""A run's config in the words of Trainer and torch: arguments, learning rate, recomputing."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import torch
from torch.optim import Optimizer
from torch.optim.lr_scheduler import LambdaLR, LRScheduler
from transformers import (
    TrainingArguments,
    get_cosine_schedule_with_warmup,
    get_inverse_sqrt_schedule,
)

from actsparse_lab.engine.config import RunConfig
from actsparse_lab.engine.tasks import task_of


def schedule_of(config: RunConfig, optimizer: Optimizer) -> LRScheduler:
    """The learning rate: a rise over the warm-up, then as ``schedule`` and ``epochs`` say."""
    warmup, steps, stairs = config.warmup_steps, config.steps, config.epochs
    if config.schedule == "inverse_sqrt":
        return get_inverse_sqrt_schedule(optimizer, warmup)
    if stairs is None:
        return get_cosine_schedule_with_warmup(optimizer, warmup, steps)

    def stair(step: int) -> float:
        rise = min(1.0, step / warmup) if warmup else 1.0
        return rise * (1 + math.cos(math.pi * (step * stairs // steps) / stairs)) / 2

    return LambdaLR(optimizer, stair)


def training_arguments(
    config: RunConfig, folder: Path, rank: int, processes: int
) -> TrainingArguments:
    """Of the process ``rank`` out of ``processes``; making them joins the processes."""
    rows, passes = config.share(processes)
    precision: str = config.precision
    if precision == "mixed":
        precision = "fp16" if torch.cuda.is_available() else "bf16"
    if precision == "fp16" and not torch.cuda.is_available():
        raise ValueError("precision='fp16' needs a GPU; here bf16 and float32 run")
    task = task_of(config.task)
    changes = [change["modification"] for change in config.recipe["modifications"]]
    arguments = TrainingArguments(
        output_dir=str(folder),
        seed=config.seed + 1_000_003 * rank,  # or dropout would be the same in all processes
        data_seed=config.seed,
        max_steps=config.steps,
        per_device_train_batch_size=rows,
        per_device_eval_batch_size=rows if task.loader else 4 * rows,  # logits of all tokens
        gradient_accumulation_steps=passes,
        max_grad_norm=config.clip or 0.0,
        bf16=precision == "bf16",
        fp16=precision == "fp16",
        logging_steps=config.log_every,
        logging_nan_inf_filter=False,  # the callback stops at the first one instead
        eval_strategy="steps",
        eval_steps=config.eval_every,
        eval_on_start=True,
        save_strategy="no" if config.save_every is None else "steps",
        save_steps=config.save_every or config.steps,
        ignore_data_skip=task.loader is not None,  # it knows its place
        dataloader_num_workers=0 if task.loader else config.workers,
        remove_unused_columns=False,
        dataloader_pin_memory=torch.cuda.is_available(),
        # of the tasks' own models all parameters are used, but for MLPs that are left out
        ddp_find_unused_parameters=None if config.start else "LeaveOutMLP" in changes,
        use_cpu=not torch.accelerator.is_available(),
        fsdp=bool(config.fsdp),
        fsdp_config={"transformer_layer_cls_to_wrap": list(config.fsdp)} if config.fsdp else None,
        report_to=list(config.report_to) or "none",
        disable_tqdm=True,
    )
    if arguments.n_gpu > 1:
        arguments._n_gpu = 1  # DataParallel copies modules, and hooks would see a part of the batch
    return arguments


def recompute(model: Any) -> None:
    """Gradient checkpointing, by the name it has in this version of transformers."""
    if hasattr(model, "activation_checkpointing_enable"):
        model.activation_checkpointing_enable()
    else:
        model.gradient_checkpointing_enable({"use_reentrant": False})

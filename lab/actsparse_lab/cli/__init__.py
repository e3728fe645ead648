"""The laboratory's commands, and what it tells the library's (`actsparse.cli.laboratory`)."""

from __future__ import annotations

import importlib
from typing import Any

import typer

from actsparse.cli.laboratory import VERBS
from actsparse_lab.cli.runs import run_at as run_at
from actsparse_lab.cli.runs import task_batches as task_batches
from actsparse_lab.cli.trained import trained_of as trained_of

MODELS = (  # tasks whose model is made anew
    "digits", "text", "lm", "cifar10", "vit_cifar10", "t5_web", "lm_web", "vit_imagenet", "t5_c4",
)  # fmt: skip


def add_verbs(app: typer.Typer) -> None:
    """Add the laboratory's verbs, and its part of ``actsparse bench``."""
    for verb in VERBS:
        found = getattr(importlib.import_module(f"actsparse_lab.cli.{verb}"), verb)
        app.add_typer(found, name=verb) if isinstance(found, typer.Typer) else app.command(verb)(
            found
        )
    importlib.import_module("actsparse_lab.cli.bench")


def task_model(task: str) -> Any:
    """The vanilla model of a task, with random weights."""
    from actsparse_lab.engine.tasks import task_of
    from actsparse_lab.tasks import run_config

    return task_of(task).model(run_config(task, "vanilla", 0), {"classes": 1000})

"""Write ``actsparse.json`` beside weights that others have written: a Trainer's checkpoints."""

from __future__ import annotations

import warnings
from pathlib import Path

from torch import nn

from actsparse.blocks.block import unwrap
from actsparse.modify.adapters import ADAPTER, write_changes
from actsparse.modify.handle import handle_of
from actsparse.modify.sidecar import (
    SIDECAR,
    describe,
    describe_changes,
    read_sidecar,
    write_sidecar,
)
from actsparse.modify.weights import weight_files


def annotate(model: nn.Module, folder: Path) -> None:
    """Write to a folder with a model's weights, or its adapter's, what loading it needs more.

    :func:`actsparse.load` reads it then, or :func:`actsparse.load_adapter`.

    Raises:
        ValueError: the change cannot be kept in a file (a function of your own).
    """
    root = unwrap(model)
    handle = handle_of(root)
    if weight_files(folder):
        write_sidecar(folder, describe(root, "a checkpoint"))
    elif handle is not None and (folder / ADAPTER).is_file():
        write_changes(root, handle, folder, describe_changes(root, "a checkpoint"))


def annotate_checkpoints(model: nn.Module, output: Path, step: int) -> None:
    """Annotate a Trainer's checkpoints of ``step`` below ``output``, or warn if that cannot be.

    A hyperparameter search has a folder ``run-…`` for each trial.
    """
    name = f"checkpoint-{step}"
    try:
        for folder in (output / name, *output.glob(f"run-*/{name}")):
            if folder.is_dir():
                annotate(model, folder)
    except ValueError as error:
        warnings.warn(f"checkpoints do not carry the recipe: {error}", stacklevel=3)


def stands_at(folder: Path) -> dict[str, int | None] | None:
    """The handle's state that a folder's sidecar has, None where there is no sidecar."""
    return read_sidecar(folder)["state"] if (folder / SIDECAR).is_file() else None

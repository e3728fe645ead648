"""Write ``actsparse.json`` beside weights that others have written: a Trainer's checkpoints."""

from __future__ import annotations

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


def stands_at(folder: Path) -> dict[str, int | None] | None:
    """The handle's state that a folder's sidecar has, None where there is no sidecar."""
    return read_sidecar(folder)["state"] if (folder / SIDECAR).is_file() else None

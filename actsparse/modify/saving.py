"""Save and load a sparsified model: safetensors beside a JSON file that says how to rebuild it."""

from __future__ import annotations

import contextlib
import os
import re
import shutil
import uuid
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load_model, save_model
from torch import nn

from actsparse.blocks.block import Blocks, unwrap
from actsparse.blocks.sharding import gathered_state, sharded
from actsparse.modify.handle import Handle
from actsparse.modify.prune_units import Pruned, cut
from actsparse.modify.rebuild import adapter_configs, build, cast, how_to_build, in_base, wrap
from actsparse.modify.sidecar import (
    SIDECAR,
    WEIGHTS,
    by_block,
    describe_changes,
    read_sidecar,
    recipe_of,
    same_blocks,
    write_sidecar,
)
from actsparse.modify.sparsify import is_peft_model, sparsify
from actsparse.modify.thresholds import put_thresholds
from actsparse.untrusted import safetensors_shapes
from actsparse.values import AtLeast0, Count


def save(model: nn.Module, path: str | os.PathLike[str]) -> Path:
    """Write a sparsified model to the folder ``path``: whole, or not at all.

    ``model.safetensors`` holds every parameter and buffer, zeroth biases among them;
    ``actsparse.json`` the recipe, where its schedules stand, how many hidden units each block has
    (:func:`actsparse.prune_dead_units`), thresholds (:func:`actsparse.calibrate_thresholds`) and,
    for models of ``transformers``, the class and config, so that :func:`load` needs nothing else.
    What was pruned is gone from the file. Of a ``PeftModel`` the base and the adapters are written,
    with the adapters' configs
    (:func:`actsparse.modify.adapters.save_adapter` leaves out the base). A folder that save()
    wrote before is replaced. Of a sharded model (FSDP2) call it in every process: parameters are
    gathered, and the first process writes them.

    Raises:
        ValueError: the model is not sparsified, its recipe holds a function, or a block that was
            pruned or has a threshold is none of those sparsified.
        FileExistsError: ``path`` is a file, or a folder with other files in it.
        OSError: the folder cannot be written; what was there before is still there.
    """
    root = unwrap(model)
    base = root.get_base_model() if is_peft_model(root) else root  # type: ignore[operator]
    sidecar = {
        **describe_changes(root, "save()", whole=True),
        "model": how_to_build(root, base),
        "adapters": None if base is root else adapter_configs(root),
    }
    whole: Any = root
    if sharded(root.modules()):
        state = gathered_state(root)
        if torch.distributed.get_rank():
            return Path(path)
        whole = SimpleNamespace(state_dict=lambda: state)  # all that is asked of a model
    with whole_folder(path, {SIDECAR, WEIGHTS}) as folder:
        _write(whole, folder / WEIGHTS)
        write_sidecar(folder, sidecar)
    return Path(path)


@contextlib.contextmanager
def whole_folder(path: str | os.PathLike[str], files: set[str]) -> Iterator[Path]:
    """A new folder to write ``files`` to, which takes the place of ``path`` when all went well.

    Raises:
        FileExistsError: ``path`` is a file, or a folder that holds other files.
    """
    target = Path(path).resolve()
    _check_free(target, files)
    target.parent.mkdir(parents=True, exist_ok=True)
    new = target.with_name(f".{target.name}-{uuid.uuid4().hex[:8]}")
    old = new.with_name(new.name + "-old")
    new.mkdir()
    try:
        yield new
        if target.exists():
            os.replace(target, old)
        os.replace(new, target)
    except BaseException:
        if old.exists() and not target.exists():
            os.replace(old, target)
        shutil.rmtree(new, ignore_errors=True)
        raise
    shutil.rmtree(old, ignore_errors=True)


def _check_free(target: Path, files: set[str]) -> None:
    if not target.exists():
        return
    if not target.is_dir():
        raise FileExistsError(f"{target} is a file; a model is saved to a folder")
    others = sorted({item.name for item in target.iterdir()} - files)
    if others:
        raise FileExistsError(
            f"saving replaces the whole folder, but {target} holds other files "
            f"({', '.join(others[:3])}); give the model a folder of its own"
        )


def _write(model: nn.Module, file: Path) -> None:
    try:
        save_model(model, str(file))
    except SafetensorError as error:  # a full disk too comes as one
        found = re.search(r"os error (\d+)", str(error))
        if found is None:
            raise
        code = int(found[1])
        raise OSError(code, os.strerror(code), str(file)) from error


def load(path: str | os.PathLike[str], model: nn.Module | None = None) -> nn.Module:
    """Read what :func:`save` wrote: build the plain model, sparsify it, load the weights.

    ``model`` is the plain model, in any state; it may be left out for classes of ``transformers``
    (the model then comes in eval mode, with the dtypes it was saved with). A model that was saved
    with peft's adapters comes back as a ``PeftModel`` around it, one that was pruned with its
    widths (``model`` is whole or as narrow), one with thresholds with them
    (:func:`actsparse.modify.thresholds.thresholds_of`).
    Nothing is unpickled and no code from the folder runs. The handle is
    ``actsparse.handle_of(model)``.

    Raises:
        FileNotFoundError: the folder or one of its two files is missing.
        ValueError: torn or foreign files, or a model that does not fit them.
    """
    path = Path(path)
    sidecar = read_sidecar(path, WEIGHTS)
    recipe = recipe_of(path, sidecar)
    adapters = sidecar.get("adapters")
    shapes = safetensors_shapes(path / WEIGHTS)
    spec = sidecar["model"] if model is None else None
    if model is None:
        model = build(path, spec, shapes)
    wraps = adapters is not None and not is_peft_model(unwrap(model))
    names = [in_base(name) for name in sidecar["blocks"]] if wraps else sidecar["blocks"]
    kept = same_blocks(str(path), names, sidecar["inputs"], model)
    with removed_on_failure(_narrowed(path, sidecar, model, kept)):
        if wraps and adapters is not None:
            model = wrap(path, model, adapters, shapes)
            if spec is not None:
                cast(model, spec["dtypes"])
                model.eval()
            kept = same_blocks(str(path), sidecar["blocks"], sidecar["inputs"], model)
        _read_weights(model, path / WEIGHTS, strict=False)  # so that sparsify meets saved norms
        handle = sparsify(model, recipe, blocks=kept)
        with removed_on_failure(handle):
            _read_weights(model, path / WEIGHTS, strict=True)
            handle.load_state_dict(sidecar["state"])
            thresholds = by_block(path, sidecar, "thresholds", AtLeast0, [0] * len(kept))
            put_thresholds(model, kept, thresholds)
    return model


def _narrowed(path: Path, sidecar: dict[str, Any], model: nn.Module, blocks: Blocks) -> Pruned:
    """The model's blocks cut to the widths that were saved; which units stay does not matter."""
    have = [block.d_hidden for block in blocks]
    widths = by_block(path, sidecar, "widths", Count, have)
    if not all(0 < width <= whole for width, whole in zip(widths, have, strict=True)):
        raise ValueError(
            f"{path} does not fit the model: it has blocks of {widths} hidden units, "
            f"{type(model).__name__} of {have}"
        )
    named = {block.up.name: block for block in blocks}
    return cut(model, named, dict(zip(named, map(torch.arange, widths), strict=True)))


@contextlib.contextmanager
def removed_on_failure(handle: Handle | Pruned) -> Iterator[None]:
    """Take a change back where what is read into the model afterwards does not fit it."""
    try:
        yield
    except BaseException:
        handle.remove()
        raise


def _read_weights(model: nn.Module, file: Path, strict: bool) -> None:
    try:
        load_model(unwrap(model), str(file), strict=strict)
    except (SafetensorError, RuntimeError) as error:
        raise ValueError(f"{file} does not fit the model: {error}") from error

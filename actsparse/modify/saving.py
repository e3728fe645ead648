"""Save and load a sparsified model: safetensors beside a JSON file that says how to rebuild it."""

from __future__ import annotations

import json
import os
import shutil
import tempfile
from pathlib import Path
from typing import Any

from safetensors import SafetensorError
from safetensors.torch import load_model, save_model
from torch import nn

from actsparse.blocks.block import Blocks, unwrap
from actsparse.blocks.find import find_mlp_blocks
from actsparse.blocks.inputs import dummy_inputs
from actsparse.modify.handle import handle_of
from actsparse.modify.recipe import Recipe
from actsparse.modify.sparsify import sparsify

SIDECAR, WEIGHTS = "actsparse.json", "model.safetensors"
_FORMAT = 1


def save(model: nn.Module, path: str | os.PathLike[str]) -> Path:
    """Write a sparsified model to the folder ``path``: whole, or not at all.

    ``model.safetensors`` holds every parameter and buffer, zeroth biases among them;
    ``actsparse.json`` the recipe, where its schedules stand and, for models of ``transformers``,
    the class and config, so that :func:`load` needs nothing else.

    Raises:
        ValueError: the model is not sparsified, or its recipe holds a function.
        OSError: the folder cannot be written; what was there before is still there.
    """
    root = unwrap(model)
    handle = handle_of(root)
    if handle is None:
        raise ValueError("save() is for a sparsified model; for a plain one use its own way")
    if handle.blocks.inputs is None:
        raise ValueError("save() needs blocks as find_mlp_blocks returned them, not a plain list")
    path = Path(path)
    sidecar = {
        "format": _FORMAT,
        "recipe": handle.recipe.to_json(),
        "state": handle.state_dict(),
        "blocks": [block.up.name for block in handle.blocks],
        "inputs": handle.blocks.inputs,
        "model": _how_to_build(root),
    }
    path.parent.mkdir(parents=True, exist_ok=True)
    new = Path(tempfile.mkdtemp(prefix=f".{path.name}-", dir=path.parent))
    try:
        save_model(root, str(new / WEIGHTS))
        (new / SIDECAR).write_text(json.dumps(sidecar, indent=1), encoding="utf-8")
        old = None
        if path.exists():
            old = new.with_name(new.name + "-old")
            os.replace(path, old)
        os.replace(new, path)
        if old is not None:
            shutil.rmtree(old)
    except BaseException:
        shutil.rmtree(new, ignore_errors=True)
        raise
    return path


def load(path: str | os.PathLike[str], model: nn.Module | None = None) -> nn.Module:
    """Read what :func:`save` wrote: build the plain model, sparsify it, load the weights.

    ``model`` is the plain model, in any state; it may be left out for classes of ``transformers``.
    Nothing is unpickled and no code from the folder runs. The handle is
    ``actsparse.handle_of(model)``.

    Raises:
        FileNotFoundError: the folder or one of its two files is missing.
        ValueError: torn or foreign files, or a model that does not fit them.
    """
    path = Path(path)
    for name in (SIDECAR, WEIGHTS):
        if not (path / name).is_file():
            raise FileNotFoundError(f"{path / name} is missing: not a folder written by save()")
    sidecar = _read_sidecar(path / SIDECAR)
    if model is None:
        model = _build(path, sidecar["model"])
    inputs = dummy_inputs(sidecar["inputs"], next(model.parameters()).device)
    found = find_mlp_blocks(model, inputs)
    kept = Blocks((b for b in found if b.up.name in sidecar["blocks"]), found.refused, found.inputs)
    if [block.up.name for block in kept] != sidecar["blocks"]:
        raise ValueError(
            f"{path} was saved from a model with MLP blocks {sidecar['blocks']}; "
            f"{type(model).__name__} has {[block.up.name for block in found]}"
        )
    handle = sparsify(model, Recipe.from_json(sidecar["recipe"]), blocks=kept)
    try:
        load_model(unwrap(model), str(path / WEIGHTS), strict=True)
    except (SafetensorError, RuntimeError) as error:
        raise ValueError(f"{path / WEIGHTS} does not fit the model: {error}") from error
    handle.load_state_dict(sidecar["state"])
    return model


def _read_sidecar(file: Path) -> dict[str, Any]:
    try:
        sidecar = json.loads(file.read_text(encoding="utf-8"))
    except (json.JSONDecodeError, UnicodeDecodeError) as error:
        raise ValueError(f"{file} is not whole JSON: {error}") from error
    needed = {"format", "recipe", "state", "blocks", "inputs", "model"}
    if not isinstance(sidecar, dict) or not needed <= set(sidecar):
        raise ValueError(f"{file} is not a sidecar of actsparse: expected keys {sorted(needed)}")
    if sidecar["format"] != _FORMAT:
        raise ValueError(f"{file} has format {sidecar['format']!r}; this version reads {_FORMAT}")
    return sidecar


def _how_to_build(model: nn.Module) -> dict[str, Any] | None:
    cls = type(model)
    config = getattr(model, "config", None)
    if cls.__module__.split(".")[0] == "transformers" and config is not None:
        return {"class": cls.__name__, "config": json.loads(config.to_json_string(use_diff=False))}
    return None


def _instance(cls: Any, config: dict[str, Any]) -> nn.Module:
    return cls(cls.config_class.from_dict(config))


def _build(path: Path, spec: dict[str, Any] | None) -> nn.Module:
    if spec is None:
        raise ValueError(f"{path} holds no config of a transformers model: pass load(path, model=)")
    import transformers

    cls = getattr(transformers, spec["class"], None)
    if not (isinstance(cls, type) and issubclass(cls, transformers.PreTrainedModel)):
        raise ValueError(f"{path}: {spec['class']!r} is not a model class of transformers")
    return _instance(cls, spec["config"])

"""Save and load a sparsified model: safetensors beside a JSON file that says how to rebuild it."""

from __future__ import annotations

import json
import os
import re
import shutil
import uuid
from pathlib import Path
from typing import Any

import torch
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
    the class and config, so that :func:`load` needs nothing else. A folder that save() wrote
    before is replaced.

    Raises:
        ValueError: the model is not sparsified, or its recipe holds a function.
        FileExistsError: ``path`` is a file, or a folder with other files in it.
        OSError: the folder cannot be written; what was there before is still there.
    """
    root = unwrap(model)
    handle = handle_of(root)
    if handle is None:
        raise ValueError("save() is for a sparsified model; for a plain one use its own way")
    if handle.blocks.inputs is None:
        raise ValueError("save() needs blocks as find_mlp_blocks returned them, not a plain list")
    target = Path(path).resolve()
    _check_free(target)
    sidecar = {
        "format": _FORMAT,
        "recipe": handle.recipe.to_json(),
        "state": handle.state_dict(),
        "blocks": [block.up.name for block in handle.blocks],
        "inputs": handle.blocks.inputs,
        "model": _how_to_build(root),
    }
    target.parent.mkdir(parents=True, exist_ok=True)
    new = target.with_name(f".{target.name}-{uuid.uuid4().hex[:8]}")
    old = new.with_name(new.name + "-old")
    new.mkdir()
    try:
        _write(root, new / WEIGHTS)
        (new / SIDECAR).write_text(json.dumps(sidecar, indent=1), encoding="utf-8")
        if target.exists():
            os.replace(target, old)
        os.replace(new, target)
    except BaseException:
        if old.exists() and not target.exists():
            os.replace(old, target)
        shutil.rmtree(new, ignore_errors=True)
        raise
    shutil.rmtree(old, ignore_errors=True)
    return Path(path)


def _check_free(target: Path) -> None:
    if not target.exists():
        return
    if not target.is_dir():
        raise FileExistsError(f"{target} is a file; save() writes a folder")
    others = sorted({item.name for item in target.iterdir()} - {SIDECAR, WEIGHTS})
    if others:
        raise FileExistsError(
            f"save() replaces the whole folder, but {target} holds other files "
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
    (the model then comes in eval mode, with the dtypes it was saved with).
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
    recipe = _recipe(path, sidecar["recipe"])
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
    _read_weights(model, path / WEIGHTS, strict=False)  # so that sparsify meets the saved norms
    handle = sparsify(model, recipe, blocks=kept)
    try:
        _read_weights(model, path / WEIGHTS, strict=True)
        handle.load_state_dict(sidecar["state"])
    except BaseException:
        handle.remove()
        raise
    return model


def _read_weights(model: nn.Module, file: Path, strict: bool) -> None:
    try:
        load_model(unwrap(model), str(file), strict=strict)
    except (SafetensorError, RuntimeError) as error:
        raise ValueError(f"{file} does not fit the model: {error}") from error


def _recipe(path: Path, values: dict[str, Any]) -> Recipe:
    try:
        return Recipe.from_json(values)
    except (KeyError, TypeError, AttributeError) as error:
        raise ValueError(f"{path / SIDECAR} holds no recipe as save() writes it") from error


def _read_sidecar(file: Path) -> dict[str, Any]:
    try:
        sidecar = json.loads(file.read_text(encoding="utf-8"))
    except (json.JSONDecodeError, UnicodeDecodeError) as error:
        raise ValueError(f"{file} is not whole JSON: {error}") from error
    needed = {"recipe": dict, "state": dict, "blocks": list, "model": dict | None}
    keys = {"format", "inputs", *needed}
    if not isinstance(sidecar, dict) or not keys <= set(sidecar):
        raise ValueError(f"{file} is not a sidecar of actsparse: expected keys {sorted(keys)}")
    if sidecar["format"] != _FORMAT:
        raise ValueError(f"{file} has format {sidecar['format']!r}; this version reads {_FORMAT}")
    for key, kind in needed.items():
        if not isinstance(sidecar[key], kind):
            raise ValueError(f"{file} is not as save() writes it: {key!r} is {sidecar[key]!r}")
    return sidecar


def _how_to_build(model: nn.Module) -> dict[str, Any] | None:
    cls = type(model)
    config = getattr(model, "config", None)
    if cls.__module__.split(".")[0] != "transformers" or config is None:
        return None
    return {
        "class": cls.__name__,
        "config": json.loads(config.to_json_string(use_diff=False)),
        "attention": getattr(config, "_attn_implementation", None),  # not in the config's file
        "dtypes": {
            name: str(tensor.dtype).removeprefix("torch.")
            for name, tensor in _floats(model)
            if tensor.dtype != torch.float32
        },
    }


def _floats(model: nn.Module) -> list[tuple[str, torch.Tensor]]:
    """Parameters and buffers, those that no state dict holds among them."""
    both = [*model.named_parameters(), *model.named_buffers()]
    return [(name, tensor) for name, tensor in both if tensor.is_floating_point()]


def _build(path: Path, spec: dict[str, Any] | None) -> nn.Module:
    if spec is None:
        raise ValueError(f"{path} holds no config of a transformers model: pass load(path, model=)")
    import transformers

    cls = getattr(transformers, str(spec.get("class")), None)
    if not (isinstance(cls, type) and issubclass(cls, transformers.PreTrainedModel)):
        raise ValueError(f"{path}: {spec.get('class')!r} is not a model class of transformers")
    try:
        config = getattr(cls, "config_class").from_dict(spec["config"])  # noqa: B009
        if spec.get("attention") in ("eager", "sdpa"):
            config._attn_implementation = spec["attention"]
        model: nn.Module = cls(config)
        for name, tensor in _floats(model):
            tensor.data = tensor.data.to(getattr(torch, spec["dtypes"].get(name, "float32")))
    except Exception as error:
        raise ValueError(
            f"{path}: cannot build {spec['class']} from its config: {error}"
        ) from error
    return model.eval()

"""Finetuning for sparsity with LoRA: peft's adapters beside a recipe, saved, loaded and merged.

The order is peft first, ``sparsify`` then, so that what a recipe attaches sees the whole layer:

    model = peft.get_peft_model(base, lora_config(base, batch))
    handle = sparsify(model, "paper-finetune", inputs=batch)
"""

from __future__ import annotations

import json
import os
import re
import warnings
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from actsparse import files
from actsparse.blocks.block import MLPBlock, unwrap
from actsparse.blocks.norm import inspect_norm
from actsparse.blocks.resolve import found_with
from actsparse.blocks.trace import is_linear
from actsparse.extras import needed
from actsparse.modify.apply import is_peft_model, sparsify
from actsparse.modify.drop_small import BUFFER, set_thresholds
from actsparse.modify.foreign_config import bounded, check_adapter, check_files
from actsparse.modify.handle import Handle, handle_of
from actsparse.modify.saving import removed_on_failure
from actsparse.modify.sidecar import (
    SIDECAR,
    check_unchanged,
    check_weights,
    describe_changes,
    read_sidecar,
    recipe_of,
    same_blocks,
    write_sidecar,
)
from actsparse.modify.thresholds import thresholds_of
from actsparse.modify.weights import disk_refusals
from actsparse.modify.zeroth_bias import CHILD
from actsparse.untrusted import read_json, safetensors_shapes

ADAPTER, CONFIG = "adapter_model.safetensors", "adapter_config.json"  # peft's files, beside them:
CHANGES = "actsparse.safetensors"  # zeroth biases, thresholds, and the norms before the MLPs
_INNER = "base_model.model."  # where a PeftModel holds the model it wraps


def lora_config(
    model: nn.Module,
    inputs: Any,
    *,
    r: int = 192,
    alpha: float = 1.0,
    targets: str | Iterable[str] = "all-linear",
    dropout: float = 0.0,
    biases: bool = True,
    keep: str | Iterable[str] = (),
) -> Any:
    """A ``peft.LoraConfig`` for finetuning a model for sparsity: ``W + (alpha/r)·B A``.

    Norms are trained in full beside the adapters, because a norm floor and zeroth biases need it.
    Source of the rank: arXiv 2309.03004 and 2605.25612, finetuning for sparsity. What the papers
    leave open is as in their authors' program (cdgyp/sparsity at ae2ff7b): alpha, biases, norms.

    Args:
        model: the plain model.
        inputs: anything the model runs on, to find its MLP blocks.
        r: the rank of the adapters; the papers have 192.
        alpha: the scale of the adapters times r.
        targets: the ends of the names of the layers that get adapters (``"fc1"``, ``"mlp.fc1"``),
            or peft's word for all but the head of a language model.
        dropout: the dropout of the adapters' input.
        biases: train all biases and all norms. Without it only the norms that feed MLPs train.
        keep: the ends of the names of further modules to train in full, such as a new head.

    Returns:
        The config, for ``peft.get_peft_model``.

    Raises:
        ValueError: a target, or a module to keep, that the model does not have; a model that is
            sparsified already.
        NoMLPFound: the model has no MLP block.

    >>> import peft
    >>> mlp = nn.Sequential(nn.LayerNorm(8), nn.Linear(8, 32), nn.GELU(), nn.Linear(32, 8))
    >>> config = lora_config(mlp, torch.zeros(2, 5, 8), r=4, targets=["1", "3"])
    >>> config.r, config.lora_alpha, config.modules_to_save
    (4, 1.0, ['0'])
    >>> model = peft.get_peft_model(mlp, config)
    >>> handle = sparsify(model, "paper-finetune", inputs=torch.zeros(2, 5, 8))
    """
    peft = needed("peft", "lora_config")
    if handle_of(unwrap(model)) is not None:
        raise ValueError(
            "the model is sparsified already, and adapters that peft adds now would be left out; "
            "call handle.remove(), wrap the model with peft, then sparsify"
        )
    modules = dict(unwrap(model).named_modules())
    layers = {name: module for name, module in modules.items() if name and is_linear(module)}
    targets, keep = _as_list(targets), _as_list(keep)
    all_linear = targets == ["all-linear"]
    aimed = list(layers) if all_linear else _named("LoRA target", targets, modules, layers)
    _named("module to keep", keep, modules, layers)
    blocks = found_with(model, inputs, "lora_config")
    norms = [block.norm.name for block in blocks if block.norm is not None]
    if biases:
        own = {name: module for name, module in modules.items() if module._parameters}
        norms += [name for name, module in own.items() if inspect_norm(name, module)]
    return peft.LoraConfig(
        r=r,
        lora_alpha=alpha,
        lora_dropout=dropout,
        bias="all" if biases else "none",
        target_modules="all-linear" if all_linear else targets,
        modules_to_save=list(dict.fromkeys([*norms, *keep])),
        fan_in_fan_out=any(type(modules[name]).__name__ == "Conv1D" for name in aimed),
    )


def _as_list(names: str | Iterable[str]) -> list[str]:
    return [names] if isinstance(names, str) else list(names)


def _named(what: str, ends: list[str], modules: Iterable[str], layers: Iterable[str]) -> list[str]:
    """The modules that peft takes for ``ends``: those whose names are one or end with one."""
    found = {end: [m for m in modules if m == end or m.endswith(f".{end}")] for end in ends}
    missing = [end for end, names in found.items() if not names]
    if missing:
        known = dict.fromkeys(_without_numbers(name) for name in layers)
        raise ValueError(
            f"{what} {', '.join(map(repr, missing))} does not exist; the model's linear layers "
            f"are {', '.join(known)}"
        )
    return [name for names in found.values() for name in names]


def _without_numbers(name: str) -> str:
    """A layer's name from the last number on, or whole where there is none.

    >>> _without_numbers("vit.layers.3.mlp.fc1"), _without_numbers("classifier")
    ('mlp.fc1', 'classifier')
    """
    return re.sub(r"^.*\.\d+\.", "", name)


def save_adapter(model: nn.Module, path: str | os.PathLike[str]) -> Path:
    """Write the adapter of a sparsified ``PeftModel`` to a folder, without its base model.

    The folder is peft's own (``adapter_config.json``, ``adapter_model.safetensors``) with two more
    files. ``actsparse.json`` holds the recipe and its step. ``actsparse.safetensors`` holds the
    zeroth biases, the thresholds of ``DropSmall`` and the norms that feed the MLPs, whether or not
    peft's config keeps them.
    :func:`load_adapter` reads all four.

    Args:
        model: the ``PeftModel``.
        path: the folder. It is written whole or not at all. A folder that save_adapter wrote before
            is replaced.

    Returns:
        The folder.

    Raises:
        ValueError: no sparsified ``PeftModel``, or one with several adapters.
        FileExistsError: ``path`` is a file, or a folder with other files in it.
        OSError: the folder cannot be written; what was there before is still there.

    >>> import copy, peft, tempfile
    >>> base = nn.Sequential(nn.LayerNorm(8), nn.Linear(8, 32), nn.GELU(), nn.Linear(32, 8))
    >>> x, other = torch.randn(2, 5, 8), copy.deepcopy(base)
    >>> model = peft.get_peft_model(base, lora_config(base, x, r=4, targets=["1", "3"]))
    >>> handle = sparsify(model, "paper-finetune", inputs=x)
    >>> with tempfile.TemporaryDirectory() as folder:
    ...     path = save_adapter(model, f"{folder}/adapter")
    ...     again = load_adapter(other, path)
    >>> torch.equal(again(x), model.eval()(x))
    True
    >>> merged = merge_adapter(model)
    >>> torch.allclose(merged(x), again(x), atol=1e-6), handle_of(merged).recipe.name
    (True, 'paper-finetune')
    """
    root, handle = _sparsified(model, "save_adapter()")
    if list(root.peft_config) != ["default"]:
        raise ValueError(
            f"save_adapter() keeps one adapter called 'default', this model has "
            f"{', '.join(map(repr, root.peft_config))}; save() keeps them all"
        )
    sidecar = describe_changes(root, "save_adapter()")
    with files.whole_folder(path, {ADAPTER, CONFIG, CHANGES, SIDECAR, "README.md"}) as folder:
        root.save_pretrained(str(folder), save_embedding_layers=_embeddings(root))
        write_changes(root, handle, folder, sidecar)
    return Path(path)


def write_changes(model: nn.Module, handle: Handle, folder: Path, sidecar: dict[str, Any]) -> None:
    """Write beside peft's files what :func:`load_adapter` needs more.

    Where the function is changed, peft's config gets a key that peft warns of by its name.
    """
    if handle.changes_function:
        config = json.loads((folder / CONFIG).read_text(encoding="utf-8"))
        config["actsparse"] = "changed by actsparse: use actsparse.load_adapter(base, folder)"
        (folder / CONFIG).write_text(json.dumps(config, indent=2), encoding="utf-8")
    changes = {name: tensor.detach().contiguous() for name, tensor in _changed(model, handle)}
    with disk_refusals(folder / CHANGES):
        save_file(changes, str(folder / CHANGES))
    write_sidecar(folder, sidecar)


def load_adapter(base: nn.Module, path: str | os.PathLike[str]) -> Any:
    """Load an adapter that :func:`save_adapter` wrote, with its recipe, onto its base model.

    Args:
        base: the model that the adapter was trained on, without adapters.
        path: the folder.

    Returns:
        The sparsified ``PeftModel`` around ``base``, in eval mode and ready to be trained further;
        ``actsparse.handle_of(model)`` is its handle.

    Raises:
        FileNotFoundError: the folder or one of its files is missing.
        ValueError: files that are damaged or not written by save_adapter, or a base that does not
            fit them.
    """
    peft = needed("peft", "load_adapter")
    path = Path(path)
    sidecar = read_sidecar(path, CHANGES, ADAPTER, CONFIG)
    check_weights(path, sidecar, CHANGES, ADAPTER)
    recipe = recipe_of(path, sidecar)
    check_files(path)
    values = read_json(path / CONFIG)
    if isinstance(values, dict):
        values.pop("actsparse", None)  # our note
    check_adapter(str(path / CONFIG), values)
    held = safetensors_shapes(path / ADAPTER) | safetensors_shapes(path / CHANGES)
    try:
        changes = load_file(str(path / CHANGES))
    except SafetensorError as error:
        raise ValueError(f"{path / CHANGES} is not whole: {error}") from error
    try:
        with warnings.catch_warnings(), bounded(str(path / CONFIG), held):
            warnings.filterwarnings("ignore", r"Unexpected keyword arguments \['actsparse'\]")
            model = peft.PeftModel.from_pretrained(base, str(path), is_trainable=True)
    except Exception as error:
        name = type(base).__name__
        raise ValueError(f"{path}: its adapter does not fit {name}: {error}") from error
    handle = sparsify(
        model, recipe, blocks=same_blocks(str(path), sidecar["blocks"], sidecar["inputs"], model)
    )
    with removed_on_failure(handle), torch.no_grad():
        own = dict(_changed(model, handle))
        shapes = [{name: tuple(t.shape) for name, t in each.items()} for each in (own, changes)]
        if shapes[0] != shapes[1]:
            odd = sorted(name for name, _ in shapes[0].items() ^ shapes[1].items())
            raise ValueError(f"{path / CHANGES} does not fit {type(base).__name__}, see {odd[0]}")
        for name, tensor in own.items():
            tensor.copy_(changes[name])
        handle.load_state_dict(sidecar["state"])
        check_unchanged(path, sidecar)
    return model.eval()


def merge_adapter(model: nn.Module) -> nn.Module:
    """Add the adapters of a sparsified ``PeftModel`` to its weights, and keep the recipe.

    ``W ← W + (alpha/r)·B A``, as peft's ``merge_and_unload`` does, which sparsified models refuse.
    Zeroth biases, norms, the thresholds of ``DropSmall`` and the step of the schedules are kept, so
    in eval mode the outputs are those of ``model`` up to rounding. Parameters that peft has frozen
    stay frozen.

    Args:
        model: the ``PeftModel``. It cannot be used afterwards, and its optimizer is no longer
            followed.

    Returns:
        The plain model, sparsified: ``actsparse.save`` writes it, and
        ``actsparse.handle_of(merged)`` is its handle.

    Raises:
        ValueError: no sparsified ``PeftModel``, or one with thresholds; nothing has changed then.
    """
    root, handle = _sparsified(model, "merge_adapter()")
    if thresholds_of(root) is not None:
        raise ValueError(
            "merge_adapter() would lose the thresholds of calibrate_thresholds: remove() them, "
            "merge, and calibrate anew"
        )
    inputs, state = handle.blocks.inputs, handle.state_dict()
    if inputs is None:
        raise ValueError("merge_adapter() needs the blocks that find_mlp_blocks returned")
    names = [block.up.name.removeprefix(_INNER) for block in handle.blocks]
    tables = [_table(block) for block in handle.blocks]
    thresholds = [block.up.module._buffers.get(BUFFER) for block in handle.blocks]
    handle.remove()
    merged: nn.Module = root.merge_and_unload()
    kept = same_blocks("the model to merge", names, inputs, merged)
    again = sparsify(merged, handle.recipe, blocks=kept)
    found = zip(kept, thresholds, strict=True)
    set_thresholds(merged, {block.name: values for block, values in found if values is not None})
    with torch.no_grad():
        for new, old in zip(map(_table, kept), tables, strict=True):
            if new is not None and old is not None:
                new.copy_(old)
    again.load_state_dict(state)
    return merged


def _embeddings(root: Any) -> Any:
    """peft's ``save_embedding_layers``: its own "auto" asks the Hub for a base by its name."""
    from peft.utils.constants import EMBEDDING_LAYER_NAMES

    config = root.peft_config["default"]
    if os.path.isfile(os.path.join(config.base_model_name_or_path or "", "config.json")):
        return "auto"
    return any(name in str(config.target_modules) for name in EMBEDDING_LAYER_NAMES)


def _table(block: MLPBlock) -> Tensor | None:
    """The zeroth bias in force at a block, where it has one; peft's wrapper hands it on."""
    child: Any = block.up.module._modules.get(CHILD)
    return None if child is None else child.zeroth_bias


def _sparsified(model: nn.Module, caller: str) -> tuple[Any, Handle]:
    root = unwrap(model)
    if not is_peft_model(root):
        raise ValueError(
            f"{caller} is for a model with peft's adapters, got {type(root).__name__}; wrap it "
            f"with peft.get_peft_model, then sparsify"
        )
    handle = handle_of(root)
    if handle is None:
        raise ValueError(f"{caller} is for a sparsified model; for a plain one use peft's method")
    return root, handle


def _changed(model: nn.Module, handle: Handle) -> list[tuple[str, Tensor]]:
    """By name, what a recipe changes: zeroth biases, thresholds, and norms that feed the MLPs."""
    mine = {id(block.up.module._buffers.get(BUFFER)) for block in handle.blocks} - {id(None)}
    for block in handle.blocks:
        table = block.up.module._modules.get(CHILD)
        mine |= {id(p) for p in table.parameters()} if table is not None else set()
        mine |= {id(p) for p in block.norm.module.parameters()} if block.norm else set()
    held = (*model.named_parameters(), *model.named_buffers())
    return [(name, tensor) for name, tensor in held if id(tensor) in mine]

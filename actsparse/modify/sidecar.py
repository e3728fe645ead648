"""``actsparse.json``, which says how a saved model was changed: written, read and checked."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from torch import nn

from actsparse.blocks.block import Blocks
from actsparse.blocks.find import find_mlp_blocks
from actsparse.blocks.inputs import dummy_inputs
from actsparse.modify.handle import handle_of
from actsparse.modify.prune_units import pruned_layers
from actsparse.modify.recipe import Recipe
from actsparse.modify.thresholds import thresholds_of

SIDECAR, WEIGHTS = "actsparse.json", "model.safetensors"
_FORMAT = 1


def describe_changes(root: nn.Module, caller: str, whole: bool = False) -> dict[str, Any]:
    """What a sidecar says of a sparsified model: recipe, schedules, blocks and how to find them.

    ``caller`` is whom the errors speak of; ``whole``: it keeps all of the model, thresholds too.

    Raises:
        ValueError: the model is not sparsified, its recipe holds a function, or nothing is known
            of the inputs its blocks were found with; thresholds or widths that cannot be kept.
    """
    handle, found = handle_of(root), thresholds_of(root)
    if handle is None and found is not None:
        raise ValueError(
            f"{caller} is for a sparsified model; to keep thresholds too, take them back, "
            f"thresholds_of(model).remove(), then sparsify(model, 'vanilla', inputs=...) and "
            f"calibrate_thresholds anew"
        )
    if handle is None:
        raise ValueError(
            f"{caller} is for a sparsified model; for a plain one use its own way, or, to prune it "
            f"or give it thresholds, sparsify(model, 'vanilla', inputs=...) first"
        )
    if handle.blocks.inputs is None:
        raise ValueError(f"{caller} needs blocks as find_mlp_blocks returned them, no plain list")
    thresholds = {} if found is None else found.in_force()
    lost = thresholds.keys() - {block.up.module for block in handle.blocks}
    if lost or (thresholds and not whole):
        why = "its blocks are not those that were sparsified" if whole else "use save()"
        raise ValueError(
            f"{caller} would lose the model's thresholds: {why}, or remove() them first"
        )
    covered = {part for block in handle.blocks for part in block.up.module.modules()}
    narrow = [name for name, layer in pruned_layers(root).items() if layer not in covered]
    if narrow and whole:
        raise ValueError(
            f"{caller} would lose the widths of {', '.join(narrow)}, pruned but none of the blocks "
            f"that were sparsified: sparsify these too, or take the pruning back first"
        )
    sidecar = {
        "format": _FORMAT,
        "recipe": handle.recipe.to_json(),
        "state": handle.state_dict(),
        "blocks": [block.up.name for block in handle.blocks],
        "inputs": handle.blocks.inputs,
        "model": None,
    }
    if whole:
        each = [thresholds.get(block.up.module, 0.0) for block in handle.blocks]
        sidecar |= {"widths": [block.d_hidden for block in handle.blocks], "thresholds": each}
    return sidecar


def write_sidecar(folder: Path, sidecar: dict[str, Any]) -> None:
    """Write ``actsparse.json``."""
    (folder / SIDECAR).write_text(json.dumps(sidecar, indent=1), encoding="utf-8")


def recipe_of(path: Path, sidecar: dict[str, Any]) -> Recipe:
    """The recipe that a sidecar names.

    Raises:
        ValueError: it is none, or one of unknown modifications.
    """
    try:
        return Recipe.from_json(sidecar["recipe"])
    except (KeyError, TypeError, AttributeError) as error:
        raise ValueError(f"{path / SIDECAR} holds no recipe as save() writes it") from error


def read_sidecar(folder: Path, *others: str) -> dict[str, Any]:
    """``actsparse.json`` as plain values, of a folder that holds files called ``others`` as well.

    Raises:
        FileNotFoundError: one of them is missing.
        ValueError: the sidecar is torn, foreign or of another version.
    """
    for name in (SIDECAR, *others):
        if not (folder / name).is_file():
            adapter = name == WEIGHTS and (folder / "adapter_config.json").is_file()
            what = "adapters alone, for load_adapter" if adapter else "not a folder of save()"
            raise FileNotFoundError(f"{folder / name} is missing: {what}")
    file = folder / SIDECAR
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


def same_blocks(source: str, names: list[str], inputs: Any, model: nn.Module) -> Blocks:
    """The blocks of ``model`` whose up layers are called ``names``.

    ``inputs`` describes what they are found with, ``source`` says in the error where they were.

    Raises:
        ValueError: the model has others.
    """
    try:
        found = find_mlp_blocks(model, dummy_inputs(inputs, next(model.parameters()).device))
    except (RuntimeError, TypeError) as error:
        raise ValueError(
            f"{source} does not fit {type(model).__name__}, which does not run on the inputs it "
            f"was found with: {error}"
        ) from error
    kept = Blocks((b for b in found if b.up.name in names), found.refused, found.inputs)
    if [block.up.name for block in kept] != names:
        raise ValueError(
            f"{source} has MLP blocks {names}; {type(model).__name__} has "
            f"{[block.up.name for block in found]}"
        )
    return kept


def by_block(
    path: Path, sidecar: dict[str, Any], key: str, kind: Any, absent: list[Any]
) -> list[Any]:
    """A sidecar's list of one number, 0 or more, for each block; ``absent`` if it has none."""
    values = sidecar.get(key, absent)
    listed = isinstance(values, list) and len(values) == len(absent)
    if not listed or not all(isinstance(value, kind) and value >= 0 for value in values):
        raise ValueError(f"{path / SIDECAR} is not as save() writes it: {key!r} is {values!r}")
    return values

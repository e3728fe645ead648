"""``actsparse.json``, which says how a saved model was changed: written, read and checked."""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Annotated, Any

import torch
from torch import nn

from actsparse.blocks.block import Blocks, NoMLPFound
from actsparse.blocks.find import find_mlp_blocks
from actsparse.blocks.inputs import dummy_inputs
from actsparse.modify.handle import handle_of
from actsparse.modify.prune_units import pruned_layers
from actsparse.modify.recipe import Recipe
from actsparse.modify.thresholds import thresholds_of
from actsparse.untrusted import read_json
from actsparse.values import BadValue, Count, Positive, Rule, Text, check, shown

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
    return Recipe.from_json(sidecar["recipe"], f"{path / SIDECAR}: sidecar.recipe")


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
    sidecar = read_json(file)
    where = f"{file}: sidecar"
    check(where, sidecar, {"format": Any})
    if sidecar["format"] != _FORMAT:
        raise BadValue(
            f"{file} has format {shown(sidecar['format'])}; this version reads {_FORMAT}"
        )
    check(where, sidecar, _SHAPE)
    _check_inputs(f"{where}.inputs", sidecar["inputs"])
    return dict(sidecar)


_DTYPE = Annotated[
    str, Rule("the name of a dtype", lambda name: isinstance(getattr(torch, name, 0), torch.dtype))
]
_SHAPE = {
    "recipe": dict,
    "state": {"step": Count, "steps": (Positive, None)},
    "blocks": [Text],
    "inputs": Any,
    "model": ({"class": Text, "config": dict, "dtypes": dict[str, _DTYPE]}, None),
    "adapters?": (dict[str, dict[str, Any]], None),
}
_TENSOR = {"shape": Annotated[list[Count], Rule("a list of 8 sizes at most", lambda s: len(s) < 9)],
           "dtype": _DTYPE}  # fmt: skip
_INPUTS, _IDS, _LONGEST = 2**26, 2**20, 2**13  # elements of floats, of ids, and ids in a row


def _check_inputs(where: str, inputs: Any, depth: int = 0) -> None:
    """Whether zeros of such shapes can be made, and a forward pass on them be waited for."""
    if isinstance(inputs, dict) and set(inputs) == {"shape", "dtype"}:
        check(where, inputs, _TENSOR)
        shape, ids = inputs["shape"], "int" in inputs["dtype"]
        if math.prod(shape) > (_IDS if ids else _INPUTS) or (ids and max(shape, default=0) > _IDS):
            raise BadValue(f"{where}.shape must be the shape of one batch; got {shown(shape)}")
        if ids and shape and shape[-1] > _LONGEST:
            raise BadValue(f"{where}.shape must end in {_LONGEST} at most; got {shown(shape)}")
    elif isinstance(inputs, dict | list) and (depth > 4 or len(inputs) > 64):
        raise BadValue(f"{where} must be a model's arguments; got {shown(inputs)}")
    elif isinstance(inputs, dict):
        for key, value in inputs.items():
            _check_inputs(f"{where}.{key}", value, depth + 1)
    elif isinstance(inputs, list):
        for index, value in enumerate(inputs):
            _check_inputs(f"{where}[{index}]", value, depth + 1)


def same_blocks(source: str, names: list[str], inputs: Any, model: nn.Module) -> Blocks:
    """The blocks of ``model`` whose up layers are called ``names``.

    ``inputs`` describes what they are found with, ``source`` says in the error where they were.

    Raises:
        ValueError: the model has others.
    """
    try:
        found = find_mlp_blocks(model, dummy_inputs(inputs, next(model.parameters()).device))
    except NoMLPFound:
        raise
    except Exception as error:  # whatever a model does with inputs that are not its own
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
    check(f"{path / SIDECAR}: sidecar.{key}", values, [kind])
    if len(values) != len(absent):
        raise BadValue(
            f"{path / SIDECAR}: sidecar.{key} must be a list of {len(absent)}, one for each block; "
            f"got {shown(values)}"
        )
    return list(values)

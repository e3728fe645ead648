"""``actsparse.json``, which describes how a saved model was changed: write, read, check."""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Annotated, Any

import torch
from torch import nn

from actsparse import files
from actsparse.blocks.block import Blocks, unwrap
from actsparse.blocks.example_inputs import dummy_inputs
from actsparse.blocks.find import find_mlp_blocks
from actsparse.blocks.refused import NoMLPFound
from actsparse.modify.apply import is_peft_model
from actsparse.modify.config_note import Note, noted
from actsparse.modify.handle import handle_of
from actsparse.modify.prune_units import pruned_layers
from actsparse.modify.rebuild_model import adapter_configs, how_to_build
from actsparse.modify.recipe import Recipe
from actsparse.modify.thresholds import thresholds_of
from actsparse.modify.weights import WEIGHTS, weight_files
from actsparse.untrusted import read_json
from actsparse.values import BadValue, Count, Positive, Rule, Text, check, shown

SIDECAR = "actsparse.json"
_FORMAT = 1


def describe(model: nn.Module, caller: str) -> dict[str, Any]:
    """All that a sidecar says: :func:`describe_changes`, and how to build the plain model.

    Raises:
        ValueError: as :func:`describe_changes`; adapters that are merged into their layers.
    """
    root = unwrap(model)
    base = root.get_base_model() if is_peft_model(root) else root  # type: ignore[operator]
    for name, module in root.named_modules():
        if getattr(module, "merged_adapters", None):
            raise ValueError(
                f"{caller} would add adapters twice: they are merged into the weight of {name}; "
                f"call unmerge_adapter() first, or actsparse.merge_adapter(model) for one without"
            )
    return {
        **describe_changes(root, caller, whole=True),
        "model": how_to_build(root, base),
        "adapters": None if base is root else adapter_configs(root),
    }


def describe_noted(model: nn.Module) -> dict[str, Any]:
    """What a config's note says of the model around it; the config itself says the rest."""
    try:
        said = describe(model, "save_pretrained()")
    except ValueError as error:
        return {"unknown": str(error)}
    if said["model"] is not None:
        del said["model"]["config"]
    return said


def changed(root: nn.Module) -> bool:
    """Whether a model computes something else in evaluation than its class does."""
    handle, found = handle_of(root), thresholds_of(root)
    by_recipe = handle is not None and handle.changes_function
    return bool(by_recipe or (found is not None and found.in_force()) or pruned_layers(root))


Note.describe = staticmethod(describe_noted)
Note.is_due = staticmethod(changed)


def describe_changes(root: nn.Module, caller: str, whole: bool = False) -> dict[str, Any]:
    """What a sidecar says of a sparsified model: recipe, schedules, blocks and how to find them.

    ``caller`` is whom the errors speak of; ``whole``: it keeps all of the model, thresholds too.

    Raises:
        ValueError: the model is not sparsified, its recipe holds a function, or nothing is known
            of the inputs its blocks were found with; thresholds or widths that cannot be kept.
    """
    handle, found = handle_of(root), thresholds_of(root)
    if handle is not None:
        blocks, recipe, state = handle.blocks, handle.recipe, handle.state_dict()
    elif found is not None:
        blocks, recipe, state = found.blocks, Recipe("vanilla"), {"step": 0, "steps": None}
    else:
        raise ValueError(
            f"{caller} is for a sparsified model, or one with thresholds; save a plain one by its "
            f"own method; if it was pruned, call sparsify(model, 'vanilla', inputs=...) first"
        )
    modules = dict(root.named_modules(remove_duplicate=False))
    if any(modules.get(block.up.name) is not block.up.module for block in blocks):
        raise ValueError(f"{caller} is for the model whose blocks were found, not for another")
    if blocks.inputs is None:
        raise ValueError(f"{caller} needs the blocks that find_mlp_blocks returned, no plain list")
    thresholds = {} if found is None else found.in_force()
    lost = thresholds.keys() - {block.up.module for block in blocks}
    if lost or (thresholds and not whole):
        why = "its blocks are not those that were sparsified" if whole else "use save()"
        raise ValueError(
            f"{caller} would lose the model's thresholds: {why}, or remove() them first"
        )
    covered = {part for block in blocks for part in block.up.module.modules()}
    narrow = [name for name, layer in pruned_layers(root).items() if layer not in covered]
    if narrow and whole:
        raise ValueError(
            f"{caller} would lose the widths of {', '.join(narrow)}, which were pruned but not "
            f"sparsified: sparsify these blocks too, or undo the pruning first"
        )
    sidecar = {
        "format": _FORMAT,
        "recipe": recipe.to_json(),
        "state": state,
        "blocks": [block.up.name for block in blocks],
        "inputs": blocks.inputs,
        "model": None,
    }
    if whole:
        each = [thresholds.get(block.up.module, 0.0) for block in blocks]
        sidecar |= {"widths": [block.d_hidden for block in blocks], "thresholds": each}
    return sidecar


def write_sidecar(folder: Path, sidecar: dict[str, Any]) -> None:
    """Write ``actsparse.json``, last of a folder's files: it vouches for the weights."""
    digests = {file.name: files.sha256(file) for file in sorted(folder.glob("*.safetensors"))}
    text = json.dumps({**sidecar, "sha256": digests}, indent=1)
    (folder / SIDECAR).write_text(text, encoding="utf-8")


def check_weights(folder: Path, sidecar: dict[str, Any], *names: str) -> None:
    """Raise `ValueError` where weights, all or those named, are not those that were saved.

    Older sidecars and notes in ``config.json`` have no digests, and vouch for nothing.
    """
    if "sha256" not in sidecar:
        return
    names = names or tuple(file.name for file in weight_files(folder))
    digests = sidecar["sha256"]
    if not set(names) <= set(digests):
        raise BadValue(
            f"{folder / SIDECAR} is not as save() writes it: 'sha256' is {shown(digests)}; "
            f"expected the digests of {', '.join(names)}"
        )
    for name in names:
        if digests[name] != (found := files.sha256(folder / name)):
            raise ValueError(
                f"{folder / name} is not what was saved: its SHA-256 is {found}, in {SIDECAR} it "
                f"is {digests[name]}"
            )


def check_unchanged(folder: Path, sidecar: dict[str, Any]) -> None:
    """Raise `ValueError` where a folder was saved anew since its sidecar was read."""
    if read_sidecar(folder) != sidecar:
        raise ValueError(f"{folder} was saved anew while it was loaded; load it again")


def recipe_of(path: Path, sidecar: dict[str, Any]) -> Recipe:
    """The recipe that a sidecar names.

    Raises:
        ValueError: it is none, or one of unknown modifications.
    """
    return Recipe.from_json(sidecar["recipe"], f"{path / SIDECAR}: sidecar.recipe")


def read_sidecar(folder: Path, *others: str) -> dict[str, Any]:
    """``actsparse.json`` as plain values, of a folder that holds files called ``others`` as well.

    Where there is none, a note in ``config.json`` says the same, as ``save_pretrained`` leaves it.

    Raises:
        FileNotFoundError: one of them is missing.
        ValueError: the sidecar is torn, foreign or of another version.
    """
    if not folder.exists():  # a save that was killed may have moved it away
        files.sweep(folder.resolve())
    note = None if (folder / SIDECAR).is_file() else noted(folder)
    for name in (*([SIDECAR] if note is None else []), *others):
        there = weight_files(folder) if name == WEIGHTS else (folder / name).is_file()
        if not there:
            adapter = name == WEIGHTS and (folder / "adapter_config.json").is_file()
            what = "adapters alone, for load_adapter" if adapter else "not a folder of save()"
            raise FileNotFoundError(f"{folder / name} is missing: {what}")
    file = folder / (SIDECAR if note is None else "config.json")
    sidecar = read_json(file) if note is None else _whole(*note)
    where = f"{file}: sidecar"
    if isinstance(sidecar, dict) and "unknown" in sidecar:
        why = str(sidecar["unknown"])[:400].encode("unicode_escape").decode()
        raise BadValue(f"{file} cannot say how its model was changed: {why}")
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
    "sha256?": dict[str, str],
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


def _whole(said: dict[str, Any], config: dict[str, Any]) -> dict[str, Any]:
    """A note made up to a sidecar by the config that it stood in."""
    if isinstance(said.get("model"), dict):
        said["model"] = {**said["model"], "config": config}
    return said


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

"""Save and load a sparsified model: safetensors beside a JSON file that says how to rebuild it."""

from __future__ import annotations

import contextlib
import json
import os
import re
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load_model, save_model
from torch import nn

from actsparse import files
from actsparse.blocks.block import Blocks, unwrap
from actsparse.blocks.find import find_mlp_blocks
from actsparse.blocks.inputs import dummy_inputs
from actsparse.blocks.sharding import gathered_state, own_class, sharded
from actsparse.modify.handle import Handle, handle_of
from actsparse.modify.prune_units import Pruned, cut, pruned_layers
from actsparse.modify.recipe import Recipe
from actsparse.modify.sparsify import is_peft_model, sparsify
from actsparse.modify.thresholds import put_thresholds, thresholds_of

SIDECAR, WEIGHTS = "actsparse.json", "model.safetensors"
_FORMAT = 1


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
        "model": _how_to_build(root, base),
        "adapters": None if base is root else _adapter_configs(root),
    }
    whole: Any = root
    if sharded(root.modules()):
        state = gathered_state(root)
        if torch.distributed.get_rank():
            return Path(path)
        whole = SimpleNamespace(state_dict=lambda: state)  # all that is asked of a model
    with files.whole_folder(path, {SIDECAR, WEIGHTS}) as folder:
        _write(whole, folder / WEIGHTS)
        write_sidecar(folder, sidecar)
    return Path(path)


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
    """Write ``actsparse.json``, last of a folder's files: it vouches for the weights."""
    digests = {file.name: files.sha256(file) for file in sorted(folder.glob("*.safetensors"))}
    text = json.dumps({**sidecar, "sha256": digests}, indent=1)
    (folder / SIDECAR).write_text(text, encoding="utf-8")


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
    check_weights(path, sidecar, WEIGHTS)
    recipe = recipe_of(path, sidecar)
    adapters = sidecar.get("adapters")
    spec = sidecar["model"] if model is None else None
    if model is None:
        model = _build(path, spec)
    wraps = adapters is not None and not is_peft_model(unwrap(model))
    names = [_in_base(name) for name in sidecar["blocks"]] if wraps else sidecar["blocks"]
    kept = same_blocks(str(path), names, sidecar["inputs"], model)
    with removed_on_failure(_narrowed(path, sidecar, model, kept)):
        if wraps:
            model = _wrap(path, model, adapters)
            if spec is not None:
                _cast(model, spec["dtypes"])
                model.eval()
            kept = same_blocks(str(path), sidecar["blocks"], sidecar["inputs"], model)
        _read_weights(model, path / WEIGHTS, strict=False)  # so that sparsify meets saved norms
        handle = sparsify(model, recipe, blocks=kept)
        with removed_on_failure(handle):
            _read_weights(model, path / WEIGHTS, strict=True)
            handle.load_state_dict(sidecar["state"])
            thresholds = _by_block(path, sidecar, "thresholds", int | float, [0] * len(kept))
            put_thresholds(model, kept, thresholds)
            check_unchanged(path, sidecar, WEIGHTS)
    return model


def _narrowed(path: Path, sidecar: dict[str, Any], model: nn.Module, blocks: Blocks) -> Pruned:
    """The model's blocks cut to the widths that were saved; which units stay does not matter."""
    have = [block.d_hidden for block in blocks]
    widths = _by_block(path, sidecar, "widths", int, have)
    if not all(0 < width <= whole for width, whole in zip(widths, have, strict=True)):
        raise ValueError(
            f"{path} does not fit the model: it has blocks of {widths} hidden units, "
            f"{type(model).__name__} of {have}"
        )
    named = {block.up.name: block for block in blocks}
    return cut(model, named, dict(zip(named, map(torch.arange, widths), strict=True)))


def _by_block(
    path: Path, sidecar: dict[str, Any], key: str, kind: Any, absent: list[Any]
) -> list[Any]:
    """A sidecar's list of one number, 0 or more, for each block; ``absent`` if it has none."""
    values = sidecar.get(key, absent)
    listed = isinstance(values, list) and len(values) == len(absent)
    if not listed or not all(isinstance(value, kind) and value >= 0 for value in values):
        raise ValueError(f"{path / SIDECAR} is not as save() writes it: {key!r} is {values!r}")
    return values


@contextlib.contextmanager
def removed_on_failure(handle: Handle | Pruned) -> Iterator[None]:
    """Take a change back where what is read into the model afterwards does not fit it."""
    try:
        yield
    except BaseException:
        handle.remove()
        raise


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


def _read_weights(model: nn.Module, file: Path, strict: bool) -> None:
    try:
        load_model(unwrap(model), str(file), strict=strict)
    except (SafetensorError, RuntimeError) as error:
        raise ValueError(f"{file} does not fit the model: {error}") from error


def check_weights(folder: Path, sidecar: dict[str, Any], *names: str) -> None:
    """Raise `ValueError` where weights are not those that were saved.

    Older sidecars have no digests, and vouch for nothing.
    """
    if "sha256" not in sidecar:
        return
    digests = sidecar["sha256"]
    if not isinstance(digests, dict) or not set(names) <= set(digests):
        raise ValueError(
            f"{folder / SIDECAR} is not as save() writes it: 'sha256' is {digests!r}; expected the "
            f"digests of {', '.join(names)}"
        )
    for name in names:
        if digests[name] != (found := files.sha256(folder / name)):
            raise ValueError(
                f"{folder / name} is not what was saved: its SHA-256 is {found}, in {SIDECAR} it "
                f"is {digests[name]}"
            )


def check_unchanged(folder: Path, sidecar: dict[str, Any], *names: str) -> None:
    """Raise `ValueError` where a folder was saved anew since its sidecar was read."""
    if read_sidecar(folder, *names) != sidecar:
        raise ValueError(f"{folder} was saved anew while it was loaded; load it again")


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
    if not folder.exists():  # a save that was killed may have moved it away
        files.sweep(folder.resolve())
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


def _adapter_configs(model: Any) -> dict[str, Any]:
    """peft's configs by the names of the adapters, the active one first."""
    names = dict.fromkeys([*model.active_adapters, *model.peft_config])
    configs = {name: model.peft_config[name].to_dict() for name in names}
    return json.loads(json.dumps(configs, default=sorted))  # JSON has no sets


def _wrap(path: Path, model: nn.Module, adapters: Any) -> nn.Module:
    import peft

    try:
        wrapped: nn.Module = model
        for name, values in adapters.items():
            config = peft.PeftConfig.from_peft_type(**values)
            if is_peft_model(wrapped):
                wrapped.add_adapter(name, config)  # type: ignore[operator]
            else:
                wrapped = peft.get_peft_model(model, config, adapter_name=name)
        return wrapped
    except Exception as error:
        raise ValueError(
            f"{path}: cannot put its adapters on {type(model).__name__}: {error}"
        ) from error


def _how_to_build(root: nn.Module, model: nn.Module) -> dict[str, Any] | None:
    """Class and config of ``model``, dtypes by the names they have in ``root`` around it."""
    cls = own_class(model)
    config = getattr(model, "config", None)
    if cls.__module__.split(".")[0] != "transformers" or config is None:
        return None
    return {
        "class": cls.__name__,
        "config": json.loads(config.to_json_string(use_diff=False)),
        "attention": getattr(config, "_attn_implementation", None),  # not in the config's file
        "dtypes": {
            name: str(tensor.dtype).removeprefix("torch.")
            for name, tensor in _floats(root)
            if tensor.dtype != torch.float32
        },
    }


def _floats(model: nn.Module) -> list[tuple[str, torch.Tensor]]:
    """Parameters and buffers, those that no state dict holds among them."""
    both = [*model.named_parameters(), *model.named_buffers()]
    return [(name, tensor) for name, tensor in both if tensor.is_floating_point()]


def _in_base(name: str) -> str:
    """The name that a part of a ``PeftModel`` has in its base.

    >>> _in_base("base_model.model.h.0.fc1.base_layer.weight")
    'h.0.fc1.weight'
    """
    for inserted in (".base_layer", ".original_module"):
        name = name.replace(inserted, "")
    return name.removeprefix("base_model.model.")


def _build(path: Path, spec: dict[str, Any] | None) -> nn.Module:
    """The plain model, in the dtypes it was saved with."""
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
        _cast(model, {_in_base(name): dtype for name, dtype in spec["dtypes"].items()})
    except Exception as error:
        raise ValueError(
            f"{path}: cannot build {spec['class']} from its config: {error}"
        ) from error
    return model.eval()


def _cast(model: nn.Module, dtypes: dict[str, str]) -> None:
    for name, tensor in _floats(model):
        tensor.data = tensor.data.to(getattr(torch, dtypes.get(name, "float32")))

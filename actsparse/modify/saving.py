"""Save and load a sparsified model: safetensors beside a JSON file that says how to rebuild it."""

from __future__ import annotations

import contextlib
import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from torch import nn

from actsparse import files
from actsparse.blocks.block import Blocks, unwrap
from actsparse.blocks.sharding import gathered_state, sharded
from actsparse.modify.apply import is_peft_model, sparsify
from actsparse.modify.handle import Handle
from actsparse.modify.prune_units import Pruned, cut
from actsparse.modify.rebuild_model import build, cast, in_base, wrap
from actsparse.modify.sidecar import (
    SIDECAR,
    by_block,
    check_unchanged,
    check_weights,
    describe,
    read_sidecar,
    recipe_of,
    same_blocks,
    write_sidecar,
)
from actsparse.modify.step_buffer import BUFFER
from actsparse.modify.thresholds import put_thresholds
from actsparse.modify.weights import (
    WEIGHTS,
    by_module_names,
    load_weights,
    read_weights,
    weight_files,
    weight_shapes,
    write_weights,
)
from actsparse.values import AtLeast0, Count


def save(model: nn.Module, path: str | os.PathLike[str]) -> Path:
    """Write a sparsified model, or one with thresholds, to a folder that :func:`load` reads.

    ``model.safetensors`` holds every parameter and buffer, zeroth biases among them.
    ``actsparse.json`` holds the recipe and its step, the number of hidden units of each block
    (:func:`actsparse.prune_dead_units`), thresholds (:func:`actsparse.calibrate_thresholds`) and,
    for models of ``transformers``, class and config, so that :func:`load` needs nothing else.
    Pruned units are not written. Of a ``PeftModel`` the base and the adapters are written, with the
    adapters' configs (:func:`actsparse.modify.adapters.save_adapter` leaves out the base).

    Args:
        model: the model. If it is sharded (FSDP2), call save in every process: parameters are
            gathered and the first process writes them.
        path: the folder. It is written whole or not at all. A folder that save wrote before is
            replaced.

    Returns:
        The folder.

    Raises:
        ValueError: the model is not changed, its recipe holds a function, or a block that was
            pruned or has a threshold is none of those sparsified.
        FileExistsError: ``path`` is a file, or a folder with other files in it.
        OSError: the folder cannot be written; what was there before is still there.

    >>> import tempfile
    >>> from actsparse import handle_of
    >>> def mlp():
    ...     return nn.Sequential(nn.LayerNorm(8), nn.Linear(8, 32), nn.ReLU(), nn.Linear(32, 8))
    >>> model, x = mlp(), torch.randn(2, 5, 8)
    >>> handle = sparsify(model, "paper", inputs=x)
    >>> with tempfile.TemporaryDirectory() as folder:
    ...     path = save(model, f"{folder}/saved")
    ...     again = load(path, mlp())
    >>> torch.equal(again(x), model(x)), handle_of(again).recipe.name
    (True, 'paper')
    """
    root = unwrap(model)
    sidecar = describe(root, "save()")
    if sharded(root.modules()):
        state = gathered_state(root)
        if torch.distributed.get_rank():
            return Path(path)
    else:
        state = root.state_dict()
    with files.whole_folder(path, {SIDECAR, WEIGHTS}) as folder:
        write_weights(state, folder / WEIGHTS)
        write_sidecar(folder, sidecar)
    return Path(path)


def load(path: str | os.PathLike[str], model: nn.Module | None = None) -> nn.Module:
    """Load a model that :func:`save` wrote, with its recipe, thresholds and widths.

    It also reads what ``save_pretrained`` wrote of a model whose function actsparse had changed,
    and checkpoints of a Trainer with ``SparsityCallback``. Nothing is unpickled, and no code from
    the folder runs. The example of :func:`save` shows both.

    Args:
        path: the folder.
        model: the plain model, with any weights; if it was pruned, whole or as narrow. It may be
            left out for classes of ``transformers``: the model then comes in eval mode, with the
            dtypes it was saved with.

    Returns:
        The model, sparsified: ``actsparse.handle_of(model)`` is its handle. If it was saved with
        peft's adapters, a ``PeftModel`` around it.

    Raises:
        FileNotFoundError: the folder or one of its two files is missing.
        ValueError: files that are damaged or not written by save, or a model that does not fit.
    """
    path = Path(path)
    sidecar = read_sidecar(path, WEIGHTS)
    check_weights(path, sidecar)
    recipe, adapters = recipe_of(path, sidecar), sidecar.get("adapters")
    shapes = weight_shapes(path)  # by their headers: what lies is refused before it is read
    weights = read_weights(weight_files(path))
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
        root, source = unwrap(model), str(path)
        early = by_module_names(root, weights, source)
        load_weights(root, early, source, strict=False)  # so that sparsify meets saved norms
        handle = sparsify(model, recipe, blocks=kept)
        with removed_on_failure(handle):
            handle.load_state_dict(sidecar["state"])
            own = {name: value for name, value in root.state_dict().items() if name == BUFFER}
            late = {**own, **by_module_names(root, weights, source)}  # older files have no buffer
            load_weights(root, late, source, strict=True)
            handle.load_state_dict(sidecar["state"])
            thresholds = by_block(path, sidecar, "thresholds", AtLeast0, [0] * len(kept))
            put_thresholds(model, kept, thresholds)
            check_unchanged(path, sidecar)
    if spec is not None and not wraps and (path / "config.json").is_file():
        for named in (model, model.config):  # else it goes by the name of what it was made of
            named.name_or_path = str(path)  # type: ignore[union-attr]
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

"""Read and write a model's weights in safetensors files, actsparse's or transformers'."""

from __future__ import annotations

import contextlib
import os
import re
import sys
import tempfile
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from actsparse.untrusted import read_json, safetensors_shapes

WEIGHTS = "model.safetensors"
INDEX = f"{WEIGHTS}.index.json"


def write_weights(state: Mapping[str, Tensor], file: Path) -> None:
    """Write a state dict: what has several names once, parts of one buffer each on its own.

    Raises:
        OSError: the file cannot be written.
    """
    first: dict[Any, str] = {}
    for name, tensor in state.items():
        first.setdefault(_place(name, tensor), name)
    tensors = {}
    for name in first.values():
        tensor = state[name].contiguous()
        whole = tensor.untyped_storage().nbytes() == tensor.nbytes
        tensors[name] = tensor if whole else tensor.clone()
    with disk_refusals(file):
        save_file(tensors, str(file), metadata={"format": "pt"})


@contextlib.contextmanager
def disk_refusals(file: Path) -> Iterator[None]:
    """Raise OSError where safetensors, inside, cannot write ``file``, as on a full disk."""
    try:
        yield
    except SafetensorError as error:
        found = re.search(r"os error (\d+)", str(error))
        if found is None:
            raise
        code = int(found[1])
        raise OSError(code, os.strerror(code), str(file)) from error


def weight_files(folder: Path) -> list[Path]:
    """The files that hold a folder's weights, one or several with an index; none is none.

    Raises:
        ValueError: an index that is torn, or names files elsewhere.
    """
    one, index = folder / WEIGHTS, folder / INDEX
    if one.is_file() or not index.is_file():
        return [one] if one.is_file() else []
    try:
        names = sorted(set(read_json(index)["weight_map"].values()))
        files = [folder / name for name in names]
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise ValueError(f"{index} is not an index of weights: {error}") from error
    for name, file in zip(names, files, strict=True):
        if Path(name).name != name or not name.endswith(".safetensors") or not file.is_file():
            raise ValueError(f"{index} names {name!r}, which is no file of safetensors beside it")
    return files


def weight_shapes(folder: Path) -> dict[str, tuple[int, ...]]:
    """Name → shape of a folder's weights, by the headers of its files.

    Raises:
        ValueError: a file that is none of safetensors, or whose header lies.
    """
    return {
        name: s for file in weight_files(folder) for name, s in safetensors_shapes(file).items()
    }


def read_weights(files: Iterable[Path]) -> dict[str, Tensor]:
    """All tensors of some files by name.

    Raises:
        ValueError: a file that is not whole.
    """
    state: dict[str, Tensor] = {}
    for file in files:
        try:
            state |= load_file(file)
        except SafetensorError as error:
            raise ValueError(f"{file} does not fit: it is not whole: {error}") from error
    return state


def load_weights(model: nn.Module, state: dict[str, Tensor], source: str, strict: bool) -> None:
    """Load a state dict in which a tensor with several names may have one alone.

    Raises:
        ValueError: it does not fit the model.
    """
    try:
        result = model.load_state_dict(state, strict=False)
    except RuntimeError as error:
        raise ValueError(f"{source} does not fit the model: {error}") from error
    if not strict:
        return
    own = model.state_dict()
    loaded = {_place(name, tensor) for name, tensor in own.items() if name in state}
    missing = [name for name in result.missing_keys if _place(name, own[name]) not in loaded]
    for what, names in (("lacks", missing), ("has, as none of it,", result.unexpected_keys)):
        if names:
            raise ValueError(f"{source} does not fit the model: it {what} {', '.join(names[:3])}")


def by_module_names(model: Any, state: dict[str, Tensor], source: str) -> dict[str, Tensor]:
    """Weights as ``save_pretrained`` has written them, by the names that the model has for them.

    transformers keeps the names of old checkpoints in files; it is asked for them with a file of
    single numbers.

    Raises:
        ValueError: it keeps them in other shapes too.
    """
    names = list(model.state_dict())
    if state.keys() <= set(names) or not hasattr(model, "save_pretrained"):
        return state
    numbers = {name: torch.tensor(float(i)) for i, name in enumerate(names)}
    with tempfile.TemporaryDirectory() as folder:
        try:
            with _no_bar():
                model.save_pretrained(folder, state_dict=numbers)
            called = read_weights(weight_files(Path(folder)))
        except Exception as error:
            raise ValueError(
                f"{source}: transformers stores {type(model).__name__} in other shapes than the "
                f"model has it ({error}); save it with actsparse.save"
            ) from error
    back = {there: names[int(number)] for there, number in called.items()}
    return {back.get(name, name): tensor for name, tensor in state.items()}


@contextlib.contextmanager
def _no_bar() -> Iterator[None]:
    """Without transformers' progress bar, whose other switches would change a user's choice."""
    logging: Any = sys.modules.get("transformers.utils.logging")
    if logging is None:
        yield
        return
    shown, logging._tqdm_active = logging._tqdm_active, False
    try:
        yield
    finally:
        logging._tqdm_active = shown


def _place(name: str, tensor: Tensor) -> Any:
    """What is the same for two names of one tensor."""
    if tensor.device.type == "meta" or not tensor.numel():
        return name
    return tensor.device, tensor.data_ptr(), tensor.shape, tensor.stride(), tensor.dtype

"""Limits on configs from untrusted sources: what they may ask for, how much they may build.

The libraries that read a config do what it says: fetch a kernel from the Hub and run it, import a
module by name, build a million layers. Here such settings are refused by name, before a model is
built. Building stops if the model becomes larger than the file of weights.
"""

from __future__ import annotations

import math
import os
import re
import threading
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from torch import Tensor, nn
from torch.nn.modules import module as hooks

from actsparse.extras import needed
from actsparse.untrusted import check_regular
from actsparse.values import BadValue, check, shown

Shapes = Mapping[str, tuple[int, ...]]

_DEEPEST = 32
_MANY = re.compile(r"(?:^(?:num|n)_.*(?:layer|block|group|expert|stage).*|.*layers?|.*depths?)$")
_LARGE = re.compile(r"position|length|theta|token|window|_ids?$|base|seed|freq|limit|scal|max_")
TUNERS = ("LORA", "ADALORA", "IA3", "LOHA", "LOKR", "OFT", "BOFT", "HRA", "LN_TUNING")
_NOT_OURS = (  # auto_mapping, which names a module, is read by AutoPeftModel alone
    "megatron_config", "layer_replication", "eva_config", "corda_config",
    "loftq_config", "lora_ga_config", "arrow_config", "trust_remote_code",
)  # fmt: skip
# a repeated group, or many repetitions: backtracking may take longer than anyone waits
_SLOW = re.compile(r"\)[*+{?]|(?:[*+}].*){6}", re.DOTALL)


def model_class(where: str, name: Any) -> Any:
    """The model class of transformers that is called ``name``.

    Raises:
        BadValue: there is none: no other attribute of transformers is made an object of.

    >>> model_class("actsparse.json", "Trainer")
    Traceback (most recent call last):
    ...
    actsparse.values.BadValue: actsparse.json: 'Trainer' is not a model class of transformers
    """
    transformers = needed("transformers", "a model of Hugging Face")
    cls = getattr(transformers, name, None) if isinstance(name, str) else None
    if not (isinstance(cls, type) and issubclass(cls, transformers.PreTrainedModel)):
        raise BadValue(f"{where}: {shown(name)} is not a model class of transformers")
    return cls


def check_config(where: str, config: Any, shapes: Shapes | None = None) -> None:
    """Refuse a model's config that asks for code or files of others, or for very much.

    Args:
        where: the file, for the message.
        config: plain values.
        shapes: of the tensors that the weights hold, if there are any.

    Raises:
        BadValue: and what it asks for.

    >>> check_config("config.json", {"attn_implementation": "somebody/kernel"})
    Traceback (most recent call last):
    ...
    actsparse.values.BadValue: config.json: attn_implementation='somebody/kernel': expected the \
name of an implementation in transformers; nothing is fetched from the Hub
    """
    check(where, config, dict)
    layers = max(256, len(shapes or ()))
    largest = max(2**20, *(max(shape, default=0) for shape in (shapes or {}).values()), 0)
    for path, key, value, beside in _leaves(where, config):
        said = f"{where}: {path}={shown(value)}: expected"
        if "implementation" in path and isinstance(value, str) and "/" in value:
            raise BadValue(
                f"{said} the name of an implementation in transformers; nothing is fetched from "
                f"the Hub"
            )
        if key == "trust_remote_code" and value:
            raise BadValue(f"{said} nothing or false; code that a config brings is not run")
        if key == "backbone" and isinstance(value, str) and not beside.get("backbone_config"):
            raise BadValue(f"{said} a backbone_config; nothing is fetched from the Hub")
        if key == "use_pretrained_backbone" and value:
            raise BadValue(f"{said} nothing or false; nothing is fetched from the Hub")
        if not isinstance(value, int) or isinstance(value, bool):
            continue
        if _MANY.match(key) and value > layers:
            raise BadValue(f"{said} at most {layers}; the weights are {len(shapes or ())} tensors")
        if abs(value) > (2**40 if _LARGE.search(key) else largest):
            raise BadValue(f"{said} at most {largest}")


def check_adapter(where: str, values: Any) -> None:
    """Refuse a config of peft that is none of ours: an unexpected kind, or one that imports.

    Raises:
        BadValue: and what is wrong.

    >>> check_adapter("adapter_config.json", {"peft_type": "PROMPT_TUNING"})
    Traceback (most recent call last):
    ...
    actsparse.values.BadValue: adapter_config.json: peft_type='PROMPT_TUNING': expected one of \
LORA, ADALORA, IA3, LOHA, LOKR, OFT, BOFT, HRA, LN_TUNING
    """
    check(where, values, {"peft_type": str})
    if (kind := values["peft_type"]) not in TUNERS:
        raise BadValue(f"{where}: peft_type={shown(kind)}: expected one of {', '.join(TUNERS)}")
    for key in _NOT_OURS:
        if values.get(key):
            raise BadValue(f"{where}: {key}={shown(values[key])}: expected none")
    for path, key, value, _ in _leaves(where, values):
        for text in (key, value):
            if isinstance(text, str) and _SLOW.search(text):
                raise BadValue(
                    f"{where}: {path}={shown(text)}: expected names, or a pattern without repeated "
                    f"groups and with at most 5 repetitions"
                )


@contextmanager
def bounded(where: str, shapes: Shapes | None) -> Iterator[None]:
    """Stop this thread where it builds more modules and tensors than ``shapes`` could fill.

    Sixteen times the file is allowed, and what is small in any case: a model is built before it is
    pruned, and tied weights are in the file once. Without ``shapes`` half of the memory is.

    Raises:
        BadValue: inside, from the constructor that goes beyond.
    """
    if shapes is None:
        count, elements = 2**16, os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") // 8
        most = "half of the memory"
    else:
        held = sum(map(math.prod, shapes.values()))
        count, elements = 64 * len(shapes) + 2**14, 16 * held + 2**26
        most = f"its weights, {len(shapes)} tensors of {held:,} elements"
    thread = threading.get_ident()

    def built(module: nn.Module, name: str, part: Any) -> None:
        nonlocal count, elements
        if threading.get_ident() != thread:
            return
        count -= 1
        elements -= part.numel() if isinstance(part, Tensor) else 0
        if count < 0 or elements < 0:
            raise BadValue(f"{where}: its config describes a far larger model than {most}")

    handles = [
        hooks.register_module_parameter_registration_hook(built),
        hooks.register_module_buffer_registration_hook(built),
        hooks.register_module_module_registration_hook(built),
    ]
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()


def check_shapes(where: str, model: nn.Module, shapes: Shapes) -> None:
    """Compare a model with the file of its weights, by name; of pruned layers one side is shorter.

    Raises:
        BadValue: a tensor of the model has another shape there.
    """
    for name, tensor in model.state_dict().items():
        have, held = tuple(tensor.shape), shapes.get(name, tuple(tensor.shape))
        shorter = len(have) == len(held) and sum(map(int.__ne__, have, held)) <= 1
        if have != held and not (shorter and all(map(int.__le__, held, have))):
            raise BadValue(
                f"{where}: its config gives {name} the shape {list(have)}, the weights hold "
                f"{list(held)}"
            )


def check_files(folder: Path) -> None:
    """Refuse a folder in which anything but regular files and folders lies.

    Raises:
        BadValue: a FIFO, a socket, a device, or a link to one or to nothing.
    """
    for entry in sorted(folder.iterdir()):
        if not entry.is_dir():
            try:
                check_regular(entry)
            except OSError as error:
                raise BadValue(f"cannot read {entry}: {error.strerror or error}") from error


def _leaves(where: str, values: Any) -> Iterator[tuple[str, str, Any, dict[str, Any]]]:
    """(path, key, value, the object it is in) of all that is not a list or an object."""
    queue: list[tuple[str, str, Any, dict[str, Any], int]] = [("", "", values, {}, 0)]
    while queue:
        path, key, value, beside, depth = queue.pop()
        if depth > _DEEPEST:
            raise BadValue(f"{where}: {path[:80]}…: nested too deep")
        if isinstance(value, dict):
            queue += [
                (f"{path}.{name}".lstrip("."), name, each, value, depth + 1)
                for name, each in value.items()
            ]
        elif isinstance(value, list):
            queue += [(path, key, each, beside, depth + 1) for each in value]
        else:
            yield path, key, value, beside

"""The models that can be named on the command line, each with inputs it runs on."""

from __future__ import annotations

import copy
import importlib
import os
import sys
from contextlib import suppress
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import nn

from actsparse.cli.laboratory import laboratory
from actsparse.extras import needed
from actsparse.modify.foreign_config import bounded, check_config, model_class
from actsparse.untrusted import read_json
from actsparse.values import BadValue, check

_LENGTH = 16  # tokens


def model_named(name: str) -> tuple[nn.Module, Any]:
    """The model and inputs it runs on; weights are random.

    ``name`` is the laboratory's name of a task, the path of a Hugging Face folder or config, or
    ``package.module:factory``. Raises `ValueError` that says what would be right.
    """
    tasks = () if laboratory() is None else laboratory().MODELS
    if name in tasks:
        model: nn.Module = laboratory().task_model(name)
        return model, inputs_of(model)
    if os.path.exists(name):
        model = _from_config(Path(name))
        return model, inputs_of(model)
    if ":" in name:
        return _from_factory(name)
    known = f"one of {', '.join(tasks)}, " if tasks else ""
    raise ValueError(
        f"no model {name!r}: expected {known}the path of a local Hugging Face folder or "
        f"config.json, or package.module:factory"
    )


def _from_config(path: Path) -> nn.Module:
    transformers = needed("transformers", "a config of Hugging Face")
    transformers.logging.set_verbosity_error()
    if path.is_dir() and not (path / "config.json").is_file():
        raise ValueError(f"{path} holds no config.json")
    file = path / "config.json" if path.is_dir() else path
    values = read_json(file)
    check(str(file), values, {"architectures?": ([str], None)})
    check_config(str(file), values)
    try:
        config = transformers.AutoConfig.from_pretrained(
            path, local_files_only=True, trust_remote_code=False
        )
        made = partial(transformers.AutoModel.from_config, trust_remote_code=False)
        for name in values.get("architectures") or ():
            with suppress(BadValue):
                made = model_class(str(file), name)
                break
        with bounded(str(file), None):
            with torch.device("meta"):
                made(copy.deepcopy(config))
            model: nn.Module = made(config)
            return model
    except Exception as error:  # whatever a stranger's config does wrong
        raise ValueError(f"{path} is no config that transformers knows: {error}") from error


def called(name: str) -> Any:
    """What ``package.module:function`` returns, or the object itself where it is no function.

    Raises:
        ValueError: it cannot be imported, or fails.
    """
    module, _, attribute = name.partition(":")
    sys.path.insert(0, os.getcwd())  # as `python -m` does
    try:
        factory = getattr(importlib.import_module(module), attribute)
    except (ImportError, AttributeError) as error:
        raise ValueError(f"cannot import {name!r}: {error}") from error
    finally:
        sys.path.remove(os.getcwd())
    try:
        return factory() if callable(factory) and not isinstance(factory, nn.Module) else factory
    except Exception as error:  # whatever a stranger's factory does wrong
        raise ValueError(f"{name} failed: {type(error).__name__}: {error}") from error


def _from_factory(name: str) -> tuple[nn.Module, Any]:
    made = called(name)
    if isinstance(made, nn.Module):
        return made, inputs_of(made)
    if isinstance(made, tuple) and len(made) == 2 and isinstance(made[0], nn.Module):
        return made
    raise ValueError(
        f"{name} returned {type(made).__name__}; expected a torch.nn.Module or (model, inputs)"
    )


def inputs_of(model: nn.Module) -> dict[str, Any]:
    """Inputs that fit a Hugging Face model's config: pixels, token ids, decoder ids.

    Raises `ValueError` where they cannot be told.
    """
    config = getattr(model, "config", None)
    main = getattr(model, "main_input_name", None)
    if config is None or main is None:
        raise ValueError(
            f"cannot tell what {type(model).__name__} runs on; give package.module:factory with a "
            f"factory that returns (model, inputs)"
        )
    inputs: dict[str, Any] = {}
    text = config.get_text_config() if hasattr(config, "get_text_config") else config
    ids = torch.arange(_LENGTH)[None] % (getattr(text, "vocab_size", None) or 2)
    if main == "pixel_values":
        vision = getattr(config, "vision_config", config)
        size = getattr(vision, "image_size", 224)
        height, width = size if isinstance(size, list | tuple) else (size, size)
        inputs[main] = torch.zeros(1, getattr(vision, "num_channels", 3), height, width)
    elif main == "input_features":
        frames = 2 * getattr(config, "max_source_positions", 1500)
        inputs[main] = torch.zeros(1, getattr(config, "num_mel_bins", 80), frames)
    elif main == "input_ids":
        inputs[main] = ids
    else:
        raise ValueError(
            f"{type(model).__name__} runs on {main}, which cannot be made from its config; give "
            f"package.module:factory with a factory that returns (model, inputs)"
        )
    if getattr(config, "is_encoder_decoder", False):
        inputs["decoder_input_ids"] = ids
    return inputs

"""Rebuild a plain model and peft's adapters as ``actsparse.json`` describes them."""

from __future__ import annotations

import copy
import json
from pathlib import Path
from typing import Any

import torch
from torch import nn

from actsparse.blocks.sharding import own_class
from actsparse.extras import needed
from actsparse.modify.apply import is_peft_model
from actsparse.modify.config_note import without_note
from actsparse.modify.foreign_config import (
    Shapes,
    bounded,
    check_adapter,
    check_config,
    check_shapes,
    model_class,
)
from actsparse.values import BadValue, shown


def how_to_build(root: nn.Module, model: nn.Module) -> dict[str, Any] | None:
    """Class and config of ``model``, dtypes by the names they have in ``root`` around it."""
    cls = own_class(model)
    config = getattr(model, "config", None)
    if cls.__module__.split(".")[0] != "transformers" or config is None:
        return None
    return {
        "class": cls.__name__,
        "config": without_note(json.loads(config.to_json_string(use_diff=False))),
        "attention": getattr(config, "_attn_implementation", None),  # not in the config's file
        "dtypes": {
            name: str(tensor.dtype).removeprefix("torch.")
            for name, tensor in _floats(root)
            if tensor.dtype != torch.float32
        },
    }


def build(path: Path, spec: dict[str, Any] | None, shapes: Shapes) -> nn.Module:
    """The plain model, in the dtypes it was saved with; ``shapes`` are those of its weights.

    It is built without memory first, so that a config that does not fit its weights costs none.

    Raises:
        ValueError: no such model, or a config that cannot be, or that the weights do not fit.
    """
    if spec is None:
        raise ValueError(
            f"{path} holds no config of a transformers model: build the plain model in Python and "
            "pass it, load(path, model=)"
        )
    cls = model_class(str(path), spec["class"])
    where = f"{path}: cannot build {spec['class']} from its config"
    check_config(where, spec["config"], shapes)
    in_model = {in_base(name): shape for name, shape in shapes.items()}
    try:
        with bounded(where, shapes):
            with torch.device("meta"):
                check_shapes(where, cls(_config(cls, spec)), in_model)
            model: nn.Module = cls(_config(cls, spec))
        cast(model, {in_base(name): dtype for name, dtype in spec["dtypes"].items()})
    except BadValue:
        raise
    except Exception as error:  # whatever a class does with a stranger's config
        raise ValueError(f"{where}: {error}") from error
    return model.eval()


def _config(cls: Any, spec: dict[str, Any]) -> Any:
    config = cls.config_class.from_dict(copy.deepcopy(spec["config"]))
    if spec.get("attention") in ("eager", "sdpa"):
        config._attn_implementation = spec["attention"]
    return config


def adapter_configs(model: Any) -> dict[str, Any]:
    """peft's configs by the names of the adapters, the active one first."""
    names = dict.fromkeys([*model.active_adapters, *model.peft_config])
    configs = {name: model.peft_config[name].to_dict() for name in names}
    return json.loads(json.dumps(configs, default=sorted))  # JSON has no sets


def wrap(path: Path, model: nn.Module, adapters: dict[str, Any], shapes: Shapes) -> nn.Module:
    """The ``PeftModel`` around ``model`` that a sidecar's ``adapters`` describe.

    Raises:
        ValueError: they do not fit it.
    """
    peft = needed("peft", "a model with adapters")
    for name, values in adapters.items():
        check_adapter(f"{path}: adapter {shown(name)}", values)
    try:
        wrapped: nn.Module = model
        with bounded(str(path), shapes):
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


def cast(model: nn.Module, dtypes: dict[str, str]) -> None:
    """Give parameters and buffers the dtypes they are named with, float32 to the others."""
    for name, tensor in _floats(model):
        tensor.data = tensor.data.to(getattr(torch, dtypes.get(name, "float32")))


def _floats(model: nn.Module) -> list[tuple[str, torch.Tensor]]:
    """Parameters and buffers, those that no state dict holds among them."""
    both = [*model.named_parameters(), *model.named_buffers()]
    return [(name, tensor) for name, tensor in both if tensor.is_floating_point()]


def in_base(name: str) -> str:
    """The name that a part of a ``PeftModel`` has in its base.

    >>> in_base("base_model.model.h.0.fc1.base_layer.weight")
    'h.0.fc1.weight'
    """
    for inserted in (".base_layer", ".original_module"):
        name = name.replace(inserted, "")
    return name.removeprefix("base_model.model.")

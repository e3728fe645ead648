"""The model that a run starts from: made anew, or a plain trained one out of a folder."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from transformers import default_data_collator

from actsparse.modify import (
    Handle,
    Recipe,
    handle_of,
    load,
    lora_config,
    merge_adapter,
    sparsify,
)
from actsparse.modify.apply import is_peft_model
from actsparse.modify.pretrained import pretrained
from actsparse.values import checked_arguments
from actsparse_lab.data import Splits
from actsparse_lab.engine.arguments import recompute
from actsparse_lab.engine.config import RunConfig
from actsparse_lab.engine.tasks import Task


def model_from(folder: str | Path) -> nn.Module:
    """The plain model in a folder that `actsparse.save` or ``save_pretrained`` wrote.

    Raises:
        ValueError: no such folder; torn or foreign files; a model that is modified already.
    """
    folder = Path(folder)
    if not (folder / "actsparse.json").is_file():
        return pretrained(folder)
    try:
        model = load(folder)
    except FileNotFoundError as error:
        raise ValueError(f"cannot load {folder}: {error}") from error
    handle = handle_of(model)
    assert handle is not None
    if handle.recipe.modifications:
        raise ValueError(
            f"{folder} holds a model of the recipe {handle.recipe.name!r}; finetuning starts from "
            f"a plain one, as the arms vanilla and vanilla-no-1d-decay leave it"
        )
    if is_peft_model(model):
        model = merge_adapter(model)
        handle = handle_of(model)
        assert handle is not None
    handle.remove()
    return model.requires_grad_(True)


def model_of(config: RunConfig, task: Task, splits: Splits[Any]) -> tuple[Any, Handle]:
    """The model that is trained, and what modifies it."""
    torch.manual_seed(config.seed)
    model: Any = task.model(config, splits.info) if not config.start else model_from(config.start)
    task.adapt(model, config)
    inputs = _inputs(splits)
    if config.start:
        _check_sizes(model, config, splits.info)
        try:
            with torch.no_grad():
                task.predict(model.eval(), inputs)
        except Exception as error:  # whatever a model does with data that are not its own
            raise ValueError(
                f"the model in {config.start} does not run on the data of {config.task}: {error}"
            ) from error
        model.train()
    if config.lora is not None:
        from peft import get_peft_model

        model = get_peft_model(
            model,
            lora_config(model, inputs, **checked_arguments(lora_config, config.lora, "adapters")),
        )
    handle = sparsify(model, Recipe.from_json(config.recipe), inputs=inputs)
    if config.gradient_checkpointing:
        recompute(model)
    return model, handle


def _check_sizes(model: Any, config: RunConfig, info: dict[str, Any]) -> None:
    """A batch or two would not show a class or a token that the model does not have."""
    own = model.config
    if "classes" in info and own.num_labels != info["classes"]:
        raise ValueError(
            f"the model in {config.start} tells {own.num_labels} classes apart, the data have "
            f"{info['classes']}; give it a head of that many first"
        )
    tokens = getattr(own, "vocab_size", None)
    if "vocab_size" in info and tokens is not None and tokens < info["vocab_size"]:
        raise ValueError(
            f"the model in {config.start} knows {tokens} tokens, the tokenizer makes "
            f"{info['vocab_size']}; give the tokenizer it was trained with"
        )


def _inputs(splits: Splits[Any]) -> dict[str, Tensor]:
    rows = splits.validation
    return default_data_collator([rows[index] for index in range(min(2, len(rows)))])

"""Where finetuning starts: a plain trained model out of a folder."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
import transformers
from torch import nn

from actsparse.modify import handle_of, load, merge_adapter
from actsparse.modify.sparsify import is_peft_model


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


def pretrained(folder: Path) -> Any:
    """The model of Hugging Face's ``save_pretrained``, from safetensors, whole.

    Raises:
        ValueError: it cannot be loaded, or lacks weights.
    """
    if not (folder / "config.json").is_file():
        raise ValueError(
            f"{folder} is no model: it holds neither actsparse.json, as a run's weights/ does, nor "
            f"config.json"
        )
    transformers.logging.set_verbosity_error()
    transformers.logging.disable_progress_bar()
    try:
        config = transformers.AutoConfig.from_pretrained(
            folder, local_files_only=True, trust_remote_code=False
        )
        name = (getattr(config, "architectures", None) or [""])[0]
        cls = getattr(transformers, name, None)
        if cls is None:
            raise ValueError(f"its config names the architecture {name!r}, unknown to transformers")
        model, report = cls.from_pretrained(
            folder,
            local_files_only=True,
            use_safetensors=True,
            output_loading_info=True,
            dtype=torch.float32,
        )
        if missing := sorted(report["missing_keys"]):
            raise ValueError(f"it lacks {len(missing)} weights: {', '.join(missing[:3])}, …")
    except Exception as error:  # whatever a stranger's folder does wrong
        raise ValueError(f"cannot load {folder}: {error}") from error
    return model

"""Load plain models from Hugging Face folders without running code from them."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch

from actsparse.extras import needed
from actsparse.modify.foreign_config import bounded, check_config, check_files, model_class
from actsparse.untrusted import read_json, safetensors_shapes
from actsparse.values import check


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
    transformers = needed("transformers", "a checkpoint of Hugging Face")
    transformers.logging.set_verbosity_error()
    transformers.logging.disable_progress_bar()
    try:
        where, values = str(folder / "config.json"), _own_config(folder)
        found = sorted(folder.glob("*.safetensors"))
        shapes = {name: shape for file in found for name, shape in safetensors_shapes(file).items()}
        check_config(where, values, shapes)
        cls = model_class(where, (values.get("architectures") or [""])[0])
        with bounded(where, shapes):
            model, report = cls.from_pretrained(
                folder,
                local_files_only=True,
                use_safetensors=True,
                output_loading_info=True,
                trust_remote_code=False,
                dtype=torch.float32,
            )
        if missing := sorted(report["missing_keys"]):
            raise ValueError(f"it lacks {len(missing)} weights: {', '.join(missing[:3])}, …")
    except Exception as error:  # whatever a stranger's folder does wrong
        raise ValueError(f"cannot load {folder}: {error}") from error
    return model


def _own_config(folder: Path) -> dict[str, Any]:
    """The config of a model that is a plain one, whole in this folder."""
    check_files(folder)
    if (folder / "adapter_config.json").exists():
        raise ValueError("adapter_config.json names a base model elsewhere: merge the adapter")
    values = read_json(folder / "config.json")
    check(str(folder / "config.json"), values, {"architectures?": ([str], None)})
    if values.get("quantization_config"):
        raise ValueError("its config asks for quantization_config: give a plain model")
    return dict(values)

"""Where finetuning starts: a plain trained model out of a folder."""

from __future__ import annotations

from pathlib import Path

from torch import nn

from actsparse.modify import handle_of, load, merge_adapter
from actsparse.modify.apply import is_peft_model
from actsparse.modify.pretrained import pretrained


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

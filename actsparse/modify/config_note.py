"""A note in a model's own ``config.json`` that this is not the plain model.

When ``transformers`` saves a model, it writes the config's ``quantization_config``. The note is
there in a model whose function was changed. ``from_pretrained`` then refuses the folder with the
note's own words, and :func:`actsparse.load` reads the rest of it.
"""

from __future__ import annotations

import weakref
from collections.abc import Callable
from pathlib import Path
from typing import Any

from torch import nn

from actsparse.untrusted import read_json

KEY, METHOD = "quantization_config", "actsparse"
_WORDS = "a model that actsparse has changed: load this folder with actsparse.load(folder)"


class Note:
    """Stands in a config, and describes its model as it is when somebody asks."""

    quant_method = METHOD
    # Both of the sidecar, which sets them: what it describes sets notes itself.
    describe: Callable[[nn.Module], dict[str, Any]]
    is_due: Callable[[nn.Module], bool]

    def __init__(self, model: nn.Module) -> None:
        self._model = weakref.ref(model)
        self._asked = False

    def to_dict(self) -> dict[str, Any] | None:
        """What a process without actsparse takes for a quantisation it cannot have."""
        model = self._model()
        if model is None or self._asked:  # describing a model asks for its config
            return None
        self._asked = True
        try:
            said = self.describe(model)
        finally:
            self._asked = False
        # transformers skips an unknown method, with a log line at most. With load_in_8bit it reads
        # on, and a dtype that torch does not have ends in an error that says its name.
        return {
            "quant_method": METHOD,
            "load_in_8bit": True,
            "bnb_4bit_compute_dtype": _WORDS,
            METHOD: said,
        }

    def __deepcopy__(self, memo: dict[int, Any]) -> Note | None:
        twin = memo.get(id(self._model()))  # else the config is copied alone, for another model
        return None if twin is None else Note(twin)

    def __reduce__(self) -> Any:
        return Note, (self._model(),)


def note_changes(model: nn.Module) -> None:
    """Let configs in ``model`` say whether its function is changed; call it after each change."""
    is_changed = Note.is_due(model)
    for part in _saved_alone(model):
        own = vars(part.config).get(KEY)
        if own is None and is_changed:
            part.config.quantization_config = Note(model)
        elif isinstance(own, Note) and not is_changed:
            del part.config.quantization_config


def noted(folder: Path) -> tuple[dict[str, Any], dict[str, Any]] | None:
    """What a note in a folder's ``config.json`` says, and the config without it; None: no note."""
    file = folder / "config.json"
    if not file.is_file():
        return None
    config = read_json(file)
    note = config.pop(KEY, None) if isinstance(config, dict) else None
    said = note.get(METHOD) if isinstance(note, dict) else None
    return (said, config) if isinstance(said, dict) else None


def without_note(config: dict[str, Any]) -> dict[str, Any]:
    """A config's values without a note, which is None while it is being asked."""
    held = config.get(KEY)
    ours = held is None or (isinstance(held, dict) and held.get("quant_method") == METHOD)
    return {key: value for key, value in config.items() if key != KEY or not ours}


def _saved_alone(model: nn.Module) -> list[Any]:
    """The outermost models of transformers in ``model``; none in peft's, which save adapters."""
    found: list[tuple[str, nn.Module]] = []
    for name, module in model.named_modules():
        if _is_of(module, "peft.peft_model"):
            return []
        inside = any(not above or name.startswith(f"{above}.") for above, _ in found)
        if _is_of(module, "transformers.modeling_utils") and not inside:
            found.append((name, module))
    return [module for _, module in found]


def _is_of(module: nn.Module, home: str) -> bool:
    return any(cls.__module__ == home for cls in type(module).mro())

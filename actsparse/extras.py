"""Packages that actsparse can do without, and how to install one that is missing."""

from __future__ import annotations

import importlib
from typing import Any

_INSTALL = {
    "transformers": 'pip install "actsparse[train]"',
    "accelerate": 'pip install "actsparse[train]"',
    "peft": 'pip install "actsparse[finetune]"',
    "gguf": 'pip install "actsparse[convert]"',
    "matplotlib": "pip install matplotlib",
    **dict.fromkeys(
        "actsparse_lab datasets jinja2 PIL scipy sentencepiece sklearn tensorboard".split(),
        "pip install ./lab, in a checkout of the repository",
    ),
}


def how_to_install(module: str | None) -> str:
    """The command that installs a module; empty if it is none of ours.

    >>> how_to_install("peft.utils")
    'pip install "actsparse[finetune]"'
    """
    return _INSTALL.get((module or "").partition(".")[0], "")


def needed(module: str, purpose: str) -> Any:
    """Import a module of an extra.

    Raises:
        ModuleNotFoundError: it is missing, and how to install it.

    >>> needed("json", "this example").dumps(1)
    '1'
    """
    try:
        return importlib.import_module(module)
    except ModuleNotFoundError as error:
        package = module.partition(".")[0]
        if (error.name or "").partition(".")[0] != package:
            raise
        said = f"{purpose} needs {package}: {how_to_install(package)}"
        raise ModuleNotFoundError(said, name=package) from error

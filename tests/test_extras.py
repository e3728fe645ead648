"""What needs a package of an extra says so, and how to install it."""

from __future__ import annotations

import json
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

from actsparse.extras import needed
from actsparse.modify import load_adapter, lora_config
from actsparse.modify.pretrained import pretrained


def callback(folder: Path) -> Any:
    from actsparse.train import SparsityCallback

    return SparsityCallback


@pytest.mark.parametrize(
    ("package", "call", "said"),
    [
        ("transformers", callback, r'SparsityCallback needs .*pip install "actsparse\[train\]"'),
        ("transformers", pretrained, r'needs transformers: pip install "actsparse\[train\]"'),
        (
            "peft",
            lambda folder: lora_config(nn.Linear(2, 2), torch.zeros(2, 2)),
            r'lora_config needs peft: pip install "actsparse\[finetune\]"',
        ),
        (
            "peft",
            lambda folder: load_adapter(nn.Linear(2, 2), folder),
            r'load_adapter needs peft: pip install "actsparse\[finetune\]"',
        ),
    ],
)
def test_a_missing_package_is_named_with_its_extra(
    package: str,
    call: Callable[[Path], object],
    said: str,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    config = {"model_type": "gpt2", "architectures": ["GPT2LMHeadModel"]}
    (tmp_path / "config.json").write_text(json.dumps(config))
    (tmp_path / "model.safetensors").write_bytes(b"")
    monkeypatch.setitem(sys.modules, package, None)
    with pytest.raises(ModuleNotFoundError, match=said):
        call(tmp_path)


def test_what_is_missing_inside_a_package_is_its_own_affair(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "broken_package.py").write_text("import not_there_either")
    monkeypatch.syspath_prepend(tmp_path)
    with pytest.raises(ModuleNotFoundError, match="No module named 'not_there_either'"):
        needed("broken_package", "this test")

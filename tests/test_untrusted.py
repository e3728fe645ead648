"""Files of strangers: what is no regular file, unpacks to much, or asks for code is refused."""

from __future__ import annotations

import gzip
import json
import os
import struct
from pathlib import Path
from typing import Any

import pytest
import torch
from PIL import Image
from transformers import GPT2Config, GPT2LMHeadModel

from actsparse import load, save, sparsify
from actsparse.modify.foreign_config import bounded, check_adapter, check_config, model_class
from actsparse.terminal import Terminal
from actsparse.untrusted import read_json, safetensors_shapes
from actsparse.values import BadValue
from actsparse_lab.data.pictures import FORMATS, opened
from actsparse_lab.data.shards import texts
from actsparse_lab.engine.start import pretrained

SIZES = {"n_layer": 1, "n_head": 2, "n_embd": 8, "n_inner": 16, "n_positions": 8, "vocab_size": 16}


@pytest.fixture
def saved(tmp_path: Path) -> Path:
    model = GPT2LMHeadModel(GPT2Config(**SIZES)).eval()
    sparsify(model, "vanilla", inputs={"input_ids": torch.arange(6)[None]})
    return save(model, tmp_path / "saved")


def config(folder: Path, **changes: Any) -> None:
    file = folder / "actsparse.json"
    sidecar = json.loads(file.read_text(encoding="utf-8"))
    sidecar["model"]["config"] |= changes
    file.write_text(json.dumps(sidecar), encoding="utf-8")


@pytest.mark.parametrize("name", ["actsparse.json", "model.safetensors"])
def test_a_fifo_is_refused_rather_than_waited_for(saved: Path, name: str) -> None:
    (saved / name).unlink()
    os.mkfifo(saved / name)
    with pytest.raises((ValueError, FileNotFoundError), match=name):
        load(saved)
    with pytest.raises(BadValue, match="is a FIFO, not a regular file"):
        read_json(saved / name)


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({"n_layer": 10**6}, "n_layer=1000000: expected at most 256"),
        ({"n_layer": 200, "n_inner": 2**20}, "describes a far larger model than its weights"),
        ({"n_embd": 10**9}, "n_embd=1000000000: expected at most"),
        ({"n_positions": 10**8}, "far larger model"),
        ({"n_embd": 12}, "gives transformer.*weight the shape"),
        ({"num_labels": 10**8}, "num_labels=100000000: expected at most"),
        ({"attn_implementation": "evil/kernel"}, "nothing is fetched from the Hub"),
        ({"trust_remote_code": True}, "code that a config brings is not run"),
    ],
    ids=str,
)
def test_a_config_is_compared_with_its_weights_before_it_is_built(
    saved: Path, changes: dict[str, Any], said: str
) -> None:
    config(saved, **changes)
    with pytest.raises(BadValue, match=said):
        load(saved)


@pytest.mark.parametrize("name", ["Trainer", "pipeline", "AutoModel", "os.system", "GPT2Config", 3])
def test_only_model_classes_are_made(name: Any) -> None:
    with pytest.raises(BadValue, match="is not a model class of transformers"):
        model_class("here", name)


def test_a_header_that_lies_is_refused(tmp_path: Path) -> None:
    file = tmp_path / "w.safetensors"
    for entry in (
        {"dtype": "F32", "shape": [2], "data_offsets": [0, 80]},
        {"dtype": "F32", "shape": [10**12], "data_offsets": [0, 8]},
        {"dtype": "F32", "shape": [-2], "data_offsets": [0, 8]},
        {"dtype": "F32", "data_offsets": [0, 8]},
    ):
        header = json.dumps({"w": entry}).encode()
        file.write_bytes(struct.pack("<Q", len(header)) + header + bytes(8))
        with pytest.raises(BadValue, match="says of 'w' what the file does not hold"):
            safetensors_shapes(file)
    file.write_bytes(struct.pack("<Q", 2**60) + bytes(8))
    with pytest.raises(BadValue, match="cut off or too long"):
        safetensors_shapes(file)


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({"peft_type": "PROMPT_TUNING"}, "peft_type='PROMPT_TUNING': expected one of LORA"),
        ({"megatron_config": {"a": 1}}, "megatron_config=.*expected none"),
        ({"layer_replication": [[0, 10**9]]}, "layer_replication=.*expected none"),
        ({"target_modules": "((a*)*)*b"}, "without repeated groups"),
        ({"rank_pattern": {"(a+)+$": 8}}, "without repeated groups"),
    ],
    ids=str,
)
def test_an_adapter_may_not_import_fetch_or_stall(changes: dict[str, Any], said: str) -> None:
    with pytest.raises(BadValue, match=said):
        check_adapter("adapter_config.json", {"peft_type": "LORA"} | changes)


def test_a_folder_that_names_a_base_elsewhere_is_refused(tmp_path: Path) -> None:
    GPT2LMHeadModel(GPT2Config(**SIZES)).save_pretrained(tmp_path)
    (tmp_path / "adapter_config.json").write_text('{"base_model_name_or_path": "evil/base"}')
    with pytest.raises(ValueError, match="names a base model elsewhere"):
        pretrained(tmp_path)


def test_building_is_counted_in_this_thread_and_only_inside() -> None:
    with pytest.raises(BadValue, match="far larger"), bounded("here", {"w": (2, 2)}):
        torch.nn.Linear(2**14, 2**14, device="meta")
    torch.nn.Linear(2**14, 2**14, device="meta")


def test_postscript_by_another_name_starts_nothing(tmp_path: Path) -> None:
    file = tmp_path / "a.png"
    file.write_bytes(b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 9 9\n%%EndComments\n")
    with file.open("rb") as content, pytest.raises(OSError, match="cannot identify"):
        opened(content)
    assert "EPS" not in FORMATS


def test_an_image_of_too_many_pixels_is_not_decoded(tmp_path: Path) -> None:
    file = tmp_path / "a.png"
    Image.new("1", (8200, 8200)).save(file)
    with file.open("rb") as content, pytest.raises(OSError, match="8200 × 8200 pixels, more than"):
        opened(content)


@pytest.mark.parametrize("line", [b"0" * 2**26, b" \n" * 2**26], ids=["one line", "many lines"])
def test_little_that_unpacks_to_much_is_refused(tmp_path: Path, line: bytes) -> None:
    file = tmp_path / "a.jsonl.gz"
    file.write_bytes(gzip.compress(line, 1))
    with pytest.raises(ValueError, match="the most that is read"):
        list(texts(str(file)))


def test_configs_are_as_deep_as_configs_are() -> None:
    deep: Any = {}
    for _ in range(100):
        deep = {"a": deep}
    deep["a"]["a"]["b"] = 1
    with pytest.raises(BadValue, match="nested too deep"):
        check_config("config.json", deep)


def test_the_terminal_gets_text_and_no_commands(capsys: pytest.CaptureFixture[str]) -> None:
    Terminal().print("[bold]a[/bold] [/] \x1b[31mred \u202e")
    assert capsys.readouterr().out == "[bold]a[/bold] [/] \\x1b[31mred \\u202e\n"

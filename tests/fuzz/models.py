"""Kinds of input that are models: folders, their sidecars, weights, configs and adapters."""

from __future__ import annotations

import json
from pathlib import Path
from random import Random
from typing import Any

import torch

from tests.fuzz import mutate
from tests.fuzz.kinds import Action, Make, json_of, kind, of_file


def _gpt2() -> Any:
    from transformers import GPT2Config, GPT2LMHeadModel

    torch.manual_seed(0)
    sizes = {"n_layer": 1, "n_head": 2, "n_embd": 8, "n_inner": 16, "n_positions": 8}
    return GPT2LMHeadModel(GPT2Config(vocab_size=16, **sizes)).eval()


IDS = torch.arange(6)[None]


def _saved(folder: Path) -> Path:
    from actsparse import save, sparsify

    model = _gpt2()
    sparsify(model, "paper", inputs={"input_ids": IDS})
    return save(model, folder / "saved")


# -- models ----------------------------------------------------------------------------------------


@kind(20)
def sidecars(folder: Path) -> Make:
    from actsparse import load

    saved = _saved(folder)
    return of_file(saved / "actsparse.json", lambda: load(saved), json_of)


@kind(15)
def weights(folder: Path) -> Make:
    """Behind the digest: a stranger writes that as well."""
    from actsparse import load

    saved = _saved(folder)
    sidecar = json.loads((saved / "actsparse.json").read_bytes())
    del sidecar["sha256"]
    (saved / "actsparse.json").write_text(json.dumps(sidecar), encoding="utf-8")
    return of_file(saved / "model.safetensors", lambda: load(saved), _header)


def _header(right: bytes, random: Random) -> bytes:
    """Bytes changed anywhere, or the header as plain values."""
    length = int.from_bytes(right[:8], "little")
    if random.random() < 0.3:
        return mutate.content(right, random)
    made = mutate.text(json.loads(right[8 : 8 + length]), random)
    return len(made).to_bytes(8, "little") + made + right[8 + length :]


@kind(15)
def pretrained_configs(folder: Path) -> Make:
    from actsparse_lab.engine.start import pretrained

    _gpt2().save_pretrained(folder / "plain")
    return of_file(folder / "plain/config.json", lambda: pretrained(folder / "plain"), json_of)


@kind(10)
def configs_alone(folder: Path) -> Make:
    from actsparse.cli.models import model_named

    file = folder / "config.json"
    _gpt2().config.to_json_file(file)
    return of_file(file, lambda: model_named(str(file)), json_of)


def _adapter(folder: Path) -> tuple[Path, Action]:
    import peft

    from actsparse import sparsify
    from actsparse.modify.adapters import load_adapter, save_adapter

    config = peft.LoraConfig(r=2, target_modules=["c_fc"], fan_in_fan_out=True)
    model = peft.get_peft_model(_gpt2(), config)
    sparsify(model, "vanilla", inputs={"input_ids": IDS})
    place = save_adapter(model, folder / "adapter")
    return place, lambda: load_adapter(_gpt2(), place)


@kind(10)
def adapter_configs(folder: Path) -> Make:
    place, read = _adapter(folder)
    return of_file(place / "adapter_config.json", read, json_of)


@kind(5)
def adapter_sidecars(folder: Path) -> Make:
    place, read = _adapter(folder)
    return of_file(place / "actsparse.json", read, json_of)


@kind(5)
def adapters_within(folder: Path) -> Make:
    """The adapters' configs in the sidecar of a whole model."""
    import peft

    from actsparse import load, save, sparsify

    config = peft.LoraConfig(r=2, target_modules=["c_fc"], fan_in_fan_out=True)
    model = peft.get_peft_model(_gpt2(), config)
    sparsify(model, "vanilla", inputs={"input_ids": IDS})
    saved = save(model, folder / "saved")

    def wrong(right: bytes, random: Random) -> bytes:
        sidecar = json.loads(right)
        adapters = mutate.plain(sidecar["adapters"], random)
        return json.dumps(sidecar | {"adapters": adapters}).encode()

    return of_file(saved / "actsparse.json", lambda: load(saved), wrong)

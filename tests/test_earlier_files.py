"""What the version of 2026-11-30 wrote is read: models, adapters, records and checkpoints."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest
import torch
from typer.testing import CliRunner

from actsparse import handle_of, load, load_adapter
from actsparse.cli.main import app
from actsparse_lab.records import read_run

EARLIER = Path(__file__).with_name("earlier")
SAID = json.loads((EARLIER / "logits.json").read_text(encoding="utf-8"))
IDS = torch.arange(10).reshape(2, 5)
SETTINGS = (
    "batch_size=8", "log_every=2", "eval_every=3", "save_every=3", "validate_on=16",
    "model.hidden_size=8", "model.intermediate_size=12", "model.num_attention_heads=2",
    "model.num_hidden_layers=1",
)  # fmt: skip


def test_a_saved_model_computes_the_same_and_knows_where_it_stands() -> None:
    model = load(EARLIER / "saved").eval()
    torch.testing.assert_close(model(input_ids=IDS).logits, torch.tensor(SAID["saved"]))
    handle = handle_of(model)
    assert handle is not None
    assert (handle.step, handle.recipe.name, len(handle.recipe.modifications)) == (3, "old", 4)


def test_an_adapter_computes_the_same_on_its_base() -> None:
    pytest.importorskip("peft")
    from transformers import BertForSequenceClassification

    base = BertForSequenceClassification.from_pretrained(EARLIER / "base")
    model = load_adapter(base, EARLIER / "adapter")
    torch.testing.assert_close(model(input_ids=IDS).logits, torch.tensor(SAID["adapter"]))


def train(out: Path) -> None:
    words = ["train", "--arm", "paper", "--steps", "6", "--out", str(out)]
    for setting in SETTINGS:
        words += ["--set", setting]
    done = CliRunner().invoke(app, words)
    assert done.exit_code == 0, done.output


def test_a_finished_run_is_not_repeated(tmp_path: Path) -> None:
    out = shutil.copytree(EARLIER / "run", tmp_path / "run")
    path = out / "runs" / "paper-seed0" / "record.jsonl"
    before = path.read_bytes()
    train(out)
    assert path.read_bytes() == before


def test_a_run_goes_on_from_its_checkpoint_to_the_same_end(tmp_path: Path) -> None:
    out = shutil.copytree(EARLIER / "run", tmp_path / "run")
    path = out / "runs" / "paper-seed0" / "record.jsonl"
    whole = read_run(path)
    assert whole.result is not None
    manifest = json.loads((path.parent / "checkpoint-3" / "manifest.json").read_text())
    path.write_bytes(path.read_bytes()[: manifest["record"]["size"]])
    train(out)
    again = read_run(path)
    assert again.result is not None
    assert again.header == whole.header
    assert again.result["loss"] == pytest.approx(whole.result["loss"], rel=1e-4)

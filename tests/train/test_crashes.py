"""Commands that are killed anywhere: nothing that was announced is lost, and they go on."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from actsparse_lab.data.text import load_documents

FAST = ("train kill 2", "train full 1", "save kill 3", "load,without_exchange kill 2")
SLOW = (
    "train kill all", "train,again kill all", "compare kill 60", "noise kill all",
    "train stop 60", "compare stop 20", "noise stop all",
    "train full 60", "compare full 20", "noise full all",
    "train 15 20", "train 2 20", "save 2 all", "save full all",
    "save kill all", "save,without_exchange kill all", "save stop all",
    "save,without_exchange stop all", "load kill all", "load,without_exchange kill all",
    "load stop all", "load,without_exchange stop all",
    "train random 25", "compare random 15", "t5_c4 random 10",
)  # fmt: skip


def struck(folder: Path, *what: str) -> list[dict[str, Any]]:
    """What was found where the commands were killed, stopped, or told that the disk is full."""
    script = Path(__file__).with_name("killed.py")
    root = Path(__file__).parents[2]
    path = f"{root}{os.pathsep}{root / 'lab'}"
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": path}
    words = [word.replace(",", " ") for each in what for word in each.split()]
    command = [sys.executable, str(script), str(folder), *words]
    done = subprocess.run(command, capture_output=True, text=True, env=environment)
    assert done.returncode == 0, done.stderr
    found = [json.loads(line) for line in done.stdout.splitlines() if line.startswith("{")]
    assert len(found) == len(what)
    for each in found:
        assert each["lost"] == [], (each, done.stderr)
    return found


def write_shards(folder: Path) -> None:
    """Shards of the embedded text and a tokenizer trained on it, in one folder."""
    tokenizers = pytest.importorskip("tokenizers")
    documents = [text.decode() for text in load_documents()["train"].values()][:60]
    folder.mkdir(parents=True)
    for part in range(2):
        lines = [json.dumps({"text": text}) for text in documents[part::2]]
        (folder / f"web-train.{part:05d}.jsonl").write_text("\n".join(lines) + "\n")
    held = [text.decode() for text in load_documents()["validation"].values()]
    lines = [json.dumps({"text": text}) for text in held]
    (folder / "web-validation.00000.jsonl").write_text("\n".join(lines) + "\n")
    model = tokenizers.Tokenizer(tokenizers.models.BPE(unk_token="<unk>"))
    model.pre_tokenizer = tokenizers.pre_tokenizers.ByteLevel()
    special = ["<pad>", "</s>", "<unk>", *(f"<extra_id_{i}>" for i in reversed(range(100)))]
    trainer = tokenizers.trainers.BpeTrainer(vocab_size=400, special_tokens=special)
    model.train_from_iterator(documents[:10], trainer)
    model.save(str(folder / "tokenizer.json"))
    config = {"eos_token": "</s>", "pad_token": "<pad>"}
    (folder / "tokenizer_config.json").write_text(json.dumps(config))


def test_nothing_is_lost_at_some_operations(tmp_path: Path) -> None:
    for found in struck(tmp_path, *FAST):
        assert found["points"] > found["struck"].get("nothing", 0)  # some did strike


@pytest.mark.slow
@pytest.mark.parametrize("what", SLOW)
def test_nothing_is_lost_anywhere(what: str, tmp_path: Path) -> None:
    if what.startswith("t5_c4"):
        write_shards(tmp_path / "data")
    (found,) = struck(tmp_path, what)
    assert found["points"] > found["struck"].get("nothing", 0) or "random" in what

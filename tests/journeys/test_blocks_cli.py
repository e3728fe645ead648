"""`actsparse blocks`: built-in models, local configs, factories."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest
from typer.testing import CliRunner

from actsparse.cli.main import app

LLAMA = {
    "architectures": ["LlamaForCausalLM"], "model_type": "llama", "vocab_size": 32,
    "hidden_size": 16, "intermediate_size": 48, "num_hidden_layers": 2, "num_attention_heads": 2,
    "num_key_value_heads": 2, "max_position_embeddings": 32,
}  # fmt: skip
WHISPER = {
    "architectures": ["WhisperForConditionalGeneration"], "model_type": "whisper",
    "vocab_size": 32, "d_model": 16, "encoder_layers": 1, "decoder_layers": 1,
    "encoder_attention_heads": 2, "decoder_attention_heads": 2, "encoder_ffn_dim": 32,
    "decoder_ffn_dim": 32, "max_source_positions": 8, "max_target_positions": 32,
    "num_mel_bins": 8, "pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2,
    "decoder_start_token_id": 1,
}  # fmt: skip


def rows(*words: str) -> list[dict[str, object]]:
    done = CliRunner().invoke(app, ["blocks", *words, "--json"])
    assert done.exit_code == 0, done.stderr
    return list(json.loads(done.stdout)["blocks"])


@pytest.mark.parametrize(("task", "count"), [("digits", 2), ("text", 4), ("lm", 2)])
def test_the_built_in_models(task: str, count: int) -> None:
    found = rows(task)
    assert len(found) == count
    assert {row["function"] for row in found} == {"relu"}


def test_a_local_config_in_a_folder_or_as_a_file(tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text(json.dumps(LLAMA))
    found = rows(str(tmp_path))
    assert [row["name"] for row in found] == ["model.layers.0.mlp", "model.layers.1.mlp"]
    assert found[0]["gate"] == "model.layers.0.mlp.gate_proj"
    assert rows(str(tmp_path / "config.json")) == found
    table = CliRunner().invoke(app, ["blocks", str(tmp_path)]).stdout
    assert "16 → 48" in table
    assert "gate_proj" in table


def test_speech_in_text_out(tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text(json.dumps(WHISPER))
    assert len(rows(str(tmp_path))) == 2


def test_a_factory_of_ones_own(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "mine_for_blocks.py").write_text(
        "import torch\n"
        "def build():\n"
        "    mlp = torch.nn.Sequential(\n"
        "        torch.nn.Linear(4, 8), torch.nn.ReLU(), torch.nn.Linear(8, 4))\n"
        "    return mlp, torch.zeros(2, 4)\n"
        "class Either(torch.nn.Module):\n"
        "    def __init__(self):\n"
        "        super().__init__()\n"
        "        self.ways = torch.nn.ModuleList(build()[0] for _ in range(3))\n"
        "    def forward(self, x):\n"
        "        return x + self.ways[0](x)\n"
        "def either():\n"
        "    return Either(), torch.zeros(2, 4)\n"
        "def bare():\n"
        "    return build()[0]\n"
        "def wrong():\n"
        "    return 3\n"
    )
    monkeypatch.chdir(tmp_path)
    (found,) = rows("mine_for_blocks:build")
    assert (found["d_model"], found["d_hidden"]) == (4, 8)
    told = CliRunner().invoke(app, ["blocks", "mine_for_blocks:either"]).stdout
    assert "refused: ways.1 … ways.2 (2): its layers did not run on these inputs" in told
    for name, said in {
        "mine_for_blocks:bare": "a factory that returns (model, inputs)",
        "mine_for_blocks:wrong": "returned int; expected a torch.nn.Module or (model, inputs)",
        "mine_for_blocks:gone": "cannot import 'mine_for_blocks:gone'",
    }.items():
        done = CliRunner().invoke(app, ["blocks", name])
        assert done.exit_code == 2
        assert said in done.stderr


def test_a_config_that_asks_for_code_of_its_own_is_refused(tmp_path: Path) -> None:
    config = {"model_type": "mine", "auto_map": {"AutoConfig": "evil.Config"}}
    (tmp_path / "config.json").write_text(json.dumps(config))
    (tmp_path / "evil.py").write_text("raise SystemExit('this ran')")
    done = CliRunner().invoke(app, ["blocks", str(tmp_path)])
    assert done.exit_code == 2
    assert "is no config that transformers knows" in done.stderr


def test_without_the_laboratory_the_library_has_its_own_verbs(tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text("{}")
    script = (
        "import importlib.metadata, sys\n"
        "importlib.metadata.entry_points = lambda **_: []\n"
        "from typer.testing import CliRunner\n"
        "from actsparse.cli.main import app\n"
        "for words in sys.argv[1:]:\n"
        "    print(CliRunner().invoke(app, words.split()).output, end='\\0')\n"
    )
    words = ["--help", "blocks lm", f"measure {tmp_path}"]
    done = subprocess.run([sys.executable, "-c", script, *words], capture_output=True, text=True)
    said, blocks, measure, _ = done.stdout.split("\0")
    assert all(f"│ {verb} " in said for verb in ("blocks", "measure", "bench"))
    assert not any(f"│ {verb} " in said for verb in ("train", "compare", "report"))
    assert "expected the path of a local Hugging Face folder" in blocks
    assert "give --data" in measure

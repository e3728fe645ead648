"""A converted checkpoint is timed beside the dense one, and decodes the same tokens."""

from __future__ import annotations

import json
from functools import partial
from pathlib import Path

import pytest
import torch
from transformers import BertConfig, BertModel
from typer.testing import CliRunner

from actsparse import DropSmall, set_thresholds, sparsify
from actsparse.bench.checkpoint import bench_checkpoint
from actsparse.bench.model import COMPILED, CUT, OURS_COMPILED
from actsparse.cli.main import app
from actsparse.convert.checkpoint import write_checkpoint
from tests.convert.checkpoints import plain, tokenizer


def converted(folder: Path) -> tuple[Path, Path]:
    dense, sparse = plain("swiglu").eval(), plain("swiglu").eval()
    dense.save_pretrained(folder / "dense")
    tokenizer().save_pretrained(folder / "dense")
    handle = sparsify(sparse, DropSmall(), inputs=torch.arange(8)[None])
    set_thresholds(sparse, {b.name: torch.full((b.d_hidden,), 1e-3) for b in handle.blocks})
    write_checkpoint(folder / "sparse", sparse, tokenizer(), {}, "a card")
    return folder / "dense", folder / "sparse"


@pytest.mark.parametrize("compiled", [False, True])
def test_the_command_prints_and_keeps_what_it_timed(
    tmp_path: Path, compiled: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    dense, sparse = converted(tmp_path)
    words = ["bench", "checkpoint", str(sparse), "--dense", str(dense), "--tokens", "3"]
    words += ["--prefill", "16", "--rounds", "3", "--out", str(tmp_path / "record.json")]
    words += ["--compiled"] if compiled else []
    monkeypatch.setattr(torch, "compile", partial(torch.compile, backend="aot_eager"))
    done = CliRunner().invoke(app, words)
    assert done.exit_code == 0, done.stderr
    for said in ("decode", "generate", "prefill", "the same tokens", "expected"):
        assert said in done.stdout
    record = json.loads((tmp_path / "record.json").read_text())
    assert record["same_tokens"]
    ratios = {each["to"] for each in record["decode"]["ratios"]}
    assert ratios == {"accelerated", CUT} | ({OURS_COMPILED} if compiled else set())
    assert (COMPILED in record["decode"]["seconds"]) == compiled
    assert (OURS_COMPILED in done.stdout or "compiled" in done.stdout) == compiled
    for work in ("decode", "generate", "prefill"):
        assert min(record[work]["seconds"].values()) > 0


def test_models_are_as_before(tmp_path: Path) -> None:
    dense, sparse = plain("gelu").eval(), plain("gelu").eval()
    ids = torch.arange(6)[None]
    sparsify(sparse, DropSmall(), inputs=ids)
    with torch.no_grad():
        before = dense(ids).logits, sparse(ids).logits
        bench_checkpoint(dense, sparse, ids, tokens=2, prefill=8, rounds=3)
        assert torch.equal(dense(ids).logits, before[0])
        assert torch.equal(sparse(ids).logits, before[1])


def test_an_encoder_is_timed_reading_texts(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("actsparse.bench.checkpoint.ENCODED", (2, 16))
    config = BertConfig(
        vocab_size=260, hidden_size=32, intermediate_size=64, num_hidden_layers=2,
        num_attention_heads=2,
    )  # fmt: skip
    torch.manual_seed(0)
    dense = BertModel(config).eval()
    dense.save_pretrained(tmp_path / "dense")
    tokenizer().save_pretrained(tmp_path / "dense")
    handle = sparsify(dense, DropSmall(), inputs=torch.arange(8)[None])
    set_thresholds(dense, {b.name: torch.full((64,), 1e-3) for b in handle.blocks})
    write_checkpoint(tmp_path / "sparse", dense, tokenizer(), {}, "a card")
    words = ["bench", "checkpoint", str(tmp_path / "sparse"), "--dense", str(tmp_path / "dense")]
    done = CliRunner().invoke(app, [*words, "--rounds", "3", "--out", str(tmp_path / "r.json")])
    assert done.exit_code == 0, done.stderr
    assert "states differ" in done.stdout
    record = json.loads((tmp_path / "r.json").read_text())
    assert record["error"] < 1e-5
    assert record["text_tokens"] == 16
    assert min(record["encode"]["seconds"].values()) > 0

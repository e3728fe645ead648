"""An encoder becomes a sparse one: its embeddings stay close to the dense model's."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from transformers import BertConfig, BertForMaskedLM, BertModel, PreTrainedModel
from typer.testing import CliRunner

from actsparse import load
from actsparse.cli.main import app
from actsparse.convert.checkpoint import around_of, load_checkpoint, pooling_of
from actsparse.convert.embeddings import distance, document_distances, pooled, states_of
from actsparse.convert.text import Windows
from actsparse.modify.drop_small import dropping_blocks
from tests.convert.checkpoints import tokenizer, write_text


def model() -> PreTrainedModel:
    torch.manual_seed(0)
    config = BertConfig(
        vocab_size=260, hidden_size=48, intermediate_size=192, num_hidden_layers=2,
        num_attention_heads=2, max_position_embeddings=64, initializer_range=0.2,
    )  # fmt: skip
    return BertModel(config).eval()


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("encoder")
    model().save_pretrained(folder / "bert")
    tokenizer().save_pretrained(folder / "bert")
    texts = [
        json.loads(line)["text"] for line in write_text(folder, 60, 400).read_text().splitlines()
    ]
    sentences = [each for text in texts for each in text.split(". ") if len(each) > 8][:300]
    (folder / "text.jsonl").write_text("\n".join(json.dumps({"text": s}) for s in sentences))
    return folder / "bert"


def run(*words: str | Path) -> tuple[int, str, str]:
    done = CliRunner().invoke(app, [str(word) for word in words])
    return done.exit_code, done.stdout, done.stderr


def test_the_command_converts_and_judges(checkpoint: Path, tmp_path: Path) -> None:
    text, out = checkpoint.parent / "text.jsonl", tmp_path / "out"
    words = ["convert", checkpoint, "--text", text, "--window", "48", "--dtype", "float32"]
    code, said, err = run(*words, "--budget", "0.5%", "--out", tmp_path / "plain", "--json")
    assert code == 0, err
    plain = json.loads(said)
    distilled = ["--tokens", "60k", "--lr", "1e-3", "--share", "0.6", "--json", "--out", out]
    code, said, err = run(*words, "--budget", "0.5%", *distilled)
    assert code == 0, err
    record = json.loads(said)
    assert record["pooling"] == "mean"
    assert record["budget_nats"] == 0.005
    assert record["choice"]["loss"] <= 0.005
    assert record["choice"]["share"] > plain["choice"]["share"]  # it learns to do with less
    found = record["judgements"][0]
    assert found["dense_loss"] == 0
    assert found["perplexity"] is None
    assert 0 < found["excess"] < 0.01
    assert 0 < found["agreement"] <= 1
    card = (out / "README.md").read_text()
    assert "same nearest neighbour" in card
    assert "perplexity" not in card
    code, said, err = run("judge", out, "--text", text, "--window", "48")
    assert code != 0
    assert "give --dense" in err
    code, said, err = run(
        "judge", out, "--text", text, "--window", "48", "--dense", checkpoint, "--json"
    )
    assert code == 0, err
    judged = json.loads(said)["judgements"][0]
    assert judged["excess"] == pytest.approx(found["excess"], rel=0.5)
    assert len(dropping_blocks(load(out))) == 2


def test_distances_are_by_document_and_padding_changes_nothing() -> None:
    one, two = model(), model()
    with torch.no_grad():
        for parameter in two.parameters():
            parameter.add_(0.02 * torch.randn_like(parameter))
    ids = [torch.randint(0, 257, (n,)) for n in (5, 9, 5, 12)]
    windows = Windows(ids, [0, 1, 1, 3])
    found = document_distances(two, one, windows, "mean")
    with torch.no_grad():
        each = [
            1 - torch.cosine_similarity(
                states_of(two, i[None]).double().mean(1), states_of(one, i[None]).double().mean(1)
            ).item()
            for i in ids
        ]  # fmt: skip
    want = [each[0], each[1] + each[2], each[3]]
    assert found.sums[0].tolist() == pytest.approx(want, abs=1e-6)
    assert found.counts.tolist() == [1, 2, 1]
    assert found.sums[1].tolist() == [0, 0, 0]
    same = document_distances(one, one, windows, "cls")
    assert same.same == 1
    assert same.sums.abs().max() < 1e-6
    lengths = torch.tensor([len(i) for i in ids])
    padded = torch.nn.utils.rnn.pad_sequence(ids, batch_first=True, padding_value=7)
    there = torch.arange(padded.shape[1]) < lengths[:, None]
    with torch.no_grad():
        rows = pooled(states_of(one, padded, there), there, "mean")
        alone = torch.cat([pooled(states_of(one, i[None]), None, "mean") for i in ids])
        assert torch.allclose(rows, alone, atol=1e-5)
        assert distance(one, one, padded, there).abs() < 1e-5
        tokens = distance(two, one, padded, there)
        assert torch.allclose(distance(two, one, padded.where(there, 3), there), tokens, atol=1e-6)


def test_the_pooling_of_the_folder_is_read_or_refused(checkpoint: Path, tmp_path: Path) -> None:
    loaded, _ = load_checkpoint(checkpoint)
    assert pooling_of(checkpoint, loaded) == "mean"
    (tmp_path / "1_Pooling").mkdir()
    file = tmp_path / "1_Pooling" / "config.json"
    file.write_text(json.dumps({"pooling_mode_cls_token": True, "pooling_mode_max_tokens": False}))
    assert pooling_of(tmp_path, loaded) == "cls"
    file.write_text(json.dumps({"pooling_mode_max_tokens": True}))
    with pytest.raises(ValueError, match="pooling_mode_max_tokens"):
        pooling_of(tmp_path, loaded)


def test_a_model_with_another_head_is_refused(checkpoint: Path, tmp_path: Path) -> None:
    BertForMaskedLM(model().config).save_pretrained(tmp_path)
    tokenizer().save_pretrained(tmp_path)
    with pytest.raises(ValueError, match="holds a BertForMaskedLM"):
        load_checkpoint(tmp_path)


def test_special_tokens_stand_around_each_window() -> None:
    class Bert:
        def __call__(self, text: str, verbose: bool = True, add_special_tokens: bool = True):
            ids = [ord(letter) for letter in text]
            return {"input_ids": [1, *ids, 2] if add_special_tokens else ids}

    assert around_of(Bert(), encodes=True) == ([1], [2])
    assert around_of(Bert(), encodes=False) == ([1], [])
    assert around_of(tokenizer(), encodes=True) == ([], [])

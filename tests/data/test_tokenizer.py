"""Tokenizers by path, each trained here from the embedded text."""

from __future__ import annotations

import json
import pickle
import shutil
from itertools import islice
from pathlib import Path
from typing import Any

import pytest

from actsparse_lab.data.rows import SpanRows
from actsparse_lab.data.text import load_documents
from actsparse_lab.data.tokenizer import Tokenizer, load_tokenizer

tokenizers = pytest.importorskip("tokenizers")
sentencepiece = pytest.importorskip("sentencepiece")

PIECES = 400
SAMPLES = [
    "Hello world.",
    "  two  spaces\nand\tothers ",
    "naïve ∑ 😀 \u2028",
    "",
    " ",
    "x" * 3000,
    # none of these may become the token it names
    "</s> <pad> <unk> <extra_id_0> <|endoftext|>",
]


@pytest.fixture(scope="module")
def texts() -> list[str]:
    documents = load_documents()["train"].values()
    return [text.decode()[:3000] for text in islice(documents, 15)]


@pytest.fixture(scope="module")
def t5(texts: list[str], tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A SentencePiece model with T5's special ids: pad 0, eos 1, unk 2, no bos."""
    folder = tmp_path_factory.mktemp("t5")
    sentencepiece.SentencePieceTrainer.train(
        sentence_iterator=(line for text in texts for line in text.splitlines()),
        model_prefix=str(folder / "spiece"),
        vocab_size=PIECES,
        pad_id=0,
        eos_id=1,
        unk_id=2,
        bos_id=-1,
        num_threads=1,
        minloglevel=2,
    )
    return folder / "spiece.model"


@pytest.fixture(scope="module")
def gpt2(texts: list[str], tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with vocab.json and merges.txt, as GPT-2's."""
    bpe = tokenizers.ByteLevelBPETokenizer()
    bpe.train_from_iterator(texts, vocab_size=300, special_tokens=["<|endoftext|>"])
    folder = tmp_path_factory.mktemp("gpt2")
    bpe.save_model(str(folder))
    return folder


@pytest.fixture(scope="module")
def fast(texts: list[str], tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A Hugging Face folder: tokenizer.json, which adds and cuts and pads, and its config."""
    tokenizer = tokenizers.Tokenizer(tokenizers.models.BPE(unk_token="<unk>"))
    tokenizer.pre_tokenizer = tokenizers.pre_tokenizers.Whitespace()
    special = ["<pad>", "</s>", "<unk>", *(f"<extra_id_{n}>" for n in range(7, -1, -1))]
    tokenizer.train_from_iterator(
        texts, tokenizers.trainers.BpeTrainer(vocab_size=PIECES, special_tokens=special)
    )
    tokenizer.post_processor = tokenizers.processors.TemplateProcessing(
        single="$A </s>", special_tokens=[("</s>", 1)]
    )
    tokenizer.enable_truncation(4)
    tokenizer.enable_padding(length=100)
    folder = tmp_path_factory.mktemp("fast")
    tokenizer.save(str(folder / "tokenizer.json"))
    config = {"eos_token": {"content": "</s>"}, "pad_token": "<pad>"}
    (folder / "tokenizer_config.json").write_text(json.dumps(config))
    return folder


def test_t5s_ids_are_sentencepieces_own(t5: Path, texts: list[str]) -> None:
    tokenizer = load_tokenizer(t5)
    model = sentencepiece.SentencePieceProcessor(model_file=str(t5))
    for text in [*texts, *SAMPLES]:
        assert list(tokenizer.encode(text)) == model.encode(text)


def test_t5s_vocabulary_is_pieces_and_100_sentinels_padded(t5: Path) -> None:
    tokenizer = load_tokenizer(str(t5))
    assert (tokenizer.pad, tokenizer.eos) == (0, 1)
    assert tokenizer.sentinel_start == PIECES + 99  # <extra_id_0>, and <extra_id_99> is PIECES
    assert tokenizer.sentinels == 100
    assert tokenizer.vocab_size == 512


def test_gpt2s_ids_are_those_of_byte_level_bpe(gpt2: Path, texts: list[str]) -> None:
    tokenizer = load_tokenizer(gpt2)
    theirs = tokenizers.ByteLevelBPETokenizer(str(gpt2 / "vocab.json"), str(gpt2 / "merges.txt"))
    for text in [*texts, *SAMPLES]:
        assert tokenizer.encode(text) == theirs.encode(text).ids
        assert theirs.decode(tokenizer.encode(text)) == text
    assert tokenizer.eos == theirs.token_to_id("<|endoftext|>") == 0
    assert (tokenizer.vocab_size, tokenizer.sentinels, tokenizer.pad) == (300, 0, None)


def test_a_pair_of_files_may_have_a_name_before_theirs(gpt2: Path, tmp_path: Path) -> None:
    for name in ("vocab.json", "merges.txt"):
        shutil.copy(gpt2 / name, tmp_path / f"gpt2_5k_{name}")
    pair = load_tokenizer(tmp_path / "gpt2_5k_vocab.json")
    assert pair.encode(SAMPLES[0]) == load_tokenizer(gpt2).encode(SAMPLES[0])
    assert pair.sha256 == load_tokenizer(gpt2).sha256
    (tmp_path / "gpt2_5k_merges.txt").unlink()
    with pytest.raises(ValueError, match=r"needs gpt2_5k_merges\.txt beside it"):
        load_tokenizer(tmp_path / "gpt2_5k_vocab.json")


def test_a_folders_tokenizer_gives_the_text_alone(fast: Path) -> None:
    tokenizer = load_tokenizer(fast)
    ids = tokenizer.encode("a document " * 50)
    assert len(ids) > 50  # neither cut nor padded
    assert {0, 1}.isdisjoint(ids)
    assert (tokenizer.pad, tokenizer.eos) == (0, 1)
    assert (tokenizer.sentinel_start, tokenizer.sentinels) == (10, 8)
    assert tokenizer.vocab_size == 512
    with pytest.raises(ValueError, match="need 28 sentinels, fast0 has 8"):
        SpanRows().check(tokenizer)
    SpanRows(64).check(tokenizer)


@pytest.mark.parametrize("kind", ["t5", "gpt2", "fast"])
def test_text_never_becomes_a_special_token(kind: str, request: pytest.FixtureRequest) -> None:
    tokenizer = load_tokenizer(request.getfixturevalue(kind))
    for copy in (tokenizer, pickle.loads(pickle.dumps(tokenizer))):
        special = {copy.eos, copy.pad}
        if copy.sentinel_start is not None:
            special |= set(range(copy.sentinel_start - copy.sentinels + 1, copy.sentinel_start + 1))
        for text in SAMPLES:
            ids = copy.encode(text)
            assert special.isdisjoint(ids)
            assert all(0 <= id < copy.vocab_size for id in ids)
            assert list(ids) == list(tokenizer.encode(text))


def test_a_folder_prefers_tokenizer_json(t5: Path, fast: Path, tmp_path: Path) -> None:
    shutil.copy(t5, tmp_path / "spiece.model")
    assert load_tokenizer(tmp_path).sha256 == load_tokenizer(t5).sha256
    for file in fast.iterdir():
        shutil.copy(file, tmp_path / file.name)
    assert load_tokenizer(tmp_path).sha256 == load_tokenizer(fast).sha256


def test_another_end_of_text_may_be_named(gpt2: Path, fast: Path, t5: Path) -> None:
    assert load_tokenizer(gpt2, eos="!").eos == 1
    assert load_tokenizer(fast, eos="<pad>").eos == 0
    assert load_tokenizer(t5, eos="<pad>").eos == 0


@pytest.mark.parametrize("kind", ["t5", "gpt2", "fast"])
def test_an_end_of_text_that_is_not_there_is_refused(
    kind: str, request: pytest.FixtureRequest
) -> None:
    with pytest.raises(ValueError, match="has no token '<end>': say which token ends a document"):
        load_tokenizer(request.getfixturevalue(kind), eos="<end>")


def test_a_tokenizer_without_end_of_text_is_refused(
    fast: Path, texts: list[str], tmp_path: Path
) -> None:
    shutil.copy(fast / "tokenizer.json", tmp_path / "tokenizer.json")
    with pytest.raises(ValueError, match=r"tokenizer\.json names no end of text"):
        load_tokenizer(tmp_path)
    sentencepiece.SentencePieceTrainer.train(
        sentence_iterator=iter(["a b c d e f " * 9]),
        model_prefix=str(tmp_path / "endless"),
        vocab_size=12,
        hard_vocab_limit=False,
        eos_id=-1,
        minloglevel=2,
    )
    with pytest.raises(ValueError, match=r"endless\.model names no end of text"):
        load_tokenizer(tmp_path / "endless.model")


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("a.model", "no model", "is no SentencePiece model"),
        ("a.model", "", "is no SentencePiece model"),
        ("tokenizer.json", "{}", r"is no tokenizer\.json"),
        ("a.txt", "", "is no tokenizer"),
        ("vocab.json", "{", "needs merges.txt"),
    ],
    ids=["no model", "empty", "no json", "text", "no merges"],
)
def test_a_file_that_is_no_tokenizer_is_named(
    tmp_path: Path, name: str, content: str, message: str
) -> None:
    (tmp_path / name).write_text(content)
    with pytest.raises(ValueError, match=message):
        load_tokenizer(tmp_path / name)


def test_a_folder_that_does_not_say_which_is_refused(t5: Path, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"holds neither .* \(.model files: \[\]\)"):
        load_tokenizer(tmp_path)
    for name in ("a.model", "b.model"):
        shutil.copy(t5, tmp_path / name)
    with pytest.raises(ValueError, match=r"\['a\.model', 'b\.model'\]\): name the file"):
        load_tokenizer(tmp_path)


def test_a_broken_pair_is_named(gpt2: Path, tmp_path: Path) -> None:
    (tmp_path / "vocab.json").write_text("{")
    shutil.copy(gpt2 / "merges.txt", tmp_path / "merges.txt")
    with pytest.raises(ValueError, match=r"vocab\.json and merges\.txt are no byte-level BPE"):
        load_tokenizer(tmp_path)


def test_a_tokenizer_says_what_a_record_needs(t5: Path, fast: Path, gpt2: Path) -> None:
    found: list[Any] = [load_tokenizer(path) for path in (t5, fast, gpt2)]
    assert [type(tokenizer) for tokenizer in found] == [Tokenizer] * 3
    assert [tokenizer.name for tokenizer in found] == ["spiece.model", fast.name, gpt2.name]
    assert len({tokenizer.sha256 for tokenizer in found}) == 3


def test_bytes_need_no_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Every text comes back from its ids; marks and sentinels are apart from all bytes."""
    monkeypatch.chdir(tmp_path)
    tokenizer = load_tokenizer("bytes")
    for text in SAMPLES:
        ids = tokenizer.encode(text)
        assert bytes(each - 2 for each in ids).decode() == text
    everything = {tokenizer.pad, tokenizer.eos, *range(2, 258)}
    sentinels = {tokenizer.sentinel_start - i for i in range(tokenizer.sentinels)}  # type: ignore[operator]
    assert not everything & sentinels
    assert everything | sentinels == set(range(tokenizer.vocab_size))
    assert pickle.loads(pickle.dumps(tokenizer)) == tokenizer

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch.utils.data import DataLoader

from actsparse_lab.data import bigram_nats, lm_splits, span_corruption_splits, text
from actsparse_lab.data.text import (
    FIRST_BYTE,
    SENTINEL_START,
    VOCAB_SIZE,
    encode,
    load_documents,
)


def decode(ids: Any) -> bytes:
    """Ids to bytes; pad, eos, sentinels and −100 are left out."""
    array = np.asarray(ids).reshape(-1) - FIRST_BYTE
    return array[(array >= 0) & (array < 256)].astype(np.uint8).tobytes()


def paragraphs(documents: dict[str, bytes]) -> list[str]:
    return [
        " ".join(paragraph.split())
        for document in documents.values()
        for paragraph in re.split(r"\n\s*\n", document.decode())
    ]


def test_no_document_and_no_paragraph_is_in_two_splits() -> None:
    documents = load_documents()
    names = [name for texts in documents.values() for name in texts]
    assert len(names) == len(set(names))
    every = [paragraph for texts in documents.values() for paragraph in paragraphs(texts)]
    assert len(every) == len(set(every))


def test_the_corpus_is_about_a_megabyte_and_an_eighth_of_it_is_held_out_twice() -> None:
    sizes = lm_splits().info["bytes"]
    total = sum(sizes.values())
    assert 0.8e6 < total < 2e6
    for split in ("validation", "test"):
        assert 0.05 < sizes[split] / total < 0.2


def test_reading_twice_gives_the_same_text() -> None:
    before = lm_splits().info
    load_documents.cache_clear()
    assert lm_splits().info == before
    assert json.loads(json.dumps(before)) == before


def test_bytes_survive_the_vocabulary() -> None:
    everything = bytes(range(256))
    ids = encode(everything)
    assert (ids.min(), ids.max()) == (2, 257)
    assert decode(ids) == everything


@pytest.mark.parametrize("block", [2, 64, 100])
def test_lm_windows_are_the_text_without_gap_or_overlap(block: int) -> None:
    splits = lm_splits(block)
    for name, part in (("train", splits.train), ("test", splits.test)):
        joined = b"\n\n\n".join(load_documents()[name].values())
        ids = part.columns["input_ids"]
        assert ids.shape == (len(joined) // block, block)
        assert decode(ids) == joined[: ids.numel()]
        assert torch.equal(part.columns["labels"], ids)


def test_corrupted_windows_are_dense_and_hide_what_the_mask_says() -> None:
    splits = span_corruption_splits(input_length=64)
    batch = next(iter(DataLoader(splits.validation, batch_size=16)))
    lengths = splits.info["lengths"]
    assert batch["input_ids"].shape == (16, lengths["inputs"])
    assert batch["labels"].shape == (16, lengths["targets"])
    assert batch["input_ids"].max() == SENTINEL_START == VOCAB_SIZE - 1
    for index in range(16):
        window, mask = splits.validation.windows[index], splits.validation.mask(index)
        assert decode(batch["labels"][index]) == decode(window[mask])
        assert decode(batch["input_ids"][index]) == decode(window[~mask])


def test_training_spans_are_fresh_in_each_pass_and_for_each_seed() -> None:
    train = span_corruption_splits(input_length=64, seed=3).train
    windows = len(train.windows)
    assert len(train) == 10 * windows
    first, second = train[5], train[5 + windows]
    assert not torch.equal(first["input_ids"], second["input_ids"])
    assert (train.mask(5) != train.mask(5 + windows)).any()
    again = span_corruption_splits(input_length=64, seed=3).train
    assert torch.equal(again[5 + windows]["input_ids"], second["input_ids"])
    other = span_corruption_splits(input_length=64, seed=4).train
    assert any((other.mask(index) != train.mask(index)).any() for index in range(5))


def test_held_out_spans_are_the_same_for_every_seed() -> None:
    first, second = (span_corruption_splits(input_length=64, seed=seed) for seed in (0, 1))
    for index in range(len(first.test)):
        assert (first.test.mask(index) == second.test.mask(index)).all()
    assert (first.test.mask(0) != first.validation.mask(0)).any()


def test_the_bigram_of_span_corruption_scores_hidden_bytes_given_the_original_text() -> None:
    validation = span_corruption_splits(input_length=64).validation
    previous, following = validation.pairs()
    assert following.tobytes() == b"".join(decode(item["labels"]) for item in validation)
    expected = [
        validation.windows[index][position - 1] - 2
        for index in range(20)
        for position in np.flatnonzero(validation.mask(index))
    ]
    assert previous[: len(expected)].tolist() == expected
    assert 2.0 < bigram_nats(span_corruption_splits(input_length=64))["test"] < 3.0


def test_indices_behave_like_a_sequences() -> None:
    test = span_corruption_splits(input_length=64).test
    assert torch.equal(test[-1]["labels"], test[len(test) - 1]["labels"])
    with pytest.raises(IndexError):
        test[len(test)]


def test_bad_input_is_refused(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="block=1"):
        lm_splits(block=1)
    with pytest.raises(ValueError, match="longer than all validation text"):
        lm_splits(block=1_000_000)
    with pytest.raises(ValueError, match="needs 139 sentinels"):
        span_corruption_splits(input_length=2500)
    with pytest.raises(ValueError, match="passes=0"):
        span_corruption_splits(passes=0)
    monkeypatch.setattr(text.sysconfig, "get_paths", lambda: {"stdlib": str(tmp_path)})
    load_documents.cache_clear()
    with pytest.raises(FileNotFoundError, match="_pydecimal"):
        lm_splits()

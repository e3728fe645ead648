"""Streams: every document once, rows that give the text back, and resume at any place."""

from __future__ import annotations

import gzip
import json
import tempfile
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from itertools import chain, islice, takewhile
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from actsparse_lab.data.rows import CausalRows, Rows, SpanRows
from actsparse_lab.data.shards import Corpus, corpus
from actsparse_lab.data.span_corruption import corrupt, span_lengths
from actsparse_lab.data.streams import (
    HELD_SPANS,
    SPANS,
    START,
    Place,
    ShardLoader,
    TokenStream,
    held_rows,
    text_splits,
)
from actsparse_lab.data.tokenizer import Tokenizer

# a machine with one core would complain of two workers
pytestmark = pytest.mark.filterwarnings("ignore:This DataLoader will create")


def to_bytes(text: str) -> list[int]:
    return [2 + byte for byte in text.encode()]


BYTES = Tokenizer("bytes", to_bytes, vocab_size=320, eos=1, pad=0, sentinel_start=319, sentinels=62)

seeds = st.integers(0, 2**32 - 1)
# how many documents each shard has
layouts = st.lists(st.integers(0, 5), min_size=1, max_size=6)


def documents_of(layout: list[int]) -> list[list[str]]:
    """Documents that say who they are, of different lengths."""
    return [
        [f"shard {shard}, document {number}. " * (1 + number) for number in range(count)]
        for shard, count in enumerate(layout)
    ]


@contextmanager
def written(shards: list[list[str]], damage: str = "") -> Iterator[list[str]]:
    with tempfile.TemporaryDirectory() as folder:
        files = [Path(folder) / f"c4-train.{shard:05d}.json.gz" for shard in range(len(shards))]
        for file, texts in zip(files, shards, strict=True):
            lines = "".join(json.dumps({"text": text}) + "\n" for text in texts)
            file.write_bytes(gzip.compress((lines + damage).encode()))
        yield [str(file) for file in files]


@pytest.fixture
def found() -> Iterator[Corpus]:
    """Three shards with seven documents each."""
    with written(documents_of([7, 7, 7])) as files:
        yield Corpus(files, [])


def text_of(ids: Any) -> list[str]:
    """The documents in a sequence of ids; the last one may have been cut."""
    plain = bytes(id - 2 if id > 1 else 0 for id in np.asarray(ids).tolist())
    return [document.decode() for document in plain.split(b"\0")]


def first_epoch(stream: TokenStream) -> list[str]:
    try:
        places = list(takewhile(lambda found: found[0].epoch == 0, stream.documents()))
    except ValueError as error:
        assert "finds no text" in str(error)  # more streams than documents  # noqa: PT017
        return []
    return [text_of(ids[:-1])[0] for _, ids in places]


def take(loader: ShardLoader, count: int) -> list[dict[str, list[list[int]]]]:
    batches = islice(loader, count)
    return [{name: ids.tolist() for name, ids in batch.items()} for batch in batches]


def reloaded(state: dict[str, Any]) -> dict[str, Any]:
    copy: dict[str, Any] = json.loads(json.dumps(state))
    return copy


@given(layouts, st.integers(1, 3), st.integers(0, 3), seeds)
def test_an_epoch_of_all_streams_has_every_document_once(
    layout: list[int], processes: int, workers: int, seed: int
) -> None:
    shards = documents_of(layout)
    with written(shards) as files:
        loaders = [
            ShardLoader(
                Corpus(files, []),
                BYTES,
                CausalRows(8),
                batch=1,
                seed=seed,
                rank=rank,
                processes=processes,
                workers=workers,
            )
            for rank in range(processes)
        ]
        streams = [stream for loader in loaders for stream in loader.streams]
        assert len(streams) == processes * max(1, workers)
        assert Counter(chain(*map(first_epoch, streams))) == Counter(chain(*shards))


@given(layouts.filter(any), st.integers(2, 70), seeds)
def test_rows_give_the_text_back(layout: list[int], tokens: int, seed: int) -> None:
    shards = documents_of(layout)
    every = list(chain(*shards))
    ids = sum(len(to_bytes(text)) + 1 for text in every)
    with written(shards) as files:
        stream = TokenStream(files, BYTES, seed=seed)
        rows = [ids for ids, _ in islice(stream.rows(tokens), -(-3 * ids // tokens))]
    assert {len(row) for row in rows} == {tokens}
    texts = text_of(np.concatenate(rows))
    # three epochs: each has everything, in an order of its own
    for epoch in range(3):
        once = texts[epoch * len(every) : (epoch + 1) * len(every)]
        assert Counter(once) == Counter(every)


@given(
    st.lists(st.integers(1, 5), min_size=1, max_size=5),
    st.integers(2, 200),
    st.integers(0, 20),
    st.integers(1, 4),
    seeds,
)
def test_a_stream_goes_on_from_any_place(
    layout: list[int], tokens: int, done: int, count: int, seed: int
) -> None:
    with written(documents_of(layout)) as files:
        # enough shards for the streams or not: both ways of dealing
        stream = TokenStream(files, BYTES, seed=seed, count=count)
        rows = list(islice(stream.rows(tokens), done + 6))
        place = rows[done - 1][1] if done else START
        assert place.row == done
        resumed = list(islice(stream.rows(tokens, Place(*place)), 6))
    for (ids, after), (again, after_again) in zip(rows[done:], resumed, strict=True):
        assert after == after_again
        assert ids.tolist() == again.tolist()


def test_resuming_tokenises_no_document_before_the_place(found: Corpus) -> None:
    seen: list[str] = []

    def counting(text: str) -> list[int]:
        seen.append(text)
        return to_bytes(text)

    stream = TokenStream(found.train, replace(BYTES, encode=counting))
    place = next(after for ids, after in stream.rows(16) if after.document == 4)
    seen.clear()
    next(stream.rows(16, place))
    assert len(seen) == 1


def test_shards_and_epochs_come_in_orders_of_their_own(found: Corpus) -> None:
    def order(**changed: int) -> list[str]:
        stream = replace(TokenStream(found.train, BYTES), **changed)
        return [text_of(ids)[0] for _, ids in islice(stream.documents(), 21 * 6)]

    epochs = {tuple(order()[start : start + 21]) for start in range(0, 21 * 6, 21)}
    assert len(epochs) > 1
    assert len({tuple(order(seed=seed)) for seed in range(4)}) == 4
    assert order() == order()


@given(st.lists(st.sampled_from(["", "a", "\n"]), max_size=4), st.integers(1, 3))
def test_a_stream_without_text_says_so(texts: list[str], count: int) -> None:
    letters = replace(BYTES, encode=lambda text: to_bytes(text.strip()))
    with written([texts]) as files:
        for index in range(count):
            stream = TokenStream(files, letters, index=index, count=count)
            if "a" in texts[index::count]:
                assert text_of(next(stream.documents())[1]) == ["a", ""]
            else:
                with pytest.raises(ValueError, match=rf"stream {index} of {count} finds no text"):
                    next(stream.documents())


@pytest.mark.parametrize("workers", [0, 2])
@pytest.mark.parametrize("rows", [CausalRows(24), SpanRows(64)], ids=["causal", "spans"])
def test_a_loader_goes_on_after_the_batch_last_given(
    found: Corpus, rows: Rows, workers: int
) -> None:
    def loader() -> ShardLoader:
        return ShardLoader(found, BYTES, rows, batch=3, seed=5, workers=workers)

    whole = take(loader(), 12)
    for done in (0, 1, 2, 5):
        first = loader()
        assert take(first, done) == whole[:done]
        second = loader()
        second.load_state_dict(reloaded(first.state_dict()))
        assert second.state_dict() == first.state_dict()
        assert take(second, 7) == whole[done : done + 7]
    # and so does the loader itself
    assert [*take(second, 0), *take(first, 3), *take(first, 2)] == whole[5:10]


@pytest.mark.parametrize("workers", [0, 2])
def test_workers_change_nothing_but_who_makes_a_batch(found: Corpus, workers: int) -> None:
    loader = ShardLoader(found, BYTES, CausalRows(16), batch=2, workers=workers)
    batches = take(loader, 8)
    for worker, stream in enumerate(loader.streams):
        rows = [ids.tolist() for ids, _ in islice(stream.rows(16), 16 // len(loader.streams))]
        mine = batches[worker :: len(loader.streams)]
        assert list(chain(*(batch["input_ids"] for batch in mine))) == rows


@pytest.mark.parametrize("noise", [(0.15, 3.0), (0.4, 1.5)], ids=["t5", "more"])
def test_batches_are_what_trainer_takes(found: Corpus, noise: tuple[float, float]) -> None:
    rows = SpanRows(40, *noise)
    lengths = span_lengths(rows.tokens, *noise)
    batch = next(iter(ShardLoader(found, BYTES, rows, batch=3)))
    assert {name: (ids.dtype, tuple(ids.shape)) for name, ids in batch.items()} == {
        "input_ids": (torch.int64, (3, lengths.inputs)),
        "labels": (torch.int64, (3, lengths.targets)),
    }
    assert not hasattr(ShardLoader, "__len__")


def test_spans_come_from_seed_stream_and_row_alone(found: Corpus) -> None:
    rows = SpanRows(30)
    by_one, by_four = (
        list(chain(*(b["labels"] for b in take(ShardLoader(found, BYTES, rows, batch=n), 8 // n))))
        for n in (1, 4)
    )
    assert by_one == by_four
    (stream,) = ShardLoader(found, BYTES, rows, batch=1).streams
    for number, (ids, _) in enumerate(islice(stream.rows(rows.tokens), 8)):
        rng = np.random.default_rng([0, SPANS, 0, number])
        assert by_one[number] == corrupt(ids, rng, sentinel_start=319, eos=1)[1].tolist()


def test_the_global_generator_is_left_alone(found: Corpus) -> None:
    before = torch.get_rng_state()
    take(ShardLoader(found, BYTES, CausalRows(8), batch=2), 2)
    assert torch.equal(before, torch.get_rng_state())


def test_two_processes_see_different_documents_and_together_all() -> None:
    shards = documents_of([4, 4, 4, 4])
    with written(shards) as files:
        seen = []
        for rank in range(2):
            loader = ShardLoader(
                Corpus(files, []), BYTES, CausalRows(16), batch=1, rank=rank, processes=2
            )
            ids: list[int] = []
            while loader.state_dict()["places"][0]["epoch"] == 0:
                ids += take(loader, 1)[0]["input_ids"][0]
            seen.append(Counter(text_of(ids)[:8]))
    assert not seen[0].keys() & seen[1].keys()
    assert seen[0] + seen[1] == Counter(chain(*shards))


CHANGES: dict[str, tuple[dict[str, Any], str]] = {
    "processes": ({"processes": 3}, "processes=2; resume with the same, here it is 3"),
    "workers": ({"workers": 3}, "workers=2; resume with the same, here it is 3"),
    "no workers": ({"workers": 0}, "workers=2; resume with the same, here it is 1"),
    "rank": ({"rank": 0}, "rank=1"),
    "seed": ({"seed": 1}, "seed=0"),
    "row": ({"rows": CausalRows(9)}, "tokens=8"),
    "tokenizer": ({"tokenizer": replace(BYTES, sha256="another")}, "tokenizer=''"),
}


@pytest.mark.parametrize("changed", CHANGES)
def test_a_place_is_refused_where_it_means_something_else(found: Corpus, changed: str) -> None:
    usual: dict[str, Any] = {
        "corpus": found,
        "tokenizer": BYTES,
        "rows": CausalRows(8),
        "batch": 2,
        "rank": 1,
        "processes": 2,
        "workers": 2,
    }
    state = reloaded(ShardLoader(**usual).state_dict())
    arguments, message = CHANGES[changed]
    with pytest.raises(ValueError, match=f"was written with {message}"):
        ShardLoader(**usual | arguments).load_state_dict(state)
    with pytest.raises(ValueError, match="was written with shards="):
        ShardLoader(**usual | {"corpus": Corpus(found.train[:2], [])}).load_state_dict(state)
    ShardLoader(**usual | {"batch": 3}).load_state_dict(state)


@pytest.mark.parametrize("workers", [0, 2])
def test_damage_is_counted_across_workers_and_resumes(workers: int) -> None:
    shards = documents_of([3, 3])
    with written(shards, damage='{"text": 3}\n') as files:

        def loader(damaged: Any) -> ShardLoader:
            return ShardLoader(
                Corpus(files, []),
                BYTES,
                CausalRows(32),
                batch=1,
                workers=workers,
                damaged=damaged,
            )

        with pytest.raises(ValueError, match=r"c4-train\.0000\d\.json\.gz, line 4: .*no \"text\""):
            take(loader("refuse"), 60)
        skipping = loader("skip")
        while any(place["epoch"] < 2 for place in skipping.state_dict()["places"]):
            take(skipping, 2)
        again = loader("skip")
        again.load_state_dict(reloaded(skipping.state_dict()))
        take(again, 2)
    assert skipping.skipped.keys() == {"c4-train.00000.json.gz", "c4-train.00001.json.gz"}
    assert set(skipping.skipped.values()) <= {2, 3}  # once in each epoch that was read
    assert all(again.skipped[name] >= count for name, count in skipping.skipped.items())


def test_held_rows_are_the_same_each_time_and_read_once(found: Corpus) -> None:
    rows = SpanRows(64)
    held = held_rows(found.train, BYTES, rows, 5)
    again = held_rows(found.train, BYTES, rows, 1000)
    assert len(held) == 5
    for index in range(5):
        assert all(torch.equal(again[index][name], ids) for name, ids in held[index].items())
    text = [id for text in chain(*documents_of([7, 7, 7])) for id in [*to_bytes(text), BYTES.eos]]
    for index in range(5):  # each row has spans of its own
        ids = np.array(text[index * rows.tokens : (index + 1) * rows.tokens])
        rng = np.random.default_rng([0, HELD_SPANS, index])
        labels = corrupt(ids, rng, sentinel_start=319, eos=1)[1]
        assert held[index]["labels"].tolist() == labels.tolist()
    assert len(again) == len(text) // rows.tokens
    plain = held_rows(found.train, BYTES, CausalRows(50), 1000).columns["input_ids"]
    assert plain.flatten().tolist() == text[: len(text) // 50 * 50]


def test_one_shard_is_divided_without_remainder_or_overlap() -> None:
    texts = [f"text {number}" for number in range(600)]
    with written([[*texts, *texts]]) as (file,):  # each twice: copies stay together
        one = corpus(file)
        (stream,) = ShardLoader(one, BYTES, CausalRows(2), batch=1).streams
        training = first_epoch(stream)
        held = {
            part: held_rows([file], BYTES, CausalRows(2), 10_000, keep=one.keep_held(part))
            for part in ("validation", "test")
        }
    parts = [text_of(rows.columns["input_ids"].flatten()) for rows in held.values()]
    parts = [[text for text in part if text in texts] for part in parts]  # without cut ones
    assert len(set(training)) + len(set(parts[0])) + len(set(parts[1])) >= 600 - 2
    assert not set(training) & set(chain(*parts))
    assert not set(parts[0]) & set(parts[1])
    assert set(Counter(training).values()) == {2}


def test_splits_describe_themselves_without_folders() -> None:
    with written(documents_of([9, 9, 9, 9])) as files:
        splits = text_splits(
            corpus(files), BYTES, SpanRows(30), count=3, name="t5_web", damaged="skip"
        )
        moved = text_splits(corpus(files), BYTES, SpanRows(30), count=3, name="t5_web")
        assert str(Path(files[0]).parent) not in json.dumps(splits.info)
    assert len(splits.validation) <= 3
    assert splits.info["sizes"] == {
        "train": len(splits.train),
        "validation": len(splits.validation),
        "test": len(splits.test),
    }
    lengths = span_lengths(SpanRows(30).tokens)
    assert splits.info["lengths"] == {"input_ids": lengths.inputs, "labels": lengths.targets}
    assert splits.info["shards"] == {"train": 3, "held": 1, "by_text": False}
    assert {name: splits.info[name] for name in ("name", "tokenizer", "vocab_size")} == {
        "name": "t5_web",
        "tokenizer": "bytes",
        "vocab_size": 320,
    }
    assert splits.info == moved.info


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"batch": 0}, "batch=0"),
        ({"workers": -1}, "workers=-1"),
        ({"rank": 2, "processes": 2}, "rank=2, processes=2"),
        ({"rank": -1}, "rank=-1"),
        ({"damaged": "ignore"}, "damaged='ignore'"),
        ({"rows": CausalRows(1)}, "tokens=1 must be at least 2"),
        ({"rows": SpanRows(2048)}, r"inputs=2048 need 114 sentinels, bytes has 62"),
        ({"rows": SpanRows(2)}, "inputs=2 is too short"),
    ],
    ids=lambda value: value if isinstance(value, str) else "",
)
def test_what_cannot_be_made_is_refused(
    found: Corpus, arguments: dict[str, Any], message: str
) -> None:
    usual: dict[str, Any] = {
        "corpus": found,
        "tokenizer": BYTES,
        "rows": CausalRows(8),
        "batch": 2,
    }
    with pytest.raises(ValueError, match=message):
        ShardLoader(**usual | arguments)


def test_too_little_held_out_text_is_refused(found: Corpus) -> None:
    with pytest.raises(ValueError, match="less text than one row of 100000 tokens"):
        held_rows(found.train, BYTES, CausalRows(100_000), 5)
    with pytest.raises(ValueError, match="count=0"):
        held_rows(found.train, BYTES, CausalRows(8), 0)

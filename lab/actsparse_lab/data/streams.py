"""Rows of tokens from text shards, dealt to processes and workers, with exact resume.

**Streams.** There are S = processes × max(1, workers) of them. With at least S shards, the shards
are shuffled by seed and shard i goes to stream i mod S; with fewer, every stream reads every shard
and takes the lines with number mod S = stream. In each epoch a stream reads its shards in a new
order; documents keep their order in the shard (C4's is random already). Within an epoch of all
streams every document comes once. Streams never end, and a shorter one begins its next epoch
earlier.

**Rows.** A stream is cut into rows of T tokens, without padding: `eos` ends each document, and rows
run across documents, shards and epochs. The spans of row n of stream s are drawn from (seed, s, n)
alone.
"""

from __future__ import annotations

import hashlib
import itertools
from collections import Counter
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any, Literal, NamedTuple

import numpy as np
import torch
from torch import Tensor
from torch.utils.data import DataLoader, IterableDataset, get_worker_info

from actsparse_lab.data.rows import Rows
from actsparse_lab.data.shards import Corpus, Keep, describe, name_of, texts
from actsparse_lab.data.span_corruption import Ids
from actsparse_lab.data.splits import Splits, TensorRows
from actsparse_lab.data.tokenizer import Tokenizer

Damaged = Literal["refuse", "skip"]
Batch = dict[str, Tensor]

# Draws that must not repeat each other, as the second word of a generator's seed.
DEALING, ORDER, SPANS, HELD_SPANS = range(4)


class Place(NamedTuple):
    """Where a stream's next row begins, after `offset` tokens of a document, and its number `row`.

    `shard` is a position in the epoch's order, `document` a line, from 0.
    """

    epoch: int = 0
    shard: int = 0
    document: int = 0
    offset: int = 0
    row: int = 0


START = Place()


@dataclass(frozen=True)
class TokenStream:
    """Stream `index` of `count` over `files`, as the module says; `keep` picks texts."""

    files: Sequence[str]
    tokenizer: Tokenizer
    keep: Keep | None = None
    seed: int = 0
    index: int = 0
    count: int = 1

    def documents(
        self, start: Place = START, skipped: Counter[str] | None = None
    ) -> Iterator[tuple[Place, Ids]]:
        """Places and ids of documents from `start` on, without end; those without tokens left out.

        Raises `ValueError` for damage unless `skipped` counts it, and when a whole epoch holds no
        token.
        """
        files, share = list(self.files), (self.index, self.count)
        if len(files) >= self.count:
            dealt = np.random.default_rng([self.seed, DEALING]).permutation(len(files))
            files, share = [files[i] for i in dealt[self.index :: self.count]], (0, 1)
        last = start.epoch  # the last epoch that held anything, as far as we know
        for epoch in itertools.count(start.epoch):
            if epoch > last + 1:
                raise ValueError(
                    f"stream {self.index} of {self.count} finds no text in "
                    f"{', '.join(map(name_of, files[:3]))}: use fewer processes or workers, or "
                    "more documents"
                )
            order = np.random.default_rng([self.seed, ORDER, epoch, self.index])
            for shard, which in enumerate(order.permutation(len(files))):
                if (epoch, shard) < start[:2]:
                    continue
                first = start.document if (epoch, shard) == start[:2] else 0
                for line, ids in _tokenised(
                    texts(files[which], first, share, skipped), self.tokenizer, self.keep
                ):
                    last = epoch
                    yield Place(epoch, shard, line), ids

    def rows(
        self, tokens: int, start: Place = START, skipped: Counter[str] | None = None
    ) -> Iterator[tuple[Ids, Place]]:
        """Rows of `tokens` ids from `start` on, each with the place of the row after it."""
        return _cut(self.documents(start, skipped), tokens, start)


def _tokenised(
    lines: Iterable[tuple[int, str]], tokenizer: Tokenizer, keep: Keep | None
) -> Iterator[tuple[int, Ids]]:
    for line, text in lines:
        if keep is None or keep(text):
            ids = tokenizer.encode(text)
            if len(ids):
                yield line, np.array([*ids, tokenizer.eos], dtype=np.int64)


def _cut(
    documents: Iterable[tuple[Place, Ids]], tokens: int, start: Place
) -> Iterator[tuple[Ids, Place]]:
    """Concatenate and cut; a last row that is not full is dropped."""
    pieces: list[Ids] = []
    missing, row = tokens, start.row
    for place, ids in documents:
        offset = start.offset if place[:3] == start[:3] else 0
        while len(ids) - offset >= missing:
            pieces.append(ids[offset : offset + missing])
            offset, row = offset + missing, row + 1
            yield np.concatenate(pieces), place._replace(offset=offset, row=row)
            pieces, missing = [], tokens
        pieces.append(ids[offset:])
        missing -= len(ids) - offset


class ShardLoader:
    """Batches of rows from a corpus for one of several processes, without end; resumable exactly.

    Iterating gives `{"input_ids": [B, I], "labels": [B, L]}`, int64 (what `rows` makes), made by
    `workers` processes ahead of time, or in this one with 0. It goes on where the last iteration
    stopped. `state_dict()` is the place after the batch last given, however many more the workers
    have ready: a loader that loads it gives the same rest. States are JSON-ready and belong to one
    process: save and load one for each.

    `skipped` counts damaged lines and shards by shard name, anew in each epoch, with
    `damaged="skip"`; otherwise damage is a `ValueError`.

    Args:
        corpus: what `actsparse_lab.data.shards.corpus` finds.
        tokenizer: what `load_tokenizer` gives.
        rows: `SpanRows(...)` or `CausalRows(...)`.
        batch: rows in a batch, B.
        seed: deals shards, orders them and draws spans.
        rank: this process, from 0.
        processes: how many there are.
        workers: worker processes of this process.
        damaged: what to do about damaged lines and shards.

    Raises:
        ValueError: sizes out of range, rows that the tokenizer cannot make, damage (see above),
            and from `load_state_dict` when the loader differs from the one that wrote the state.

    >>> import json, tempfile
    >>> from actsparse_lab.data.rows import CausalRows
    >>> with tempfile.NamedTemporaryFile("w", suffix=".jsonl") as file:
    ...     print(
    ...         json.dumps({"text": "ab"}),
    ...         json.dumps({"text": "c"}),
    ...         sep="\\n",
    ...         file=file,
    ...         flush=True,
    ...     )
    ...     found = Corpus(train=[file.name], held=[])
    ...     letters = Tokenizer("letters", lambda text: [ord(c) - 96 for c in text], 27, eos=0)
    ...     loader = ShardLoader(found, letters, CausalRows(3), batch=2)
    ...     next(iter(loader))["input_ids"], loader.state_dict()["places"]
    (tensor([[1, 2, 0],
             [3, 0, 1]]),
     [{'epoch': 1, 'shard': 0, 'document': 0, 'offset': 1, 'row': 2, 'skipped': {}}])
    """

    def __init__(
        self,
        corpus: Corpus,
        tokenizer: Tokenizer,
        rows: Rows,
        *,
        batch: int,
        seed: int = 0,
        rank: int = 0,
        processes: int = 1,
        workers: int = 0,
        damaged: Damaged = "refuse",
    ) -> None:
        if batch < 1 or workers < 0 or not 0 <= rank < processes:
            raise ValueError(
                f"batch={batch}, workers={workers}, rank={rank}, processes={processes}: expected "
                "batch ≥ 1, workers ≥ 0 and 0 ≤ rank < processes"
            )
        rows.check(tokenizer)
        self.rows, self.batch, self.workers, self.skip = rows, batch, workers, not _refuses(damaged)
        each = max(1, workers)
        self.streams = [
            TokenStream(
                corpus.train,
                tokenizer,
                corpus.keep,
                seed,
                index=rank * each + worker,
                count=processes * each,
            )
            for worker in range(each)
        ]
        names = "\0".join(map(name_of, corpus.train))
        # what a place has its meaning from
        self._made_with = {
            "processes": processes,
            "workers": each,
            "rank": rank,
            "seed": seed,
            "tokens": rows.tokens,
            "tokenizer": tokenizer.sha256,
            "shards": hashlib.sha256(names.encode()).hexdigest(),
        }
        self._turn = 0
        self._places = [_Kept(START, {}) for _ in self.streams]

    @property
    def skipped(self) -> dict[str, int]:
        """Damaged lines and shards left out so far, by shard name."""
        return dict(sum((Counter(kept.skipped) for kept in self._places), Counter()))

    def __iter__(self) -> Iterator[Batch]:
        loader = DataLoader(
            _Batches(self),
            batch_size=None,
            num_workers=self.workers,
            pin_memory=torch.cuda.is_available(),
            generator=torch.Generator(),  # or each iteration would draw from the global one
        )
        for batch, worker, place, skipped in loader:
            self._turn = (worker + 1) % len(self.streams)
            self._places[worker] = _Kept(Place(*place), skipped)
            yield batch

    def state_dict(self) -> dict[str, Any]:
        """Where the next batch begins: a place for each worker and whose turn it is; JSON-ready."""
        places = [{**kept.place._asdict(), "skipped": kept.skipped} for kept in self._places]
        return {**self._made_with, "turn": self._turn, "places": places}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Go on from `state`; takes effect when iteration begins."""
        for name, here in self._made_with.items():
            if state[name] != here:
                raise ValueError(
                    f"this place in the data was written with {name}={state[name]!r}; resume with "
                    f"the same, here it is {here!r}"
                )
        self._turn = state["turn"]
        self._places = [
            _Kept(Place(**{name: kept[name] for name in Place._fields}), dict(kept["skipped"]))
            for kept in state["places"]
        ]


class _Kept(NamedTuple):
    place: Place
    skipped: dict[str, int]


class _Batches(IterableDataset[Any]):
    """One worker's batches, each with the worker's number and the place after it."""

    def __init__(self, loader: ShardLoader) -> None:
        self.streams, self.rows, self.batch = loader.streams, loader.rows, loader.batch
        self.turn, self.places = loader._turn, list(loader._places)
        self.skip = loader.skip

    def __iter__(self) -> Iterator[tuple[Batch, int, tuple[int, ...], dict[str, int]]]:
        info = get_worker_info()
        # DataLoader asks its workers in turn from 0: 0 plays the one whose turn it is
        worker = (self.turn + (info.id if info else 0)) % len(self.streams)
        stream, kept = self.streams[worker], self.places[worker]
        skipped = Counter(kept.skipped) if self.skip else None
        made = []
        for ids, after in stream.rows(self.rows.tokens, kept.place, skipped):
            rng = np.random.default_rng([stream.seed, SPANS, stream.index, after.row - 1])
            made.append(self.rows.row(ids, stream.tokenizer, rng))
            if len(made) == self.batch:
                yield _stacked(made), worker, tuple(after), dict(skipped or {})
                made = []


def text_splits(
    corpus: Corpus,
    tokenizer: Tokenizer,
    rows: Rows,
    *,
    count: int = 1000,
    name: str = "shards",
    damaged: Damaged = "refuse",
) -> Splits[TensorRows]:
    """Held-out rows of a corpus, `count` each for validation and test, fewer where text is short.

    A held-out document goes to validation or test by hash of its text. `train` holds the first
    rows of the training text, at most 16, to try a model on: training itself reads `ShardLoader`.
    `info` names shards and tokenizer; its `sha256` is over the shards' names and sizes, not
    over their bytes. Raises `ValueError` as `held_rows` and `ShardLoader` do.
    """
    skipped = None if _refuses(damaged) else Counter[str]()
    train = held_rows(corpus.train, tokenizer, rows, 16, keep=corpus.keep, skipped=skipped)
    validation, test = (
        held_rows(corpus.held, tokenizer, rows, count, keep=corpus.keep_held(part), skipped=skipped)
        for part in ("validation", "test")
    )
    info = {
        "name": name,
        **describe(list(dict.fromkeys([*corpus.train, *corpus.held]))),
        "sizes": {"train": len(train), "validation": len(validation), "test": len(test)},
        "shards": {"train": len(corpus.train), "held": len(corpus.held), "by_text": corpus.by_text},
        "tokenizer": tokenizer.name,
        "tokenizer_sha256": tokenizer.sha256,
        "vocab_size": tokenizer.vocab_size,
        "eos_token_id": tokenizer.eos,
        "pad_token_id": tokenizer.pad,
        "decoder_start_token_id": tokenizer.pad,
        **vars(rows),
        "tokens": rows.tokens,
        "lengths": {name: ids.shape[1] for name, ids in validation.columns.items()},
        "skipped": dict(skipped or {}),
    }
    return Splits(train, validation, test, info)


def held_rows(
    files: Sequence[str],
    tokenizer: Tokenizer,
    rows: Rows,
    count: int,
    *,
    keep: Keep | None = None,
    skipped: Counter[str] | None = None,
) -> TensorRows:
    """The first `count` rows of `files`, read once in order, with spans that never change.

    Fewer where the text ends before. `keep` picks texts, `skipped` counts damage instead of
    refusing it. Raises `ValueError` for `count` below 1, for less text than one row, for damage,
    and for rows that the tokenizer cannot make.
    """
    if count < 1:
        raise ValueError(f"count={count} must be at least 1 row")
    rows.check(tokenizer)
    documents = (
        (Place(shard=shard, document=line), ids)
        for shard, file in enumerate(files)
        for line, ids in _tokenised(texts(file, skipped=skipped), tokenizer, keep)
    )
    made = [
        rows.row(ids, tokenizer, np.random.default_rng([0, HELD_SPANS, after.row - 1]))
        for ids, after in itertools.islice(_cut(documents, rows.tokens, START), count)
    ]
    if not made:
        names = ", ".join(map(name_of, files[:3]))
        raise ValueError(f"{names}: less text than one row of {rows.tokens} tokens to hold out")
    return TensorRows(**_stacked(made))


def _stacked(rows: list[dict[str, Ids]]) -> Batch:
    return {name: torch.from_numpy(np.stack([row[name] for row in rows])) for name in rows[0]}


def _refuses(damaged: str) -> bool:
    if damaged not in ("refuse", "skip"):
        raise ValueError(f'damaged={damaged!r} must be "refuse" or "skip"')
    return damaged == "refuse"

"""Shards of text (C4 and the like): which files train, which are held out, and what they hold.

A shard is a file of JSON lines with a `text` each, a document per line: `.jsonl` or `.json`, plain,
`.gz` or `.xz`, on this machine or streamed (`http://…`, or what fsspec reads, such as
`hf://datasets/allenai/c4/en/…`). Lines end with "\\n" and nothing else.
`actsparse_lab.data.streams` makes rows of them.
"""

from __future__ import annotations

import gzip
import hashlib
import http.client
import lzma
import urllib.request
import zlib
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

import fsspec  # type: ignore[import-untyped]

from actsparse.untrusted import MIB, check_regular, lines, parse_json
from actsparse.values import BadValue

SUFFIXES = tuple(f".{text}{packed}" for text in ("jsonl", "json") for packed in ("", ".gz", ".xz"))
# Of a single shard, one document in HELD_ONE_IN is held out.
HELD_ONE_IN = 20
UNPACK: dict[str, Callable[[Any], Any]] = {"gz": gzip.open, "xz": lzma.open}
TIMEOUT = 60  # seconds that a server may stay silent
# A packed file may hold anything: a line at most, and how many times its size (text packs by 3
# to 10) beside what is small in any case; bytes in all where the size is not known.
LINE, MOST, SMALL, UNKNOWN = 32 * MIB, 50, 8 * MIB, 2**20 * MIB

Keep = Callable[[str], bool]


@dataclass(frozen=True)
class Corpus:
    """Shards to train on and shards held out; `by_text`: the same ones, divided by their texts."""

    train: list[str]
    held: list[str]
    by_text: bool = False

    @property
    def keep(self) -> Keep | None:
        """Which texts of the shards in `train` train; None means all."""
        return partial(in_part, part="train", one_in=HELD_ONE_IN) if self.by_text else None

    def keep_held(self, part: str) -> Keep:
        """Which texts of the shards in `held` are `part`, "validation" or "test"."""
        return partial(in_part, part=part, one_in=HELD_ONE_IN if self.by_text else 1)


def corpus(data: str | Sequence[str], validation: str | Sequence[str] | None = None) -> Corpus:
    """Which shards train and which are held out; names are those of `shards`.

    Held out are `validation`'s shards, else those of `data`'s folders with "valid" in their names,
    else the last shard; where there is only one, 1 document in 20, by hash of the text.

    Raises `ValueError` when there are no shards, or none is left to train on.
    """
    train = shards(data)
    if validation is None:
        held = [f for f in shards(data, "valid") if "valid" in name_of(f) and f not in train]
    else:
        held = shards(validation, "valid")
        train = [file for file in train if file not in held]
        if not train:
            raise ValueError(f"validation={validation!r} leaves no shard of {data!r} to train on")
    if held:
        return Corpus(train, held)
    return Corpus(train[:-1], train[-1:]) if len(train) > 1 else Corpus(train, train, by_text=True)


def shards(data: str | Sequence[str], split: str = "train") -> list[str]:
    """The shards that `data` names: a file, a glob, a folder, or several of these; each sorted.

    A folder stands for those of its shards with `split` in their names, or all where none has.
    A server's files (`http://…`) are taken as named, since they cannot be listed.

    Raises `ValueError` when a name leads to no shard.

    >>> shards("c4/en")
    Traceback (most recent call last):
    ...
    ValueError: no shards at c4/en: expected .jsonl, .jsonl.gz, .jsonl.xz, .json, .json.gz, .json.xz
    """
    found: list[str] = []
    for name in [data] if isinstance(data, str) else data:
        files = [name] if _is_http(name) else _listed(name, split)
        if not files:
            raise ValueError(f"no shards at {name}: expected {', '.join(SUFFIXES)}")
        found += files
    if not found:
        raise ValueError("no shards: the list of names is empty")
    return list(dict.fromkeys(found))


def _listed(name: str, split: str) -> list[str]:
    system, path = fsspec.core.url_to_fs(name)
    if system.isfile(path):
        return [name]
    folder = system.isdir(path)
    every = system.ls(path, detail=False) if folder else system.glob(path)
    files = sorted(file for file in every if file.endswith(SUFFIXES))
    if folder:
        files = [file for file in files if split in name_of(file)] or files
    return [system.unstrip_protocol(file) if "://" in name else file for file in files]


def name_of(file: str) -> str:
    """A shard's name without its folder.

    >>> name_of("hf://datasets/allenai/c4/en/c4-train.00000-of-01024.json.gz")
    'c4-train.00000-of-01024.json.gz'
    """
    return file.partition("?")[0].replace("\\", "/").rpartition("/")[2]


def describe(files: Sequence[str]) -> dict[str, Any]:
    """`source`, the names of `files`, and a `sha256` over names and sizes; no folders.

    The size counts where it is known without reading: not on a plain server (`http://…`).
    """
    digest = hashlib.sha256()
    for file in files:
        system, path = (None, file) if _is_http(file) else fsspec.core.url_to_fs(file)
        size = None if system is None else system.size(path)
        digest.update(f"{name_of(file)}\0{size}\0".encode())
    names = [name_of(file) for file in files]
    source = names[0] if len(names) == 1 else f"{len(names)} shards, {names[0]} to {names[-1]}"
    return {"source": source, "sha256": digest.hexdigest()}


def texts(
    file: str,
    first: int = 0,
    share: tuple[int, int] = (0, 1),
    skipped: Counter[str] | None = None,
) -> Iterator[tuple[int, str]]:
    """Line numbers (from 0) and texts of a shard, as it is read.

    Args:
        file: a shard, as `shards` names it.
        first: lines before this one are read and not looked at.
        share: (r, n): only lines with number mod n = r.
        skipped: where damage is counted, by the shard's name, instead of refused: each line that
            is no text, and once for a shard that is missing or ends early.

    Raises:
        ValueError: naming file and line (from 1), for a shard that is missing or damaged, and for
            a line that is no JSON or has no `text`. Where a shard is shared the one whose line it
            is refuses.
    """
    remainder, every = share
    number = 0
    # a local name: the generator may be closed when the interpreter has let go of its modules
    broken = (OSError, EOFError, zlib.error, lzma.LZMAError, http.client.HTTPException)

    def damage(error: Exception) -> None:
        if skipped is None:
            named = isinstance(error, BadValue)
            said = error if named else f"{file}, line {number + 1}: {type(error).__name__}: {error}"
            raise BadValue(f'{said}; damaged="skip" would go on without it') from error
        skipped[name_of(file)] += 1

    try:
        for line in _lines(file):
            if number >= first and number % every == remainder:
                try:
                    text = _text(line, f"{file}, line {number + 1}")
                except ValueError as error:
                    damage(error)
                else:
                    yield number, text
            number += 1
    except broken as error:
        if number % every == remainder:
            damage(error)


def _text(line: bytes, where: str) -> str:
    if not line.strip():
        return ""
    document = parse_json(line, where)
    text = document.get("text") if isinstance(document, dict) else None
    if not isinstance(text, str):
        raise BadValue(f'{where}: no "text" in it')
    text.encode()  # half a surrogate pair: no tokenizer takes it
    return text


def _lines(file: str) -> Iterator[bytes]:
    if not _is_address(file):
        check_regular(file)
    # fsspec's own http needs aiohttp, which nothing else here does
    with (
        urllib.request.urlopen(file, timeout=TIMEOUT)
        if _is_http(file)
        else fsspec.open(file, "rb").open()
    ) as raw:
        unpack = UNPACK.get(name_of(file).rpartition(".")[2])
        size = getattr(raw, "length" if _is_http(file) else "size", None)
        total = SMALL + MOST * size if unpack and size else UNKNOWN
        yield from lines(unpack(raw) if unpack else raw, LINE, total)
        if _is_http(file) and raw.length:  # bytes promised; urllib itself says nothing
            raise EOFError(f"the server stopped {raw.length} bytes early")


def in_part(text: str, part: str, one_in: int) -> bool:
    """Whether a text is in `part` of "train", "validation" and "test"; copies always agree.

    1 document in `one_in` is held out, and half of those are "validation", half "test".

    >>> [in_part("some text", part, one_in=1) for part in ("train", "validation", "test")]
    [False, False, True]
    """
    digest = hashlib.blake2b(text.encode(), digest_size=8).digest()
    half, draw = int.from_bytes(digest, "big") % 2, int.from_bytes(digest, "big") // 2 % one_in
    return part == ("train" if draw else ("validation", "test")[half])


def _is_address(name: str) -> bool:
    return "://" in name or "::" in name


def _is_http(name: str) -> bool:
    return name.startswith(("http://", "https://"))

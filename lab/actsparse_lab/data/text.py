"""Text that every Python brings along, as bytes: for causal LMs and for T5 span corruption.

The documents are the topics of `pydoc_data` and the docstrings of a fixed list of standard-library
modules. They are the same for the same Python version and differ a little between versions, so
`info` records version, size and sha256, and a report should compare runs with equal sha256 only.
A paragraph is kept once (the topics repeat each other), and whole documents go to train,
validation or test by a hash of their name: no held-out paragraph was trained on.

Vocabulary: 0 pad, 1 eos, 2 to 257 the bytes, 258 to 319 the sentinels of span corruption, used
from 319 down. Causal LMs need the first 258 ids only.
"""

from __future__ import annotations

import ast
import hashlib
import platform
import re
import sysconfig
import warnings
from collections import deque
from collections.abc import Iterator
from functools import lru_cache
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor
from torch.utils.data import Dataset

from actsparse_lab.data.bigram import Pairs
from actsparse_lab.data.span_corruption import (
    Ids,
    apply_mask,
    noise_mask,
    span_lengths,
    tokens_for_inputs,
)
from actsparse_lab.data.splits import Splits, TensorRows

PAD, EOS, FIRST_BYTE = 0, 1, 2
LM_VOCAB_SIZE = FIRST_BYTE + 256
SENTINELS = 62
VOCAB_SIZE = LM_VOCAB_SIZE + SENTINELS
SENTINEL_START = VOCAB_SIZE - 1

# Present in every supported Python, in Debian's minimal set too, and long on docstrings.
MODULES = """
    _pydecimal argparse ast asyncio base64 bdb bz2 calendar cmd code codecs collections concurrent
    configparser contextlib ctypes dataclasses difflib dis doctest email enum fileinput fractions
    ftplib functools gettext gzip heapq html http imaplib importlib inspect ipaddress json locale
    logging lzma mailbox mimetypes multiprocessing numbers optparse os pathlib pdb pickle
    pickletools pkgutil platform poplib profile queue random re sched selectors shelve shutil
    smtplib socket socketserver ssl statistics string subprocess tarfile tempfile textwrap threading
    timeit tokenize trace traceback typing unittest urllib uuid wave weakref wsgiref xml xmlrpc
    zipfile
""".split()
SHARES = {"train": 80, "validation": 10, "test": 10}  # percent of documents, by hash of the name


def encode(text: bytes) -> Ids:
    """Bytes to ids, [len(text)] int64.

    >>> encode(b"Hi")
    array([ 74, 107])
    """
    return np.frombuffer(text, dtype=np.uint8).astype(np.int64) + FIRST_BYTE


@lru_cache(maxsize=1)
def load_documents() -> dict[str, dict[str, bytes]]:
    """The text, as `{split: {document: bytes}}`, in sorted order; reads for about a second.

    Raises `FileNotFoundError` when this Python was installed without its sources.
    """
    splits: dict[str, dict[str, bytes]] = {split: {} for split in SHARES}
    seen: set[str] = set()
    for name, text in sorted([*_topics(), *_docstrings()]):
        fresh = []
        for paragraph in re.split(r"\n\s*\n", text):
            key = " ".join(paragraph.split())
            if key and key not in seen:
                seen.add(key)
                fresh.append(paragraph.strip("\n"))
        if fresh:
            splits[split_of(name)][name] = "\n\n".join(fresh).encode()
    return splits


def split_of(document: str) -> str:
    """The split a document belongs to, by name alone.

    >>> split_of("topics/assignment")
    'train'
    """
    draw = int.from_bytes(hashlib.sha256(document.encode()).digest()[:8], "big") % 100
    for split, share in SHARES.items():
        draw -= share
        if draw < 0:
            return split
    raise AssertionError("SHARES must add up to 100")


class LMWindows(TensorRows):
    """Windows [N, block] of ids; `labels` are `input_ids`, since HF's causal LMs shift them."""

    def __init__(self, windows: Ids) -> None:
        ids = torch.from_numpy(windows)
        super().__init__(input_ids=ids, labels=ids)

    def every_pair(self) -> Pairs:
        """What a bigram fits: the same as `pairs`."""
        return self.pairs()

    def pairs(self) -> Pairs:
        """Every predicted byte with the byte before it; a window's first byte is not predicted."""
        return _adjacent(self.columns["input_ids"].numpy())


class SpanCorrupted(Dataset[dict[str, Tensor]]):
    """Windows [N, T] of ids, corrupted on the way out: `input_ids` and `labels`, never padded.

    The windows come `passes` times, each time with other spans: item i is window i mod N, and its
    spans are a function of (`stream`, i) alone. Nothing has to be told which epoch it is (under
    DDP, Trainer does not tell), and workers, ranks and resumed runs see the same items.
    """

    def __init__(
        self,
        windows: Ids,
        *,
        stream: tuple[int, ...],
        passes: int,
        noise_density: float,
        mean_span: float,
    ) -> None:
        if passes < 1:
            raise ValueError(f"passes={passes} must be at least 1")
        self.windows, self.stream, self.passes = windows, stream, passes
        self.noise_density, self.mean_span = noise_density, mean_span

    def mask(self, index: int) -> NDArray[np.bool_]:
        """Which bytes of item `index` are hidden, [T] bool."""
        rng = np.random.default_rng([*self.stream, index])
        return noise_mask(self.windows.shape[1], rng, self.noise_density, self.mean_span)

    def every_pair(self) -> Pairs:
        """All bytes that some draw could hide, with the byte before each: what a bigram fits."""
        return _adjacent(self.windows)

    def pairs(self) -> Pairs:
        """The hidden bytes of every item, with the byte before each in the original text."""
        hidden = np.stack([self.mask(index) for index in range(len(self))])[:, 1:]
        raw = np.tile((self.windows - FIRST_BYTE).astype(np.uint8), (self.passes, 1))
        return raw[:, :-1][hidden], raw[:, 1:][hidden]

    def __len__(self) -> int:
        return len(self.windows) * self.passes

    def __getitem__(self, index: int) -> dict[str, Tensor]:
        index = range(len(self))[index]  # IndexError past the end, and −1 is the last
        inputs, targets = apply_mask(
            self.windows[index % len(self.windows)],
            self.mask(index),
            sentinel_start=SENTINEL_START,
            eos=EOS,
        )
        return {"input_ids": torch.from_numpy(inputs), "labels": torch.from_numpy(targets)}


def lm_splits(block: int = 64) -> Splits[LMWindows]:
    """Python's documentation in windows of `block` bytes, for a causal LM.

    Items are `input_ids` and `labels` [block] int64. Documents are joined by three newlines, cut
    without overlap, and the rest below one window is dropped. Raises `ValueError` when `block`
    is below 2.

    >>> splits = lm_splits(block=64)
    >>> splits.train[0]["input_ids"].shape, splits.info["vocab_size"]
    (torch.Size([64]), 258)
    """
    train, validation, test = (LMWindows(windows) for windows in _windows(block))
    info = {"vocab_size": LM_VOCAB_SIZE, "block": block}
    return Splits(train, validation, test, _info("text-lm", info, train, validation, test))


def span_corruption_splits(
    input_length: int = 128,
    *,
    noise_density: float = 0.15,
    mean_span: float = 3.0,
    passes: int = 10,
    seed: int = 0,
) -> Splits[SpanCorrupted]:
    """Python's documentation with spans of bytes hidden, for a T5.

    Items are `input_ids` [I] and `labels` [L] int64, I ≤ `input_length`, the same for all items
    (T5's rule: a window as long as fits), so no padding and no mask is needed. The training
    windows come `passes` times, with other spans each time: one epoch is `passes` readings of the
    text. `seed` draws the training spans: pass the run's. Validation and test never change.

    Raises `ValueError` for lengths or densities that `span_lengths` refuses, for `passes` below
    1, and for more spans than the vocabulary's 62 sentinels.

    >>> splits = span_corruption_splits(input_length=64)
    >>> {name: tuple(ids.shape) for name, ids in splits.train[0].items()}
    {'input_ids': (64,), 'labels': (14,)}
    """
    tokens = tokens_for_inputs(input_length, noise_density, mean_span)
    lengths = span_lengths(tokens, noise_density, mean_span)
    if lengths.spans > SENTINELS:
        raise ValueError(
            f"input_length={input_length} needs {lengths.spans} sentinels, the vocabulary has "
            f"{SENTINELS}: use a shorter input or a longer mean_span"
        )

    def corrupted(windows: Ids, *stream: int, passes: int = 1) -> SpanCorrupted:
        return SpanCorrupted(
            windows,
            stream=stream,
            passes=passes,
            noise_density=noise_density,
            mean_span=mean_span,
        )

    first, second, third = _windows(tokens)
    train = corrupted(first, 0, seed, passes=passes)
    validation, test = corrupted(second, 1), corrupted(third, 2)
    info = {
        "vocab_size": VOCAB_SIZE,
        "pad_token_id": PAD,
        "eos_token_id": EOS,
        "decoder_start_token_id": PAD,
        "noise_density": noise_density,
        "mean_span": mean_span,
        "lengths": lengths._asdict(),
        "passes": passes,
        "corruption_seed": seed,
    }
    return Splits(
        train, validation, test, _info("text-span-corruption", info, train, validation, test)
    )


def _topics() -> Iterator[tuple[str, str]]:
    from pydoc_data.topics import topics

    for name, text in topics.items():
        yield f"topics/{name}", text


def _docstrings() -> Iterator[tuple[str, str]]:
    """One document for each source file: its docstrings, in the order of the source."""
    root = Path(sysconfig.get_paths()["stdlib"])
    for module in MODULES:
        single = root / f"{module}.py"
        files = [single] if single.exists() else sorted((root / module).rglob("*.py"))
        if not files:
            raise FileNotFoundError(
                f"no source of the standard library's {module!r} found: the text data need a "
                "Python that was installed with its .py files"
            )
        for path in files:
            relative = path.relative_to(root)
            if {"test", "tests"}.isdisjoint(relative.parts):
                yield f"stdlib/{relative.as_posix()}", "\n\n".join(_file_docstrings(path))


_STATEMENTS = ast.stmt | ast.excepthandler | ast.match_case


def _file_docstrings(path: Path) -> Iterator[str]:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # the library's own escapes are not ours to judge
        tree = ast.parse(path.read_text(encoding="utf-8"))
    todo: deque[ast.AST] = deque([tree])
    while todo:  # as ast.walk, but for expressions, which hold no docstrings and are most of a file
        node = todo.popleft()
        if isinstance(node, ast.Module | ast.ClassDef | ast.FunctionDef | ast.AsyncFunctionDef):
            yield ast.get_docstring(node) or ""
        for name in node._fields:
            if type(held := getattr(node, name, None)) is list:
                todo.extend(each for each in held if isinstance(each, _STATEMENTS))


def _windows(block: int) -> list[Ids]:
    """Train, validation and test as ids [N, block]."""
    if block < 2:
        raise ValueError(f"block={block} must be at least 2: one byte to see, one to predict")
    windows = []
    for split, documents in load_documents().items():
        ids = encode(b"\n\n\n".join(documents.values()))
        count = len(ids) // block
        if count == 0:
            raise ValueError(f"block={block} is longer than all {split} text, {len(ids)} bytes")
        windows.append(ids[: count * block].reshape(count, block))
    return windows


def _adjacent(windows: Ids) -> Pairs:
    raw = (windows - FIRST_BYTE).astype(np.uint8)
    return raw[:, :-1].reshape(-1), raw[:, 1:].reshape(-1)


def _info(
    name: str,
    extra: dict[str, Any],
    train: LMWindows | SpanCorrupted,
    validation: LMWindows | SpanCorrupted,
    test: LMWindows | SpanCorrupted,
) -> dict[str, Any]:
    documents = load_documents()
    digest = hashlib.sha256()
    for split, texts in documents.items():
        for document, text in texts.items():
            digest.update(f"{split}\0{document}\0".encode() + text)
    return {
        "name": name,
        "source": "pydoc_data.topics and standard-library docstrings",
        "python": platform.python_version(),
        "sizes": {"train": len(train), "validation": len(validation), "test": len(test)},
        "documents": {split: len(texts) for split, texts in documents.items()},
        "bytes": {split: sum(map(len, texts.values())) for split, texts in documents.items()},
        "sha256": digest.hexdigest(),
        **extra,
    }

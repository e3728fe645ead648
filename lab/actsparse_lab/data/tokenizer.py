"""Tokenizers by path: T5's SentencePiece model, GPT-2's pair of files, a Hugging Face folder.

A SentencePiece model is read by `sentencepiece` itself: the ids that T5 and C4 were made with, and
several times as fast as the conversion `transformers` makes of it, which breaks ties between
equally likely pieces the other way now and then. Everything else is read by `tokenizers`.

Text never becomes a special token: a page that says `</s>` or `<extra_id_0>` gives ordinary
pieces, so the marks that packing and span corruption set are the only ones.
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from actsparse.untrusted import MIB, read_bytes, read_json
from actsparse.values import BadValue, check
from actsparse_lab.data.text import EOS, FIRST_BYTE, PAD, SENTINELS, VOCAB_SIZE

T5_SENTINELS = 100
GPT2_EOS = "<|endoftext|>"
BYTES = "bytes"
LIMIT = 128 * MIB  # of a file of a tokenizer; the largest that is known holds 34 MB


@dataclass(frozen=True)
class Tokenizer:
    """What data need of a tokenizer; safe to send to another process.

    `encode` gives a text's ids, without `eos` and without other special tokens. `vocab_size` is
    what a model's embedding needs; with T5's sentinels it is rounded up to a multiple of 128, as
    T5's own (32,100 ids, 32,128 rows). The `sentinels` of span corruption count down from
    `sentinel_start`, which is None without any. `sha256` is that of the tokenizer's files.
    """

    name: str
    encode: Callable[[str], Sequence[int]]
    vocab_size: int
    eos: int
    pad: int | None = None
    sentinel_start: int | None = None
    sentinels: int = 0
    sha256: str = ""


def load_tokenizer(path: str | Path, eos: str | None = None) -> Tokenizer:
    """The tokenizer in a file or folder on this machine.

    - `spiece.model`, any SentencePiece model: T5's 100 sentinels are added after its pieces, from
      `<extra_id_99>` to `<extra_id_0>`, as in T5's own vocabulary (Raffel et al. 2020, section
      2.1; the order is Hugging Face's).
    - `vocab.json`, `….vocab.json` or `…_vocab.json`, with `merges.txt` of the same beginning
      beside it: GPT-2's byte-level BPE.
    - `tokenizer.json`; its end of text is named in `tokenizer_config.json` beside it.
    - a folder: its `tokenizer.json`, else `vocab.json` and `merges.txt`, else its one `.model`.
    - the word `bytes`: no file at all; a token is a byte of UTF-8.

    Args:
        path: file or folder.
        eos: the token that ends a document, where the files do not say or say another.

    Raises:
        ValueError: nothing of the above is there, a file cannot be read as what its name says, or
            the end of text is not known or not in the vocabulary.
        ImportError: `sentencepiece` or `tokenizers` is missing.

    >>> load_tokenizer("bytes").encode("é")
    [197, 171]
    >>> load_tokenizer("t5/spiece.model")
    Traceback (most recent call last):
    ...
    ValueError: no tokenizer at t5/spiece.model
    """
    if str(path) == BYTES:
        return _bytes()
    path = Path(path)
    if not path.exists():
        raise ValueError(f"no tokenizer at {path}")
    file = _in_folder(path) if path.is_dir() else path
    try:
        for each in (file, file.with_name("tokenizer_config.json"), _merges(file)):
            if each.exists():
                read_bytes(each, LIMIT)
    except OSError as error:
        raise ValueError(f"cannot read {error.filename}: {error.strerror}") from error
    if file.suffix == ".model":
        return _sentencepiece(file, eos)
    if file.name.endswith("vocab.json"):
        return _gpt2(file, eos)
    if file.suffix == ".json":
        return _fast(file, eos)
    raise ValueError(f"{path} is no tokenizer: use a .model, vocab.json or tokenizer.json")


def _bytes() -> Tokenizer:
    return Tokenizer(
        name=BYTES,
        encode=_encode_bytes,
        vocab_size=VOCAB_SIZE,
        eos=EOS,
        pad=PAD,
        sentinel_start=VOCAB_SIZE - 1,
        sentinels=SENTINELS,
        sha256=hashlib.sha256(b"").hexdigest(),
    )


def _encode_bytes(text: str) -> list[int]:
    return [FIRST_BYTE + byte for byte in text.encode("utf-8", "replace")]


def _in_folder(folder: Path) -> Path:
    for name in ("tokenizer.json", "vocab.json"):
        if (folder / name).exists():
            return folder / name
    found = sorted(folder.glob("*.model"))
    if len(found) == 1:
        return found[0]
    raise ValueError(
        f"{folder} holds neither tokenizer.json nor vocab.json nor one .model "
        f"(.model files: {[file.name for file in found]}): name the file"
    )


def _sentencepiece(file: Path, eos: str | None) -> Tokenizer:
    try:
        import sentencepiece
    except ImportError as error:
        raise ImportError(f"{file.name} needs sentencepiece: pip install sentencepiece") from error
    try:
        model = sentencepiece.SentencePieceProcessor()
        model.LoadFromSerializedProto(file.read_bytes())
    except (RuntimeError, OSError) as error:
        raise ValueError(f"{file} is no SentencePiece model") from error
    pieces = model.get_piece_size()
    end = model.eos_id() if eos is None else model.piece_to_id(eos)
    if end < 0 or (eos is not None and model.id_to_piece(end) != eos):
        raise _no_eos(file, eos)
    return Tokenizer(
        name=file.name,
        encode=model.encode,
        vocab_size=_rounded(pieces + T5_SENTINELS),
        eos=end,
        pad=None if model.pad_id() < 0 else model.pad_id(),
        sentinel_start=pieces + T5_SENTINELS - 1,
        sentinels=T5_SENTINELS,
        sha256=_sha256(file),
    )


def _gpt2(vocab: Path, eos: str | None) -> Tokenizer:
    tokenizers = _tokenizers(vocab)
    merges = _merges(vocab)
    if not merges.exists():
        raise ValueError(f"{vocab} needs {merges.name} beside it")
    with _refusing(f"{vocab} and {merges.name} are no byte-level BPE"):
        bpe = tokenizers.Tokenizer(tokenizers.models.BPE.from_file(str(vocab), str(merges)))
    bpe.pre_tokenizer = tokenizers.pre_tokenizers.ByteLevel(add_prefix_space=False)
    return _of_tokenizers(
        vocab, bpe, GPT2_EOS if eos is None else eos, None, _sha256(vocab, merges)
    )


@contextmanager
def _refusing(what: str) -> Iterator[None]:
    """`ValueError` for what `tokenizers` raises: plain exceptions, and panics, which are none."""
    try:
        yield
    except BaseException as error:
        if not isinstance(error, Exception) and type(error).__name__ != "PanicException":
            raise
        raise ValueError(f"{what}: {error}") from error


def _merges(vocab: Path) -> Path:
    return vocab.with_name(vocab.name.removesuffix("vocab.json") + "merges.txt")


def _fast(file: Path, eos: str | None) -> Tokenizer:
    tokenizers = _tokenizers(file)
    with _refusing(f"{file} is no tokenizer.json"):
        tokenizer = tokenizers.Tokenizer.from_file(str(file))
    tokenizer.no_truncation()
    tokenizer.no_padding()
    beside = file.with_name("tokenizer_config.json")
    config = read_json(beside) if beside.exists() else {}
    check(str(beside), config, {"eos_token?": _TOKEN, "pad_token?": _TOKEN})
    named = {key: _token(config.get(key)) for key in ("eos_token", "pad_token")}
    return _of_tokenizers(
        file, tokenizer, eos or named["eos_token"], named["pad_token"], _sha256(file)
    )


def _of_tokenizers(
    file: Path, tokenizer: Any, eos: str | None, pad: str | None, sha256: str
) -> Tokenizer:
    end = None if eos is None else tokenizer.token_to_id(eos)
    if end is None:
        raise _no_eos(file, eos)
    start = tokenizer.token_to_id("<extra_id_0>")
    sentinels = 0
    while start is not None and tokenizer.token_to_id(f"<extra_id_{sentinels}>") == (
        start - sentinels
    ):
        sentinels += 1
    ids = tokenizer.get_vocab().values()
    size = 1 + max(ids, default=-1)  # a list of tokens may have holes
    if size > 2**16 + 4 * len(ids):
        raise BadValue(f"{file} gives a token the id {size - 1}, but has {len(ids)} tokens")
    with _refusing(f"{file} cannot be used"):
        encode = _Encode(tokenizer.to_str())
    return Tokenizer(
        name=file.parent.name if file.name in ("tokenizer.json", "vocab.json") else file.name,
        encode=encode,
        vocab_size=_rounded(size) if sentinels else size,
        eos=end,
        pad=None if pad is None else tokenizer.token_to_id(pad),
        sentinel_start=start,
        sentinels=sentinels,
        sha256=sha256,
    )


class _Encode:
    """`Tokenizer.encode` of `tokenizers`; pickling by its text keeps special tokens out."""

    def __init__(self, text: str) -> None:
        from tokenizers import Tokenizer as Fast

        self.text, self.tokenizer = text, Fast.from_str(text)
        self.tokenizer.encode_special_tokens = True  # as text; not part of `to_str`

    def __reduce__(self) -> tuple[Any, ...]:
        return _Encode, (self.text,)

    def __call__(self, text: str) -> list[int]:
        # one text at a time: a batch would start threads, and forked workers must not inherit them
        with _refusing("the tokenizer cannot encode a text"):
            ids: list[int] = self.tokenizer.encode(text, add_special_tokens=False).ids
        return ids


def _tokenizers(file: Path) -> Any:
    try:
        import tokenizers
    except ImportError as error:
        raise ImportError(
            f'{file.name} needs tokenizers: pip install "actsparse[train]"'
        ) from error
    return tokenizers


_TOKEN = str | dict[str, Any] | None


def _token(entry: Any) -> str | None:
    """A token as tokenizer_config.json writes it: plain, or as an object with its content."""
    found = entry.get("content") if isinstance(entry, dict) else entry
    return found if isinstance(found, str) else None


def _rounded(size: int) -> int:
    return -(-size // 128) * 128


def _no_eos(file: Path, eos: str | None) -> ValueError:
    what = "names no end of text" if eos is None else f"has no token {eos!r}"
    return ValueError(f"{file} {what}: say which token ends a document, eos=...")


def _sha256(*files: Path) -> str:
    return hashlib.sha256(b"".join(file.read_bytes() for file in files)).hexdigest()

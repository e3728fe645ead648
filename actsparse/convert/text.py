"""Text for conversion: documents out of files, cut into windows of tokens."""

from __future__ import annotations

import json
import lzma
import re
from collections.abc import Callable, Collection, Iterable, Iterator, Sequence
from pathlib import Path
from typing import IO, NamedTuple

import torch
from torch import Tensor

from actsparse.untrusted import check_regular
from actsparse.values import BadValue

_HEADING = re.compile(r"^ = [^=].* = $", re.MULTILINE)  # of an article of WikiText
Encode = Callable[[str], Sequence[int]]


class Windows(NamedTuple):
    """Tokens of documents, cut into windows; each window is read without those before it.

    ``ids`` are the windows, int64 of 2 to ``window`` tokens; ``document`` is the number of the
    document that each is of.
    """

    ids: list[Tensor]
    document: list[int]

    @property
    def documents(self) -> int:
        """How many documents have at least one window."""
        return len(set(self.document))

    @property
    def tokens(self) -> int:
        """How many tokens are predicted: all but the first of each window."""
        return sum(len(window) - 1 for window in self.ids)

    def take(self, documents: Iterable[int]) -> Windows:
        """The windows of some documents.

        >>> Windows([torch.arange(4), torch.arange(3)], [0, 1]).take([1]).ids
        [tensor([0, 1, 2])]
        """
        wanted = set(documents)
        pairs = zip(self.ids, self.document, strict=True)
        kept = [(ids, number) for ids, number in pairs if number in wanted]
        return Windows([ids for ids, _ in kept], [number for _, number in kept])


def read_documents(files: Iterable[str | Path]) -> list[str]:
    """Read documents from text files.

    A ``.jsonl`` file (also ``.jsonl.xz``) has a document in the ``text`` of each line. Any other
    file is UTF-8 text: a document for each article where there are headings of WikiText
    (``" = Title = "``), else one document.

    Args:
        files: their paths.

    Returns:
        The documents that are not blank, in order.

    Raises:
        ValueError: a file that cannot be read so, or no text in all of them.
        OSError: a file that cannot be opened.
    """
    found: list[str] = []
    for file in map(Path, files):
        check_regular(file)
        try:
            with (
                lzma.open(file, "rt", encoding="utf-8-sig")
                if file.suffix == ".xz"
                else open(file, encoding="utf-8-sig") as stream
            ):
                found += _lines(file, stream) if ".jsonl" in file.suffixes else _articles(stream)
        except (UnicodeDecodeError, lzma.LZMAError, EOFError) as error:
            raise BadValue(f"{file} is not UTF-8 text: {error}") from error
    kept = [text for text in found if text.strip()]
    if not kept:
        raise BadValue(f"no text in {', '.join(map(str, files)) or 'no files'}")
    return kept


def read_texts(files: Iterable[Path], taken: Collection[str] = ()) -> dict[str, list[str]]:
    """Read each file as a text of its own.

    Args:
        files: their paths.
        taken: names that other texts have.

    Returns:
        The documents by the name of the text. It is the name of the file without endings, or the
        whole path where two texts would have one name.

    Raises:
        ValueError: as :func:`read_documents`, or a file given twice.
        OSError: a file that cannot be opened.
    """
    files = list(files)
    short = [file.name.split(".")[0] for file in files]
    found: dict[str, list[str]] = {}
    for file, name in zip(files, short, strict=True):
        name = name if name and short.count(name) == 1 and name not in taken else str(file)
        if name in found or name in taken:
            raise BadValue(f"{file} is given twice, or has the name of another text")
        found[name] = read_documents([file])
    return found


def _lines(file: Path, stream: IO[str]) -> Iterator[str]:
    for number, line in enumerate(stream, 1):
        try:
            text = json.loads(line)["text"]
        except (ValueError, KeyError, TypeError, RecursionError):
            text = None
        if not isinstance(text, str):
            raise BadValue(f'{file}, line {number}: expected {{"text": "..."}}')
        yield text


def _articles(stream: IO[str]) -> list[str]:
    text = stream.read()
    starts = [match.start() for match in _HEADING.finditer(text)]
    ends = [*starts[1:], len(text)]
    if not starts:
        return [text]
    return [text[: starts[0]], *(text[a:b] for a, b in zip(starts, ends, strict=True))]


def windows_of(
    documents: Iterable[str],
    encode: Encode,
    window: int,
    tokens: int | None = None,
    first: Sequence[int] = (),
    last: Sequence[int] = (),
) -> Windows:
    """Cut documents into windows of at most ``window`` tokens.

    Args:
        documents: their texts.
        encode: gives the token ids of a text.
        window: the most tokens of a window, at least 2.
        tokens: stop after so many; None: take all.
        first: what each window begins with, such as a token for the beginning of text, without
            which some models predict badly; documents may begin with it already.
        last: what each window ends with, as encoders want it.

    Returns:
        The windows. A rest of a single token is left out.

    Raises:
        ValueError: no window comes of it.

    >>> windows_of(["abcde", "z"], lambda text: [ord(c) - 97 for c in text], window=3).ids
    [tensor([0, 1, 2]), tensor([3, 4])]
    """
    made = Windows([], [])
    left, lead, tail = tokens, *(torch.tensor(list(e), dtype=torch.int64) for e in (first, last))
    around = len(lead) + len(tail)
    if window <= around:
        raise BadValue(f"window={window}: expected more than the {around} tokens around each text")
    for number, text in enumerate(documents):
        ids = torch.tensor(list(encode(text)), dtype=torch.int64)
        if len(lead) and torch.equal(ids[: len(lead)], lead):
            ids = ids[len(lead) :]
        ids = ids if left is None else ids[:left]
        for rest in ids.split(window - around):
            piece = torch.cat([lead, rest, tail])
            if len(piece) > 1:
                made.ids.append(piece)
                made.document.append(number)
        if left is not None and (left := left - len(ids)) <= 0:
            break
    if not made.ids:
        raise BadValue("the text has fewer than two tokens")
    return made

"""Finished runs in one file: ``<out>/runs.tar.xz``, for what lay in ``<out>/runs``.

A reader asks `read_file` for ``<out>/runs/<run>/record.jsonl`` and need not know where it lies. A
file in the folder comes first. A record in the folder hides all that is packed of a run of the same
name: measures belong to the record that they were taken with.
"""

from __future__ import annotations

import io
import lzma
import os
import re
import tarfile
from collections.abc import Iterable, Mapping
from contextlib import suppress
from functools import lru_cache
from pathlib import Path

from actsparse import files
from actsparse.untrusted import MIB, read_bytes
from actsparse_lab.record_schema import RecordError

PACK = "runs.tar.xz"
RECORD, MEASURES = "record.jsonl", "measures.json"
LIMIT = 128 * MIB  # of a pack's files; those of 100 runs take 5 MiB
_MEMORY = 128 * MIB  # for unpacking; xz -9 needs 65 MiB
_NAME = re.compile(rf"(?!\.\.?/)[^/\\]+/({re.escape(RECORD)}|{re.escape(MEASURES)})")


def read_file(path: Path) -> bytes:
    """The bytes of a run's record or measures, from its folder or else from the pack.

    Raises:
        FileNotFoundError: it is in neither.
        RecordError: it cannot be read, or the pack is broken.
    """
    try:
        return read_bytes(path)
    except (FileNotFoundError, NotADirectoryError) as error:
        content = None
        if not os.path.lexists(path.with_name(RECORD)):
            runs = path.absolute().parent.parent
            packed = _files_in(runs.with_name(PACK)) if runs.name == "runs" else {}
            content = packed.get(f"{path.absolute().parent.name}/{path.name}")
        if content is None:
            raise FileNotFoundError(*error.args) from error
        return content
    except OSError as error:
        raise RecordError(f"cannot read {path}: {error.strerror or error}") from error


def record_paths(out: str | Path) -> list[Path]:
    """Where `read_file` finds the records of a folder's runs.

    Raises:
        RecordError: the pack is broken.
    """
    runs = Path(out) / "runs"
    packed = {runs / name for name in _files_in(runs.with_name(PACK)) if name.endswith(RECORD)}
    return sorted(packed | set(runs.glob(f"*/{RECORD}")))


def pack(out: str | Path, runs: Iterable[str]) -> Path:
    """Move the records and measures of runs, given by their folders' names, into ``<out>``'s pack.

    A run that was packed before under that name is replaced. What else is in the folders (weights,
    checkpoints) stays there; a folder that is empty then is removed.

    Returns:
        The pack's path.

    Raises:
        RecordError: a file cannot be read or written, or all are more than `LIMIT`.

    >>> import tempfile
    >>> out = Path(tempfile.mkdtemp())
    >>> files.write(out / "runs/paper-seed0/record.jsonl", b"{}")
    >>> pack(out, ["paper-seed0"]).name, [each.name for each in out.iterdir()]
    ('runs.tar.xz', ['runs.tar.xz'])
    >>> read_file(out / "runs/paper-seed0/record.jsonl")
    b'{}'
    """
    target, folder = Path(out) / PACK, Path(out) / "runs"
    own = {
        f"{run}/{name}": path
        for run in runs
        for name in (RECORD, MEASURES)
        if (path := folder / run / name).is_file()
    }
    new = {name.partition("/")[0] for name in own if name.endswith(RECORD)}
    kept = {
        name: content
        for name, content in _files_in(target).items()
        if name.partition("/")[0] not in new
    }
    try:
        whole = kept | {name: read_bytes(path) for name, path in own.items()}
        content = lzma.compress(_tar(whole), preset=9 | lzma.PRESET_EXTREME)
        same = _unpacked(content, target) == whole  # before another pack is overwritten
        if same:
            files.write(target, content)
            same = read_bytes(target) == content
    except OSError as error:
        raise RecordError(files.refusal(target, error)) from error
    if not same:
        raise RecordError(f"{target} would not be read as {folder}, which is kept")
    for path in own.values():
        path.unlink()
    for empty in (*{path.parent for path in own.values()}, folder):
        with suppress(OSError):  # it holds more
            empty.rmdir()
    return target


def _files_in(pack: Path) -> Mapping[str, bytes]:
    """``<run>/<file>`` → its bytes; nothing where there is no pack."""
    try:
        there = pack.stat()
        return _read(pack, there.st_ino, there.st_mtime_ns, there.st_size)
    except (FileNotFoundError, NotADirectoryError):
        return {}
    except OSError as error:
        raise RecordError(f"cannot read {pack}: {error.strerror or error}") from error


@lru_cache(maxsize=4)
def _read(pack: Path, *_: int) -> Mapping[str, bytes]:
    return _unpacked(read_bytes(pack), pack)


def _unpacked(pack: bytes, where: Path) -> dict[str, bytes]:
    stream = lzma.LZMADecompressor(lzma.FORMAT_XZ, memlimit=_MEMORY)
    try:
        whole = stream.decompress(pack, LIMIT + 1)
        if len(whole) > LIMIT:
            raise ValueError(f"more than {LIMIT // MIB} MiB unpacked, the most that is read")
        found = _untar(whole)
        # One way to write a pack: no links, nothing twice, nothing between the files or behind.
        right = stream.eof and not stream.unused_data and _tar(found) == whole
        if not right or not all(map(_NAME.fullmatch, found)):
            raise ValueError("not as benchmarks/pack.py writes them")
    except (lzma.LZMAError, tarfile.TarError, ValueError) as error:
        raise RecordError(f"{where} is no pack of runs: {error}") from error
    return found


def _untar(whole: bytes) -> dict[str, bytes]:
    """The files of what `_tar` wrote; of anything else, something that `_tar` writes otherwise."""
    found, at = {}, 0
    while (header := whole[at : at + 512]).strip(b"\0"):
        info = tarfile.TarInfo.frombuf(header, "utf-8", "strict")
        begin, size = at + 512, max(0, info.size)
        found[info.name] = whole[begin : begin + size]
        at = begin + -(-size // 512) * 512
    return found


def _tar(contents: Mapping[str, bytes]) -> bytes:
    """The same bytes for the same files, whoever packs them and when."""
    buffer = io.BytesIO()
    form = tarfile.USTAR_FORMAT
    with tarfile.open(fileobj=buffer, mode="w", format=form, encoding="utf-8") as tar:
        for name, content in sorted(contents.items()):
            info = tarfile.TarInfo(name)
            info.size = len(content)
            tar.addfile(info, io.BytesIO(content))
    return buffer.getvalue()

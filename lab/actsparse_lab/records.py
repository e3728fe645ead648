"""The record of a run: one file of JSON lines, ``<out>/runs/<arm>-seed<seed>/record.jsonl``.

The first line (kind ``run``) says what ran, on what and when; ``train``, ``eval`` and, where asked
for, ``measured`` lines follow; a ``result`` line means the run is finished, a ``failed`` line says
why it is not. `actsparse_lab.record_schema.SCHEMA` lists every field. Numbers are finite; null
stands only where the schema says so. What the clock says stands under ``time`` alone, so that two
runs of one config can be told to be the same: all but ``time`` and ``run_id`` is.

A line counts once its newline is there, so a run killed half-way through a line loses that alone.

Finished runs may lie in one file instead, ``<out>/runs.tar.xz``: `actsparse_lab.packed`.
"""

from __future__ import annotations

import errno
import hashlib
import json
import os
import uuid
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from actsparse import files
from actsparse.environment import environment as environment
from actsparse.untrusted import parse_json
from actsparse.values import check, shown
from actsparse_lab.packed import MEASURES as MEASURES_FILE
from actsparse_lab.packed import RECORD, read_file, record_paths
from actsparse_lab.record_schema import MEASURES as MEASURES  # what a summary of observe fits
from actsparse_lab.record_schema import SCHEMA, VERSION, Entry, RecordError


class NoRecord(RecordError):
    """There is no such file, in the folder or in its pack."""


@dataclass(frozen=True)
class Run:
    """A record, read. ``torn``: its last line was half-written and is left out."""

    path: Path
    header: Entry
    train: list[Entry]
    evals: list[Entry]
    measured: list[Entry]
    result: Entry | None
    failed: Entry | None
    torn: bool

    @property
    def task(self) -> str:
        """What was learnt: ``digits``, …"""
        return str(self.header["task"])

    @property
    def arm(self) -> str:
        """Which recipe: ``vanilla``, ``paper``, …"""
        return str(self.header["arm"])

    @property
    def seed(self) -> int:
        """Runs of one seed are paired across arms."""
        return int(self.header["seed"])

    @property
    def finished(self) -> bool:
        """Whether it came to its result."""
        return self.result is not None


class RecordWriter:
    """Writes one run's record, line by line; every line is on disk when its call returns.

    Starting replaces a record already at ``path``; `resume` goes on with it. ``header`` holds task,
    arm, seed, config and what `environment` returns, and where there are several the number of
    ``processes``; ``kind``, ``schema``, ``run_id`` and ``time.started`` (now) are filled in. A
    ``command`` in it is shown on the report.

    Raises `RecordError` for a field that is missing or wrong, and where the disk refuses (full,
    read-only); a line that did not fit is taken back whole.

    >>> import tempfile
    >>> path = run_path(tempfile.mkdtemp(), arm="paper", seed=0)
    >>> header = {"task": "digits", "arm": "paper", "seed": 0, "config": {}, **environment()}
    >>> with RecordWriter(path, header) as record:
    ...     record.write("failed", step=7, reason="the loss became NaN")
    >>> read_run(path).failed["reason"]
    'the loss became NaN'
    """

    def __init__(self, path: str | Path, header: Entry) -> None:
        self.path = Path(path)
        started = datetime.now(UTC).isoformat(timespec="seconds")
        head = {
            "kind": "run",
            "schema": VERSION,
            "run_id": uuid.uuid4().hex,
            "time": {"started": started},
            "processes": 1,
            **header,
        }
        self._begin(_line(head, self.path))

    @classmethod
    def resume(cls, path: str | Path, step: int) -> RecordWriter:
        """Go on with a record as it was after ``step`` optimizer steps; its header stays.

        Later lines are cut off, and so are a ``failed`` or ``result`` line and half a line at the
        end: a run stopped anywhere and resumed writes what it would have written undisturbed.

        Raises `RecordError` as `read_run` does, and where the disk refuses.

        >>> import tempfile
        >>> path = run_path(tempfile.mkdtemp(), arm="paper", seed=0)
        >>> header = {"task": "digits", "arm": "paper", "seed": 0, "config": {}, **environment()}
        >>> with RecordWriter(path, header) as record:
        ...     record.write("failed", step=7, reason="the loss became NaN")
        >>> RecordWriter.resume(path, step=5).close()
        >>> read_run(path).failed is None
        True
        """
        lines, entries, _ = _read(Path(path))
        kept = [
            line
            for line, entry in zip(lines, entries, strict=True)
            if entry["kind"] == "run"
            or (entry["kind"] not in ("failed", "result") and entry["step"] <= step)
        ]
        record = cls.__new__(cls)
        record.path = Path(path)
        record._begin(b"".join(line + b"\n" for line in kept))
        return record

    def _begin(self, lines: bytes) -> None:
        write_whole(self.path, lines)
        self._written, self._size = hashlib.sha256(lines), len(lines)
        with refusals(self.path):
            self._fd: int | None = os.open(self.path, os.O_WRONLY | os.O_APPEND)

    def write(self, kind: str, **fields: Any) -> None:
        """Append one line, of any kind but ``run``."""
        if self._fd is None:
            raise RecordError(f"{self.path}: the record is closed; nothing more can be written")
        if kind == "run":
            raise RecordError(f"{self.path}: the run line is the header, written at the start")
        line = _line({"kind": kind, **fields}, self.path)
        self.check()
        with refusals(self.path):
            try:
                if os.write(self._fd, line) != len(line):
                    raise OSError(errno.ENOSPC, "only part of a line could be written")
                os.fsync(self._fd)
            except OSError:
                with suppress(OSError):  # or the next line would land behind half a line
                    os.ftruncate(self._fd, self._size)
                raise
        self._written.update(line)
        self._size += len(line)

    def check(self) -> None:
        """Raise `RecordError` where the file is no longer there, or not as it was written."""
        try:
            there = os.stat(self.path)
        except OSError as error:
            why = error.strerror or error
            raise RecordError(f"{self.path} was taken away while it was written: {why}") from error
        assert self._fd is not None
        if not os.path.samestat(there, os.fstat(self._fd)) or there.st_size != self._size:
            raise RecordError(f"{self.path} was changed by another while it was written")

    def state(self) -> dict[str, Any]:
        """What is written so far: its ``size`` in bytes and ``sha256``, for `is_as_written`."""
        self.check()
        return {"size": self._size, "sha256": self._written.hexdigest()}

    def close(self) -> None:
        """Take no more lines; closing twice is fine."""
        if self._fd is not None:
            os.close(self._fd)
            self._fd = None

    def __enter__(self) -> RecordWriter:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()


def run_path(out: str | Path, arm: str, seed: int) -> Path:
    """Where a run's record lies; `RecordError` for an arm that cannot name a folder.

    >>> run_path("out", "paper", 3).as_posix()
    'out/runs/paper-seed3/record.jsonl'
    """
    if not arm or "/" in arm or "\\" in arm:
        raise RecordError(f"an arm names a folder, so not empty and without slashes; got {arm!r}")
    return Path(out) / "runs" / f"{arm}-seed{seed}" / RECORD


def run_measures_path(folder: str | Path) -> Path:
    """Where `actsparse measure` keeps the measures of the run in ``folder``.

    >>> run_measures_path("out/runs/paper-seed3").as_posix()
    'out/runs/paper-seed3/measures.json'
    """
    return Path(folder) / MEASURES_FILE


def read_run(path: str | Path) -> Run:
    """Read one record.

    Raises `RecordError`, naming path and line, for a file that cannot be read, is no record, was
    written by another schema, or holds a broken line anywhere but at its end; `NoRecord` for none.
    """
    path = Path(path)
    _, (header, *body), torn = _read(path)
    by_kind: dict[str, list[Entry]] = {kind: [] for kind in SCHEMA}
    for entry in body:
        by_kind[entry["kind"]].append(entry)
    return Run(
        path=path,
        header=header,
        train=by_kind["train"],
        evals=by_kind["eval"],
        measured=by_kind["measured"],
        result=by_kind["result"][0] if by_kind["result"] else None,
        failed=by_kind["failed"][0] if by_kind["failed"] else None,
        torn=torn,
    )


def read_runs(out: str | Path) -> list[Run]:
    """Every record of ``<out>/runs`` or its pack, sorted by arm and seed; none: an empty list.

    Where both hold a run, that of the folder counts.

    Raises `RecordError` as `read_run` does.
    """
    runs = [read_run(path) for path in record_paths(out)]
    return sorted(runs, key=lambda run: (run.arm, run.seed))


def is_as_written(path: Path, state: dict[str, Any]) -> bool:
    """Whether a record begins with all that was in it when `RecordWriter.state` was asked."""
    start = _bytes(path)[: state["size"]]
    return hashlib.sha256(start).hexdigest() == state["sha256"]


def write_whole(path: str | Path, data: bytes) -> None:
    """`files.write`, whose errors are `RecordError`."""
    with refusals(path):
        files.write(path, data)


@contextmanager
def refusals(path: str | Path) -> Iterator[None]:
    """What the system refuses inside is a `RecordError` that names ``path``."""
    try:
        yield
    except OSError as error:
        raise refused(Path(path), error) from error


def refused(path: Path, error: OSError) -> RecordError:
    """What to tell a user when the system would not write ``path``."""
    return RecordError(files.refusal(path, error))


def _line(entry: Entry, path: Path) -> bytes:
    _check_entry(entry, str(path))
    try:
        return json.dumps(entry, allow_nan=False).encode() + b"\n"
    except (TypeError, ValueError) as error:
        raise RecordError(f"{path}: the {entry['kind']} line does not fit JSON: {error}") from error


def _read(path: Path) -> tuple[list[bytes], list[Entry], bool]:
    """The whole lines, what each says, and whether half a line follows."""
    *lines, rest = _bytes(path).split(b"\n")
    if not lines:
        raise RecordError(f"{path}:1: no whole first line; a record begins with its run line")
    entries: list[Entry] = []
    once: set[str] = set()
    for number, line in enumerate(lines, start=1):
        entry = _parse(line, path, number)
        kind = entry["kind"]
        if kind in once:
            raise RecordError(f"{path}:{number}: a second {kind} line; a record holds one")
        once |= {kind} & {"run", "result", "failed"}
        entries.append(entry)
    return lines, entries, rest != b""


def _bytes(path: Path) -> bytes:
    try:
        return read_file(path)
    except FileNotFoundError as error:
        raise NoRecord(f"cannot read {path}: {error.strerror or error}") from error


def _parse(line: bytes, path: Path, number: int) -> Entry:
    where = f"{path}:{number}"
    entry = parse_json(line, where)
    if number == 1 and (not isinstance(entry, dict) or entry.get("kind") != "run"):
        raise RecordError(f"{where}: not a record; its first line must be of kind 'run'")
    if number == 1:
        _check_schema(entry.get("schema"), where)
    _check_entry(entry, where)
    return dict(entry)


def _check_schema(schema: Any, where: str) -> None:
    check(f"{where}: run.schema", schema, SCHEMA["run"]["schema"])
    if schema > VERSION:
        raise RecordError(
            f"{where}: written by a newer actsparse (schema {schema}); "
            f"this one reads {VERSION}: upgrade it"
        )
    if schema < VERSION:
        raise RecordError(
            f"{where}: written by an older actsparse (schema {schema}); this one reads {VERSION}"
        )


def _check_entry(entry: Any, where: str) -> None:
    kind = entry.get("kind") if isinstance(entry, dict) else None
    if not isinstance(kind, str) or kind not in SCHEMA:
        raise RecordError(f"{where}: unknown kind {shown(kind)}; one of {', '.join(SCHEMA)}")
    check(f"{where}: {kind}", entry, SCHEMA[kind])

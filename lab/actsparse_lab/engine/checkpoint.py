"""Checkpoints that count only when whole: files, and last a manifest that vouches for them.

A run's folder holds ``checkpoint-<step>/`` as Trainer writes them. `seal` puts ``manifest.json``
into one, by rename, once all its files are on the disk; without it, or with a file that is not as
it says, the checkpoint does not count. Links are neither followed nor vouched for.
"""

from __future__ import annotations

import hashlib
import json
import re
import shutil
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

from actsparse import files
from actsparse.untrusted import read_bytes
from actsparse_lab.records import RecordError, is_as_written, refusals

MANIFEST = "manifest.json"
_FORMAT = 1


def seal(folder: Path, **facts: Any) -> None:
    """Vouch for every file below ``folder``: write its manifest, last of all.

    The manifest is one JSON object: ``format``, the ``facts`` (plain values: the step, …),
    ``files``, which gives each path its ``size`` in bytes and its ``sha256``, and the ``sha256`` of
    all that. Files and folders are on the disk before it is, whenever the power fails.

    Raises `RecordError` where the disk refuses.

    >>> import tempfile
    >>> folder = Path(tempfile.mkdtemp(), "checkpoint-50")
    >>> folder.mkdir()
    >>> (folder / "model.safetensors").write_bytes(bytes(8))
    8
    >>> flaw(folder)
    'manifest.json is missing: its writing was cut off'
    >>> seal(folder, step=50)
    >>> flaw(folder), facts(folder)
    (None, {'step': 50})
    """
    with refusals(folder):
        files.sweep(folder / MANIFEST)
        files.sync_tree(folder)
        known = {name: _described(path) for name, path in _files(folder).items()}
        manifest = {"format": _FORMAT, **facts, "files": known}
        manifest["sha256"] = _sha256_of(manifest)
        files.write(folder / MANIFEST, json.dumps(manifest, indent=1, allow_nan=False).encode())
        files.sync(folder.parent)


def flaw(folder: Path) -> str | None:
    """What is wrong with a checkpoint, naming the file; None if it is whole.

    Reads every file. Files that the manifest does not know are no flaw.
    """
    try:
        known = _manifest(folder)["files"]
    except _Broken as broken:
        return str(broken)
    there = _files(folder)
    for name, written in known.items():
        if name not in there:
            return f"{name} is missing"
        try:
            found = _described(there[name])
        except OSError as error:
            return f"{name} cannot be read: {error.strerror or error}"
        if found["size"] != written["size"]:
            return f"{name} has {found['size']} bytes, not the {written['size']} that were written"
        if found["sha256"] != written["sha256"]:
            return f"{name} is not what was written: its SHA-256 is another"
    return None


def facts(folder: Path) -> dict[str, Any]:
    """The facts a checkpoint was sealed with; `RecordError` where it has no sound manifest."""
    try:
        manifest = _manifest(folder)
    except _Broken as broken:
        raise RecordError(f"{folder}: {broken}") from broken
    return {key: value for key, value in manifest.items() if key not in ("format", "files")}


def checkpoints(folder: Path) -> list[Path]:
    """The folders ``checkpoint-<step>`` of a run, by step; whole or not."""
    found = [path for path in folder.glob("checkpoint-*") if _NAME.fullmatch(path.name)]
    return sorted((path for path in found if path.is_dir() and not path.is_symlink()), key=_step)


def newest_whole(
    folder: Path, told: Callable[[str], None] = warnings.warn, record: Path | None = None
) -> Path | None:
    """The newest checkpoint without a flaw, None if there is none.

    ``told`` hears of each newer one that is refused: why, and what is used instead. Where
    ``record`` is given, it must begin as it was when the checkpoint was made.

    Raises `RecordError` where of the record too little is left for every checkpoint.
    """
    found = checkpoints(folder)
    cut = None
    for path, before in reversed(list(zip(found, [None, *found], strict=False))):
        wrong = flaw(path)
        if wrong is None and record is not None and not _fits(path, record):
            wrong = cut = f"{record.name} has been cut or changed since it was made"
        if wrong is None:
            files.sweep(path / MANIFEST)
            return path
        if cut and before is None:
            raise RecordError(
                f"{path} is refused: {cut}, and there is no earlier one; bring {record} back, or "
                f"remove {folder} to start anew"
            )
        instead = "the run starts anew" if before is None else f"going back to {before.name}"
        told(f"checkpoint {path} is refused: {wrong}; {instead}")
    return None


def prune(folder: Path, keep: int) -> None:
    """Delete what is older than the newest ``keep`` whole checkpoints, and what broke among them.

    Whole is here what has a sound manifest: files are not read again. What is newer than every
    whole one stays; it may be being written.

    Raises:
        ValueError: ``keep`` is below 1.
        RecordError: the disk refuses.
    """
    if keep < 1:
        raise ValueError(f"keep={keep} must be at least 1, or nothing is left to go on from")
    found = checkpoints(folder)
    whole = [path for path in found if _sealed(path)]
    for path in found:
        if whole and path not in whole[-keep:] and _step(path) < _step(whole[-1]):
            _delete(path)


def drop_after(folder: Path, step: int) -> None:
    """Delete the checkpoints of later steps, which training from ``step`` will write again.

    Raises `RecordError` where the disk refuses.
    """
    for path in checkpoints(folder):
        if _step(path) > step:
            _delete(path)


_NAME = re.compile(r"checkpoint-([0-9]+)")


class _Broken(Exception):
    """A manifest that vouches for nothing; the message says why."""


def _step(path: Path) -> int:
    return int(path.name.removeprefix("checkpoint-"))


def _fits(folder: Path, record: Path) -> bool:
    """Whether a record begins with what was in it when a whole checkpoint was made."""
    then = facts(folder).get("record")  # checkpoints of an older actsparse do not know
    return then is None or is_as_written(record, then)


def _sealed(folder: Path) -> bool:
    try:
        _manifest(folder)
    except _Broken:
        return False
    return True


def _manifest(folder: Path) -> dict[str, Any]:
    """The manifest without its own digest."""
    try:
        manifest = json.loads(read_bytes(folder / MANIFEST))
    except FileNotFoundError as error:
        raise _Broken(f"{MANIFEST} is missing: its writing was cut off") from error
    except OSError as error:
        raise _Broken(f"{MANIFEST} cannot be read: {error.strerror or error}") from error
    except (ValueError, RecursionError) as error:
        raise _Broken(f"{MANIFEST} is no JSON: {error}") from error
    form = manifest.get("format") if isinstance(manifest, dict) else None
    if form != _FORMAT:
        raise _Broken(f"{MANIFEST} has format {form!r}; this actsparse reads {_FORMAT}")
    if manifest.pop("sha256", None) != _sha256_of(manifest):
        raise _Broken(f"{MANIFEST} is not what was written: its SHA-256 is another")
    return dict(manifest)


def _files(folder: Path) -> dict[str, Path]:
    """The plain files below, by path; not the manifest, not what links lead to."""
    plain = [path for path in folder.rglob("*") if path.is_file() and not path.is_symlink()]
    files = {path.relative_to(folder).as_posix(): path for path in sorted(plain)}
    files.pop(MANIFEST, None)
    return files


def _described(path: Path) -> dict[str, Any]:
    """A file as the manifest has it."""
    return {"size": path.stat().st_size, "sha256": files.sha256(path)}


def _sha256_of(manifest: dict[str, Any]) -> str:
    return hashlib.sha256(json.dumps(manifest).encode()).hexdigest()


def _delete(folder: Path) -> None:
    """The manifest first, so that nothing half-deleted looks whole."""
    with refusals(folder):
        (folder / MANIFEST).unlink(missing_ok=True)
        files.sync(folder)
        shutil.rmtree(folder)

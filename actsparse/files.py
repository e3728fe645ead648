"""Write files and folders whole or not at all, also if killed, or beside a second process.

What is being written is in a hidden folder beside its place, ``.<name>.<id>.tmp``, with a lock that
its process holds. A lock ends with its process, so a folder whose lock is free was left by a dead
process. The next one that writes to the same place deletes it.
"""

from __future__ import annotations

import ctypes
import errno
import hashlib
import os
import re
import shutil
import sys
import uuid
from collections.abc import Collection, Iterator
from contextlib import contextmanager, suppress
from itertools import takewhile
from pathlib import Path

_LOCK, _NEW, _OLD = "lock", "new", "old"
_HERE, _SWAP = -100, 2  # AT_FDCWD, RENAME_EXCHANGE


def write(path: str | os.PathLike[str], data: bytes) -> None:
    """Write a file whole or not at all, making its folder; it is on the disk afterwards.

    Raises `OSError` where the disk refuses; what was there before is still there.

    >>> import tempfile
    >>> path = Path(tempfile.mkdtemp(), "deep", "note.txt")
    >>> write(path, b"whole")
    >>> path.read_bytes(), [each.name for each in path.parent.iterdir()]
    (b'whole', ['note.txt'])
    """
    path = Path(path)
    make_folder(path.parent)
    with beside(path) as work:
        with open(work / _NEW, "wb") as file:
            file.write(data)
        put(work / _NEW, path)


def refusal(path: str | os.PathLike[str], error: OSError) -> str:
    """What to tell a user where the system would not write ``path``."""
    full = error.errno in (errno.ENOSPC, errno.EDQUOT)
    remedy = "free some space or choose another folder" if full else "choose another folder"
    return f"cannot write {path}: {error.strerror or error}; {remedy}"


def put(file: Path, path: Path) -> None:
    """Move a finished file to its place on the same disk, where another may be."""
    sync(file)
    os.replace(file, path)
    sync(path.parent)


@contextmanager
def whole_folder(path: str | os.PathLike[str], files: Collection[str]) -> Iterator[Path]:
    """A new folder to write ``files`` to, which takes the place of ``path`` when all went well.

    Whenever it stops, ``path`` is the old folder or the new one. It is on the disk afterwards.

    Raises:
        FileExistsError: ``path`` is a file, or a folder that holds other files.
        OSError: the disk refuses; what was there before is still there.
    """
    target = Path(path).resolve()
    check_free(target, files)
    make_folder(target.parent)
    with beside(target) as work:
        new = work / _NEW
        new.mkdir()
        yield new
        sync_tree(new)
        check_free(target, files)  # writing may have taken long
        _take_place(new, target)
        sync(target.parent)  # before the old one is deleted


@contextmanager
def beside(target: Path) -> Iterator[Path]:
    """A hidden folder to work in, on the disk of ``target``; it is gone in the end."""
    sweep(target)
    work, lock = _work(target)
    try:
        yield work
    finally:
        _clear(work, target)
        if lock is not None:
            os.close(lock)


@contextmanager
def alone(path: Path) -> Iterator[None]:
    """Hold a place for this process as long as the block runs; it ends with the process.

    Raises:
        FileExistsError: another process holds it.
    """
    lock = path.with_name(f".{path.name}.lock")
    descriptor = os.open(lock, os.O_RDWR | os.O_CREAT)
    try:
        with suppress(ModuleNotFoundError):  # no locks there
            import fcntl

            fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
        try:
            yield
        finally:
            lock.unlink(missing_ok=True)
    except BlockingIOError as error:
        raise FileExistsError(
            f"another process writes {path}: wait for it, or give another place"
        ) from error
    finally:
        os.close(descriptor)


def sweep(target: Path) -> None:
    """Take away what dead processes left beside ``target``, and put back what they had moved."""
    left = re.compile(re.escape(f".{target.name}.") + r"[0-9a-f]{12}\.tmp")
    with suppress(OSError):
        for name in filter(left.fullmatch, os.listdir(target.parent)):
            lock = _lock(target.with_name(name), wait=False)
            if lock is not None:
                _clear(target.with_name(name), target)
                os.close(lock)


def make_folder(path: Path) -> None:
    """Make a folder and those above it; they are on the disk afterwards."""
    for each in reversed([*takewhile(lambda each: not each.is_dir(), (path, *path.parents))]):
        each.mkdir(exist_ok=True)
        sync(each.parent)


def sync(path: Path) -> None:
    """Have the disk keep what a file holds, or which files a folder does."""
    if os.name != "posix" and path.is_dir():
        return  # a folder cannot be opened there
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    except OSError as error:
        if error.errno != errno.EINVAL:  # some shares sync no folders
            raise
    finally:
        os.close(descriptor)


def sync_tree(folder: Path) -> None:
    """`sync` for a folder and all in it; links are not followed."""
    for place, _, names in os.walk(folder, topdown=False):
        for path in (Path(place, name) for name in names):
            if path.is_file() and not path.is_symlink():
                sync(path)
        sync(Path(place))


def sha256(path: Path) -> str:
    """The SHA-256 of a file, in hexadecimal."""
    with open(path, "rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def check_free(target: Path, files: Collection[str]) -> None:
    """Raise `FileExistsError` where a folder of ``files`` cannot take the place of ``target``."""
    if not target.exists():
        return
    if not target.is_dir():
        raise FileExistsError(f"{target} is a file; a model is saved to a folder")
    others = sorted({item.name for item in target.iterdir()} - set(files))
    if others:
        raise FileExistsError(
            f"saving replaces the whole folder, but {target} holds other files "
            f"({', '.join(others[:3])}); give the model a folder of its own"
        )


def _take_place(new: Path, target: Path) -> None:
    """Let a folder take the place of another, which is then in its work folder."""
    while True:
        try:
            if not target.exists():
                os.rename(new, target)
            elif not _exchange(new, target):
                os.rename(target, new.with_name(_OLD))
                os.rename(new, target)
            return
        except OSError as error:  # another process has put one there or taken it away: look again
            raced = error.errno in (errno.ENOENT, errno.ENOTEMPTY, errno.EEXIST)
            if not raced or not new.exists():
                raise
            shutil.rmtree(new.with_name(_OLD), ignore_errors=True)


def _exchange(one: Path, two: Path) -> bool:
    """Let two folders change places at once; False where the system cannot."""
    swap = getattr(ctypes.CDLL(None, use_errno=True), "renameat2", None) if _LINUX else None
    if swap is None:
        return False
    if swap(_HERE, os.fsencode(one), _HERE, os.fsencode(two), _SWAP) == 0:
        return True
    code = ctypes.get_errno()
    if code in (errno.EINVAL, errno.ENOSYS, errno.ENOTSUP):
        return False
    raise OSError(code, os.strerror(code), str(two))


_LINUX = sys.platform == "linux"


def _work(target: Path) -> tuple[Path, int | None]:
    """A new work folder, and its lock where there are locks."""
    while True:
        work = target.with_name(f".{target.name}.{uuid.uuid4().hex[:12]}.tmp")
        work.mkdir()
        lock = _lock(work, wait=True)
        if work.exists():
            return work, lock
        if lock is not None:  # swept before it was locked: once more
            os.close(lock)


def _lock(work: Path, wait: bool) -> int | None:
    """Lock a work folder; None where another process has, or where there are no locks."""
    descriptor = None
    try:
        import fcntl

        descriptor = os.open(work / _LOCK, os.O_RDWR | os.O_CREAT)
        fcntl.flock(descriptor, fcntl.LOCK_EX | (0 if wait else fcntl.LOCK_NB))
    except (ModuleNotFoundError, OSError):
        if descriptor is not None:
            os.close(descriptor)
        return None
    return descriptor


def _clear(work: Path, target: Path) -> None:
    """Take a work folder away; what it moved goes back where nothing took its place."""
    if (work / _OLD).exists() and not target.exists():
        os.rename(work / _OLD, target)
        sync(target.parent)
    shutil.rmtree(work, ignore_errors=True)

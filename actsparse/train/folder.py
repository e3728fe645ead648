"""A run's folder: is the run done already, and can it be written at all? Light: no transformers."""

from __future__ import annotations

import errno
import os
import shutil
from pathlib import Path

from actsparse.records import RecordError, Run, read_run, refused, run_path
from actsparse.train.config import RunConfig

ROOM = 64 * 2**20  # bytes that must be free before a run starts


def finished_run(config: RunConfig, out: str | Path) -> Run | None:
    """The finished run of this arm and seed, or None if it is still to be done.

    A record that ends half-way, or whose first line never got whole, counts as not done.

    Raises:
        ValueError: it was finished with another config; the message says what differs.
        RecordError: the record is broken in its middle, or of a newer actsparse.
    """
    path = run_path(out, config.arm, config.seed)
    try:
        if not path.exists() or b"\n" not in path.read_bytes():
            return None
    except OSError as error:
        raise RecordError(f"cannot read {path}: {error.strerror or error}") from error
    run = read_run(path)
    if not run.finished:
        return None
    now = config.to_json()
    # a setting that is newer than the run had its default
    then = RunConfig(task=config.task, arm=config.arm, seed=config.seed).to_json()
    then |= run.header["config"]
    other = [key for key in {**now, **then} if then.get(key) != now.get(key)]
    if run.task != config.task:
        other = ["task"]
    if other:
        said = ", ".join(f"{key}={then.get(key)!r} (now {now.get(key)!r})" for key in other)
        raise ValueError(
            f"{path.parent} holds a finished run with {said}; "
            f"choose another --out, or remove that folder to have it done again"
        )
    return run


def check_folder(folder: str | Path) -> None:
    """Make sure that ``folder`` exists, can be written and has room for a run.

    Raises `RecordError` that names the folder and the reason.
    """
    folder = Path(folder)
    probe = folder / f".probe-{os.getpid()}"
    try:
        folder.mkdir(parents=True, exist_ok=True)
        free = shutil.disk_usage(folder).free
        if free < ROOM:
            raise OSError(errno.ENOSPC, f"only {free >> 20} of {ROOM >> 20} MiB are free")
        try:
            probe.write_bytes(b"\0" * 4096)
        finally:
            probe.unlink(missing_ok=True)
    except OSError as error:
        raise refused(folder, error) from error

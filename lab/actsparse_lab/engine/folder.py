"""A run's folder: is the run done already, and can it be written at all? Light: no transformers."""

from __future__ import annotations

import errno
import os
import shutil
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from copy import deepcopy
from pathlib import Path

from actsparse import files
from actsparse.modify import Recipe
from actsparse.values import BadValue
from actsparse_lab.engine.checkpoint import checkpoints, newest_whole
from actsparse_lab.engine.config import RunConfig
from actsparse_lab.engine.gradient_noise_config import GradientNoiseConfig
from actsparse_lab.packed import PACK, read_file
from actsparse_lab.records import RecordError, Run, read_run, refusals, run_path

Config = RunConfig | GradientNoiseConfig
ROOM = 64 * 2**20  # bytes that must be free before any run starts


def finished_run(config: Config, out: str | Path) -> Run | None:
    """The finished run of this arm and seed, or None if it is still to be done.

    A record that ends half-way, or whose first line never got whole, counts as not done.

    Raises:
        ValueError: it was finished with another config; the message says what differs.
        RecordError: the record is broken in its middle, or of a newer actsparse.
    """
    path = run_path(out, config.arm, config.seed)
    try:
        if b"\n" not in read_file(path):
            return None
    except FileNotFoundError:
        return None
    run = read_run(path)
    if not run.finished:
        return None
    if other := _differences(config, run):
        again = "remove that folder to have it done again"
        if not path.exists():
            again = f"take it out of {PACK} to have it done again"
        raise ValueError(
            f"{path.parent} holds a finished run with {other}; choose another --out, or {again}"
        )
    return run


def checkpoint_of(
    config: RunConfig,
    out: str | Path,
    processes: int,
    digest: str,
    told: Callable[[str], None],
) -> Path | None:
    """The checkpoint from which an unfinished run goes on, None if it starts anew.

    ``told`` is called with what is wrong with each newer checkpoint that is not whole.

    Raises:
        ValueError: it was trained with another config, on data of another ``digest``, or with
            another number of processes.
        RecordError: the record is broken, or missing though there are checkpoints.
    """
    path = run_path(out, config.arm, config.seed)
    if not checkpoints(path.parent):
        return None
    run = read_run(path)
    if other := _differences(config, run):
        raise ValueError(
            f"{path.parent} holds an unfinished run with {other}; call it as it was called, choose "
            f"another --out, or remove that folder"
        )
    if (before := run.header["processes"]) != processes:
        raise ValueError(
            f"{path.parent} holds an unfinished run of {before} process{'es' * (before != 1)}; go "
            f"on with as many, not {processes}, or remove that folder"
        )
    if run.header.get("data_sha256", digest) != digest:
        raise ValueError(
            f"{path.parent} holds an unfinished run on other data (their names, sizes or texts "
            f"have changed); bring them back, or remove that folder"
        )
    return newest_whole(path.parent, told, record=path)


@contextmanager
def claimed(config: Config, out: str | Path, room: int = 0) -> Iterator[Run | None]:
    """Keep other processes out of a run's folder, which has ``room`` (bytes).

    Gives the run if it is finished: another process may have done it since it was looked for.

    Raises:
        ValueError: another process is at it, or has finished it with another config.
        RecordError: the folder cannot be written, or the record is broken.
    """
    folder = run_path(out, config.arm, config.seed).parent
    check_folder(folder, room)
    with alone(folder):
        yield finished_run(config, out)


@contextmanager
def alone(folder: Path) -> Iterator[None]:
    """Keep other processes out of ``folder``; a process that ends, however it does, lets go of it.

    Raises:
        ValueError: another is at it.
        RecordError: it cannot be locked.
    """
    try:
        import fcntl
    except ModuleNotFoundError:  # not POSIX
        yield
        return
    place = (folder / ".lock").resolve()
    busy = f"another process is at the run in {folder}; wait for it, or choose another --out"
    if place in _OURS:  # these locks keep out other processes, not other threads
        raise ValueError(busy)
    with refusals(folder):
        file = open(place, "wb")  # noqa: SIM115
    with file:
        try:  # not flock, which the data workers of a killed process would keep for seconds
            fcntl.lockf(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError as error:
            if error.errno in (errno.EACCES, errno.EAGAIN):
                raise ValueError(busy) from error
            raise RecordError(
                f"cannot lock {place}: {error.strerror or error}; choose an --out on a disk with "
                f"file locks, or two processes could write to one run"
            ) from error
        with refusals(folder):
            same = os.path.samestat(os.fstat(file.fileno()), os.stat(place))
        if not same:  # the folder was removed, and made again by another
            raise ValueError(busy)
        _OURS.add(place)
        try:
            yield
        finally:
            _OURS.remove(place)


_OURS: set[Path] = set()


# Settings that another call may have otherwise: they change nothing that is trained.
_FREE = ("keep", "save_every", "report_to")


def _differences(config: Config, run: Run) -> str:
    """What differs between a run on disk and one that is asked for, in words; empty: nothing."""
    now = config.to_json()
    # a setting that is newer than the run had its default
    then = deepcopy(run.header["config"])
    if isinstance(config, RunConfig):
        plain = RunConfig(task=config.task, arm=config.arm, seed=config.seed).to_json()
        then = plain | then
        starts = {Path(each["start"]).resolve() for each in (now, then) if each["start"]}
        if now["start"] and then["start"] and len(starts) == 1:
            then["start"] = now["start"]  # the same place, spelt otherwise
        for each in (now, then):
            with suppress(BadValue):  # a recipe that can no longer be made stays another one
                each["recipe"] = Recipe.from_json(each["recipe"]).to_json()
    for data in (now["data"], then["data"]):
        if "shards" in data:  # places keep their meaning where damage is skipped
            data.pop("damaged", None)
    free = _FREE if "shards" in config.data else (*_FREE, "workers")
    other = [key for key in {**now, **then} if key not in free and then.get(key) != now.get(key)]
    if run.task != config.task:
        other = ["task"]
    return ", ".join(f"{key}={then.get(key)!r} (now {now.get(key)!r})" for key in other)


def check_folder(folder: str | Path, room: int = 0) -> None:
    """Make sure that ``folder`` exists, can be written and has ``room`` (bytes) for a run.

    Raises `RecordError` that names the folder and the reason.
    """
    folder = Path(folder)
    with refusals(folder):
        files.make_folder(folder)
        free, room = shutil.disk_usage(folder).free, max(room, ROOM)
        if free < room:
            raise OSError(errno.ENOSPC, f"only {free >> 20} of {room >> 20} MiB are free")
        with files.beside(folder / "probe") as work:
            (work / "probe").write_bytes(b"\0" * 4096)

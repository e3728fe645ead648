"""A process that ends at its n-th file operation, and a disk that forgets what was not synced.

For forked children of one thread: what is patched here stays patched.
"""

from __future__ import annotations

import contextlib
import errno
import json
import os
import shutil
import signal
import stat
import sys
import traceback
from collections.abc import Callable
from pathlib import Path
from typing import Any

from actsparse_lab.engine.interrupt import Interrupted

# of Python's audit events, with where their paths stand among the arguments
CHANGES = {"open": 0, "os.rename": 1, "os.remove": 0, "os.rmdir": 0, "os.mkdir": 0,
           "os.truncate": 0}  # fmt: skip
TAKES_AWAY = ("os.remove", "os.rmdir", "os.truncate")
WRITING = os.O_WRONLY | os.O_RDWR | os.O_CREAT | os.O_TRUNC


REFUSED = ("another process", "cannot write", "saved anew", "is not what was saved")


def in_child(job: Callable[[], object], stopped: Callable[[], object] = lambda: None) -> int:
    """Run in a forked process; its exit status, negative where a signal ended it.

    0: all went well; 3: it was refused, or interrupted, in so many words. Where the process stops
    itself, ``stopped`` is called, and it goes on.
    """
    sys.stdout.flush()
    child = os.fork()
    if child == 0:
        code = 1
        try:
            os.setpgid(0, 0)
            job()
            code = 0
        except BaseException as error:  # a forked process must never come back
            told = any(words in str(error) for words in REFUSED)
            code = 3 if told or isinstance(error, OSError | Interrupted | KeyboardInterrupt) else 1
            if code == 1:
                traceback.print_exc()
        finally:
            sys.stderr.flush()
            os._exit(code)
    while True:
        _, status = os.waitpid(child, os.WUNTRACED)
        if not os.WIFSTOPPED(status):
            return os.waitstatus_to_exitcode(status)
        stopped()
        os.killpg(child, signal.SIGCONT)


class Operations:
    """Counts what this process does to files below ``root``; at the ``at``-th it acts.

    ``act`` is "kill", "stop", "full" (the disk refuses that operation and all that follow it) or
    the number of a signal. ``kept`` is a folder for what the disk surely has, see `lose_power`.
    """

    def __init__(self, root: Path, kept: Path, at: int, act: Any = "kill", reads: bool = False):
        self.root, self.kept, self.at, self.act = os.path.realpath(root), kept, at, act
        self.reads, self.count, self.held = reads, 0, []
        self.listed: dict[int, int] = {}  # numbers of files in synced folders, each held open
        (kept / "synced").mkdir(parents=True)
        for place, _, names in os.walk(root):
            for path in (place, *(os.path.join(place, name) for name in names)):
                self._note(os.open(path, os.O_RDONLY))
        self._fsync, self._write = os.fsync, os.write
        os.fsync, os.write = self._fsync_counted, self._write_counted
        sys.addaudithook(self._audit)

    def wrap(self, place: Any, name: str, half: int | None = None) -> None:
        """Count calls of a function that writes unseen by Python; ``half``: where its path is."""
        own = getattr(place, name)

        def counted(*args: Any, **options: Any) -> Any:
            self.step(name)
            done = own(*args, **options)
            if half is not None:
                self.step(f"half of {name}", cut=args[half])
            return done

        setattr(place, name, counted)

    def announce(self, place: Any, name: str, what: Callable[..., Any]) -> None:
        """Note what is said to be there once a function has returned."""
        own = getattr(place, name)

        def noted(*args: Any, **options: Any) -> Any:
            done = own(*args, **options)
            line = json.dumps(what(*args, **options)) + "\n"
            with open(self.kept / "announced", "a") as file:
                file.write(line)
            return done

        setattr(place, name, noted)

    def step(self, what: str, cut: Any = None) -> None:
        self.count += 1
        if self.at == 0:  # a look at how many there are, those of workers too
            with open(self.kept / "counts", "a") as file:
                file.write(f"{self.count}\n")
        if self.act == "full" and self.count >= self.at > 0 and what not in TAKES_AWAY:
            (self.kept / "struck").write_text(what)
            if cut is not None:
                os.truncate(cut, os.path.getsize(cut) // 2)
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        if self.count != self.at or self.act == "full":
            return
        (self.kept / "struck").write_text(what)
        if self.act == "kill":
            if cut is not None:
                os.truncate(cut, os.path.getsize(cut) // 2)
            os.killpg(0, signal.SIGKILL)  # workers too
        elif self.act == "stop":
            os.killpg(0, signal.SIGSTOP)  # whoever waits for this process, too
        else:
            signal.raise_signal(self.act)

    def _audit(self, event: str, args: tuple[Any, ...]) -> None:
        if event not in CHANGES:
            return
        path = args[CHANGES[event]]
        if event == "open" and not (self.reads or (args[2] or 0) & WRITING):
            return
        if isinstance(path, int):
            path = os.readlink(f"/proc/self/fd/{path}")
        inside = os.path.realpath(os.path.dirname(os.fsdecode(path))) + "/"
        relative = event in TAKES_AWAY and not os.path.isabs(path)  # below an open folder
        if relative or inside.startswith(self.root + "/"):
            self.step(event)

    def _fsync_counted(self, descriptor: int) -> None:
        self.step("fsync")
        self._fsync(descriptor)
        self._note(os.dup(descriptor))

    def _write_counted(self, descriptor: int, data: bytes) -> int:
        if not os.readlink(f"/proc/self/fd/{descriptor}").startswith(self.root + "/"):
            return self._write(descriptor, data)
        self.step("write")
        if self.count + 1 == self.at and self.act in ("kill", "full"):
            self._write(descriptor, data[: len(data) // 2])
        self.step("half of write")
        return self._write(descriptor, data)

    def _note(self, descriptor: int) -> None:
        """Keep a file as it is now; the open descriptor keeps its number from being used again."""
        self.held.append(descriptor)
        found = os.fstat(descriptor)
        note = self.kept / "synced" / str(found.st_ino)
        if stat.S_ISDIR(found.st_mode):
            with os.scandir(descriptor) as entries:
                names = {each.name: [each.inode(), each.is_dir()] for each in entries}
            for name, (number, _) in names.items():  # their numbers are not used again either
                with contextlib.suppress(FileNotFoundError):
                    if number not in self.listed:
                        self.listed[number] = os.open(name, os.O_PATH, dir_fd=descriptor)
            note.with_suffix(".new").write_text(json.dumps(names))
        else:
            shutil.copyfile(f"/proc/self/fd/{descriptor}", note.with_suffix(".new"))
        os.replace(note.with_suffix(".new"), note)  # a kill may come here as well


def announced(kept: Path) -> list[Any]:
    """What the process said before it ended."""
    path = kept / "announced"
    return [json.loads(line) for line in path.read_text().splitlines()] if path.exists() else []


def lose_power(root: Path, kept: Path, how: str | None, made: Path) -> None:
    """Make the folder that lost power may leave, after the process that wrote to it was killed.

    ``how``: None, as it is; "all", nothing that was not synced is there: content is cut to what
    was, and files made, moved or deleted since their folder was synced are where they were;
    "content": names are as they were last, what they hold is emptied to what was synced; "half": or
    cut in half.
    """
    made.parent.mkdir()
    if how == "all":
        return _restore(os.stat(root).st_ino, made, kept / "synced")
    shutil.copytree(root, made, symlinks=True)
    for place, _, names in os.walk(root if how is not None else ""):
        for path in (Path(place, name) for name in names):
            was, new = kept / "synced" / str(path.stat().st_ino), made / path.relative_to(root)
            if was.exists():
                shutil.copyfile(was, new)
            else:
                os.truncate(new, path.stat().st_size // 2 if how == "half" else 0)
    return None


def _restore(number: int, made: Path, synced: Path) -> None:
    made.mkdir()
    note = synced / str(number)
    entries = json.loads(note.read_text()) if note.exists() else {}
    for name, (inner, folder) in entries.items():
        if folder:
            _restore(inner, made / name, synced)
        elif (synced / str(inner)).exists():
            shutil.copyfile(synced / str(inner), made / name)
        else:
            (made / name).touch()

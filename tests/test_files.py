"""A file or folder is whole, old or new, and what dead processes left is swept."""

from __future__ import annotations

import errno
import os
import signal
import subprocess
import sys
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from actsparse import files

ODD = ["plain", "two\nlines", "[a-z]*?.", "{}", "-rf", "ü ☃", "x" * 200]
names = st.text(st.characters(codec="utf-8", exclude_characters="/\0"), min_size=1, max_size=50)
tmp_path_is_reused = settings(
    max_examples=40, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture]
)


def put(folder: Path, **files_in_it: str) -> None:
    for name, text in files_in_it.items():
        (folder / name).write_text(text)


def replace(target: Path, text: str) -> None:
    with files.whole_folder(target, {"a", "b"}) as new:
        put(new, a=text, b=text)


def held_in(target: Path) -> str | None:
    """What both files of a folder say, None where there is no folder."""
    if not target.exists():
        return None
    (text,) = {(target / name).read_text() for name in ("a", "b")}
    return text


@pytest.fixture(params=["exchange", "two renames"])
def kernel(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> None:
    if request.param == "two renames":
        monkeypatch.setattr(files, "_exchange", lambda one, two: False)


@pytest.mark.usefixtures("kernel")
@pytest.mark.parametrize("name", ODD)
def test_a_folder_is_replaced_whatever_its_name(tmp_path: Path, name: str) -> None:
    for text in ("old", "new"):
        replace(tmp_path / name, text)
    assert held_in(tmp_path / name) == "new"
    assert [each.name for each in tmp_path.iterdir()] == [name]


@tmp_path_is_reused
@given(name=names.filter(lambda name: name not in (".", "..")), data=st.binary(max_size=99))
def test_a_file_holds_what_was_written_and_nothing_is_beside_it(
    tmp_path: Path, name: str, data: bytes
) -> None:
    if len(os.fsencode(name)) > 200:  # no room for the name of a work folder
        return
    path = tmp_path / "deep" / name
    files.write(path, b"old")
    files.write(path, data)
    assert path.read_bytes() == data
    assert [each.name for each in path.parent.iterdir()] == [name]
    path.unlink()


LEAVE = """
import os, sys
from pathlib import Path
import files
target = Path(sys.argv[1])
files._exchange = lambda one, two: False
rename = os.rename
def stop(*_):
    print("here", flush=True)
    input()
if sys.argv[2] == "writing":
    with files.whole_folder(target, {"a", "b"}) as new:
        stop()
def second(old, new):
    if Path(old).name == "new":
        stop()
    rename(old, new)
os.rename = second
with files.whole_folder(target, {"a", "b"}) as new:
    for name in ("a", "b"):
        (new / name).write_text("theirs")
"""


def in_process(program: str, *words: object) -> subprocess.Popen[str]:
    """Without torch: the module is imported alone."""
    place = {**os.environ, "PYTHONPATH": str(Path(files.__file__).parent)}
    command = [sys.executable, "-c", program, *map(str, words)]
    return subprocess.Popen(command, stdin=-1, stdout=-1, text=True, env=place, cwd="/")


def stopped_at(target: Path, where: str) -> subprocess.Popen[str]:
    """A process that waits while it saves: "writing", or with the old folder moved away."""
    process = in_process(LEAVE, target, where)
    assert process.stdout is not None
    assert process.stdout.readline() == "here\n"
    return process


def hidden(folder: Path) -> list[str]:
    return [each.name for each in folder.iterdir() if each.name.startswith(".")]


def test_what_a_live_process_works_in_is_left_and_what_a_dead_one_left_is_swept(
    tmp_path: Path,
) -> None:
    target = tmp_path / "m\n[x]"
    replace(target, "old")
    process = stopped_at(target, "writing")
    (before,) = hidden(tmp_path)
    replace(target, "new")
    assert hidden(tmp_path) == [before]
    process.kill()
    process.communicate()
    foreign = tmp_path / ".m\n[x].0123456789ab.txt"
    foreign.touch()
    replace(tmp_path / "other", "another")
    assert before in hidden(tmp_path)  # it is swept by who writes there
    replace(target, "newer")
    assert hidden(tmp_path) == [foreign.name]
    assert held_in(target) == "newer"


@pytest.mark.parametrize("then", ["swept", "saved"])
def test_an_old_folder_that_a_dead_process_had_moved_away_comes_back(
    tmp_path: Path, then: str
) -> None:
    target = tmp_path / "m"
    replace(target, "old")
    process = stopped_at(target, "moved")
    assert held_in(target) is None
    files.sweep(target)
    assert held_in(target) is None  # the process lives: it is its own
    process.kill()
    process.communicate()
    if then == "saved":
        with pytest.raises(OSError, match="mine"), files.whole_folder(target, {"a", "b"}):
            raise OSError("mine")
    else:
        files.sweep(target)
    assert held_in(target) == "old"
    assert hidden(tmp_path) == []


@pytest.mark.usefixtures("kernel")
def test_of_two_that_save_at_once_each_is_whole(tmp_path: Path) -> None:
    target = tmp_path / "m"
    for text in ("first", "second"):  # the target is there, or not
        with files.whole_folder(target, {"a", "b"}) as new:
            put(new, a=text, b=text)
            replace(target, "other")
        assert held_in(target) == text
    assert hidden(tmp_path) == []


def test_a_folder_that_got_other_files_meanwhile_is_left(tmp_path: Path) -> None:
    target = tmp_path / "m"
    replace(target, "old")

    def save(stranger: str) -> None:
        with files.whole_folder(target, {"a", "b"}) as new:
            put(new, a="new", b="new")
            put(target, **{stranger: "all of it"})

    with pytest.raises(FileExistsError, match="holds other files \\(thesis\\)"):
        save("thesis")
    assert held_in(target) == "old"
    assert hidden(tmp_path) == []


@pytest.mark.usefixtures("kernel")
@pytest.mark.parametrize("instead", ["file", "dangling link", "link to a file", "file above"])
def test_what_is_no_folder_is_not_replaced(tmp_path: Path, instead: str) -> None:
    target, aside = tmp_path / "m", tmp_path / "aside"
    if instead == "file above":
        target.write_text("mine")
        with pytest.raises(OSError, match=r"exists|Not a directory"):
            replace(target / "below", "new")
        return
    if instead == "file":
        target.write_text("mine")
    else:
        target.symlink_to(aside)
    if instead == "link to a file":
        aside.write_text("mine")
    if instead == "dangling link":  # a place on another disk, not yet there
        replace(target, "new")
        assert held_in(aside) == "new"
        assert target.is_symlink()
        return
    with pytest.raises(FileExistsError, match="is a file"):
        replace(target, "new")
    assert target.read_text() == "mine"


def test_a_folder_without_write_permission_is_refused_and_stays() -> None:
    program = (
        "import os, sys; from pathlib import Path; import files\n"
        "os.setuid(65534) if os.getuid() == 0 else None\n"
        "files.sweep(Path(sys.argv[1]))\n"
        "try: files.write(Path(sys.argv[1], 'a'), b'new')\n"
        "except PermissionError: print('refused')\n"
    )
    with TemporaryDirectory() as place:
        target = Path(place) / "m"
        replace(target, "old")
        for folder in (Path(place), target):
            folder.chmod(0o555)
        done = in_process(program, target).communicate()[0]
        for folder in (Path(place), target):
            folder.chmod(0o755)
        assert done == "refused\n"
        assert held_in(target) == "old"


def test_without_locks_files_are_written_and_nothing_is_swept(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    fcntl = pytest.importorskip("fcntl")
    left = tmp_path / ".m.0123456789ab.tmp"
    left.mkdir()

    def none(*_: object) -> None:
        raise OSError(errno.ENOLCK, "No locks available")

    monkeypatch.setattr(fcntl, "flock", none)
    replace(tmp_path / "m", "new")
    assert held_in(tmp_path / "m") == "new"
    assert hidden(tmp_path) == [left.name]
    monkeypatch.undo()
    replace(tmp_path / "m", "newer")
    assert hidden(tmp_path) == []


def test_what_the_kernel_cannot_exchange_is_moved_in_two_steps(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    replace(tmp_path / "m", "old")
    monkeypatch.setattr(files, "_SWAP", 1 << 20)  # no such flag: EINVAL, as on other disks
    replace(tmp_path / "m", "new")
    assert held_in(tmp_path / "m") == "new"
    assert hidden(tmp_path) == []


def test_a_signal_between_two_steps_leaves_a_whole_folder(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    replace(tmp_path / "m", "old")
    monkeypatch.setattr(files, "_exchange", lambda one, two: False)
    rename = os.rename

    def interrupted(old: Any, new: Any) -> None:
        rename(old, new)
        monkeypatch.setattr(os, "rename", rename)
        signal.raise_signal(signal.SIGINT)

    monkeypatch.setattr(os, "rename", interrupted)
    with pytest.raises(KeyboardInterrupt):
        replace(tmp_path / "m", "new")
    assert held_in(tmp_path / "m") == "old"
    assert hidden(tmp_path) == []

"""A run that is packed is read as one in its folder, and benchmarks/ stays small."""

from __future__ import annotations

import io
import lzma
import os
import re
import shutil
import subprocess
import sys
import tarfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from actsparse_lab import packed
from actsparse_lab.analysis.measures import read_measures
from actsparse_lab.campaigns.compare import compare
from actsparse_lab.campaigns.frontier import frontier
from actsparse_lab.engine.folder import finished_run
from actsparse_lab.packed import PACK, pack, read_file, record_paths
from actsparse_lab.records import RecordError, read_runs

ROOT = Path(__file__).parents[1]
RUNS = ROOT / "benchmarks" / "digits-measures" / "runs"
NAMES = ("paper-seed0", "paper-seed1", "vanilla-seed0")


@pytest.fixture
def out(tmp_path: Path) -> Path:
    """A folder of three runs, with measures and one's weights."""
    for name in NAMES:
        (tmp_path / "runs" / name).mkdir(parents=True)
        for file in ("record.jsonl", "measures.json"):
            (tmp_path / "runs" / name / file).write_bytes(read_file(RUNS / name / file))
    return tmp_path


def contents(out: Path) -> list[Any]:
    return [(run, read_measures(run)) for run in read_runs(out)]


def test_what_is_packed_is_read_as_it_was(out: Path) -> None:
    before = contents(out)
    assert pack(out, NAMES) == out / PACK
    assert [each.name for each in out.iterdir()] == [PACK]
    assert contents(out) == before
    assert [run.path.parent.name for run, _ in before] == list(NAMES)


def test_the_same_runs_are_packed_to_the_same_bytes(out: Path, tmp_path_factory: Any) -> None:
    other = tmp_path_factory.mktemp("other")
    shutil.copytree(out / "runs", other / "runs", copy_function=shutil.copyfile)
    first = pack(out, NAMES).read_bytes()
    for name in reversed(NAMES):
        last = pack(other, [name])
    assert last.read_bytes() == first


def test_what_is_not_finished_and_weights_stay_in_their_folders(out: Path) -> None:
    torn = out / "runs" / "paper-seed1" / "record.jsonl"
    torn.write_bytes(torn.read_bytes().splitlines(keepends=True)[0])
    weights = out / "runs" / "vanilla-seed0" / "weights" / "model.safetensors"
    weights.parent.mkdir()
    weights.write_bytes(b"weights")
    before = contents(out)
    command = [sys.executable, str(ROOT / "benchmarks" / "pack.py"), str(out)]
    done = subprocess.run(command, capture_output=True, text=True, check=True)
    assert f"{out / PACK}: 2 runs" in done.stdout
    assert sorted(each.name for each in (out / "runs").iterdir()) == [*NAMES[1:]]
    assert [each.name for each in (out / "runs" / "vanilla-seed0").iterdir()] == ["weights"]
    assert contents(out) == before


def test_a_folders_record_hides_the_packed_run(out: Path) -> None:
    record = out / "runs" / "paper-seed0" / "record.jsonl"
    again = record.read_bytes().replace(b'"run_id": "', b'"run_id": "again')
    pack(out, NAMES)
    record.parent.mkdir(parents=True)
    record.write_bytes(again)
    assert len(record_paths(out)) == 3
    run = read_runs(out)[0]
    assert run.header["run_id"].startswith("again")
    assert read_measures(run) is None  # those in the pack are of the other record
    pack(out, ["paper-seed0"])
    assert read_runs(out)[0] == run
    assert read_measures(run) is None


def test_what_could_not_be_read_is_not_packed(out: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    pack(out, NAMES[:1])
    before = contents(out)
    monkeypatch.setattr(packed, "LIMIT", 2**18)
    with pytest.raises(RecordError, match="the most that is read"):
        pack(out, NAMES[1:])
    assert contents(out) == before


def test_a_packed_run_is_not_done_again() -> None:
    place = ROOT / "benchmarks" / "frontier" / "digits"
    events = list(compare(frontier("digits", seeds=5), place))
    assert [event.kind for event in events] == ["skipped"] * 50
    assert not (place / "runs").exists()


def test_a_packed_run_of_another_config_is_refused() -> None:
    (config,) = frontier("digits", arms=["vanilla"], seeds=1, steps=9)
    with pytest.raises(ValueError, match=rf"steps=\d+ \(now 9\).*, or take it out of {PACK}"):
        finished_run(config, ROOT / "benchmarks" / "frontier" / "digits")


def _tar(*members: tuple[tarfile.TarInfo, bytes]) -> bytes:
    buffer = io.BytesIO()
    with tarfile.open(fileobj=buffer, mode="w", format=tarfile.USTAR_FORMAT) as tar:
        for info, content in members:
            info.size = len(content)
            tar.addfile(info, io.BytesIO(content))
    return buffer.getvalue()


def _named(name: str, **fields: Any) -> tuple[tarfile.TarInfo, bytes]:
    info = tarfile.TarInfo(name)
    for key, value in fields.items():
        setattr(info, key, value)
    return info, b"" if info.type == tarfile.SYMTYPE else b"{}"


GOOD = "paper-seed0/record.jsonl"
HOSTILE: dict[str, Callable[[], bytes]] = {
    "no xz": lambda: b"nothing",
    "cut off": lambda: lzma.compress(_tar(_named(GOOD)))[:-9],
    "more behind": lambda: lzma.compress(_tar(_named(GOOD))) + b"x",
    "a bomb": lambda: lzma.compress(b"0" * (packed.LIMIT + 1), preset=0),
    "empty blocks": lambda: lzma.compress(b"\0" * packed.LIMIT, preset=0),
    "above": lambda: lzma.compress(_tar(_named("../record.jsonl"))),
    "absolute": lambda: lzma.compress(_tar(_named("/etc/record.jsonl"))),
    "deeper": lambda: lzma.compress(_tar(_named("a/b/record.jsonl"))),
    "another file": lambda: lzma.compress(_tar(_named("paper-seed0/weights.pt"))),
    "a link": lambda: lzma.compress(
        _tar(_named(GOOD, type=tarfile.SYMTYPE, linkname="/etc/passwd"))
    ),
    "twice": lambda: lzma.compress(_tar(_named(GOOD), _named(GOOD))),
    "a time": lambda: lzma.compress(_tar(_named(GOOD, mtime=1))),
    "cut inside": lambda: lzma.compress(_tar(_named(GOOD))[:700]),
    "no tar": lambda: lzma.compress(b"x" * 2048),
}


@pytest.mark.parametrize("name", HOSTILE)
def test_a_pack_of_a_stranger_is_refused_by_name(tmp_path: Path, name: str) -> None:
    (tmp_path / PACK).write_bytes(HOSTILE[name]())
    with pytest.raises(RecordError, match=re.escape(str(tmp_path / PACK))):
        read_runs(tmp_path)
    assert [each.name for each in tmp_path.iterdir()] == [PACK]


def test_a_pack_that_is_a_fifo_is_refused(tmp_path: Path) -> None:
    os.mkfifo(tmp_path / PACK)
    with pytest.raises(RecordError, match="is a FIFO"):
        read_runs(tmp_path)


def tracked() -> list[Path]:
    """The files of benchmarks/ that are in the repository."""
    git = ["git", "-C", str(ROOT), "ls-files", "-z", "--", "benchmarks"]
    done = subprocess.run(git, capture_output=True, text=True)
    if done.returncode:
        pytest.skip("not a checkout of git")
    return [path for name in done.stdout.split("\0") if name and (path := ROOT / name).exists()]


def test_benchmarks_take_six_megabytes_at_most() -> None:
    assert sum(path.stat().st_size for path in tracked()) <= 6e6
    assert [path for path in tracked() if path.name == "record.jsonl"] == []


def test_no_picture_is_kept_that_no_page_shows() -> None:
    shown = set()
    for page in (ROOT / "README.md", *(ROOT / "docs").glob("*.md")):
        for place in re.findall(r"!\[[^\]]*\]\(([^)]+\.png)\)", page.read_text(encoding="utf-8")):
            shown.add((page.parent / place).resolve())
    assert {path for path in tracked() if path.suffix == ".png"} == shown

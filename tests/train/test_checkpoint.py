"""A checkpoint counts when it is whole, and at no other time."""

from __future__ import annotations

import errno
import json
import os
import shutil
from pathlib import Path
from typing import Any

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from actsparse_lab.engine import checkpoint
from actsparse_lab.engine.checkpoint import (
    MANIFEST,
    checkpoints,
    drop_after,
    facts,
    flaw,
    newest_whole,
    prune,
    seal,
)
from actsparse_lab.records import RecordError

FILES = {
    "model.safetensors": bytes(range(40)),
    "optimizer.pt": b"moments",
    "rng_state_0.pth": b"",
    "adapter/nested/weights.bin": b"\0" * 8,
}
FACTS: dict[str, Any] = {"step": 50, "processes": 2, "lr": 5e-3, "named": {"arm": "paper"}}
tmp_path_is_reused = settings(
    max_examples=100, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture]
)


def write(folder: Path) -> Path:
    """The files of a checkpoint, as they are before it is sealed."""
    shutil.rmtree(folder, ignore_errors=True)
    for name, data in FILES.items():
        path = folder / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(data)
    return folder


def sealed(folder: Path, **more: Any) -> Path:
    seal(write(folder), **{**FACTS, **more})
    return folder


def names(run: Path) -> list[str]:
    return [path.name for path in checkpoints(run)]


def refuse(*_: object, **__: object) -> None:
    raise OSError(errno.ENOSPC, "No space left on device")


# What a checkpoint is


def test_a_sealed_checkpoint_is_whole_and_says_its_facts(tmp_path: Path) -> None:
    folder = sealed(tmp_path / "checkpoint-50")
    assert flaw(folder) is None
    assert facts(folder) == FACTS
    manifest = json.loads((folder / MANIFEST).read_text())
    assert manifest["format"] == 1
    assert {name: each["size"] for name, each in manifest["files"].items()} == {
        name: len(data) for name, data in FILES.items()
    }


def test_until_it_is_sealed_it_does_not_count(tmp_path: Path) -> None:
    folder = write(tmp_path / "checkpoint-50")
    assert flaw(folder) == "manifest.json is missing: its writing was cut off"
    with pytest.raises(RecordError, match=r"checkpoint-50: manifest\.json is missing"):
        facts(folder)


def test_files_that_come_later_are_no_flaw(tmp_path: Path) -> None:
    folder = sealed(tmp_path / "checkpoint-50")
    (folder / ".manifest.json.7.tmp").write_bytes(b"a kill left this")
    assert flaw(folder) is None


def test_a_checkpoint_written_again_is_sealed_again(tmp_path: Path) -> None:
    folder = sealed(tmp_path / "checkpoint-50")
    (folder / "optimizer.pt").write_bytes(b"others!")
    assert flaw(folder) is not None
    seal(folder, step=50)
    assert flaw(folder) is None
    assert facts(folder) == {"step": 50}


@pytest.mark.parametrize("name", [*FILES, MANIFEST])
def test_a_file_cut_at_any_byte_or_gone_is_named(tmp_path: Path, name: str) -> None:
    path = sealed(tmp_path / "checkpoint-50") / name
    data = path.read_bytes()
    for length in range(len(data)):
        path.write_bytes(data[:length])
        wrong = flaw(tmp_path / "checkpoint-50")
        assert wrong is not None
        assert wrong.startswith(name)
        if name != MANIFEST:
            assert wrong == f"{name} has {length} bytes, not the {len(data)} that were written"
    path.unlink()
    gone = flaw(tmp_path / "checkpoint-50")
    assert gone is not None
    assert gone.startswith(f"{name} is missing")


@tmp_path_is_reused
@given(data=st.data())
def test_no_flipped_bit_goes_unseen(tmp_path: Path, data: st.DataObject) -> None:
    folder = sealed(tmp_path / "checkpoint-50")
    filled = [name for name in [*FILES, MANIFEST] if (folder / name).stat().st_size]
    name = data.draw(st.sampled_from(filled))
    content = bytearray((folder / name).read_bytes())
    bit = data.draw(st.integers(0, 8 * len(content) - 1))
    content[bit // 8] ^= 1 << bit % 8
    (folder / name).write_bytes(content)
    wrong = flaw(folder)
    assert wrong is not None
    if name != MANIFEST:
        assert wrong == f"{name} is not what was written: its SHA-256 is another"


@tmp_path_is_reused
@given(junk=st.binary(max_size=60) | st.sampled_from([b"[" * 100_000, b'{"format": 1}', b"1e999"]))
def test_no_manifest_crashes_the_reader(tmp_path: Path, junk: bytes) -> None:
    folder = write(tmp_path / "checkpoint-50")
    (folder / MANIFEST).write_bytes(junk)
    wrong = flaw(folder)
    assert wrong is not None
    assert wrong.startswith(MANIFEST)


@pytest.mark.parametrize(
    ("manifest", "message"),
    [
        ({"format": 2, "files": {}}, "manifest.json has format 2; this actsparse reads 1"),
        ({"weight_map": {}}, "manifest.json has format None; this actsparse reads 1"),
        ([1], "manifest.json has format None; this actsparse reads 1"),
    ],
    ids=["newer", "foreign", "a list"],
)
def test_a_manifest_of_another_format_is_refused(
    tmp_path: Path, manifest: Any, message: str
) -> None:
    folder = write(tmp_path / "checkpoint-50")
    (folder / MANIFEST).write_text(json.dumps(manifest))
    assert flaw(folder) == message


def test_a_file_that_cannot_be_read_is_a_flaw(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = sealed(tmp_path / "checkpoint-50")

    def broken(*_: object) -> None:
        raise OSError(errno.EIO, "Input/output error")

    monkeypatch.setattr(checkpoint.hashlib, "file_digest", broken)
    assert flaw(folder) == "adapter/nested/weights.bin cannot be read: Input/output error"


def test_links_are_neither_followed_nor_vouched_for(tmp_path: Path) -> None:
    outside = tmp_path / "outside"
    outside.mkdir()
    (outside / "secret").write_bytes(b"x")
    folder = write(tmp_path / "checkpoint-50")
    (folder / "link").symlink_to(outside / "secret")
    (folder / "away").symlink_to(outside)
    (folder / "loop").symlink_to(folder)
    seal(folder)
    assert set(json.loads((folder / MANIFEST).read_text())["files"]) == set(FILES)
    (outside / "secret").write_bytes(b"y")
    assert flaw(folder) is None
    (folder / "optimizer.pt").rename(outside / "optimizer.pt")
    (folder / "optimizer.pt").symlink_to(outside / "optimizer.pt")
    assert flaw(folder) == "optimizer.pt is missing"
    (tmp_path / "checkpoint-60").symlink_to(outside)
    drop_after(tmp_path, 0)
    assert sorted(path.name for path in outside.iterdir()) == ["optimizer.pt", "secret"]
    assert (tmp_path / "checkpoint-60").is_symlink()
    assert not folder.exists()


def test_a_manifest_cannot_name_files_outside(tmp_path: Path) -> None:
    folder = sealed(tmp_path / "run" / "checkpoint-50")
    (tmp_path / "secret").write_bytes(b"x")
    manifest = json.loads((folder / MANIFEST).read_text())
    del manifest["sha256"]
    outside = str(tmp_path / "secret")
    for name in ("../../secret", outside):
        manifest["files"] = {name: checkpoint._described(tmp_path / "secret")}
        vouched = {**manifest, "sha256": checkpoint._sha256_of(manifest)}
        (folder / MANIFEST).write_text(json.dumps(vouched))
        assert flaw(folder) == f"{name} is missing"


# When the power or the disk fails


def test_all_files_are_on_the_disk_before_the_manifest(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = write(tmp_path / "checkpoint-50")
    done: list[Path] = []
    fsync, replace = os.fsync, os.replace

    def noted_fsync(descriptor: int) -> None:
        done.append(Path(os.readlink(f"/proc/self/fd/{descriptor}")))
        fsync(descriptor)

    def noted_replace(old: Path, new: Path) -> None:
        done.append(Path(new))
        replace(old, new)

    monkeypatch.setattr(os, "fsync", noted_fsync)
    monkeypatch.setattr(os, "replace", noted_replace)
    seal(folder, step=50)
    at = done.index(folder / MANIFEST)
    needed = {folder / name for name in FILES} | {folder / "adapter" / "nested", folder / "adapter"}
    assert needed | {folder} <= set(done[:at])
    assert set(done[at + 1 :]) == {folder, tmp_path}  # the rename, and the folder itself


def test_a_full_disk_is_named_and_leaves_no_manifest(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = write(tmp_path / "checkpoint-50")
    monkeypatch.setattr(os, "fsync", refuse)
    with pytest.raises(RecordError, match=r"cannot write .*checkpoint-50: No space left on device"):
        seal(folder, step=50)
    assert not (folder / MANIFEST).exists()


def test_what_is_half_deleted_does_not_count(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for step in (50, 100):
        sealed(tmp_path / f"checkpoint-{step}")
    monkeypatch.setattr(shutil, "rmtree", refuse)
    with pytest.raises(RecordError, match=r"checkpoint-50: No space left"):
        prune(tmp_path, keep=1)
    assert all((tmp_path / "checkpoint-50" / name).exists() for name in FILES)
    assert flaw(tmp_path / "checkpoint-50") == "manifest.json is missing: its writing was cut off"
    monkeypatch.undo()
    prune(tmp_path, keep=1)
    assert names(tmp_path) == ["checkpoint-100"]


# Which of a run's checkpoints


def test_checkpoints_go_by_step_as_a_number(tmp_path: Path) -> None:
    for name in ("checkpoint-100", "checkpoint-9", "checkpoint-x", "weights", "checkpoint-7.old"):
        (tmp_path / name).mkdir()
    (tmp_path / "checkpoint-8").write_text("a file")
    assert names(tmp_path) == ["checkpoint-9", "checkpoint-100"]
    assert checkpoints(tmp_path / "elsewhere") == []


def test_the_newest_whole_one_is_used_and_each_refusal_told(tmp_path: Path) -> None:
    for step in (50, 100, 150):
        sealed(tmp_path / f"checkpoint-{step}")
    told: list[str] = []
    assert newest_whole(tmp_path, told.append) == tmp_path / "checkpoint-150"
    assert told == []

    (tmp_path / "checkpoint-150" / MANIFEST).unlink()
    (tmp_path / "checkpoint-100" / "optimizer.pt").write_bytes(b"torn")
    assert newest_whole(tmp_path, told.append) == tmp_path / "checkpoint-50"
    assert told == [
        f"checkpoint {tmp_path / 'checkpoint-150'} is refused: manifest.json is missing: its "
        f"writing was cut off; going back to checkpoint-100",
        f"checkpoint {tmp_path / 'checkpoint-100'} is refused: optimizer.pt has 4 bytes, not the "
        f"7 that were written; going back to checkpoint-50",
    ]

    (tmp_path / "checkpoint-50" / "optimizer.pt").unlink()
    told.clear()
    assert newest_whole(tmp_path, told.append) is None
    assert len(told) == 3
    assert told[-1].endswith("optimizer.pt is missing; the run starts anew")


def test_a_refusal_is_a_warning_unless_told_otherwise(tmp_path: Path) -> None:
    write(tmp_path / "checkpoint-50")
    with pytest.warns(UserWarning, match="is refused: .*; the run starts anew"):
        assert newest_whole(tmp_path) is None


@tmp_path_is_reused
@given(
    whole=st.dictionaries(st.integers(0, 200), st.booleans(), max_size=7),
    keep=st.integers(1, 3),
)
def test_prune_keeps_the_newest_whole_and_what_is_being_written(
    tmp_path: Path, whole: dict[int, bool], keep: int
) -> None:
    run = tmp_path / "run"
    shutil.rmtree(run, ignore_errors=True)
    for step, counts in whole.items():
        (run / f"checkpoint-{step}").mkdir(parents=True)
        if counts:
            seal(run / f"checkpoint-{step}")
    prune(run, keep)
    kept = sorted(step for step, counts in whole.items() if counts)[-keep:]
    newer = [step for step in whole if not kept or step > kept[-1]]
    assert names(run) == [f"checkpoint-{step}" for step in sorted({*kept, *newer})]


def test_prune_does_not_read_the_files_again(tmp_path: Path) -> None:
    for step in (50, 100, 150):
        sealed(tmp_path / f"checkpoint-{step}")
    (tmp_path / "checkpoint-150" / "optimizer.pt").write_bytes(b"torn")
    prune(tmp_path, keep=2)
    assert names(tmp_path) == ["checkpoint-100", "checkpoint-150"]


def test_prune_to_nothing_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="keep=0 must be at least 1"):
        prune(tmp_path, keep=0)


def test_later_checkpoints_are_dropped_whole_or_not(tmp_path: Path) -> None:
    sealed(tmp_path / "checkpoint-50")
    sealed(tmp_path / "checkpoint-100")
    write(tmp_path / "checkpoint-1000")
    drop_after(tmp_path, 50)
    assert names(tmp_path) == ["checkpoint-50"]
    assert flaw(tmp_path / "checkpoint-50") is None

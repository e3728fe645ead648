"""A record comes back as it was written, whatever happens half-way."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from actsparse import environment
from actsparse_lab import records
from actsparse_lab.records import (
    RecordError,
    RecordWriter,
    read_run,
    read_runs,
    run_path,
    write_whole,
)

HEADER: dict[str, Any] = {
    "task": "digits",
    "arm": "paper",
    "seed": 0,
    "config": {"lr": 5e-3},
    "versions": {"python": "3.11"},
    "hardware": {"cpu": "some"},
    "git": None,
}
DENSITIES = {
    "density": 0.25,
    "derivative_density": 0.25,
    "dead": 1,
    "units": 8,
    "living_density": None,
}
MEASURES: dict[str, Any] = {**DENSITIES, "blocks": [{"block": "0", **DENSITIES}]}
TRAIN: dict[str, Any] = {
    "step": 100,
    "loss": 1.5,
    "lr": 5e-3,
    "time": {"seconds": 2.0},
    "penalty": None,
    "measures": MEASURES,
}
MEASURED: dict[str, Any] = {"step": 100, "how": {"samples": 8}, "measures": None, "curvature": {}}
EVAL: dict[str, Any] = {
    "split": "validation",
    "step": 100,
    "loss": 1.4,
    "quality": 0.9,
    "measures": None,
}
RESULT: dict[str, Any] = {
    "split": "test",
    "step": 200,
    "loss": 1.0,
    "quality": 0.95,
    "quality_name": "accuracy",
    "higher_is_better": True,
    "inference": MEASURES,
    "training": MEASURES,
    "skippable": {"forward": 0.4, "backward": 0.7},
    "baselines": {},
    "time": {"seconds": 9.0, "peak_memory_mib": 512.0},
}

finite = st.floats(allow_nan=False, allow_infinity=False)
texts = st.text(min_size=1)
anything = st.recursive(
    st.none() | st.booleans() | st.integers() | finite | st.text(),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(), inner, max_size=3),
    max_leaves=6,
)
tmp_path_is_reused = settings(
    max_examples=50, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture]
)


def finished_run(path: Path) -> Path:
    with RecordWriter(path, HEADER) as record:
        record.write("train", **TRAIN)
        record.write("eval", **EVAL)
        record.write("measured", **MEASURED)
        record.write("result", **RESULT)
    return path


@tmp_path_is_reused
@given(
    config=st.dictionaries(st.text(), anything, max_size=4),
    losses=st.lists(finite, max_size=5),
    reason=texts,
)
def test_what_is_written_is_read(
    tmp_path: Path, config: dict[str, Any], losses: list[float], reason: str
) -> None:
    path = tmp_path / "record.jsonl"
    with RecordWriter(path, {**HEADER, "config": config}) as record:
        for step, loss in enumerate(losses):
            record.write("train", **{**TRAIN, "step": step, "loss": loss})
        record.write("failed", step=7, reason=reason)
    run = read_run(path)
    assert run.header["config"] == config
    assert [entry["loss"] for entry in run.train] == losses
    assert run.failed == {"kind": "failed", "step": 7, "reason": reason}
    assert not run.finished
    assert not run.torn


def test_a_record_cut_at_any_byte_reads_or_says_why(tmp_path: Path) -> None:
    whole = finished_run(tmp_path / "whole.jsonl").read_bytes()
    ends = [index + 1 for index, byte in enumerate(whole) if byte == ord("\n")]
    cut_path = tmp_path / "cut.jsonl"
    for cut in range(len(whole) + 1):
        cut_path.write_bytes(whole[:cut])
        if cut < ends[0]:
            with pytest.raises(RecordError, match=r"cut\.jsonl:1: no whole first line"):
                read_run(cut_path)
            continue
        run = read_run(cut_path)
        lines = sum(end <= cut for end in ends)
        found = len(run.train) + len(run.evals) + len(run.measured) + run.finished
        assert 1 + found == lines
        assert run.torn == (cut not in ends)
        assert run.finished == (cut == len(whole))


@tmp_path_is_reused
@given(junk=st.binary(max_size=200))
def test_no_bytes_crash_the_reader(tmp_path: Path, junk: bytes) -> None:
    path = tmp_path / "junk.jsonl"
    path.write_bytes(junk)
    with pytest.raises(RecordError, match=r"junk\.jsonl:1"):
        read_run(path)


@pytest.mark.parametrize(
    "line",
    [
        b"half a li",
        b"",
        b"\xff\xfe",
        b"[" * 100_000,
        b'{"kind": "eval", "loss": NaN}',
        b'{"kind": "metric"}',
        b'{"kind": "eval", "step": 3}',
        b'{"kind": "failed", "step": -1, "reason": "x"}',
    ],
)
def test_garbage_in_the_middle_is_named_by_line(tmp_path: Path, line: bytes) -> None:
    path = finished_run(tmp_path / "record.jsonl")
    first, *rest = path.read_bytes().splitlines()
    path.write_bytes(b"\n".join([first, line, *rest, b""]))
    with pytest.raises(RecordError, match=r"record\.jsonl:2: "):
        read_run(path)


def test_a_second_result_is_refused(tmp_path: Path) -> None:
    path = finished_run(tmp_path / "record.jsonl")
    last = path.read_bytes().splitlines()[-1]
    path.write_bytes(path.read_bytes() + last + b"\n")
    with pytest.raises(RecordError, match=r":6: a second result line"):
        read_run(path)


@pytest.mark.parametrize(
    ("schema", "message"),
    [
        (3, r"written by a newer actsparse \(schema 3\); this one reads 2: upgrade it"),
        (1, r"written by an older actsparse \(schema 1\); this one reads 2$"),
        ("2", r"run\.schema must be a whole number, 0 or more; got '2'"),
    ],
)
def test_a_record_of_another_schema_is_refused(tmp_path: Path, schema: Any, message: str) -> None:
    path = tmp_path / "record.jsonl"
    path.write_text(json.dumps({"kind": "run", "schema": schema}) + "\n")
    with pytest.raises(RecordError, match=rf":1: {message}"):
        read_run(path)
    with pytest.raises(RecordError, match=rf":1: {message}"):
        RecordWriter.resume(path, 0)


def test_the_header_says_which_run_and_when(tmp_path: Path) -> None:
    first, second = (tmp_path / "first.jsonl", tmp_path / "second.jsonl")
    RecordWriter(first, HEADER).close()
    RecordWriter(second, {**HEADER, "processes": 2}).close()
    one, two = read_run(first).header, read_run(second).header
    assert (one["schema"], one["processes"], two["processes"]) == (2, 1, 2)
    assert one["run_id"] != two["run_id"]
    assert "T" in one["time"]["started"]
    apart = {"run_id", "time", "processes"}
    assert {key: one[key] for key in one if key not in apart} == {
        "kind": "run",
        "schema": 2,
    } | HEADER


@pytest.mark.parametrize(
    ("kind", "fields", "message"),
    [
        ("metric", {}, "unknown kind 'metric'; one of run, train, eval, result, measured, failed"),
        ("run", HEADER, "the run line is the header"),
        ("failed", {"step": 3}, "failed lacks 'reason'"),
        ("train", {**TRAIN, "loss": float("nan")}, "train.loss must be a finite number; got nan"),
        ("train", {**TRAIN, "lr": float("inf")}, "train.lr must be a finite number; got inf"),
        (
            "train",
            {**TRAIN, "step": True},
            "train.step must be a whole number, 0 or more; got True",
        ),
        ("eval", {**EVAL, "quality": None}, "eval.quality must be a finite number; got None"),
        (
            "eval",
            {**EVAL, "measures": {**MEASURES, "density": 1.5}},
            "eval.measures.density must be a share from 0 to 1; got 1.5",
        ),
        (
            "eval",
            {**EVAL, "measures": {**MEASURES, "blocks": [{"block": "0"}]}},
            r"eval.measures.blocks\[0\] lacks 'density'",
        ),
        ("train", {**TRAIN, "time": {}}, "train.time lacks 'seconds'; it needs seconds"),
        ("result", {**RESULT, "time": 9.0}, "result.time must be an object of seconds; got 9.0"),
        (
            "result",
            {**RESULT, "before": {"loss": 2.0, "inference": None}},
            "result.before lacks 'quality'; it needs loss, quality, inference",
        ),
        (
            "result",
            {**RESULT, "before": {"loss": 2.0, "quality": 0.5, "inference": {"density": 2}}},
            "result.before.inference lacks",
        ),
        ("result", {**RESULT, "before": None}, "result.before must be an object of loss, quality"),
        ("result", {**RESULT, "baselines": {"bigram": "x"}}, "result.baselines must be an object"),
        ("failed", {"step": 3, "reason": "x", "grads": float("nan")}, "does not fit JSON"),
        ("failed", {"step": 3, "reason": "x", "where": Path("x")}, "does not fit JSON"),
    ],
)
def test_a_wrong_line_is_refused_and_not_written(
    tmp_path: Path, kind: str, fields: dict[str, Any], message: str
) -> None:
    path = tmp_path / "record.jsonl"
    with RecordWriter(path, HEADER) as record:
        before = path.read_bytes()
        with pytest.raises(RecordError, match=message):
            record.write(kind, **fields)
        assert path.read_bytes() == before


def test_where_finetuning_began_is_kept(tmp_path: Path) -> None:
    before = {"loss": 2.0, "quality": 0.5, "inference": MEASURES}
    path = tmp_path / "record.jsonl"
    with RecordWriter(path, HEADER) as record:
        record.write("result", **RESULT, before=before)
    result = read_run(path).result
    assert result is not None
    assert result["before"] == before
    other = read_run(finished_run(tmp_path / "other.jsonl")).result
    assert other is not None
    assert "before" not in other


def test_starting_anew_replaces_the_old_record(tmp_path: Path) -> None:
    path = finished_run(tmp_path / "record.jsonl")
    RecordWriter(path, {**HEADER, "seed": 5}).close()
    run = read_run(path)
    assert (run.seed, run.finished, run.train) == (5, False, [])
    assert [each.name for each in tmp_path.iterdir()] == ["record.jsonl"]


def test_a_closed_record_takes_no_more(tmp_path: Path) -> None:
    record = RecordWriter(tmp_path / "record.jsonl", HEADER)
    record.close()
    with pytest.raises(RecordError, match="is closed"):
        record.write("failed", step=1, reason="x")


def test_an_unwritable_place_is_named(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("in the way")
    with pytest.raises(RecordError, match=r"cannot write .*file.record\.jsonl: "):
        RecordWriter(tmp_path / "file" / "record.jsonl", HEADER)


def test_a_full_disk_is_named_and_leaves_no_half_line(tmp_path: Path) -> None:
    # A limit on the size of files stands in for the full disk: the kernel writes what fits.
    path = tmp_path / "record.jsonl"
    program = f"""
import resource
from pathlib import Path
from actsparse_lab.records import RecordError, RecordWriter
path = Path({str(path)!r})
with RecordWriter(path, {HEADER!r}) as record:
    record.write("failed", step=1, reason="fits")
    size = path.stat().st_size
    resource.setrlimit(resource.RLIMIT_FSIZE, (size + 10, resource.RLIM_INFINITY))
    try:
        record.write("train", **{TRAIN!r})
    except RecordError as error:
        print(error)
    assert path.stat().st_size == size, "half a line is left"
"""
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert "cannot write" in done.stdout
    assert "record.jsonl" in done.stdout
    run = read_run(path)
    assert run.failed is not None
    assert not run.torn


def test_write_whole_keeps_the_old_file_when_it_fails(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = tmp_path / "page.html"
    write_whole(path, b"old")

    def full(descriptor: int) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(records.os, "fsync", full)
    with pytest.raises(RecordError, match="No space left on device"):
        write_whole(path, b"new")
    assert path.read_bytes() == b"old"
    assert [each.name for each in tmp_path.iterdir()] == ["page.html"]


def test_runs_are_sorted_by_arm_then_seed_as_a_number(tmp_path: Path) -> None:
    for arm, seed in (("vanilla", 0), ("paper", 10), ("paper", 2)):
        RecordWriter(run_path(tmp_path, arm, seed), {**HEADER, "arm": arm, "seed": seed}).close()
    found = [(run.arm, run.seed) for run in read_runs(tmp_path)]
    assert found == [("paper", 2), ("paper", 10), ("vanilla", 0)]
    assert read_runs(tmp_path / "elsewhere") == []


@pytest.mark.parametrize("arm", ["", "a/b", "..\\b"])
def test_an_arm_names_a_folder(arm: str) -> None:
    with pytest.raises(RecordError, match="without slashes"):
        run_path("out", arm, 0)


def test_environment_fits_a_header_and_names_what_it_runs_on(tmp_path: Path) -> None:
    found = records.environment(threads=2, gpu="H200")
    assert found["hardware"]["threads"] == 2
    assert found["hardware"]["gpu"] == "H200"
    assert found["hardware"]["cores"] >= 1
    assert found["hardware"]["memory_gib"] > 0.1
    version = ".".join(map(str, sys.version_info[:3]))
    assert found["versions"]["python"] == version
    assert "torch" in found["versions"]
    with RecordWriter(tmp_path / "record.jsonl", {**HEADER, **found}):
        pass
    assert read_run(tmp_path / "record.jsonl").header["hardware"] == found["hardware"]


def git(folder: Path, *words: str) -> str:
    who = ["-c", "user.name=t", "-c", "user.email=t@example.org", "-c", "core.hooksPath="]
    done = subprocess.run(
        ["git", "-C", str(folder), *who, *words], capture_output=True, text=True, check=True
    )
    return done.stdout.strip()


def test_git_state_is_of_the_checkout_that_tracks_the_file(tmp_path: Path) -> None:
    source = tmp_path / "module.py"
    source.write_text("x = 1\n")
    assert environment._git(source) is None  # no checkout
    git(tmp_path, "init", "-q")
    assert environment._git(source) is None  # a checkout, not of this file
    git(tmp_path, "add", "module.py")
    git(tmp_path, "commit", "-q", "-m", "one")
    commit = git(tmp_path, "rev-parse", "HEAD")
    assert environment._git(source) == {"commit": commit, "dirty": False}
    source.write_text("x = 2\n")
    assert environment._git(source) == {"commit": commit, "dirty": True}


def test_records_need_only_the_standard_library() -> None:
    program = (
        "import sys, actsparse_lab.records\n"
        "print(sorted({'torch', 'numpy', 'scipy', 'matplotlib'} & set(sys.modules)))"
    )
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True)
    assert done.stdout.strip() == "[]", done.stderr

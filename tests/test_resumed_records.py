"""A record that a resumed run goes on writing is the one an undisturbed run writes."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from actsparse_lab.records import RecordError, RecordWriter, environment, read_run

HEADER = {"task": "digits", "arm": "paper", "seed": 0, "config": {}, **environment()}
EVAL: dict[str, Any] = {"split": "validation", "loss": 1.0, "quality": 0.9, "measures": None}
BODY: dict[str, dict[str, Any]] = {
    "train": {"loss": 1.5, "lr": 5e-3, "time": {"seconds": 2}, "penalty": None, "measures": None},
    "eval": EVAL,
    "measured": {"how": {"samples": 8}, "measures": None, "curvature": {}},
}
RESULT: dict[str, Any] = {
    **EVAL,
    "split": "test",
    "step": 250,
    "quality_name": "accuracy",
    "higher_is_better": True,
    "inference": None,
    "training": None,
    "skippable": None,
    "baselines": {},
    "time": {"seconds": 9.0},
}
FAILED = {"step": 250, "reason": "the loss became NaN"}

steps = st.integers(0, 5).map(lambda at: 50 * at)
bodies = st.lists(st.tuples(steps, st.sampled_from(list(BODY))), max_size=8).map(sorted)
endings = st.sampled_from([[], [("failed", FAILED)], [("result", RESULT)]])


@settings(deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(body=bodies, ending=endings, step=steps, data=st.data())
def test_a_resumed_record_is_the_undisturbed_one(
    tmp_path: Path, body: list[tuple[int, str]], ending: list[Any], step: int, data: st.DataObject
) -> None:
    """Cut at any byte after the header, as a kill may do, and resumed after any step."""
    lines = [(kind, {"step": at, **BODY[kind]}) for at, kind in body] + ending
    path = tmp_path / "record.jsonl"
    with RecordWriter(path, HEADER) as record:
        for kind, fields in lines:
            record.write(kind, **fields)
    whole = path.read_bytes()
    ends = [index + 1 for index, byte in enumerate(whole) if byte == ord("\n")]
    cut = data.draw(st.sampled_from(ends) | st.integers(ends[0], len(whole)))
    path.write_bytes(whole[:cut])
    done = sum(at <= step for at, _ in body)
    with RecordWriter.resume(path, step) as record:
        there = min(done, whole[:cut].count(b"\n") - 1)
        assert path.read_bytes() == whole[: ends[there]]
        if there == done:  # killed after that step: write what comes next
            for kind, fields in lines[done:]:
                record.write(kind, **fields)
            assert path.read_bytes() == whole
    assert [each.name for each in tmp_path.iterdir()] == ["record.jsonl"]


@pytest.mark.parametrize(("kind", "fields"), [("failed", FAILED), ("result", RESULT)])
def test_an_ended_run_has_no_ending_once_resumed(
    tmp_path: Path, kind: str, fields: dict[str, Any]
) -> None:
    path = tmp_path / "record.jsonl"
    with RecordWriter(path, HEADER) as record:
        record.write("eval", step=250, **EVAL)
        record.write(kind, **fields)
    RecordWriter.resume(path, 250).close()
    run = read_run(path)
    assert [entry["step"] for entry in run.evals] == [250]
    assert run.failed is None
    assert run.result is None


def test_a_broken_record_is_not_resumed_and_stays_as_it_is(tmp_path: Path) -> None:
    path = tmp_path / "record.jsonl"
    with RecordWriter(path, HEADER) as record:
        record.write("failed", **FAILED)
    broken = path.read_bytes().replace(b"\n", b"\nhalf a li\n", 1)
    path.write_bytes(broken)
    with pytest.raises(RecordError, match=r"record\.jsonl:2: not whole JSON"):
        RecordWriter.resume(path, 100)
    assert path.read_bytes() == broken
    with pytest.raises(RecordError, match=r"cannot read .*gone\.jsonl: No such file"):
        RecordWriter.resume(tmp_path / "gone.jsonl", 100)

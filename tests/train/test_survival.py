"""Runs that are killed: the same command goes on, and ends as if nothing had happened."""

from __future__ import annotations

import json
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest

from actsparse_lab.engine.checkpoint import checkpoints
from actsparse_lab.engine.interrupt import Interrupted
from actsparse_lab.engine.run import run
from actsparse_lab.engine.trainer import RunTrainer
from actsparse_lab.records import RecordError, Run, read_run, run_path
from actsparse_lab.tasks import run_config

TINY: dict[str, Any] = {
    "steps": 12, "batch_size": 8, "log_every": 5, "eval_every": 6, "save_every": 4,
    "validate_on": 16,
}  # fmt: skip


def lines_of(record: Path) -> list[dict[str, Any]]:
    entries = [json.loads(line) for line in record.read_text().splitlines()]
    return [{k: v for k, v in each.items() if k not in ("time", "run_id")} for each in entries]


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory) -> Run:
    """A vanilla run that nobody disturbed. Read it; do not write into its folder."""
    return run(run_config("digits", "vanilla", 0, **TINY), tmp_path_factory.mktemp("whole"))


def stopped(config: Any, out: Path, step: int) -> Interrupted:
    def tell(done: int) -> None:
        if done == step:
            signal.raise_signal(signal.SIGTERM)

    with pytest.raises(Interrupted) as caught:
        run(config, out, on_step=tell)
    return caught.value


def test_a_signal_leaves_a_checkpoint_of_that_very_step(tmp_path: Path) -> None:
    config = run_config("digits", "paper", 0, measures=("flatness",), **TINY)
    whole = run(config, tmp_path / "whole")
    error = stopped(config, tmp_path / "stopped", 7)
    assert error.step == 7
    assert error.checkpoint.is_dir()
    assert str(error.checkpoint) in str(error)
    done = run(config, tmp_path / "stopped")
    assert lines_of(done.path) == lines_of(whole.path)
    assert done.result is not None
    assert done.result["time"]["resumed_at"] == 7
    kept = [each.name for each in checkpoints(done.path.parent)]
    assert kept == ["checkpoint-8", "checkpoint-12"]


@pytest.mark.parametrize(
    ("arm", "settings"),
    [
        ("paper-finetune", {"model": {"hidden_act": "gelu"}}),
        ("hoyer", {"precision": "bf16"}),
        ("vanilla", {"accelerate": "sparse"}),
    ],
    ids=["mixing", "autocast", "accelerated"],
)
def test_a_run_stopped_between_its_last_checkpoint_and_its_result(
    arm: str, settings: dict[str, Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    config = run_config("digits", arm, 0, **TINY, **settings)
    whole = run(config, tmp_path / "whole")
    own = RunTrainer.evaluate

    def cut(self: RunTrainer, *args: Any, **options: Any) -> Any:
        if options.get("metric_key_prefix") == "test":
            raise KeyboardInterrupt
        return own(self, *args, **options)

    monkeypatch.setattr(RunTrainer, "evaluate", cut)
    with pytest.raises(KeyboardInterrupt):
        run(config, tmp_path / "cut")
    monkeypatch.undo()
    done = run(config, tmp_path / "cut")
    assert done.result is not None
    assert done.result["time"]["resumed_at"] == TINY["steps"]
    assert lines_of(done.path) == lines_of(whole.path)
    for file in ("model.safetensors", "actsparse.json"):
        one, two = (each.path.parent / "weights" / file for each in (whole, done))
        assert one.read_bytes() == two.read_bytes()


def test_a_run_is_one_processs_at_a_time(tmp_path: Path) -> None:
    config = run_config("digits", "vanilla", 0, **TINY)
    folder = run_path(tmp_path, "vanilla", 0).parent
    folder.mkdir(parents=True)
    script = "import sys; from pathlib import Path; from actsparse_lab.engine.folder import alone\n"
    script += "with alone(Path(sys.argv[1])): print('in', flush=True); input()"
    words = [sys.executable, "-c", script, str(folder)]
    pipes: dict[str, Any] = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE, "text": True}
    with subprocess.Popen(words, **pipes) as other:
        assert other.stdout is not None
        assert other.stdout.readline() == "in\n"
        with pytest.raises(ValueError, match="another process is at the run in"):
            run(config, tmp_path)
        other.kill()
    assert run(config, tmp_path).finished


def test_other_data_are_refused_where_a_run_goes_on(tmp_path: Path) -> None:
    config = run_config("digits", "vanilla", 0, **TINY)
    stopped(config, tmp_path, 3)
    record = run_path(tmp_path, "vanilla", 0)
    header, *rest = record.read_text().splitlines()
    other = json.dumps(json.loads(header) | {"data_sha256": "0" * 64})
    record.write_text("\n".join([other, *rest]) + "\n")
    with pytest.raises(ValueError, match="unfinished run on other data"):
        run(config, tmp_path)


def test_checkpoints_asked_for_later_are_made(tmp_path: Path) -> None:
    config = run_config("digits", "vanilla", 0, **TINY | {"save_every": None})
    stopped(config, tmp_path, 3)
    often = run_config("digits", "vanilla", 0, **TINY | {"save_every": 2, "keep": 9})
    done = run(often, tmp_path)
    kept = [each.name for each in checkpoints(done.path.parent)]
    assert kept == [f"checkpoint-{step}" for step in (3, 4, 6, 8, 10, 12)]
    alone_again = run(config, tmp_path / "whole")
    assert checkpoints(alone_again.path.parent) == []  # none were asked for
    assert lines_of(alone_again.path) != []


def test_a_damaged_checkpoint_is_refused_by_name_and_the_one_before_it_is_used(
    tmp_path: Path,
) -> None:
    config = run_config("digits", "paper", 0, **TINY)
    whole = run(config, tmp_path / "whole")
    stopped(config, tmp_path / "flipped", 9)
    folder = run_path(tmp_path / "flipped", "paper", 0).parent
    weights = folder / "checkpoint-9" / "model.safetensors"
    data = bytearray(weights.read_bytes())
    data[len(data) // 2] ^= 1
    weights.write_bytes(data)
    said: list[str] = []
    done = run(config, tmp_path / "flipped", told=said.append)
    assert len(said) == 1
    assert "checkpoint-9" in said[0]
    assert "model.safetensors" in said[0]
    assert done.result is not None
    assert done.result["time"]["resumed_at"] == 8
    assert lines_of(done.path) == lines_of(whole.path)


def test_without_a_whole_checkpoint_the_run_starts_anew(whole: Run, tmp_path: Path) -> None:
    config = run_config("digits", "vanilla", 0, **TINY)
    stopped(config, tmp_path / "cut", 3)
    folder = run_path(tmp_path / "cut", "vanilla", 0).parent
    (folder / "checkpoint-3" / "manifest.json").unlink()
    said: list[str] = []
    done = run(config, tmp_path / "cut", told=said.append)
    assert "checkpoint-3" in said[0]
    assert done.result is not None
    assert done.result["time"]["resumed_at"] is None
    assert lines_of(done.path) == lines_of(whole.path)


def test_an_unfinished_run_goes_on_only_as_it_was_begun(tmp_path: Path) -> None:
    config = run_config("digits", "vanilla", 0, **TINY)
    stopped(config, tmp_path, 3)
    before = run_path(tmp_path, "vanilla", 0).read_bytes()
    other = run_config("digits", "vanilla", 0, **TINY | {"lr": 0.1})
    with pytest.raises(ValueError, match=r"unfinished run with lr=0\.005 \(now 0\.1\)"):
        run(other, tmp_path)
    assert run_path(tmp_path, "vanilla", 0).read_bytes() == before
    freer = run_config("digits", "vanilla", 0, **TINY | {"save_every": 5, "keep": 3})
    assert run(freer, tmp_path).finished


def test_another_number_of_processes_is_refused(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    config = run_config("digits", "vanilla", 0, **TINY)
    stopped(config, tmp_path, 3)
    record = run_path(tmp_path, "vanilla", 0)
    header, *rest = record.read_text().splitlines()
    two = json.dumps(json.loads(header) | {"processes": 2})
    record.write_text("\n".join([two, *rest]) + "\n")
    with pytest.raises(
        ValueError, match="unfinished run of 2 processes; go on with as many, not 1"
    ):
        run(config, tmp_path)


def test_a_full_disk_at_a_checkpoint_is_said_and_the_one_before_stands(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    config = run_config("digits", "vanilla", 0, **TINY)
    own = RunTrainer._save_own

    def full(self: RunTrainer, file: Path) -> None:
        if "checkpoint-8" in str(file):
            raise OSError(28, "No space left on device")
        own(self, file)

    monkeypatch.setattr(RunTrainer, "_save_own", full)
    with pytest.raises(RecordError, match=r"cannot write .*checkpoint-8: No space left on device"):
        run(config, tmp_path)
    monkeypatch.undo()
    said: list[str] = []
    done = run(config, tmp_path, told=said.append)
    assert done.result is not None
    assert done.result["time"]["resumed_at"] == 4
    assert "checkpoint-8" in said[0]


def test_the_command_stopped_by_ctrl_c_says_so_and_goes_on(tmp_path: Path) -> None:
    words = [sys.executable, "-m", "actsparse", "train", "--task", "digits", "--arm", "vanilla"]
    words += ["--steps", "1000", "--set", "eval_every=1000", "--out", str(tmp_path)]
    words += ["--set", "batch_size=8"]
    process = subprocess.Popen(words, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
    assert process.stdout is not None
    for line in process.stdout:
        if "of 1000 steps" in line:
            break
    process.send_signal(signal.SIGINT)
    deadline = time.monotonic() + 60
    while process.poll() is None and time.monotonic() < deadline:
        time.sleep(0.05)
    _, errors = process.communicate(timeout=10)
    assert process.returncode == 130, errors
    assert "the same command goes on from" in errors
    assert "Traceback" not in errors
    record = run_path(tmp_path, "vanilla", 0)
    assert not read_run(record).finished
    assert len(checkpoints(record.parent)) == 1
    shutil.rmtree(tmp_path)

"""Whole commands that are killed at random moments, again and again, end as if left alone."""

from __future__ import annotations

import os
import random
import signal
import subprocess
import sys
import time
from contextlib import suppress
from pathlib import Path

import pytest

from actsparse_lab.records import run_path
from tests.train.killed import weights_in
from tests.train.test_survival import lines_of

SHORT = ["--task", "digits", "--steps", "120", "--set", "eval_every=40", "--out", ".",
         "--set", "save_every=10", "--set", "log_every=10"]  # fmt: skip
COMMANDS = {
    "train": ["train", "--arm", "paper", *SHORT],
    "compare": ["compare", "--arms", "paper,weight-noise", "--seeds", "1", *SHORT],
}
ARMS = {"train": ("paper",), "compare": ("paper", "weight-noise")}


def started(name: str, out: Path) -> subprocess.Popen[str]:
    out.mkdir(exist_ok=True)
    words = [sys.executable, "-m", "actsparse", *COMMANDS[name]]
    place = {**os.environ, "OMP_NUM_THREADS": "1"}
    return subprocess.Popen(
        words, stdout=-1, stderr=-1, text=True, cwd=out, env=place, process_group=0
    )


def ended(name: str, out: Path) -> list[object]:
    """The end of a command that nobody disturbs: weights, and records without time."""
    with started(name, out) as process:
        _, errors = process.communicate(timeout=600)
    assert process.returncode == 0, errors
    found: list[object] = []
    for record in (run_path(out, arm, 0) for arm in ARMS[name]):
        header, *lines = lines_of(record)
        del header["git"]  # somebody may commit meanwhile
        found += [weights_in(record.parent / "weights"), header, *lines]
    return found


def begun(out: Path, before: float) -> bool:
    """Whether a command has come so far that it writes files."""
    with suppress(FileNotFoundError):  # gone again meanwhile
        return any(each.stat().st_mtime > before for each in out.rglob("*"))
    return True


def killed(name: str, out: Path, after: float) -> None:
    """Kill a command so many seconds after it wrote its first file, if it is not done by then."""
    before = time.time()
    with started(name, out) as process:
        while process.poll() is None and not begun(out, before):
            time.sleep(0.02)
        time.sleep(after)
        if process.poll() is None:
            os.killpg(process.pid, signal.SIGKILL)
        _, errors = process.communicate()
    assert process.returncode in (0, -signal.SIGKILL), errors


@pytest.mark.slow
@pytest.mark.parametrize("name", COMMANDS)
def test_processes_killed_at_random_moments_end_as_if_left_alone(name: str, tmp_path: Path) -> None:
    began = time.monotonic()
    whole = ended(name, tmp_path / "whole")
    took = time.monotonic() - began
    draw = random.Random(7)
    for chain in range(5):
        out = tmp_path / str(chain)
        for _ in range(5):
            killed(name, out, draw.uniform(0, took / 6))
        assert ended(name, out) == whole
        assert list(out.rglob(".*.tmp")) == []

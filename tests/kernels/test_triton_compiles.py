"""The Triton kernels compile for an H200, and fit it: the interpreter takes what no GPU would."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

pytest.importorskip("triton")

SHARED = 227 * 1024  # bytes that a program may have there
OF_PRODUCTS = {"_multiply_and_pack", "_multiply_and_pick", "_active", "_candidates"}


def compiled(*words: str, cache: Path) -> list[dict[str, Any]]:
    """In a process of its own: in this one kernels are interpreted."""
    script = Path(__file__).with_name("compiled.py")
    own = {"TRITON_INTERPRET": "0", "TRITON_CACHE_DIR": str(cache)}
    done = subprocess.run(
        [sys.executable, str(script), *words], capture_output=True, text=True, env=os.environ | own
    )
    assert done.returncode == 0, done.stderr[-3000:]
    return [json.loads(line) for line in done.stdout.splitlines()]


def assert_fit(made: list[dict[str, Any]], spilled: int) -> None:
    assert all(each["shared"] <= SHARED for each in made)
    assert [each for each in made if each["spilled"] > spilled] == []
    cores = {each["kernel"] for each in made if each["tensor_cores"]}
    assert cores >= OF_PRODUCTS


def test_the_first_size_of_each_spills_no_register(tmp_path: Path) -> None:
    made = compiled(cache=tmp_path)
    assert len({each["kernel"] for each in made}) == 11
    assert_fit(made, 0)


@pytest.mark.slow
def test_every_size_that_is_tried_hardly_spills(tmp_path: Path) -> None:
    assert_fit(compiled("--all", cache=tmp_path), 128)

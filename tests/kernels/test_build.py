"""Building the kernels: once, whole or not at all, and a clear line where it cannot be done."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

from actsparse.kernels import build

ROOT = Path(__file__).parents[2]
SCRIPT = """
import torch
from actsparse.kernels import build, sparse_mlp
x, up, down = torch.ones(1, 2, requires_grad=True), torch.ones(3, 2), torch.ones(2, 3)
y = sparse_mlp(x, up, None, down, screen=True)
y.sum().backward()
print(build.level(), y.tolist(), x.grad.tolist())
"""


def run(script: str, **environment: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, "-c", script],
        cwd=ROOT,
        env={**os.environ, **environment},
        capture_output=True,
        text=True,
        check=False,
    )


def test_without_a_compiler_pytorch_does_it_and_one_line_says_so(tmp_path: Path) -> None:
    result = run(SCRIPT, PATH="", CXX="", ACTSPARSE_CPU="", ACTSPARSE_CACHE=str(tmp_path))
    assert result.stdout == "reference [[6.0, 6.0]] [[6.0, 6.0]]\n", result.stderr
    said = [line for line in result.stderr.splitlines() if "no C++ compiler found" in line]
    assert len(said) == 1
    assert list(tmp_path.iterdir()) == []


def test_a_compiler_that_fails_leaves_nothing_behind(tmp_path: Path) -> None:
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("CXX", "false")
        with pytest.raises(RuntimeError, match="the C\\+\\+ compiler failed"):
            build.build(tmp_path)
    assert list(tmp_path.iterdir()) == []


def test_the_instruction_set_can_be_chosen(monkeypatch: pytest.MonkeyPatch) -> None:
    best = build.level()
    fresh = build.load.__wrapped__
    monkeypatch.setenv("ACTSPARSE_CPU", "reference")
    assert fresh() is False
    if best != "reference":
        for name in ("baseline", best):
            monkeypatch.setenv("ACTSPARSE_CPU", name)
            assert fresh() is True
            assert build.level() == name
    monkeypatch.setenv("ACTSPARSE_CPU", "avx3")
    with pytest.raises(ValueError, match="'avx3'; it can be reference, baseline, avx2, avx512"):
        fresh()


def test_a_library_that_is_there_is_not_built_again(tmp_path: Path) -> None:
    target = build.library(tmp_path)
    target.touch()
    assert build.build(tmp_path) == target
    assert target.stat().st_size == 0


@pytest.mark.slow
def test_builds_in_an_empty_folder(tmp_path: Path) -> None:
    if build.compiler() is None:
        pytest.skip("no compiler here")
    target = build.build(tmp_path / "new")
    assert [path.name for path in target.parent.iterdir()] == [target.name]

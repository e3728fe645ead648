"""The wheel of `make wheel` brings compiled kernels, for machines without a compiler."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from actsparse.kernels import build

ROOT = Path(__file__).parents[1]
SCRIPT = """
import actsparse, torch
from torch import nn
model = nn.Sequential(nn.Linear(8, 32), nn.ReLU(), nn.Linear(32, 8))
x = torch.randn(4, 8)
dense = model(x)
handle = actsparse.accelerate(model, inputs=x, mode="sparse")
torch.testing.assert_close(model(x), dense)
print(actsparse.__file__, handle, sep="\\n")
"""


@pytest.mark.slow
def test_a_wheel_runs_compiled_kernels_without_a_compiler(tmp_path: Path) -> None:
    if build.compiler() is None:
        pytest.skip("no compiler here")
    make = ["make", "wheel", "-o", ".venv/.dev", f"PY={sys.executable}"]
    subprocess.run(make, cwd=ROOT, check=True)
    wheel = max((ROOT / "dist").glob("*.whl"), key=lambda path: path.stat().st_mtime)
    assert "-py3-none-" in wheel.name
    assert wheel.stat().st_size < 5e6

    venv = tmp_path / "venv"
    subprocess.run([sys.executable, "-m", "venv", "--without-pip", venv], check=True)
    python = venv / "bin" / "python"
    pip = [sys.executable, "-m", "pip", "--python", python, "install", "--no-index", "--no-deps"]
    subprocess.run([*pip, wheel], check=True)
    (packages,) = venv.glob("lib/python*/site-packages")
    (packages / "torch.pth").write_text(str(Path(torch.__file__).parents[1]))
    environment = {"PATH": "", "CXX": "", "PYTHONPATH": "", "ACTSPARSE_CACHE": str(tmp_path / "no")}
    said = subprocess.run(
        [python, "-W", "error", "-c", SCRIPT],
        cwd=tmp_path,
        env={**os.environ, **environment},
        capture_output=True,
        text=True,
        check=True,
    )
    lines = said.stdout.splitlines()
    assert Path(lines[0]).is_relative_to(venv)
    assert lines[-1] == f"native kernels: {build.level()}"
    assert not (tmp_path / "no").exists()

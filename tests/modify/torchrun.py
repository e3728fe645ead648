"""Runs a script in two processes that talk over gloo."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).parents[2]


def torchrun(script: Path, *arguments: str) -> None:
    """``torchrun --nproc_per_node 2 script arguments``, to its end.

    Raises:
        AssertionError: it failed, with the end of what it printed.
    """
    words = [sys.executable, "-m", "torch.distributed.run", "--nproc_per_node", "2"]
    words += ["--rdzv_backend", "c10d", "--rdzv_endpoint", "localhost:0", str(script), *arguments]
    environment = {
        **os.environ,
        "PYTHONPATH": str(ROOT),
        "OMP_NUM_THREADS": "1",
        "GLOO_SOCKET_IFNAME": "lo",
    }
    done = subprocess.run(
        words, cwd=ROOT, env=environment, capture_output=True, text=True, timeout=300
    )
    assert done.returncode == 0, (done.stdout + done.stderr)[-5000:]

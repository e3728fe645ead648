"""What the operators' checks cost: a call before them and a call today, in turn, in one process.

    python benchmarks/check_cost.py [REVISION]

Builds the C++ sources of REVISION (the last one without checks by default), under another name,
and prints the median call of each operator in µs on the smallest operands and on those of ViT-B.
"""

from __future__ import annotations

import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from statistics import median

import torch

from actsparse.kernels import build, ops
from actsparse.kernels import pack as packing

ROOT = Path(__file__).parents[1]
BEFORE = "58a9b70"


def earlier(revision: str) -> None:
    """Load the kernels of a revision as torch.ops.actsparse_before."""
    with tempfile.TemporaryDirectory() as name:
        git = ["git", "-C", str(ROOT), "archive", revision, "actsparse/kernels/cpu"]
        files = subprocess.run(git, check=True, capture_output=True).stdout
        subprocess.run(["tar", "-x", "-C", name], input=files, check=True)
        sources = Path(name) / "actsparse/kernels/cpu"
        bind = sources / "bind.cpp"
        bind.write_text(bind.read_text().replace("(actsparse_cpu,", "(actsparse_before,"))
        build.SOURCES = sources
        torch.ops.load_library(str(build.build(Path(name) / "cache")))


def in_turn(old: Callable[[], object], new: Callable[[], object], calls: int) -> list[float]:
    """Medians of both, in µs."""
    times: tuple[list[float], list[float]] = ([], [])
    for turn in range(calls):
        for which in (0, 1) if turn % 2 else (1, 0):
            start = time.perf_counter_ns()
            (old, new)[which]()
            times[which].append((time.perf_counter_ns() - start) / 1000)
    return [median(each) for each in times]


def main(revision: str) -> None:
    assert build.load()
    earlier(revision)
    torch.set_num_threads(1)
    a, b = torch.ops.actsparse_before, torch.ops.actsparse_cpu
    print(f"{'operator':20} {'N, D, H':>16} {'before':>10} {'today':>10} {'more':>8}  µs")
    for n, d, h, calls in [(1, 4, 8, 20000), (1576, 768, 3072, 40)]:
        keep = torch.rand(n, h) < 0.05
        keep[:, 0] = True
        pointer, index = packing.pack(keep)
        value, x, up, bias = torch.randn(len(index)), torch.randn(n, d), torch.randn(h, d), None
        codes, z = ops.quantise(up), x @ up.t()
        two, entries = torch.rand(n), (pointer, index, value)
        low = torch.full((h,), -2 * d**0.5)
        for name, old, new in [
            ("multiply", (*entries, up, bias, n, False), None),
            ("by_unit", (*entries, n, h), None),
            ("row_sums", (pointer, value, n), None),
            ("row_norms", (pointer, value, n), None),
            ("row_norms_backward", (pointer, value, two, two, two), None),
            ("turned", (up,), None),
            ("fingerprint", (up,), None),
            ("quantise", (up,), None),
            ("sample", (pointer, index, x, up), (pointer, index, x, up, None)),
            ("screen", (x, up, low, *codes, 1, 0.0), None),
            ("forward", (z, low, up, None, 1, 0.0), None),
            ("forward_screened", (x, up, low, *codes, up, None, 1, 0.0), None),
        ]:
            one, other = getattr(a, name).default, getattr(b, name).default
            new = old if new is None else new
            before, today = in_turn(lambda: one(*old), lambda: other(*new), calls)  # noqa: B023
            size = f"{n}, {d}, {h}"
            print(f"{name:20} {size:>16} {before:10.2f} {today:10.2f} {today - before:8.2f}")


if __name__ == "__main__":
    main(*(sys.argv[1:] or [BEFORE]))

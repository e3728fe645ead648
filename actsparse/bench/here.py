"""What to expect of sparse execution on this machine, in about two minutes."""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from statistics import median
from typing import Any

import torch

from actsparse.bench.mlp import Dtype, bench_mlp, ours, where_faster

DTYPES: tuple[Dtype, ...] = ("float32", "bfloat16")
DENSITIES = (0.02, 0.1, 0.3)
TOKENS = (1, 197, 1576)


def bandwidth(megabytes: int = 256, rounds: int = 5) -> float:
    """GB/s that a sum reads from memory, by as many threads as torch has.

    >>> bandwidth(1, 1) > 0
    True
    """
    x = torch.ones(megabytes * 2**20 // 4)
    seconds = []
    for _ in range(rounds):
        start = time.perf_counter()
        x.sum()
        seconds.append(time.perf_counter() - start)
    return x.nbytes / median(seconds) / 1e9


def bench_here(
    d: int = 768,
    h: int = 3072,
    densities: Sequence[float] = DENSITIES,
    tokens: Sequence[int] = TOKENS,
    rounds: int = 3,
    progress: Callable[[str], None] = lambda what: None,
) -> dict[str, Any]:
    """Time one MLP in float32 and bfloat16, and say up to which density it gains.

    Returns:
        ``bandwidth``, GB/s from memory; ``mlps``, what :func:`bench_mlp` returns for each dtype;
        ``rows``, one for each dtype, number of tokens and kind of pass: the best ``dense`` program
        and its ``gflops`` a second; the ``break_even`` density (None: none between those timed);
        whether the better program is ``faster`` at all of them; the ``gain`` at the lowest, dense
        time ÷ the better program's.

    >>> found = bench_here(16, 32, [0.1], [4], rounds=1)
    >>> [(row["dtype"], row["tokens"], row["kind"]) for row in found["rows"]]
    [('float32', 4, 'forward'), ('bfloat16', 4, 'forward')]
    """
    rows, mlps = [], []
    for dtype in DTYPES:
        mlp = bench_mlp(d, h, densities, tokens, rounds=rounds, dtype=dtype, progress=progress)
        mlps.append(mlp)
        for t in tokens:
            of_t = [row for row in mlp["rows"] if row["tokens"] == t]
            for kind in ("forward", "training"):
                if kind not in of_t[0]:
                    continue
                first = of_t[0][kind]
                rows.append(
                    {
                        "dtype": dtype, "tokens": t, "kind": kind, "dense": first["best_dense"],
                        "gflops": first["gflops"], "break_even": mlp["break_even"][kind].get(t),
                        "density": of_t[0]["density"], "faster": where_faster(of_t, kind),
                        "gain": max(each["value"] for each in ours(first)),
                    }
                )  # fmt: skip
    return {
        "benchmark": "here",
        "threads": torch.get_num_threads(),
        "kernels": mlps[0]["kernels"],
        "bandwidth": bandwidth(),
        "rows": rows,
        "mlps": mlps,
    }

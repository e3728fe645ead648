"""Compare the times of several programs fairly on a noisy machine."""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from torch import Tensor


@dataclass(frozen=True)
class Ratio:
    """``time(of) ÷ time(to)`` as a ratio of medians, with a 95 % bootstrap interval."""

    of: str
    to: str
    value: float
    low: float
    high: float


def interleaved(
    programs: Mapping[str, Callable[[], object]],
    rounds: int,
    warmup: int = 2,
    progress: Callable[[int], None] = lambda done: None,
) -> dict[str, list[float]]:
    """Seconds of each program in each of ``rounds`` rounds; a round runs every program once.

    The order turns by one program each round, so that none always runs after the same one.

    >>> times = interleaved({"a": lambda: sum(range(10)), "b": lambda: None}, rounds=3)
    >>> {name: len(values) for name, values in times.items()}
    {'a': 3, 'b': 3}
    """
    names = list(programs)
    for name in names:
        for _ in range(warmup):
            programs[name]()
    times: dict[str, list[float]] = {name: [] for name in names}
    for i in range(rounds):
        for name in names[i % len(names) :] + names[: i % len(names)]:
            start = time.perf_counter()
            programs[name]()
            times[name].append(time.perf_counter() - start)
        progress(i + 1)
    return times


def ratio(times: Mapping[str, list[float]], of: str, to: str, seed: int = 0) -> Ratio:
    """The ratio of medians of two programs timed in the same rounds.

    The bootstrap resamples rounds, so that what slows a whole round down slows both.

    >>> ratio({"a": [2.0, 2.0], "b": [1.0, 1.0]}, "a", "b").value
    2.0
    """
    first, second = np.asarray(times[of]), np.asarray(times[to])
    draws = np.random.default_rng(seed).integers(0, len(first), (2000, len(first)))
    ratios = np.median(first[draws], axis=1) / np.median(second[draws], axis=1)
    low, high = np.quantile(ratios, [0.025, 0.975])
    value = statistics.median(times[of]) / statistics.median(times[to])
    return Ratio(of, to, value, float(low), float(high))


def kept_for_backward(run: Callable[[], object], but: Iterable[Tensor] = ()) -> int:
    """Bytes that autograd keeps of a forward pass, other than the tensors in ``but``.

    >>> x = torch.ones(8, requires_grad=True)
    >>> kept_for_backward(lambda: x.exp(), [x])
    32
    """
    own = {tensor.untyped_storage().data_ptr() for tensor in but}
    kept: dict[int, int] = {}

    def keep(tensor: Tensor) -> Tensor:
        storage = tensor.untyped_storage()
        if storage.data_ptr() not in own:
            kept[storage.data_ptr()] = storage.nbytes()
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
        result = run()
    del result  # alive until here, so that no two storages have one address
    return sum(kept.values())


def high_water() -> float:
    """This process's largest resident set, MiB; getrusage's would begin with the parent's."""
    status = Path("/proc/self/status").read_text(encoding="ascii")
    return next(int(line.split()[1]) / 1024 for line in status.splitlines() if "VmHWM" in line)

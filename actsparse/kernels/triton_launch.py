"""What all Triton kernels share: which tensors they accept, and how block sizes are tuned."""

from __future__ import annotations

import functools
from collections.abc import Callable, Sequence
from typing import Any, ParamSpec, TypeVar

import torch
import triton
from torch import Tensor

INTERPRETED = bool(triton.knobs.runtime.interpret)  # TRITON_INTERPRET=1: on the CPU, to test
P = ParamSpec("P")
R = TypeVar("R")


def tuned(sizes: Sequence[dict[str, int]], key: list[str]) -> Callable[[Any], Any]:
    """Let Triton time a kernel at these ``sizes`` once for each value of ``key``.

    A size is block sizes by name, with ``warps`` and ``stages``. The interpreter takes the first,
    cut to 64: it has no clock, and small blocks meet more edges.
    """
    if INTERPRETED:
        small = {name: min(size, 64) for name, size in sizes[0].items()}
        return triton.autotune([_config(small)], key=key)
    return triton.autotune([_config(size) for size in sizes], key=key)


def _config(size: dict[str, int]) -> Any:
    blocks = {name: each for name, each in size.items() if name not in ("warps", "stages")}
    return triton.Config(blocks, num_warps=size.get("warps", 4), num_stages=size.get("stages", 3))


def about(n: int) -> int:
    """A number of rows as the autotuner knows it: sizes are timed anew when it doubles."""
    return n.bit_length()


def on_its_device(run: Callable[P, R]) -> Callable[P, R]:
    """Launch on the device of the first tensor, which need not be the current one."""

    @functools.wraps(run)
    def there(*args: P.args, **kwargs: P.kwargs) -> R:
        first = args[0]
        assert isinstance(first, Tensor)
        with torch.cuda.device_of(first):
            return run(*args, **kwargs)

    return there


def strides(weight: Tensor) -> tuple[int, int]:
    """Of a matrix, as kernels take them."""
    return weight.stride(0), weight.stride(1)

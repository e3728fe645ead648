"""Whether ``accelerate`` ever loses to the layers it stands in for, at any density."""

from __future__ import annotations

import copy
from collections.abc import Callable, Sequence
from dataclasses import asdict
from typing import Any

import torch
from torch import Tensor, nn

from actsparse.bench.mlp import CACHE, Layer, check
from actsparse.bench.timing import interleaved, ratio
from actsparse.kernels import accelerate, build

DENSITIES = (0.0, 0.01, 0.03, 0.1, 0.2, 0.25, 0.3, 0.4, 0.5, 0.75, 1.0)
TOKENS = (1, 16, 197, 1576)


class Stack(nn.Module):
    """MLPs of one size, each with its own input: a decoder without the rest."""

    def __init__(self, layers: Sequence[Layer]) -> None:
        super().__init__()
        self.mlps = nn.ModuleList()
        for layer in layers:
            h, d = layer.up.shape
            mlp = nn.Sequential(nn.Linear(d, h), nn.ReLU(), nn.Linear(h, d))
            weights = ("0.weight", "0.bias", "2.weight", "2.bias")
            mlp.load_state_dict(dict(zip(weights, layer.weights, strict=True)))
            self.mlps.append(mlp)

    def forward(self, xs: Sequence[Tensor]) -> list[Tensor]:
        """y [T, D] of each x [T, D]."""
        return [mlp(x) for mlp, x in zip(self.mlps, xs, strict=True)]


def bench_auto(
    d: int = 768,
    h: int = 3072,
    densities: Sequence[float] = DENSITIES,
    tokens: Sequence[int] = TOKENS,
    rounds: int = 101,
    progress: Callable[[str], None] = lambda what: None,
) -> dict[str, Any]:
    """Time a stack of MLPs in inference, by its layers and accelerated, in ``rounds`` pairs.

    For few tokens the stack is larger than :data:`actsparse.bench.mlp.CACHE`, as decoders are.

    Returns:
        ``rows``: for each T and density the ``program`` chosen and the ``ratio``, dense ÷
        accelerated (:class:`actsparse.bench.timing.Ratio`).

    >>> bench_auto(8, 16, [0.5], [2], rounds=3)["rows"][0]["program"]
    'dense'
    """
    check(densities, tokens)
    rows = []
    for t in tokens:
        for density in densities:
            progress(f"T = {t}, density {density:g}")
            count = 1 if t >= 197 else min(-(-CACHE // (8 * d * h)), 16)
            layers = [Layer(t, d, h, density, seed) for seed in range(count)]
            dense, xs = Stack(layers), [layer.x for layer in layers]
            fast = copy.deepcopy(dense)
            # the same memory: where weights happen to lie makes up to 10 % at T = 1
            fast.load_state_dict(dense.state_dict(keep_vars=True), assign=True)
            handle = accelerate(fast, inputs=(xs,))
            with torch.inference_mode():
                programs = {"dense": lambda: dense(xs), "accelerated": lambda: fast(xs)}  # noqa: B023
                times = interleaved(programs, rounds, warmup=3)
            found = handle.table()
            row: dict[str, Any] = {"tokens": t, "wanted": density}
            row["density"] = sum(layer.density for layer in layers) / count
            row["program"] = found[0]["program"] if found else "dense"
            rows.append({**row, "ratio": asdict(ratio(times, "dense", "accelerated"))})
            handle.remove()
    return {
        "benchmark": "auto",
        "sizes": {"d": d, "h": h, "rounds": rounds},
        "threads": torch.get_num_threads(),
        "kernels": build.level(),
        "rows": rows,
    }

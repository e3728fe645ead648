"""Whether ``accelerate`` ever loses to a dense program, at any density."""

from __future__ import annotations

import copy
from collections.abc import Callable, Sequence
from dataclasses import asdict
from statistics import median
from typing import Any

import torch
from torch import Tensor, nn

from actsparse.bench.mlp import CACHE, Dtype, Layer, check
from actsparse.bench.timing import interleaved, ratio
from actsparse.kernels import accelerate, build
from actsparse.kernels.dense import onednn
from actsparse.kernels.prepared import Prepared
from actsparse.kernels.programs import Weights

DENSITIES = (0.0, 0.01, 0.05, 0.1, 0.3, 0.5, 1.0)
TOKENS = (1, 4, 16, 64, 197, 1576)


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
    rounds: int = 51,
    dtype: Dtype = "float32",
    progress: Callable[[str], None] = lambda what: None,
) -> dict[str, Any]:
    """Time a stack of MLPs in inference, accelerated and by every dense program, in turn.

    The dense programs are the model's own layers and, without a module around them, oneDNN's
    products of the weights and of packed copies. For few tokens the stack is larger than
    :data:`actsparse.bench.mlp.CACHE`, as decoders are, and there are twice as many rounds.

    Returns:
        ``rows``: for each T and density the ``program`` chosen, the fastest dense one (``dense``),
        and two ratios (:class:`actsparse.bench.timing.Ratio`): ``ratio``, that one ÷ accelerated,
        and ``layers``, the model's own ÷ accelerated.

    >>> bench_auto(8, 16, [0.5], [2], rounds=3)["rows"][0]["program"]
    'dense'
    """
    check(densities, tokens)
    rows = []
    for t in tokens:
        for density in densities:
            progress(f"T = {t}, density {density:g}, {dtype}")
            size = 2 * d * h * getattr(torch, dtype).itemsize
            count = 1 if t >= 197 else min(-(-CACHE // size), 16)
            layers = [
                Layer(t, d, h, density, seed).to(getattr(torch, dtype)) for seed in range(count)
            ]
            repeats = rounds if t >= 197 else 2 * rounds
            rows.append({"tokens": t, "wanted": density, **_row(layers, repeats)})
    return {
        "benchmark": "auto",
        "sizes": {"d": d, "h": h, "dtype": dtype, "rounds": rounds},
        "threads": torch.get_num_threads(),
        "kernels": build.level(),
        "rows": rows,
    }


def _row(layers: Sequence[Layer], rounds: int) -> dict[str, Any]:
    dense, xs = Stack(layers).to(layers[0].x.dtype), [layer.x for layer in layers]
    fast = copy.deepcopy(dense)
    # the same memory, of copies too: where weights happen to lie makes up to 10 % at few tokens
    fast.load_state_dict(dense.state_dict(keep_vars=True), assign=True)
    handle = accelerate(fast, inputs=(xs,))
    programs: dict[str, Callable[[], object]] = {"dense": lambda: dense(xs)}
    with torch.inference_mode():
        for _ in range(3):  # it looks at the density, tries and chooses
            fast(xs)
        runs = handle.runs.values()
        copies = [run.prepared(xs[0].dtype, Weights.of(run.block)) for run in runs]
        for name in layers[0].programs(training=False, dense=True)[1:]:
            programs[name] = _products(name, layers, copies)
        rivals = list(programs)
        programs["accelerated"] = lambda: fast(xs)
        times = interleaved(programs, rounds, warmup=3)
    best = min(rivals, key=lambda name: median(times[name]))
    found = handle.table()
    handle.remove()
    return {
        "density": sum(layer.density for layer in layers) / len(layers),
        "program": found[0]["program"] if found else "dense",
        "dense": best,
        "ratio": asdict(ratio(times, best, "accelerated")),
        "layers": asdict(ratio(times, "dense", "accelerated")),
    }


def _products(
    name: str, layers: Sequence[Layer], copies: Sequence[Prepared | None]
) -> Callable[[], object]:
    """The MLPs by oneDNN's products, of packed weights or not, and nothing besides."""
    mlps = []
    for layer, copy_of in zip(layers, copies, strict=True):
        up, bias, down, down_bias = layer.weights
        if name == "packed":
            assert copy_of is not None
            up, down = (copy_of.packed(each, len(layer.x)) for each in ("first", "down"))
        mlps.append((layer.x, up, bias, down, down_bias))

    def call() -> list[Tensor]:
        return [
            onednn(torch.relu(onednn(x, up, bias)), down, down_bias)
            for x, up, bias, down, down_bias in mlps
        ]

    return call

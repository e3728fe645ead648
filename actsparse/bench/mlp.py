"""The sparse MLP beside the dense one: forward, training step, and one token with cold caches."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import asdict
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from actsparse.activations import named
from actsparse.bench.timing import interleaved, ratio
from actsparse.kernels import build, prepare, sparse_mlp

DENSITIES = (0.01, 0.03, 0.05, 0.10, 0.20)
TOKENS = (1, 16, 197, 1576)
CACHE = 128 * 2**20  # bytes of weights that no cache still holds when their turn comes again


class Layer:
    """One MLP whose density on its own tokens is ``density``: every unit has the quantile bias.

    x [T, D] ~ N(0, 1), up [H, D] ~ N(0, 1/D), down [D, H] ~ N(0, 1/H); bias [H] is minus each
    unit's 1 − density quantile of x upᵀ over at least 512 tokens.
    """

    def __init__(self, tokens: int, d: int, h: int, density: float, seed: int) -> None:
        generator = torch.Generator().manual_seed(seed)
        x = torch.randn(max(tokens, 512), d, generator=generator)
        self.up = torch.randn(h, d, generator=generator) / d**0.5
        z = x @ self.up.t()
        self.bias = -torch.quantile(z, 1 - density, dim=0)
        self.down = torch.randn(d, h, generator=generator) / h**0.5
        self.down_bias = torch.randn(d, generator=generator)
        self.x = x[:tokens].clone()
        self.grad_y = torch.randn(tokens, d, generator=generator)
        self.density = float((z[:tokens] + self.bias > 0).float().mean())
        self.prepared = prepare(self.down, self.up)

    @property
    def weights(self) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        """up, bias, down and its bias, as :func:`sparse_mlp` takes them."""
        return self.up, self.bias, self.down, self.down_bias

    def dense(self, phi: Callable[[Tensor], Tensor]) -> Tensor:
        """y as PyTorch computes it."""
        return F.linear(phi(F.linear(self.x, self.up, self.bias)), self.down, self.down_bias)

    def sparse(self, activation: str, screen: bool, training: bool) -> Tensor:
        """y as ours; in training nothing is prepared, since weights change every step."""
        prepared = None if training else self.prepared
        return sparse_mlp(
            self.x, *self.weights, activation=activation, screen=screen, prepared=prepared
        )


def bench_mlp(
    d: int = 768,
    h: int = 3072,
    densities: Sequence[float] = DENSITIES,
    tokens: Sequence[int] = TOKENS,
    activation: str = "relu",
    rounds: int = 11,
    training: bool = True,
    progress: Callable[[int], None] = lambda done: None,
) -> dict[str, Any]:
    """Time dense, sparse and screened MLPs in turn, on as many threads as torch has.

    A call takes the next of as many layers as do not fit in :data:`CACHE`, which for few tokens
    means that weights come from memory, as in a decoder; where T ≥ 197 it is one layer.

    Returns:
        ``rows``: for each T and density the measured ``density``, and for ``forward`` and (T ≥
        197) ``training`` the seconds of each program and its ratios to dense
        (:class:`actsparse.bench.timing.Ratio`); ``sizes``; ``threads``; ``kernels``, the
        instruction set.

    >>> result = bench_mlp(16, 32, densities=[0.1], tokens=[4], rounds=1)
    >>> [row["tokens"] for row in result["rows"]]
    [4]
    """
    rows = []
    for t in tokens:
        for density in densities:
            count = 1 if t >= 197 else min(-(-CACHE // (8 * d * h)), 16)
            count += count % 3 == 0  # else three programs in turn would each keep to its own
            layers = [Layer(t, d, h, density, seed) for seed in range(count)]
            row: dict[str, Any] = {"tokens": t}
            row["density"] = sum(layer.density for layer in layers) / count
            repeats = rounds if t >= 197 else 8 * rounds
            row["forward"] = _compare(_forward(layers, activation), repeats, progress)
            if training and t >= 197:
                row["training"] = _compare(_step(layers[0], activation), rounds, progress)
            rows.append(row)
    return {
        "benchmark": "mlp",
        "sizes": {"d": d, "h": h, "activation": activation, "rounds": rounds},
        "threads": torch.get_num_threads(),
        "kernels": build.level(),
        "rows": rows,
    }


def _forward(layers: list[Layer], activation: str) -> dict[str, Callable[[], object]]:
    phi, turn = named(activation).value, [0]

    def program(run: Callable[[Layer], Tensor]) -> Callable[[], object]:
        def call() -> Tensor:
            turn[0] += 1
            with torch.inference_mode():
                return run(layers[turn[0] % len(layers)])

        return call

    return {
        "dense": program(lambda layer: layer.dense(phi)),
        "sparse": program(lambda layer: layer.sparse(activation, False, False)),
        "screened": program(lambda layer: layer.sparse(activation, True, False)),
    }


def _step(layer: Layer, activation: str) -> dict[str, Callable[[], object]]:
    phi = named(activation).value
    leaves = [tensor.requires_grad_() for tensor in (layer.x, *layer.weights)]

    def program(run: Callable[[], Tensor]) -> Callable[[], object]:
        def call() -> None:
            for leaf in leaves:
                leaf.grad = None
            run().backward(layer.grad_y)

        return call

    return {
        "dense": program(lambda: layer.dense(phi)),
        "sparse": program(lambda: layer.sparse(activation, False, True)),
        "screened": program(lambda: layer.sparse(activation, True, True)),
    }


def _compare(
    programs: dict[str, Callable[[], object]], rounds: int, progress: Callable[[int], None]
) -> dict[str, Any]:
    times = interleaved(programs, rounds, progress=progress)
    return {
        "seconds": {name: sorted(values)[len(values) // 2] for name, values in times.items()},
        "ratios": [asdict(ratio(times, "dense", name)) for name in ("sparse", "screened")],
    }

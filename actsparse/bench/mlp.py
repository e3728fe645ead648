"""Time the sparse MLP against the dense one: forward, training step, one token with cold caches."""

from __future__ import annotations

import copy
import itertools
import math
from collections.abc import Callable, Sequence
from dataclasses import asdict
from functools import partial
from typing import Any, Literal

import torch
import torch.nn.functional as F
from torch import Tensor

from actsparse.activations import named
from actsparse.bench.timing import interleaved, kept_for_backward, ratio
from actsparse.kernels import build, prepare
from actsparse.kernels.programs import DENSE, Weights, known, run

Pattern = Literal["even", "zipf"]
Dtype = Literal["float32", "bfloat16"]
DENSITIES = (0.01, 0.03, 0.05, 0.10, 0.20)
TOKENS = (1, 16, 197, 1576)
CACHE = 128 * 2**20  # bytes of weights that no cache still holds when their turn comes again


class Layer:
    """One MLP whose density on its own tokens is ``density``: biases see to that.

    x [T, D] ~ N(0, 1), up [H, D] ~ N(0, 1/D), down [D, H] ~ N(0, 1/H); with its bias each unit is
    active on a share p of at least 512 tokens, where p is ``density`` for every unit, or of that
    mean and ∝ 1/rank, at most 1, in random order (``pattern="zipf"``).
    """

    def __init__(
        self, tokens: int, d: int, h: int, density: float, seed: int, pattern: Pattern = "even"
    ) -> None:
        generator = torch.Generator().manual_seed(seed)
        x = torch.randn(max(tokens, 512), d, generator=generator)
        self.up = torch.randn(h, d, generator=generator) / d**0.5
        z = x @ self.up.t()
        shares = torch.full((h,), density) if pattern == "even" else zipf(h, density)
        shares = shares[torch.randperm(h, generator=generator)]
        z = z.sort(dim=0).values
        z = torch.cat([z[:1] - 1, z, z[-1:] + 1])
        above = len(z) - 1 - (shares * (len(z) - 2)).round().long()[None]  # between two tokens' z
        self.bias = -(z.gather(0, above) + z.gather(0, above - 1))[0] / 2
        self.down = torch.randn(d, h, generator=generator) / h**0.5
        self.down_bias = torch.randn(d, generator=generator)
        self.x = x[:tokens].clone()
        self.grad_y = torch.randn(tokens, d, generator=generator)
        self._settle()

    def _settle(self) -> None:
        active = F.linear(self.x, self.up, self.bias) > 0
        self.density = float(active.float().mean())
        self.prepared = prepare(self.down, self.up)

    def to(self, dtype: torch.dtype) -> Layer:
        """A copy in another dtype, with the density that it has there."""
        cast = copy.copy(self)
        for name, value in vars(self).items():
            if isinstance(value, Tensor):
                setattr(cast, name, value.to(dtype))
        cast._settle()
        return cast

    @property
    def weights(self) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        """up, bias, down and its bias, as :func:`sparse_mlp` takes them."""
        return self.up, self.bias, self.down, self.down_bias

    def dense(self, phi: Callable[[Tensor], Tensor]) -> Tensor:
        """y as PyTorch computes it."""
        return F.linear(phi(F.linear(self.x, self.up, self.bias)), self.down, self.down_bias)

    def run(self, program: str, activation: str, training: bool) -> Tensor:
        """y by a program; in training nothing is prepared, since weights change every step."""
        if program == "layers":
            return self.dense(named(activation).value)
        prepared = None if training else self.prepared
        return run(program, self.x, Weights(*self.weights), activation, prepared=prepared)

    def programs(self, training: bool, dense: bool = False) -> list[str]:
        """The names of the programs that there are; ``dense``: of those alone."""
        return ["layers", *(n for n in known(self.x, "relu", training) if not dense or n in DENSE)]


def check(densities: Sequence[float], tokens: Sequence[int]) -> None:
    """Raise ValueError for what no MLP can have.

    >>> check([2.0], [1])
    Traceback (most recent call last):
    ValueError: density 2.0: expected 0 to 1
    """
    for density in densities:
        if not 0 <= density <= 1:
            raise ValueError(f"density {density}: expected 0 to 1")
    for count in tokens:
        if count < 1:
            raise ValueError(f"{count} tokens: expected 1 or more")


def zipf(units: int, mean: float) -> Tensor:
    """Shares of tokens on which units are active: min(1, c ÷ rank), c such that their mean is so.

    >>> zipf(1000, 0.05).mean()
    tensor(0.0500)
    """
    ranks = torch.arange(1, units + 1, dtype=torch.float64)
    low, high = 0.0, float(units)
    for _ in range(60):
        c = (low + high) / 2
        low, high = (c, high) if float((c / ranks).clamp(max=1).mean()) < mean else (low, c)
    return (high / ranks).clamp(max=1).float()


def break_even(rows: Sequence[dict[str, Any]], kind: str) -> dict[int, float | None]:
    """By number of tokens the density above which neither program beats dense.

    Linear in log density and log ratio between the measured rows; None where it was never reached.

    >>> ratios = [{"of": "dense", "to": "sparse", "value": v} for v in (4.0, 0.25)]
    >>> rows = [
    ...     {"tokens": 1, "density": p, "forward": {"ratios": [r]}}
    ...     for p, r in zip((0.01, 0.16), ratios)
    ... ]
    >>> break_even(rows, "forward")
    {1: 0.04}
    """
    found: dict[int, float | None] = {}
    for tokens in dict.fromkeys(row["tokens"] for row in rows if kind in row):
        points = sorted(
            (math.log(row["density"]), math.log(max(r["value"] for r in ours(row[kind]))))
            for row in rows
            if row["tokens"] == tokens and kind in row and row["density"] > 0
        )
        found[tokens] = None
        for (p, gain), (q, less) in itertools.pairwise(points):
            if gain > 0 >= less:
                found[tokens] = round(math.exp(p + (q - p) * gain / (gain - less)), 4)
    return found


def where_faster(rows: Sequence[dict[str, Any]], kind: str) -> str:
    """Whether the better program beats dense at all densities of ``rows`` (of one T), or at none.

    >>> rows = [
    ...     {"density": p, "forward": {"ratios": [{"to": "sparse", "value": v}]}}
    ...     for p, v in ((0.01, 5.45), (0.2, 1.1))
    ... ]
    >>> where_faster(rows, "forward")
    'always faster'
    >>> where_faster(rows[:1], "training")
    'not timed'
    """
    gains = [max(each["value"] for each in ours(row[kind])) for row in rows if kind in row]
    if not gains:
        return "not timed"
    faster = [gain > 1 for gain in gains]
    return "always faster" if all(faster) else "faster at some" if any(faster) else "never faster"


def ours(timed: dict[str, Any]) -> list[dict[str, Any]]:
    """The ratios of our programs to dense."""
    return [row for row in timed["ratios"] if row["to"] in ("sparse", "screened")]


def bench_mlp(
    d: int = 768,
    h: int = 3072,
    densities: Sequence[float] = DENSITIES,
    tokens: Sequence[int] = TOKENS,
    activation: str = "relu",
    rounds: int = 11,
    training: bool = True,
    pattern: Pattern = "even",
    compiled: bool = False,
    dtype: Dtype = "float32",
    progress: Callable[[str], None] = lambda what: None,
) -> dict[str, Any]:
    """Time an MLP's dense programs, sparse and screened in turn, on as many threads as torch has.

    A call takes the next of as many layers as do not fit in :data:`CACHE`, which for few tokens
    means that weights come from memory, as in a decoder; where T ≥ 197 it is one layer.
    ``compiled`` times ``torch.compile`` of the dense MLP too. Beside float32 stands dense bfloat16.

    Returns:
        ``rows``: for each T and density the measured ``density``, and for ``forward`` and (T ≥
        197) ``training`` the ``seconds`` of each program; ``best_dense``, the fastest dense one of
        this dtype, with its ``gflops`` a second; ``ratios`` of it ÷ each
        (:class:`actsparse.bench.timing.Ratio`); the root mean square ``error`` of each y against
        float64, and the ``memory`` each keeps for backward beside x and weights, bytes;
        ``break_even`` densities by T; ``sizes``; ``threads``; ``kernels``, the instruction set.

    Raises:
        ValueError: a density outside 0…1, or a number of tokens below 1.

    >>> result = bench_mlp(16, 32, densities=[0.1], tokens=[4], rounds=1)
    >>> [row["tokens"] for row in result["rows"]]
    [4]
    """
    check(densities, tokens)
    rows = []
    for t in tokens:
        for density in densities:
            count = 1 if t >= 197 else min(-(-CACHE // (8 * d * h)), 16)
            progress(f"T = {t}, density {density:g}, {dtype}")
            layers = [Layer(t, d, h, density, seed, pattern) for seed in range(count)]
            halves = [layer.to(torch.bfloat16) for layer in layers]
            layers = layers if dtype == "float32" else halves
            row: dict[str, Any] = {"tokens": t}
            row["density"] = sum(layer.density for layer in layers) / count
            repeats = rounds if t >= 197 else 8 * rounds
            work = 4 * t * d * h / 1e9
            programs = _forward(layers, halves, activation, compiled)
            row["forward"] = _compare(programs, repeats, work)
            row["error"] = _errors(layers[0], activation)
            if training and t >= 197:
                row["memory"] = _memory(layers[0], activation)
                programs = _step(layers[0], halves[0], activation, compiled)
                row["training"] = _compare(programs, rounds, 3 * work)
            rows.append(row)
    return {
        "benchmark": "mlp",
        "sizes": {
            "d": d, "h": h, "activation": activation, "pattern": pattern, "dtype": dtype,
            "rounds": rounds,
        },
        "threads": torch.get_num_threads(),
        "kernels": build.level(),
        "rows": rows,
        "break_even": {kind: break_even(rows, kind) for kind in ("forward", "training")},
    }  # fmt: skip


def _compiled(phi: Callable[[Tensor], Tensor]) -> Callable[..., Tensor]:
    def dense(x: Tensor, up: Tensor, bias: Tensor, down: Tensor, down_bias: Tensor) -> Tensor:
        return F.linear(phi(F.linear(x, up, bias)), down, down_bias)

    return torch.compile(dense)


def _forward(
    layers: list[Layer], halves: list[Layer], activation: str, compiled: bool
) -> dict[str, Callable[[], object]]:
    def program(run: Callable[[Layer], Tensor], layers: list[Layer]) -> Callable[[], object]:
        turns = itertools.cycle(layers)  # of each program, so that each meets cold weights

        def call() -> Tensor:
            with torch.inference_mode():
                return run(next(turns))

        return call

    def named_program(name: str, layers: list[Layer] = layers) -> Callable[[], object]:
        return program(lambda layer: layer.run(name, activation, False), layers)

    programs = {name: named_program(name) for name in layers[0].programs(False)}
    if compiled:
        fused = _compiled(named(activation).value)
        programs["compiled"] = program(lambda layer: fused(layer.x, *layer.weights), layers)
    if layers[0].x.dtype is torch.float32:
        for name in halves[0].programs(False, dense=True):
            programs[f"{name}, bfloat16"] = named_program(name, halves)
    return programs


def _errors(layer: Layer, activation: str) -> dict[str, float]:
    """Root mean square of y − the y of float64 with the same inputs, by program."""
    phi = named(activation).value
    x, *weights = (t.detach().double() for t in (layer.x, *layer.weights))
    with torch.inference_mode():
        exact = F.linear(phi(F.linear(x, weights[0], weights[1])), weights[2], weights[3])
        found = {
            "dense": layer.dense(phi),
            "sparse": layer.run("sparse", activation, False),
            "screened": layer.run("screened", activation, False),
        }
        return {name: float((y - exact).square().mean().sqrt()) for name, y in found.items()}


def _memory(layer: Layer, activation: str) -> dict[str, int]:
    """Bytes that autograd keeps of a forward pass, other than x and the weights, by program."""
    given = [tensor.requires_grad_() for tensor in (layer.x, *layer.weights)]
    programs = (("dense", "layers"), ("sparse", "sparse"), ("screened", "screened"))
    return {
        name: kept_for_backward(partial(layer.run, program, activation, True), given)
        for name, program in programs
    }


def _step(
    layer: Layer, half: Layer, activation: str, compiled: bool
) -> dict[str, Callable[[], object]]:
    def program(layer: Layer, run: Callable[[], Tensor]) -> Callable[[], object]:
        leaves = [tensor.requires_grad_() for tensor in (layer.x, *layer.weights)]

        def call() -> None:
            for leaf in leaves:
                leaf.grad = None
            run().backward(layer.grad_y)

        return call

    def named_program(layer: Layer, name: str) -> Callable[[], object]:
        return program(layer, lambda: layer.run(name, activation, True))

    programs = {name: named_program(layer, name) for name in layer.programs(True)}
    if compiled:
        fused = _compiled(named(activation).value)
        programs["compiled"] = program(layer, lambda: fused(layer.x, *layer.weights))
    if layer.x.dtype is torch.float32:
        programs["layers, bfloat16"] = named_program(half, "layers")
    return programs


def _compare(programs: dict[str, Callable[[], object]], rounds: int, work: float) -> dict[str, Any]:
    """Times of programs that do ``work`` · 10⁹ operations if dense, over the best dense one."""
    times = interleaved(programs, rounds)
    seconds = {name: sorted(values)[len(values) // 2] for name, values in times.items()}
    dense = [name for name in times if name in ("layers", "onednn", "packed", "compiled")]
    halves = [name for name in times if name.endswith("bfloat16")]
    best = min(dense, key=seconds.__getitem__)
    times["dense"], seconds["dense"] = times[best], seconds[best]
    if halves:
        times["bfloat16"] = times[min(halves, key=seconds.__getitem__)]
    others = [*dense, "sparse", "screened", *(["bfloat16"] if halves else [])]
    return {
        "best_dense": best,
        "gflops": work / seconds[best],
        "seconds": seconds,
        "ratios": [asdict(ratio(times, "dense", name)) for name in others if name != best],
    }

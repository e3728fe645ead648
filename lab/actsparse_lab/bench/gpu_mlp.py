"""One sparse MLP on a GPU beside the dense one: decoding, a training step, and two choices.

What bounds decoding is bytes: beside each time stands what must be read at least, over the
bandwidth that a plain copy reached in the same run.
"""

from __future__ import annotations

import functools
import statistics
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass
from functools import partial
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from actsparse.bench.models_at_density import thresholds
from actsparse.bench.timing import interleaved, ratio
from actsparse.kernels import accelerate, prepare, sparse_mlp
from actsparse.kernels.prepared import Prepared

Program = Callable[[], object]
Timer = Callable[[Mapping[str, Program], int], dict[str, list[float]]]
Row = dict[str, Any]
BEST = ("dense", "compiled")  # the forms of the dense block
SAMPLE = 4096  # tokens on which a unit's density is set, at least
CALLS = 24  # of a layer in one CUDA graph, so that a launch is a small part of its time
SLICE = 128  # tokens, or units, on which gradients are compared with float64
LONG, ROUNDS = 1.0, (5, 50)  # seconds that the timed rounds may take; least and most of them


@dataclass(frozen=True)
class Place:
    """Where programs run, in which dtype, and what times them."""

    device: torch.device
    dtype: torch.dtype
    timer: Timer
    compiled: bool = True

    @property
    def gpu(self) -> bool:
        """Whether there are CUDA graphs, events and counters of memory."""
        return self.device.type == "cuda"

    def captured(self, run: Program) -> Program:
        """``run`` as one CUDA graph; before, it is called until all is compiled and tuned."""
        run()
        if not self.gpu:
            return run
        side = torch.cuda.Stream()
        side.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(side):
            for _ in range(3):
                run()
        torch.cuda.current_stream().wait_stream(side)
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            run()
        return graph.replay

    def timed(self, programs: Mapping[str, Program], of: Sequence[str] = ("dense",)) -> Row:
        """``seconds``, medians of rounds in turn, and ``ratios`` of each in ``of`` to the rest."""
        for program in programs.values():
            program()
        once = sum(each for (each,) in self.timer(programs, 1).values())
        least, most = ROUNDS
        times = self.timer(programs, min(max(round(LONG / once), least), most))
        return {
            "seconds": {name: statistics.median(each) for name, each in times.items()},
            "ratios": [
                asdict(ratio(times, one, two))
                for one in of
                for two in programs
                if one in programs and two not in of
            ],
        }

    def peak(self, program: Program) -> int | None:
        """Bytes that a call takes beside what was there; None where nothing counts them."""
        if not self.gpu:
            return None
        program()
        before = torch.cuda.memory_allocated()
        torch.cuda.reset_peak_memory_stats()
        program()
        torch.cuda.synchronize()
        return torch.cuda.max_memory_allocated() - before


def by_events(programs: Mapping[str, Program], rounds: int) -> dict[str, list[float]]:
    """As :func:`interleaved`, on the GPU's own clock; the host queues all rounds, then waits."""
    names = list(programs)
    marks: dict[str, list[tuple[Any, Any]]] = {name: [] for name in names}
    for i in range(rounds):
        for name in names[i % len(names) :] + names[: i % len(names)]:
            start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
            start.record()
            programs[name]()
            end.record()
            marks[name].append((start, end))
    torch.cuda.synchronize()
    return {name: [a.elapsed_time(b) / 1e3 for a, b in each] for name, each in marks.items()}


def place_at(device: str, dtype: str, compiled: bool = True) -> Place:
    """The place by its names.

    Raises:
        ValueError: a GPU is asked for, and there is none.
    """
    where = torch.device(device)
    if where.type != "cuda":
        timer: Timer = partial(interleaved, warmup=0)
        return Place(where, getattr(torch, dtype), timer, compiled)
    if not torch.cuda.is_available():
        raise ValueError(
            "this benchmark needs an NVIDIA GPU, and PyTorch sees none; "
            "benchmarks/gpu.md says what waits for one"
        )
    return Place(where, getattr(torch, dtype), by_events, compiled)


class Block:
    """One MLP with its tokens: x [T, D] ~ N(0, 1), up ~ N(0, 1/D), down ~ N(0, 1/H)."""

    def __init__(self, place: Place, tokens: int, d: int, h: int, seed: int) -> None:
        generator = torch.Generator(place.device).manual_seed(seed)

        def normal(*shape: int, over: int = 1) -> Tensor:
            there = torch.randn(*shape, generator=generator, device=place.device)
            return (there / over**0.5).to(place.dtype)

        self.sample = normal(max(tokens, SAMPLE), d)
        self.x = self.sample[:tokens].contiguous()
        self.up, self.down, self.down_bias = normal(h, d, over=d), normal(d, h, over=h), normal(d)
        self.bias = torch.zeros(h, dtype=place.dtype, device=place.device)
        self.grad_y = normal(tokens, d)
        self.prepared: Prepared | None = None  # where it decodes

    @property
    def weights(self) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        """up, bias, down and its bias, as :func:`sparse_mlp` takes them."""
        return self.up, self.bias, self.down, self.down_bias

    @torch.no_grad()
    def arrange(self, density: float) -> None:
        """Set the biases so that each unit is active in this share of the sample."""
        z = self.sample.float() @ self.up.float().t()
        with self.up.device:
            self.bias = -thresholds(z, density).to(self.up.dtype)

    @torch.no_grad()
    def active(self) -> Tensor:
        """Which units of which tokens are: [T, H]."""
        return F.linear(self.x, self.up, self.bias) > 0


def dense(x: Tensor, up: Tensor, bias: Tensor, down: Tensor, down_bias: Tensor) -> Tensor:
    """y as PyTorch computes it."""
    return F.linear(F.relu(F.linear(x, up, bias)), down, down_bias)


@functools.cache
def _compiled() -> Callable[..., Tensor]:
    return torch.compile(dense, mode="max-autotune-no-cudagraphs", dynamic=False)


def moved(
    d: int, h: int, size: int, units: float, candidates: float | None = None
) -> dict[str, int]:
    """Bytes of weights that each program must read once, of entries of ``size`` bytes.

    ``units``: the share of units that any token needs; ``candidates``: the share that the screen
    leaves to be computed, at least ``units``, which stands for it where it is None.

    >>> moved(4, 10, 2, units=0.2, candidates=0.3)
    {'dense': 160, 'compiled': 160, 'sparse': 96, 'screened': 80}
    """
    whole, row = d * h * size, d * size
    needed = round(units * h) * row
    left = needed if candidates is None else round(candidates * h) * row
    both = {"dense": 2 * whole, "compiled": 2 * whole}
    return {**both, "sparse": whole + needed, "screened": d * h + left + needed}


@torch.no_grad()
def candidates(block: Block, codes: Sequence[Tensor]) -> float:
    """The share of units that :mod:`actsparse.kernels.triton_decode`'s screen leaves, by its bound.

    ``codes`` as its ``quantise`` gives them of ``block.up``.
    """
    from actsparse.kernels.triton_decode import ROUNDING

    x, b = block.x.double(), block.bias.double()
    rounding = (x.shape[1] + 2) * ROUNDING
    code, scale, norm, error, whole = (each.double() for each in codes)
    bound = (x @ code.t()) * scale + b + rounding * b.abs()
    bound += x.norm(dim=1)[:, None] * (error + rounding * (norm + whole))
    return float((bound >= 0).any(0).double().mean())


def bandwidth(place: Place, size: int = 2**30) -> float:
    """Bytes a second, read and written, of a plain copy of ``size`` bytes."""
    source = torch.zeros(size, dtype=torch.uint8, device=place.device)
    target = torch.empty_like(source)
    copied = place.timed({"dense": lambda: target.copy_(source)})
    return 2 * size / copied["seconds"]["dense"]


def decode(place: Place, blocks: Sequence[Block], density: float, speed: float) -> Row:
    """Few tokens through layer after layer, so many that no cache holds their weights.

    ``speed``: bytes a second. ``seconds`` are of one layer; ``bytes`` as :func:`moved` has them,
    ``floor`` the seconds these take, and ``reached`` floor ÷ seconds; ``error``, root mean square
    of y − the y of float64, and ``relative_error``, that ÷ dense's.
    """
    for block in blocks:
        block.arrange(density)
        if block.prepared is None:
            block.prepared = prepare(block.down, block.up)
    laps = max(1, round(CALLS / len(blocks)))
    ways = _forward(place)

    def rounds_of(run: Callable[[Block], Tensor]) -> Program:
        def go() -> None:
            with torch.no_grad():
                for block in list(blocks) * laps:
                    run(block)

        return place.captured(go)

    result = place.timed({name: rounds_of(run) for name, run in ways.items()}, BEST)
    calls = laps * len(blocks)
    seconds = {name: each / calls for name, each in result["seconds"].items()}
    active = [block.active() for block in blocks]
    units = _mean(float(each.any(0).double().mean()) for each in active)
    left = None
    if place.gpu:  # on a CPU the screen is another
        left = _mean(candidates(b, b.prepared.codes()) for b in blocks if b.prepared is not None)
    h, d = blocks[0].up.shape
    needs = moved(d, h, blocks[0].up.element_size(), units, left)
    floor = {name: needs[name] / speed for name in seconds}
    with torch.no_grad():
        exact = dense(*(t.double() for t in (blocks[0].x, *blocks[0].weights)))
        error = {name: _rms(run(blocks[0]), exact) for name, run in ways.items()}
    return {
        "tokens": len(blocks[0].x),
        "wanted": density,
        "density": _mean(float(each.double().mean()) for each in active),
        "units": units,
        "candidates": left,
        "layers": len(blocks),
        "calls": calls,
        **result,
        "seconds": seconds,
        "bytes": {name: needs[name] for name in seconds},
        "floor": floor,
        "reached": {name: floor[name] / seconds[name] for name in seconds},
        "error": error,
        "relative_error": _to_dense(error),
    }


def _forward(place: Place) -> dict[str, Callable[[Block], Tensor]]:
    def sparse(block: Block, screen: bool = False) -> Tensor:
        return sparse_mlp(block.x, *block.weights, screen=screen, prepared=block.prepared)

    ways: dict[str, Callable[[Block], Tensor]] = {
        "dense": lambda block: dense(block.x, *block.weights),
        "compiled": lambda block: _compiled()(block.x, *block.weights),
        "sparse": sparse,
        "screened": partial(sparse, screen=True),
    }
    return {name: run for name, run in ways.items() if place.compiled or name != "compiled"}


def train(place: Place, block: Block, density: float) -> Row:
    """Forward alone, and forward and backward, of one block at many tokens.

    ``auto`` is the block as a module under :func:`accelerate`, and ``auto_ran`` what it chose;
    ``memory`` the bytes a step takes beside what it starts with; ``error`` of y and dx, of
    :data:`SLICE` tokens, and of dU, of as many units, against float64.
    """
    block.arrange(density)
    x = block.x.detach().requires_grad_()
    leaves = [x, *(t.detach().requires_grad_() for t in block.weights)]
    layers = module_of(block)
    ready = prepare(block.down)

    def sparse() -> Tensor:  # in training weights change at every step
        return sparse_mlp(x, *leaves[1:], prepared=None if torch.is_grad_enabled() else ready)

    ways: dict[str, Callable[[], Tensor]] = {
        "dense": lambda: dense(*leaves),
        "compiled": lambda: _compiled()(*leaves),
        "sparse": sparse,
        "auto": lambda: layers(x),
    }
    if not place.compiled:
        del ways["compiled"]

    def step(name: str) -> tuple[Tensor, ...]:
        y = ways[name]()
        learning = [x, *layers.parameters()] if name == "auto" else leaves
        return y.detach(), *torch.autograd.grad(y, learning, block.grad_y)

    def forward(name: str) -> Tensor:
        with torch.no_grad():
            return ways[name]()

    row: Row = {"tokens": len(x), "wanted": density}
    row["density"] = float(block.active().double().mean())
    with accelerate(layers, inputs=block.x[:2]) as handle:
        for kind, call in (("training", step), ("forward", forward)):
            for _ in range(3):  # it counts, tries and chooses
                call("auto")
            row[kind] = place.timed({name: partial(call, name) for name in ways}, BEST)
        row["auto_ran"] = handle.table()
        row["memory"] = {name: place.peak(partial(step, name)) for name in ways}
        exact = _exact(block)
        found = {name: step(name)[:3] for name in ways}
    row["error"] = {
        name: {what: _rms(one[:SLICE], exact[what]) for what, one in zip(exact, each, strict=True)}
        for name, each in found.items()
    }
    row["relative_error"] = {
        what: _to_dense({name: each[what] for name, each in row["error"].items()}) for what in exact
    }
    return row


def module_of(block: Block) -> nn.Sequential:
    """The block as layers, on its own weights."""
    h, d = block.up.shape
    with torch.device("meta"):
        layers = nn.Sequential(nn.Linear(d, h), nn.ReLU(), nn.Linear(h, d))
    names = ("0.weight", "0.bias", "2.weight", "2.bias")
    layers.load_state_dict(dict(zip(names, block.weights, strict=True)), assign=True)
    return layers


@torch.no_grad()
def _exact(block: Block) -> dict[str, Tensor]:
    """y, dx and dU in float64: of the first tokens, and of the first units."""
    x, up, bias, down, down_bias = (t.double() for t in (block.x, *block.weights))
    grad = block.grad_y.double()
    z = F.linear(x[:SLICE], up, bias)
    y = F.linear(z.relu(), down, down_bias)
    dx = ((grad[:SLICE] @ down) * (z > 0)) @ up
    z = F.linear(x, up[:SLICE], bias[:SLICE])
    return {"y": y, "dx": dx, "dU": ((grad @ down[:, :SLICE]) * (z > 0)).t() @ x}


def tune(place: Place, block: Block, density: float) -> Row:
    """The choices that were made by estimate: where to pack, and how to sample a product."""
    from actsparse.kernels import triton_pack, triton_products

    block.arrange(density)
    x, up, bias = block.x, block.up, block.bias
    pointer, index, _ = triton_pack.pack(x, up, bias, 0.0, fused=False)
    sampled = (pointer, index, block.grad_y, block.down.t())
    packing = {
        "cuBLAS, then pack": lambda: triton_pack.pack(x, up, bias, 0.0, fused=False),
        "fused": lambda: triton_pack.pack(x, up, bias, 0.0, fused=True),
    }
    sampling = {
        "whole product": lambda: triton_pack.sample_dense(*sampled),
        "entries": lambda: triton_products.sample(*sampled),
    }
    return {
        "tokens": len(x),
        "density": len(index) / (len(x) * len(up)),
        "packing": place.timed(packing, ["cuBLAS, then pack"]),
        "sampling": place.timed(sampling, ["whole product"]),
    }


def _rms(found: Tensor, exact: Tensor) -> float:
    return float((found.double() - exact).square().mean().sqrt())


def _to_dense(error: Mapping[str, float]) -> dict[str, float | None]:
    """Each ÷ dense's; None where dense has no error."""
    own = error["dense"]
    return {name: each / own if own else None for name, each in error.items()}


def _mean(values: Iterable[float]) -> float:
    return statistics.fmean(values)

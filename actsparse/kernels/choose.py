"""Choose the fastest program for a block by timing, once for blocks that are alike."""

from __future__ import annotations

import time
from collections.abc import Callable, Hashable, Iterable, Mapping
from dataclasses import dataclass
from functools import partial
from statistics import median

import torch
import torch.nn.functional as F
from torch import Tensor

from actsparse.activations import named
from actsparse.blocks.stages import NORMS, Cut, token_norm
from actsparse.kernels.dense import hidden_layer
from actsparse.kernels.programs import Weights, parts_of, run

NEAR = 1.25  # densities within this factor of each other share a trial
MARGIN = 1.03  # a program takes over from dense where it is faster by this much, leaves below 1
CEILING = 0.5  # sparse products cost about 3.75 × density of dense ones: nothing to time above
CEILING_CUT = 0.8  # of a cut at few tokens: the time is that of reading the weights
CACHE = 2**27  # bytes of other weights after which a block's own lie in no cache
TIMED = 2048  # tokens at most in a trial; all larger calls are taken for alike
COLD = 256  # tokens up to which a model's other weights, which clear the caches, matter
LONG, ROUNDS = 0.05, (3, 15)  # seconds that a program's turns may take; least and most rounds
CLEAR, PATIENCE = 1.25, 10  # a ratio nearer to 1 than that may take so many times as long


@dataclass(frozen=True)
class Trial:
    """Seconds of each program on one block at one density, medians of rounds in turn."""

    density: float
    seconds: dict[str, float]

    def ratio(self, name: str) -> float:
        """dense ÷ ``name``.

        >>> Trial(0.01, {"dense": 0.4, "sparse": 0.1}).ratio("sparse")
        4.0
        """
        return self.seconds["dense"] / self.seconds[name]

    def best(self, now: str) -> str:
        """The fastest program; ``dense`` unless another gains :data:`MARGIN`, or is kept.

        >>> Trial(0.2, {"dense": 1.02, "sparse": 1.0}).best("dense")
        'dense'
        >>> Trial(0.2, {"dense": 1.02, "sparse": 1.0}).best("sparse")
        'sparse'
        """
        fastest = min(self.seconds, key=lambda name: self.seconds[name])
        enough = 1.0 if now != "dense" else MARGIN
        return fastest if self.ratio(fastest) >= enough else "dense"


class Trials:
    """The trials of a model's blocks, by kind of call and density.

    ``others``: bytes of the model's other weights. Between two calls of a block in a model the
    others pass through the caches; a trial of few tokens clears them likewise.
    """

    def __init__(self, others: int) -> None:
        self.others = min(others, CACHE)
        self.known: dict[Hashable, list[Trial]] = {}

    def near(self, kind: Hashable, density: float) -> Trial | None:
        """The trial at the closest density, if it is within :data:`NEAR`."""
        known = self.known.get(kind, [])
        closest = min(known, key=lambda trial: apart(trial.density, density), default=None)
        return closest if closest and apart(closest.density, density) <= NEAR else None

    def run(
        self,
        kind: Hashable,
        density: float,
        programs: Mapping[str, Callable[[], object]],
        cold: bool,
        device: torch.device,
    ) -> Trial:
        """Time ``programs`` in turn on ``device``, and keep what comes out."""
        between = torch.ones(self.others // 4, device=device) if cold else None
        for program in programs.values():
            program()
        times: dict[str, list[float]] = {name: [] for name in programs}
        begun = time.perf_counter()
        least, most = ROUNDS
        for done in range(most):
            spent = (time.perf_counter() - begun) / (LONG * len(programs))
            if done >= least and spent > (1 if _clear(times) else PATIENCE):
                break
            for name, program in programs.items():
                times[name].append(_seconds(program, between, device))
        trial = Trial(density, {name: median(each) for name, each in times.items()})
        self.known.setdefault(kind, []).append(trial)
        return trial


def _clear(times: Mapping[str, list[float]]) -> bool:
    """Whether the fastest program beats the second by far."""
    first, second, *_ = [*sorted(median(each) for each in times.values()), float("inf")]
    return second > CLEAR * first


def apart(one: float, two: float) -> float:
    """The factor between two densities; below 1 in 10 000 they are all alike.

    >>> apart(0.1, 0.2), apart(0.0, 1e-9)
    (2.0, 1.0)
    """
    one, two = max(one, 1e-4), max(two, 1e-4)
    return max(one / two, two / one)


def _seconds(program: Callable[[], object], between: Tensor | None, device: torch.device) -> float:
    wait = torch.cuda.synchronize if device.type == "cuda" else lambda: None
    if between is not None:
        between.sum()  # reads: lines that must be written back would slow what comes next
    wait()
    start = time.perf_counter()
    program()
    wait()
    return time.perf_counter() - start


def programs_of(
    names: Iterable[str],
    weights: Weights,
    function: str | Cut,
    x: Tensor,
    training: bool,
    norms: bool = False,
    asks: Callable[[], object] = lambda: None,
) -> Mapping[str, Callable[[], object]]:
    """A block's computation by its own layers and by each program, on these tokens.

    ``norms``: those of a are read too, and learnt from in training. ``asks``: what a call through
    the block asks before a program may take its layers' place, which is a part of its time.
    """
    x = x.detach().reshape(-1, x.shape[-1])[:TIMED].requires_grad_(training and x.requires_grad)
    leaves = Weights._make(
        t if t is None else t.detach().requires_grad_(training and t.requires_grad) for t in weights
    )
    copied = not (training or any(t is not None and t.is_inference() for t in leaves))
    prepared = leaves.prepare() if copied else None
    name, threshold, product = parts_of(function)
    act = named(name)

    def dense() -> list[Tensor]:
        up, bias, down, down_bias, gate, gate_bias = leaves
        second = None if gate is None else F.linear(x, up, bias)
        first = F.linear(x, up, bias) if gate is None else F.linear(x, gate, gate_bias)
        a = hidden_layer(act, first, second, threshold, product)
        y = F.linear(a, down, down_bias)
        return [y, *(token_norm(a, order) for order in NORMS.values() if norms)]

    def other(name: str) -> list[Tensor]:
        read: dict[str, Tensor] = {}
        told = read.update if norms else None
        if training or name != "packed":  # whose layers stay where they are
            asks()
        y = run(name, x, leaves, function, prepared=prepared, on_norms=told)
        return [y, *read.values()]

    programs: dict[str, Callable[[], list[Tensor]]] = {"dense": dense}
    programs |= {name: partial(other, name) for name in names}
    if not training:
        return programs
    learning = [t for t in (x, *leaves) if t is not None and t.requires_grad]
    return {name: _step(program, learning) for name, program in programs.items()}


def _step(program: Callable[[], list[Tensor]], learning: list[Tensor]) -> Callable[[], object]:
    def step() -> None:
        # hooks of an outer checkpoint must not count what a trial saves
        same = torch.autograd.graph.saved_tensors_hooks(lambda t: t, lambda t: t)
        with torch.enable_grad(), same:
            # norms of a do not depend on down: no gradient of theirs where it alone learns
            outputs = [out for out in program() if out.requires_grad]
            torch.autograd.grad(outputs, learning, [torch.ones_like(out) for out in outputs])

    return step

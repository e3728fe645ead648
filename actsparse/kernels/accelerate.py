"""``accelerate``: MLP blocks run sparse, wherever that is faster, with the same numbers."""

from __future__ import annotations

from collections.abc import Hashable, Iterable
from dataclasses import dataclass, field
from typing import Any, Literal, Self, get_args

import torch
from torch import Tensor, nn

from actsparse.blocks.block import MLPBlock
from actsparse.blocks.chosen import blocks_of
from actsparse.blocks.exchange import OnNorms
from actsparse.blocks.site import Site, no_executor, site_of
from actsparse.kernels import build, ops
from actsparse.kernels.choose import CEILING, NEAR, TIMED, Trial, Trials, apart, programs_of
from actsparse.kernels.forms import is_silent
from actsparse.kernels.mlp import FEW, Prepared, prepare, sparse_mlp

Mode = Literal["auto", "sparse", "screened"]
EVERY = 64  # calls between two looks at the density where looking costs something
LEAST = 2**18  # entries of a weight; smaller blocks gain less than a call of few tokens costs
MANY = 2**24  # entries · tokens of a call that is worth a trial whatever the block's size


def accelerate(
    model: nn.Module,
    *,
    inputs: Any = None,
    blocks: Iterable[MLPBlock] | None = None,
    mode: Mode = "auto",
) -> Accelerated:
    """Run the MLP blocks of ``model`` sparse, exactly, in inference and training; in place.

    Parameters and state dicts stay as they are. A block runs by whichever is faster on this
    machine: its own layers, sparse products, or sparse products behind the int8 screen
    (:func:`sparse_mlp`). All three are timed on the block's own weights and tokens at the second
    call of a kind (training or not, about so many tokens), once for blocks of equal size and
    density within 25 %, and again when the density has moved that far. The layers also run while
    something attached needs all of the hidden layer, such as ``observe``, under autocast, and for
    any dtype but float32 on the CPU, and float32, bfloat16 and float16 on a GPU. Numbers differ
    from the layers' by the dtype's rounding; a product with an activation that is exactly zero is
    skipped even where its weight is NaN or infinite; dropout draws other random numbers. A
    gradient's own gradient (Hessian products) needs the layers: ``remove()`` first. Under
    ``torch.compile`` a block keeps to what it met when it was compiled, and in a CUDA graph, of 16
    tokens at most, to what it met before: run two calls first, or give ``mode``, since trials see
    what launches cost without a graph. Without gradients prepared copies of weights are used while
    those do not change; a change of few entries through ``weight.data`` goes unnoticed, on a GPU
    any such change, one through the weight itself does not.

    Args:
        model: any model, modified by ``sparsify`` or not, before or after.
        inputs: for finding the blocks, as :func:`actsparse.find_mlp_blocks` takes them.
        blocks: the blocks to run, instead. A model that ``sparsify`` has modified needs neither.
        mode: ``"auto"``; ``"sparse"`` or ``"screened"`` run so at any density and size.

    Returns:
        A handle; print it for choice, density and measured gain of each block, ``remove()`` gives
        the model back.

    Raises:
        ValueError: unknown mode; no block can be run so, with the reason for each.

    >>> mlp = nn.Sequential(nn.Linear(8, 32), nn.ReLU(), nn.Linear(32, 8))
    >>> x = torch.randn(4, 8)
    >>> y = mlp(x)
    >>> with accelerate(mlp, inputs=x, mode="sparse"):
    ...     torch.allclose(mlp(x), y, atol=1e-5)
    True
    """
    if mode not in get_args(Mode):
        raise ValueError(f"unknown mode {mode!r}; known: {', '.join(get_args(Mode))}")
    chosen = blocks_of(model, inputs, blocks, "accelerate")
    reasons = {block.up.name: _unfit(block) for block in chosen}
    fit = [block for block in chosen if reasons[block.up.name] is None]
    if not fit:
        said = "; ".join(f"{name}: {reason}" for name, reason in reasons.items())
        raise ValueError(f"no block can be run sparse: {said}")
    weights = sum(p.numel() for p in model.parameters()) - fit[0].up.weight.numel() * 2
    trials = Trials(4 * max(weights, 0))
    return Accelerated(fit, {n: r for n, r in reasons.items() if r is not None}, mode, trials)


def _unfit(block: MLPBlock) -> str | None:
    """Why a block keeps to its own layers, or None."""
    layers = [layer for layer in (block.up, block.gate, block.down) if layer is not None]
    for layer in layers:
        if type(layer.module).__name__ not in (
            "Linear",
            "Conv1D",
            "NonDynamicallyQuantizableLinear",
        ):
            return f"{layer.name} is a {type(layer.module).__name__}"
    if (reason := no_executor(block)) is not None:
        return reason
    function = site_function(block)
    if function is not None and not is_silent(function):
        return f"{function} is never exactly zero"
    return None


def site_function(block: MLPBlock) -> str | None:
    """The name of the φ in force; None while it is mixed, or unknown."""
    site = block.up.module.__dict__.get("_actsparse_site")
    return block.activation.function if site is None else site.function


class Accelerated:
    """What :func:`accelerate` has done; ``remove()`` undoes it."""

    def __init__(
        self, blocks: list[MLPBlock], left: dict[str, str], mode: Mode, trials: Trials
    ) -> None:
        self.left = left
        self.runs = {
            block.name or block.up.name: SparseRun(block, mode, trials) for block in blocks
        }
        for run in self.runs.values():
            site_of(run.block).execute(run)

    def table(self) -> list[dict[str, Any]]:
        """A row for each block and kind of call it has met, as JSON has it.

        ``block``, ``training``, ``tokens`` (of the last call), ``program``, ``density``, ``ratio``
        (dense time ÷ the program's in the trial; None where there was none), and ``calls`` by
        program.
        """
        return [
            {"block": name, **met.row()} for name, run in self.runs.items() for met in run.met()
        ]

    def remove(self) -> None:
        """Give the blocks their own layers back; twice is fine."""
        for run in self.runs.values():
            site_of(run.block).release(run)

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.remove()

    def __str__(self) -> str:
        return "\n".join(
            [
                *(f"{name}: {run}" for name, run in self.runs.items()),
                *(f"{name}: left alone, {why}" for name, why in self.left.items()),
            ]
        )


@dataclass
class Met:
    """What a block knows of one kind of call, and runs then."""

    training: bool
    tokens: int = 0
    program: str = "dense"
    density: float | None = None  # of the last calls
    decided_at: float | None = None  # the density when ``program`` was chosen
    trial: Trial | None = None
    calls: dict[str, int] = field(default_factory=dict)

    def count(self, active: int, entries: int) -> None:
        """Take the density of a call into account."""
        now = active / max(entries, 1)
        self.density = now if self.density is None else 0.75 * self.density + 0.25 * now

    @property
    def decided(self) -> bool:
        """Whether the density is about what it was when the program was chosen."""
        assert self.density is not None
        if self.decided_at is None:
            return False
        above = min(self.density, self.decided_at) > CEILING
        return above or apart(self.density, self.decided_at) <= NEAR

    def row(self) -> dict[str, Any]:
        """As :meth:`Accelerated.table` says."""
        ratio = None if self.trial is None else self.trial.ratio(self.program)
        known = {"training": self.training, "tokens": self.tokens, "program": self.program}
        return {**known, "density": self.density, "ratio": ratio, "calls": dict(self.calls)}

    def __str__(self) -> str:
        density = "unknown" if self.density is None else f"{self.density:.3f}"
        what = "training" if self.training else "forward"
        gain = "" if self.trial is None else f", {self.trial.ratio(self.program):.2f} × dense"
        calls = ", ".join(f"{count} {name}" for name, count in self.calls.items())
        return f"{what}, T = {self.tokens}: {self.program} at density {density}{gain} ({calls})"


class SparseRun:
    """The executor of one block: when it runs, and the run."""

    def __init__(self, block: MLPBlock, mode: Mode, trials: Trials) -> None:
        self.block, self.mode, self.trials = block, mode, trials
        self._met: dict[Hashable, Met] = {}
        self._now: Met | None = None
        self._program = "dense"
        self._promised: dict[Hashable, str] = {}
        self._ready: Prepared | None = None
        self._ready_for: tuple[Any, ...] = ()
        self._built = build.level() != "reference"
        self._capturing = False

    def met(self) -> list[Met]:
        """The kinds of calls there were."""
        return list(self._met.values())

    def takes(self, site: Site, x: Tensor) -> bool:
        """Whether this call runs sparse."""
        self._now = None
        gpu = ops.on_gpu(x, self.block.up.weight)
        fit = (
            (gpu or (x.dtype is torch.float32 and x.is_cpu))
            and is_silent(site.function)
            and not torch.is_autocast_enabled(x.device.type)
        )
        tokens, entries = x.numel() // max(x.shape[-1], 1), self.block.up.weight.numel()
        worthwhile = (gpu or self._built) and (entries >= LEAST or entries * tokens >= MANY)
        if not fit or (self.mode == "auto" and not worthwhile):
            return False
        if torch.compiler.is_compiling():  # compiled code keeps to what it met
            if self.mode != "auto":
                self._program = self.mode
            return self._program != "dense"
        learns, size = self._learns(x), min(tokens, TIMED).bit_length()
        kind = (learns, size, torch.get_num_threads(), site.wants_norms, x.device.type, x.dtype)
        now = self._met.get(kind)
        if now is None:
            now = self._met[kind] = Met(learns is not None)
        now.tokens, self._now = tokens, now
        self._capturing = gpu and x.is_cuda and torch.cuda.is_current_stream_capturing()
        if self._capturing and (learns is not None or tokens > FEW):
            return False  # the number of entries would stop the host
        if self._capturing and self.mode == "auto":  # a CUDA graph keeps to what was met before
            self._program = now.program
        elif site.recomputing and kind in self._promised:
            self._program = self._promised[kind]  # what was saved in the forward must fit
        else:
            self._decide(now, kind, site, x)
            self._program = self._promised[kind] = now.program
        return self._program != "dense"

    def _learns(self, x: Tensor) -> tuple[bool, ...] | None:
        if not torch.is_grad_enabled():
            return None
        block = self.block
        learns = (x.requires_grad, block.up.weight.requires_grad, block.down.weight.requires_grad)
        return learns if any(learns) else None

    def _decide(self, now: Met, kind: Hashable, site: Site, x: Tensor) -> None:
        function = site.function
        assert function is not None
        if self.mode != "auto":
            now.program = self.mode
            return
        if now.density is None or now.decided:
            return
        now.trial, now.decided_at = None, now.density
        if now.density <= CEILING:
            block = self.block
            alike = (kind, block.up.weight.shape, block.down.weight.shape, block.gated, function)
            now.trial = self.trials.near(alike, now.density)
            if now.trial is None:
                cold = now.tokens <= 16 and not now.training
                programs = programs_of(block, function, x, now.training, site.wants_norms)
                self.trials.device = x.device
                now.trial = self.trials.run(alike, now.density, programs, cold)
        now.program = "dense" if now.trial is None else now.trial.best(now.program)

    def __call__(self, site: Site, x: Tensor, on_norms: OnNorms | None) -> Tensor:
        """y of the block, by the sparse kernels."""
        block, now = self.block, self._now
        screen = self._program == "screened"
        count = None
        if now is not None:
            calls = now.calls[self._program] = now.calls.get(self._program, 0) + 1
            if (now.training or calls % EVERY == 1) and not self._capturing:
                entries = now.tokens * block.d_hidden
                count = lambda active: now.count(active, entries)  # noqa: E731
        parts = [part.module for part in block.between if part.module is not None]
        assert site.function is not None
        prepared = None
        if now is not None and not now.training:
            prepared = self._prepared(screen)
        return sparse_mlp(
            x,
            block.up.weight,
            block.up.bias,
            block.down.weight,
            block.down.bias,
            activation=site.function,
            gate=None if block.gate is None else block.gate.weight,
            gate_bias=None if block.gate is None else block.gate.bias,
            screen=screen,
            between=nn.Sequential(*parts) if parts and parts[0].training else None,
            prepared=prepared,
            on_active=count,
            on_norms=on_norms,
        )

    def _prepared(self, screen: bool) -> Prepared:
        """Copies of the weights for calls without gradients, made anew when a weight changes."""
        first = self.block.pre_activation.weight
        down = self.block.down.weight
        now = (*_print(first), *_print(down), screen)
        if self._ready is None or now != self._ready_for:
            wanted = first if screen or first.is_cuda else None
            self._ready, self._ready_for = prepare(down, wanted, screen=screen), now
        return self._ready

    def passed(self, site: Site, d: Tensor) -> None:
        """A call by the layers: count its zeros, now and then."""
        now = self._now
        if now is None or torch.compiler.is_compiling() or self._capturing:
            return
        if now.density is None or now.calls.get("dense", 0) % EVERY == 0:
            kept = 1.0
            for part in self.block.between:
                if isinstance(part.module, nn.Dropout) and part.module.training:
                    kept *= 1 - part.module.p
            active = int(torch.count_nonzero(d))
            now.count(round(active / kept) if kept else d.numel(), d.numel())
        now.calls["dense"] = now.calls.get("dense", 0) + 1

    def __str__(self) -> str:
        return "; ".join(map(str, self._met.values())) or "no calls yet"


def _print(weight: Tensor) -> tuple[int, ...]:
    """What tells that a weight has changed; ``weight.data`` can change without a new version."""
    version = 0 if weight.is_inference() else weight._version
    return version, weight.data_ptr(), ops.fingerprint(weight)

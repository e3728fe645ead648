"""Decide how each call of a block runs: its own layers, sparse products, or the screen first."""

from __future__ import annotations

import threading
from collections.abc import Callable, Hashable
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor, nn

from actsparse.blocks.block import Layer, MLPBlock
from actsparse.blocks.replace_forward import foreign_mode
from actsparse.blocks.site import Site, site_of
from actsparse.blocks.stages import AtOnce, Cut, OnNorms, Plan
from actsparse.kernels import backends, build
from actsparse.kernels.at_once import OwnLayers, PackedLayers, SparseLayers
from actsparse.kernels.choose import (
    CEILING,
    CEILING_CUT,
    COLD,
    TIMED,
    Trial,
    Trials,
    programs_of,
)
from actsparse.kernels.fit import Fit
from actsparse.kernels.forms import FEW
from actsparse.kernels.in_compiled import ByWeights, run_compiled
from actsparse.kernels.met import EVERY, RESTING, Known, Last, Met
from actsparse.kernels.prepared import Prepared, fingerprint
from actsparse.kernels.programs import DENSE, Weights, copies, function_at, known, run

Mode = Literal["auto", "dense", "sparse", "screened"]
TIMED_MODES = ("auto", "dense")  # the others are the name of the program
SHAPES = 256  # shapes of calls that are known; more are met anew
LEAST = 2**18  # entries of a weight; smaller blocks gain less than a call of few tokens costs
MANY = 2**24  # entries · tokens of a call that is worth a trial whatever the block's size

_timing = threading.Lock()  # one trial at a time, or they would time each other


@dataclass(slots=True)  # frozen ones take a microsecond more to make
class CallPlan:
    """How one call runs; nothing of it is kept anywhere else, so that calls may overlap."""

    of: SparseRun
    program: str
    dtype: torch.dtype  # that its products have
    met: Met | None = None  # None: in compiled code, which counts nothing
    looks: bool = True  # whether the host may wait for a number

    @property
    def runs(self) -> bool:
        """Whether the kernels run."""
        return self.program != "dense"

    def __call__(self, site: Site, x: Tensor, on_norms: OnNorms | None) -> Tensor:
        """y of the block, by the sparse kernels."""
        block, met = self.of.block, self.met
        count: Callable[[int], None] | None = None
        prepared = None
        if met is not None:
            self.of.proven |= block.up.module.training
            before = met.call(self.program)
            if (met.training or before % EVERY == 0) and self.looks:
                entries = x.shape[:-1].numel() * block.d_hidden
                count = lambda active: met.count(active, entries)  # noqa: E731
        weights = Weights.of(block)
        if met is not None and not met.training:
            prepared = self.of.prepared(self.dtype, weights)
        if torch.is_autocast_enabled(x.device.type):  # as it does for the layers
            x, weights = x.to(self.dtype), weights.to(self.dtype)
        active = []
        if block.between:
            dropouts = [part.module for part in block.between if part.module is not None]
            active = [module for module in dropouts if module.training]
        function = function_at(site)
        assert function is not None
        plain = not (torch.is_grad_enabled() or active or on_norms is not None)
        if met is None and plain and x.is_cpu and not torch.is_autocast_enabled("cpu"):
            return run_compiled(self.program, x, weights, function)
        if prepared is not None and met is not None and x.is_cpu:
            self._at_once(site, x, met, prepared)
        return run(
            self.program,
            x,
            weights,
            function,
            between=nn.Sequential(*active) if active else None,
            prepared=prepared,
            on_active=count,
            on_norms=on_norms,
        )

    def _at_once(self, site: Site, x: Tensor, met: Met, prepared: Prepared) -> None:
        """Let the calls to come that are like this one do without a plan."""
        way: AtOnce | None
        if self.program == "packed":
            way = PackedLayers.of(self.of.block, self.of.last, met, prepared, x.shape[:-1].numel())
        else:
            way = SparseLayers(self.of, site, met, prepared, x, self.program)
        site.at_once(x, way)

    def passed(self, d: Tensor) -> None:
        """The layers ran: count their zeros, now and then, where that may decide anything."""
        met = self.met
        if met is None:
            return
        before = met.call("dense")
        if met.reason is not None or not self.looks:
            return
        if met.density is None or before % EVERY == 0:
            kept = 1.0
            for part in self.of.block.between:
                if isinstance(part.module, nn.Dropout) and part.module.training:
                    kept *= 1 - part.module.p
            active = int(torch.count_nonzero(d))
            met.count(round(active / kept) if kept else d.numel(), d.numel())


class SparseRun(ByWeights):
    """The executor of one block: it makes a plan for each call."""

    def __init__(self, block: MLPBlock, mode: Mode, trials: Trials, room: float) -> None:
        self.block, self.mode, self.trials, self.room = block, mode, trials, room
        self.fit = Fit(block, dense=mode == "dense")
        self._met: dict[Hashable, Met] = {}
        self.proven = False  # whether a call in training mode ran by the kernels, not compiled
        self.last = Last()
        self._promised: dict[Hashable, str] = {}
        self._known: dict[Hashable, Known] = {}  # by what tells calls apart
        self._ready: dict[torch.dtype, tuple[tuple[int, ...], Prepared]] = {}

    def met(self) -> list[Met]:
        """The kinds of calls there were."""
        return list(self._met.values())

    def plan(self, site: Site, x: Tensor) -> Plan:
        """How this call is to run."""
        if torch.compiler.is_compiling():  # compiled code keeps to what it met
            "".join(map(str, self.fit.numbers()))  # read, so that the compiler guards them
            keeps = self._fixed_reason() or self._unproven() or _unfit_call(site, x, self.block.up)
            fixed = self.last.program if self.mode in TIMED_MODES else self.mode
            return CallPlan(self, "dense" if keeps else fixed, _dtype_of(x))
        recomputing = site.recomputing
        like = (
            x.shape, x.dtype, x.device, torch.is_grad_enabled(), torch.get_num_threads(),
            torch.is_autocast_enabled(x.device.type), site.wants_norms,
        )  # fmt: skip
        known = None if recomputing else self._known.get(like)
        # where the layers won they run at once, whatever hangs on them: they are always right
        if known is not None and known.rests and known.met.rests():
            known.met.tokens, self.last.program = known.tokens, "dense"
            if not known.met.training:
                site.at_once(x, OwnLayers(self.last, known.met, known.tokens))
            return RESTING
        keeps = self._questions(site, x)
        if known is not None and keeps is None and not known.rests:
            met = known.met
            self._decide(met, known.kind, site, x)
            if met.program != "dense":
                met.tokens = known.tokens
                self._promised[known.kind] = self.last.program = met.program
                return CallPlan(self, met.program, met.dtype, met)
        return self._plan_anew(site, x, like, keeps, recomputing)

    def _plan_anew(
        self, site: Site, x: Tensor, like: Hashable, keeps: str | None, recomputing: bool
    ) -> CallPlan:
        """How a call is to run that was not met so before; ``keeps``: why by its layers, if so."""
        tokens, dtype = x.shape[:-1].numel(), _dtype_of(x)
        small = None if keeps else self._too_small(x, tokens)
        keeps = keeps or small
        learns, size = self._learns(x), min(tokens, TIMED).bit_length()
        capturing = x.is_cuda and torch.cuda.is_current_stream_capturing()
        if capturing and (learns is not None or tokens > FEW):
            keeps = keeps or "a CUDA graph cannot wait for the number of entries"
        kind = (
            learns, size, torch.get_num_threads(), site.wants_norms, x.device.type, dtype, keeps,
        )  # fmt: skip
        met = self._met.setdefault(kind, Met(learns is not None, dtype, reason=keeps))
        met.tokens = tokens
        if keeps:
            program = "dense"
        elif recomputing and kind in self._promised:
            program = self._promised[kind]  # what was saved in the forward must fit
        else:
            if (
                not capturing or self.mode not in TIMED_MODES
            ):  # a graph keeps to what was met before
                self._decide(met, kind, site, x)
            program = self._promised[kind] = self.last.program = met.program
        forward = program != "dense" and not (torch.is_grad_enabled() or x.is_cuda)
        rests = program == "dense" and (small is not None or (keeps is None and met.decided))
        if (forward or rests) and not recomputing:
            if len(self._known) >= SHAPES:
                self._known.clear()
            self._known[like] = Known(kind, met, tokens, rests)
        elif not recomputing:
            self._known.pop(like, None)
        return CallPlan(self, program, dtype, met, looks=not capturing)

    def _questions(self, site: Site, x: Tensor) -> str | None:
        """Why this call, which nobody compiles, is for the layers, or None."""
        if foreign_mode():
            return "under a TorchFunctionMode or TorchDispatchMode, which would miss operations"
        return self.fit.reason() or _unfit_call(site, x, self.block.up)

    def _fixed_reason(self) -> str | None:
        return self.fit.reason()

    # a compiler takes the answer for granted: hooks and types are what it guards, or cannot see
    _fixed_reason._dynamo_marked_constant = True  # type: ignore[attr-defined]

    def _unproven(self) -> str | None:
        """Why compiled code keeps to the layers in training mode, or None.

        Blocks were found in evaluation. What a forward does to the hidden layer in training alone
        shows in a call that is not compiled, by the ghost that it computes with.
        """
        if self.proven or not self.block.up.module.training:
            return None
        return "compiled code trains it sparse after one training call that is not compiled"

    def _too_small(self, x: Tensor, tokens: int) -> str | None:
        """Why ``auto`` tries nothing on this call, or None."""
        if self.mode not in TIMED_MODES:
            return None
        entries = self.block.up.weight.numel()
        if not (backends.on_gpu(x) or build.level() != "reference"):
            return "the kernels are not compiled here"
        if entries < LEAST and entries * tokens < MANY:
            return f"too small: {entries} weights in up, {tokens} tokens"
        return None

    def _learns(self, x: Tensor) -> tuple[bool, ...] | None:
        """Whether x, up and down learn, None if neither they do nor anything else in the block."""
        if not torch.is_grad_enabled():
            return None
        weights = [
            each.module._parameters.get("weight") for each in (self.block.up, self.block.down)
        ]
        learns = tuple(t is not None and t.requires_grad for t in (x, *weights))
        rest = (t is not None and t.requires_grad for t in Weights.of(self.block))
        return learns if any(learns) or any(rest) else None

    def _decide(self, met: Met, kind: Hashable, site: Site, x: Tensor) -> None:
        if self.mode not in TIMED_MODES:
            met.program = self.mode
            return
        density, function, block = met.density, function_at(site), self.block
        cuts = isinstance(function, Cut)
        met.ceiling = CEILING_CUT if cuts and met.tokens <= FEW else CEILING
        if density is None or met.decided or not _timing.acquire(blocking=False):
            return  # another thread is at it: until then as before
        try:
            assert function is not None
            shapes = (block.up.weight.shape, block.down.weight.shape, block.gated)
            x = x.to(met.dtype)
            names = self._tried(met, function, x, density)
            # a cut without its thresholds, which may change between calls
            what: Hashable = function
            if isinstance(function, Cut):
                what = function.function, function.form
            alike = (kind, shapes, what, *names)
            trial = self.trials.near(alike, density)
            if trial is None:
                trial = self._try(met, alike, names, site, x)
            met.program = trial.best(met.program)
            met.trial, met.decided_at = trial, density
            if not met.training:  # copies that only another program needed
                self._ready.clear()
                site.at_once(None)
        finally:
            _timing.release()

    def _tried(self, met: Met, function: str | Cut, x: Tensor, density: float) -> list[str]:
        """The programs worth timing, whose copies there is room for."""
        room = self.room * Weights.of(self.block).nbytes
        return [
            name
            for name in known(x, function, met.training)
            if ((density <= met.ceiling and self.mode == "auto") or name in DENSE)
            and (met.training or sum(self._needed(met, name).values()) <= room)
        ]

    def _try(self, met: Met, alike: Hashable, names: list[str], site: Site, x: Tensor) -> Trial:
        assert met.density is not None
        function = function_at(site)
        assert function is not None
        weights = Weights.of(self.block).to(met.dtype)
        cold = met.tokens <= COLD and not met.training
        norms, dtype = site.wants_norms, met.dtype

        def asks() -> None:
            self._questions(site, x)
            if not met.training:
                self.prepared(dtype, Weights.of(self.block))

        programs = programs_of(names, weights, function, x, met.training, norms, asks)
        return self.trials.run(alike, met.density, programs, cold, x.device)

    def _needed(self, other: Met | None = None, program: str = "dense") -> dict[str, int]:
        """Bytes of each copy that calls without gradients keep, if ``other`` ran by ``program``."""
        needed: dict[str, int] = {}
        for met in self.met():
            if not met.training:
                runs = program if met is other else met.program
                for name, size in copies(runs, Weights.of(self.block), met.tokens).items():
                    needed[f"{met.dtype} {name}"] = size
        return needed

    def prepared(self, dtype: torch.dtype, weights: Weights) -> Prepared | None:
        """Copies of the weights for calls without gradients, made anew when a weight changes.

        None where changes leave no trace.
        """
        up, down, gate = weights.up, weights.down, weights.gate
        try:
            versions = up._version, down._version, 0 if gate is None else gate._version
        except RuntimeError:  # made in inference mode
            return None
        # what tells of changes; those of ``weight.data`` have no new version
        places = up.data_ptr(), down.data_ptr(), 0 if gate is None else gate.data_ptr()
        now = *versions, *places, fingerprint(up, down, gate)
        ready = self._ready.get(dtype)
        if ready is None or now != ready[0]:
            ready = self._ready[dtype] = now, weights.to(dtype).prepare()
            site_of(self.block).at_once(None)  # which holds the copies of before
        return ready[1]

    def __str__(self) -> str:
        said = [*map(str, self._met.values())] or ["no calls yet"]
        if held := sum(prepared.bytes() for _, prepared in self._ready.values()):
            said.append(f"copies of its weights take {held / 1e6:.1f} MB")
        trained = any(met.training for met in self._met.values())
        reason = self.fit.reason() or (None if trained else self._unproven())
        if reason is not None and not any(reason in each for each in said):
            said.append(f"now its layers, {reason}")
        return "; ".join(said)


def _unfit_call(site: Site, x: Tensor, up: Layer) -> str | None:
    """Why this call is for the layers, or None."""
    if site.needs_layers:
        return (
            "what is attached reads or changes the hidden layer (an open session of observe, until "
            "its close(), or a penalty in training)"
        )
    if site.function is None and site.cut is None:
        return "its φ is being mixed, or has no name"
    weight, dtype = up.weight, _dtype_of(x)
    cast = torch.is_autocast_enabled(x.device.type)
    if cast and not (x.is_cpu and x.dtype in backends.CPU and weight.dtype in backends.CPU):
        return "under autocast"
    if not ((x.is_cpu and dtype in backends.CPU) or backends.on_gpu(x, weight)):
        return f"{str(dtype).removeprefix('torch.')} on {x.device.type} has no kernels here"
    if not cast and (dtype is not weight.dtype or x.device != weight.device):
        return f"its input is {x.dtype} on {x.device}, up {weight.dtype} on {weight.device}"
    if torch.compiler.is_compiling():
        return None
    if type(x) not in (Tensor, nn.Parameter):
        return f"its input is a {type(x).__name__}, not a plain tensor"
    if torch._C._are_functorch_transforms_active():
        return "inside torch.func transforms (vmap, grad, jvp)"
    if torch.autograd.forward_ad._current_level >= 0:
        return "under forward-mode differentiation"
    return "while torch.jit traces" if torch._C._is_tracing() else None


def _dtype_of(x: Tensor) -> torch.dtype:
    """The dtype of the block's products."""
    device = x.device.type
    return torch.get_autocast_dtype(device) if torch.is_autocast_enabled(device) else x.dtype

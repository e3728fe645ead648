"""``accelerate``: MLP blocks run sparse, wherever that is faster, with the same numbers."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any, Literal, Self

import torch
from torch import Tensor, nn

from actsparse.activations import ACTIVATIONS
from actsparse.blocks.block import MLPBlock
from actsparse.blocks.chosen import blocks_of
from actsparse.blocks.site import Site, no_executor, site_of
from actsparse.kernels import build
from actsparse.kernels.mlp import Prepared, prepare, sparse_mlp

Mode = Literal["auto", "sparse"]
EVERY = 64  # calls between two looks at the density
# Densities below which sparse was faster than dense, and the screen faster than sparse, in
# `actsparse bench mlp` with AVX-512; decoding is up to 16 tokens.
SPARSE = {"decode": 0.2, "forward": 0.2, "training": 0.2}
SCREEN = {"decode": 0.2, "forward": 0.1, "training": 0.06}
SLACK = 1.2  # a block leaves sparse execution at this multiple of the limit it enters below
LEAST = 2**19  # entries of a weight; smaller blocks gain less than a call costs


def accelerate(
    model: nn.Module,
    *,
    inputs: Any = None,
    blocks: Iterable[MLPBlock] | None = None,
    mode: Mode = "auto",
) -> Accelerated:
    """Run the MLP blocks of ``model`` sparse, exactly, in inference and training; in place.

    Parameters and state dicts stay as they are. A block runs sparse while its density is low
    enough for that to be faster, which is looked at every 64 calls, and by its own layers
    otherwise: also while something attached needs all of the hidden layer, such as ``observe``, in
    any dtype but float32, under autocast, and off the CPU. Numbers differ from the layers' by
    float32 rounding; a product with an activation that is exactly zero is skipped even where its
    weight is NaN or infinite; dropout draws other random numbers. A gradient's own gradient
    (Hessian products) needs the layers: ``remove()`` first.

    Args:
        model: any model, modified by ``sparsify`` or not, before or after.
        inputs: for finding the blocks, as :func:`actsparse.find_mlp_blocks` takes them.
        blocks: the blocks to run, instead. A model that ``sparsify`` has modified needs neither.
        mode: ``"auto"``, or ``"sparse"`` at any density.

    Returns:
        A handle; print it for what is chosen, ``remove()`` gives the model back.

    Raises:
        ValueError: unknown mode; no block can be run so, with the reason for each.

    >>> mlp = nn.Sequential(nn.Linear(8, 32), nn.ReLU(), nn.Linear(32, 8))
    >>> x = torch.randn(4, 8)
    >>> y = mlp(x)
    >>> with accelerate(mlp, inputs=x, mode="sparse"):
    ...     torch.allclose(mlp(x), y, atol=1e-5)
    True
    """
    if mode not in ("auto", "sparse"):
        raise ValueError(f"unknown mode {mode!r}; known: auto, sparse")
    chosen = blocks_of(model, inputs, blocks, "accelerate")
    reasons = {block.up.name: _unfit(block) for block in chosen}
    fit = [block for block in chosen if reasons[block.up.name] is None]
    if not fit:
        said = "; ".join(f"{name}: {reason}" for name, reason in reasons.items())
        raise ValueError(f"no block can be run sparse: {said}")
    return Accelerated(fit, {n: r for n, r in reasons.items() if r is not None}, mode)


def _unfit(block: MLPBlock) -> str | None:
    """Why a block keeps to its own layers, or None."""
    layers = [layer for layer in (block.up, block.gate, block.down) if layer is not None]
    for layer in layers:
        if layer.rows is not None:
            return "up and gate are one layer"
        if type(layer.module).__name__ not in (
            "Linear",
            "Conv1D",
            "NonDynamicallyQuantizableLinear",
        ):
            return f"{layer.name} is a {type(layer.module).__name__}"
    if (reason := no_executor(block)) is not None:
        return reason
    function = site_function(block)
    if function is not None and not (function in ACTIVATIONS and ACTIVATIONS[function].silent):
        return f"{function} is never exactly zero"
    return None


def site_function(block: MLPBlock) -> str | None:
    """The name of the φ in force; None while it is mixed, or unknown."""
    site = block.up.module.__dict__.get("_actsparse_site")
    return block.activation.function if site is None else site.function


class Accelerated:
    """What :func:`accelerate` has done; ``remove()`` undoes it."""

    def __init__(self, blocks: list[MLPBlock], left: dict[str, str], mode: Mode) -> None:
        self.left = left
        self.runs = {block.name or block.up.name: SparseRun(block, mode) for block in blocks}
        for run in self.runs.values():
            site_of(run.block).execute(run)

    def remove(self) -> None:
        """Give the blocks their own layers back; twice is fine."""
        for run in self.runs.values():
            site_of(run.block).release(run)

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.remove()

    def __str__(self) -> str:
        lines = [f"{name}: {run}" for name, run in self.runs.items()]
        return "\n".join(
            [*lines, *(f"{name}: left alone, {why}" for name, why in self.left.items())]
        )


class SparseRun:
    """The executor of one block: when it runs, and the run."""

    def __init__(self, block: MLPBlock, mode: Mode) -> None:
        self.block, self.mode = block, mode
        self.calls = {"dense": 0, "sparse": 0, "screened": 0}
        self.density: float | None = None
        self._ready: Prepared | None = None
        self._ready_for: tuple[Any, ...] = ()
        self._level = build.level()
        self._worthwhile = block.up.weight.numel() >= LEAST and self._level != "reference"
        self._kind = ""
        self._sparse = False

    def takes(self, site: Site, x: Tensor) -> bool:
        """Whether this call runs sparse."""
        function = site.function
        fit = (
            x.dtype is torch.float32
            and x.is_cpu
            and not torch.is_autocast_enabled("cpu")
            and function in ACTIVATIONS
            and ACTIVATIONS[function].silent
        )
        if not fit:
            return False
        rows = x.numel() // x.shape[-1]
        if torch.is_grad_enabled() and self.block.up.weight.requires_grad:
            self._kind = "training"
        else:
            self._kind = "decode" if rows <= 16 else "forward"
        if self.mode == "auto" and not self._worthwhile:
            return False
        if self.mode == "sparse" or torch.compiler.is_compiling():
            return self.mode == "sparse" or self._sparse  # compiled code keeps to what it met
        if self.density is None or sum(self.calls.values()) % EVERY == 0:
            return False  # by the layers, whose zeros are counted
        self._sparse = self.density < SPARSE[self._kind] * (SLACK if self._sparse else 1)
        return self._sparse

    def __call__(self, site: Site, x: Tensor) -> Tensor:
        """y of the block, by the sparse kernels."""
        block = self.block
        # the int8 products of older CPUs pay for few tokens only, or not at all
        pays = self._level == "avx512" or (self._level == "avx2" and self._kind == "decode")
        screen = pays and self.density is not None and self.density < SCREEN[self._kind]
        self._count("screened" if screen else "sparse")
        parts = [part.module for part in block.between if part.module is not None]
        assert site.function is not None
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
            prepared=None if self._kind == "training" else self._prepared(screen),
        )

    def _prepared(self, screen: bool) -> Prepared | None:
        """Copies of the weights for calls without gradients, made anew when a weight changes."""
        first = self.block.pre_activation.weight
        down = self.block.down.weight
        if torch.compiler.is_compiling():
            return None
        now = (*_print(first), *_print(down), screen)
        if self._ready is None or now != self._ready_for:
            self._ready, self._ready_for = prepare(down, first if screen else None), now
        return self._ready

    def passed(self, site: Site, d: Tensor) -> None:
        """A call by the layers: count its zeros, now and then."""
        if torch.compiler.is_compiling():
            return
        if sum(self.calls.values()) % EVERY == 0 or self.density is None:
            kept = 1.0
            for part in self.block.between:
                if isinstance(part.module, nn.Dropout) and part.module.training:
                    kept *= 1 - part.module.p
            self.density = float((d != 0).double().mean()) / kept if kept else 1.0
        self._count("dense")

    def _count(self, kind: str) -> None:
        if not torch.compiler.is_compiling():  # it would compile anew at every call
            self.calls[kind] += 1

    def __str__(self) -> str:
        density = "unknown" if self.density is None else f"{self.density:.3f}"
        calls = ", ".join(f"{count} {name}" for name, count in self.calls.items() if count)
        return f"density {density}; calls: {calls or 'none'}"


def _print(weight: Tensor) -> tuple[Any, ...]:
    """What tells that a weight has changed; ``weight.data`` can change without a new version."""
    flat = (
        weight.detach().t().reshape(-1) if weight.t().is_contiguous() else weight.detach().flatten()
    )
    sample = flat[:: max(len(flat) // 251, 1)]  # views: no copy of the weight
    return weight._version, weight.data_ptr(), float(sample.sum()), float(sample.square().sum())

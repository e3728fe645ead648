"""``accelerate``: run MLP blocks sparse where that is faster, with the same results."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any, Self, get_args

from torch import nn

from actsparse import html
from actsparse.blocks.block import MLPBlock
from actsparse.blocks.resolve import blocks_of
from actsparse.blocks.site import site_of
from actsparse.kernels.build import level
from actsparse.kernels.choose import Trials
from actsparse.kernels.fit import Fit
from actsparse.kernels.plan import Mode, SparseRun


def accelerate(
    model: nn.Module,
    *,
    inputs: Any = None,
    blocks: Iterable[MLPBlock] | None = None,
    mode: Mode = "auto",
    max_extra_memory: float = 1.35,
) -> Accelerated:
    """Run the MLP blocks of a model sparse where that is faster, with the same results.

    The model is changed in place; parameters and state dicts stay as they are. It works in
    inference and in training.

    *Which program runs.* A block runs by whichever is fastest on this machine: ``dense``, its own
    layers; ``onednn`` and ``packed``, all products by oneDNN, of the weights and (in inference) of
    packed copies of them; ``sparse`` products; or those behind the int8 screen, ``screened``
    (:func:`sparse_mlp`). They are timed on the block's own weights and tokens at the second call of
    a kind (training or not, about so many tokens). Blocks of equal size, with densities within
    25 %, share one timing. They are timed again when the density has moved by more than that.

    *Activations that are never zero.* A block with SiLU, GELU or the like can run sparse while
    thresholds cut its activation. The dense programs cut it at the same thresholds.

    *When the layers run.* The block's own layers run, and print says why, while something needs all
    of the hidden layer (``observe``, a hook of yours); where a layer was exchanged or wrapped;
    under ``torch.func`` and ``torch.jit.trace``, and on a GPU under autocast; and for dtypes other
    than float32 and bfloat16 on the CPU, and float32, bfloat16 and float16 on a GPU. Under autocast
    on the CPU the products are bfloat16, as the layers' are.

    *What differs.* Results differ from the layers' by the rounding of the dtype. Where thresholds
    cut, an activation as close to its threshold as that may be kept by one program and dropped by
    another, which in a deep model changes single outputs by more than rounding. A product with an
    activation that is exactly zero is skipped even where its weight is NaN or infinite. Dropout
    draws other random numbers. Second derivatives (Hessian products) need the layers: call
    ``remove()`` first.

    *Compiling.* Under ``torch.compile`` a block keeps the program it had when it was compiled. In a
    CUDA graph, which holds 16 tokens at most, it keeps the one it had before. Run two calls first,
    or give ``mode``, because the timings include launch costs that a graph does not have. Compiled
    training runs sparse after one training call that was not compiled.

    *Copies of weights.* Without gradients prepared copies of the weights are used until the weights
    change. A change through the weight itself is noticed. A change through ``weight.data`` is not
    noticed on a GPU, nor on the CPU if it is of few entries. Weights made in inference mode are
    copied at each call, because their changes leave no trace.

    Several threads may call one model at the same time.

    Args:
        model: any model, modified by ``sparsify`` or not, before or after.
        inputs: for finding the blocks, as :func:`actsparse.find_mlp_blocks` takes them.
        blocks: the blocks to run, instead. A model that ``sparsify`` has modified needs neither.
        mode: ``"auto"`` times the programs. ``"dense"`` times those that multiply all of it: the
            best that could be run instead, to compare with, for any φ. ``"sparse"`` and
            ``"screened"`` run that program at any density and size.
        max_extra_memory: what copies of a block's weights may take in inference, as a multiple of
            those weights. ``"auto"`` does not try programs whose copies would take more; 0 leaves
            those that need none.

    Returns:
        A handle. Print it for the program, density and measured speed-up of each block;
        ``remove()`` restores the model.

    Raises:
        ValueError: the mode is unknown, or no block can run sparse; the message says why for each.

    >>> import torch
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
    reasons = {block.up.name: Fit(block, mode == "dense").refusal() for block in chosen}
    fit = [block for block in chosen if reasons[block.up.name] is None]
    if not fit:
        said = "; ".join(f"{name}: {reason}" for name, reason in reasons.items())
        raise ValueError(f"no block can be run sparse: {said}")
    if not max_extra_memory >= 0:
        raise ValueError(f"max_extra_memory is {max_extra_memory}; it must be 0 or more")
    weights = sum(p.numel() for p in model.parameters()) - fit[0].up.weight.numel() * 2
    trials = Trials(4 * max(weights, 0))
    left = {name: reason for name, reason in reasons.items() if reason is not None}
    return Accelerated(fit, left, mode, trials, max_extra_memory)


class Accelerated:
    """The handle that :func:`accelerate` returns: print it to see how each block runs.

    As a context manager it restores the model at the end.

    Args:
        blocks: the blocks that can run sparse.
        left: the other blocks by name, with the reason for each.
        mode: as for :func:`accelerate`.
        trials: the timings that the blocks share.
        room: as ``max_extra_memory`` of :func:`accelerate`.

    >>> import torch
    >>> mlp = nn.Sequential(nn.Linear(8, 32), nn.ReLU(), nn.Linear(32, 8))
    >>> x = torch.randn(4, 8)
    >>> handle = accelerate(mlp, inputs=x, mode="sparse")
    >>> with torch.no_grad():
    ...     y = mlp(x)
    >>> handle.ran()
    {'0': 'sparse'}
    >>> len(handle.lines())
    1
    >>> handle.table()[0]["tokens"]
    4
    >>> handle.remove()
    """

    def __init__(
        self,
        blocks: list[MLPBlock],
        left: dict[str, str],
        mode: Mode,
        trials: Trials,
        room: float = 1.35,
    ) -> None:
        self.left = left
        self.runs = {
            block.name or block.up.name: SparseRun(block, mode, trials, room) for block in blocks
        }
        for run in self.runs.values():
            site_of(run.block).execute(run)

    def table(self) -> list[dict[str, Any]]:
        """One row for each block and each kind of call that it has had.

        Returns:
            Rows for JSON: ``block``; ``training``; ``tokens`` of the last call; ``program``;
            ``reason`` (why the layers run where nothing was timed, else None); ``density``;
            ``ratio`` (dense time divided by the program's time when it was timed; None if it was
            not); ``calls`` by program.
        """
        return [
            {"block": name, **met.row()} for name, run in self.runs.items() for met in run.met()
        ]

    def ran(self) -> dict[str, str]:
        """How the last call of each block ran.

        Returns:
            By block, the name of the program, or ``dense`` with the reason.
        """
        how = {name: f"dense: {why}" for name, why in self.left.items()}
        for row in self.table():
            why = row["reason"] or "no other program was clearly faster"
            how[row["block"]] = f"dense: {why}" if row["program"] == "dense" else row["program"]
        return how

    def remove(self) -> None:
        """Let the blocks run by their own layers again; calling it twice does no harm."""
        for run in self.runs.values():
            site_of(run.block).release(run)

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.remove()

    def __repr__(self) -> str:
        alone = f", {len(self.left)} left alone" if self.left else ""
        return f"<Accelerated: {len(self.runs)} MLP blocks{alone}>"

    def _repr_html_(self) -> str:
        heads = ("block", "training", "tokens", "program", "density", "ratio", "reason")
        rows = [[row[head] for head in heads] for row in self.table()]
        alone = (f"{name}: left alone, {why}" for name, why in self.left.items())
        return html.table(heads, rows, repr(self).strip("<>")) + html.lines(alone)

    def __str__(self) -> str:
        return "\n".join([*self.lines(), *self._kernels()])

    def lines(self) -> list[str]:
        """How each block runs, in words.

        Returns:
            A line for each block, its name first.
        """
        runs = (f"{name}: {run}" for name, run in self.runs.items())
        return [*runs, *(f"{name}: left alone, {why}" for name, why in self.left.items())]

    def _kernels(self) -> list[str]:
        """The line about the compiled kernels, if a block is on the CPU."""
        devices = {run.block.up.weight.device.type for run in self.runs.values()}
        names = {"reference": "none, so that PyTorch's own operators run"}
        return [f"native kernels: {names.get(level(), level())}"] if "cpu" in devices else []

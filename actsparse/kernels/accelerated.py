"""``accelerate``: MLP blocks run sparse, wherever that is faster, with the same numbers."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any, Self, get_args

from torch import nn

from actsparse.blocks.block import MLPBlock
from actsparse.blocks.resolve import blocks_of
from actsparse.blocks.site import site_of
from actsparse.kernels.choose import Trials
from actsparse.kernels.fit import Fit
from actsparse.kernels.plan import Mode, SparseRun


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
    density within 25 %, and again when the density has moved that far. The layers run, and print
    says why, while something needs all of the hidden layer (``observe``, a hook of yours), where a
    layer was exchanged or wrapped, under autocast, ``torch.func`` and ``torch.jit.trace``, and for
    any dtype but float32 on the CPU, and float32, bfloat16 and float16 on a GPU. Numbers differ
    from the layers' by the dtype's rounding; a product with an activation that is exactly zero is
    skipped even where its weight is NaN or infinite; dropout draws other random numbers. A
    gradient's own gradient (Hessian products) needs the layers: ``remove()`` first. Under
    ``torch.compile`` a block keeps to what it met when it was compiled, and in a CUDA graph, of 16
    tokens at most, to what it met before: run two calls first, or give ``mode``, since trials see
    what launches cost without a graph. Compiled training runs sparse after one training call that
    was not compiled. Without gradients prepared copies of weights are used while
    those do not change; a change of few entries through ``weight.data`` goes unnoticed, on a GPU
    any such change, one through the weight itself does not. Weights made in inference mode, whose
    changes leave no trace, are copied at each call. Threads may call one model at a time.

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
    reasons = {block.up.name: Fit(block).refusal() for block in chosen}
    fit = [block for block in chosen if reasons[block.up.name] is None]
    if not fit:
        said = "; ".join(f"{name}: {reason}" for name, reason in reasons.items())
        raise ValueError(f"no block can be run sparse: {said}")
    weights = sum(p.numel() for p in model.parameters()) - fit[0].up.weight.numel() * 2
    trials = Trials(4 * max(weights, 0))
    return Accelerated(fit, {n: r for n, r in reasons.items() if r is not None}, mode, trials)


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

        ``block``, ``training``, ``tokens`` (of the last call), ``program``, ``reason`` (why the
        layers run where nothing was timed, else None), ``density``, ``ratio`` (dense time ÷ the
        program's in the trial; None where there was none), and ``calls`` by program.
        """
        return [
            {"block": name, **met.row()} for name, run in self.runs.items() for met in run.met()
        ]

    def ran(self) -> dict[str, str]:
        """By block, how its last call ran: a program, or ``dense`` and why."""
        how = {name: f"dense: {why}" for name, why in self.left.items()}
        for row in self.table():
            why = row["reason"] or "sparse was not clearly faster"
            how[row["block"]] = f"dense: {why}" if row["program"] == "dense" else row["program"]
        return how

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

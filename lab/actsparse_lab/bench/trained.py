"""Trained models in inference: dense time ÷ accelerated, of the whole and of the MLPs alone."""

from __future__ import annotations

import copy
import statistics
from collections import Counter
from collections.abc import Callable
from dataclasses import asdict
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from actsparse import find_mlp_blocks, handle_of, observe
from actsparse.bench.timing import Ratio, interleaved, ratio
from actsparse.blocks.block import MLPBlock
from actsparse.blocks.site import function_of
from actsparse.kernels import accelerate
from actsparse.kernels.choose import programs_of
from actsparse.kernels.forms import is_silent
from actsparse.kernels.programs import Weights, known

Infer = Callable[[nn.Module], object]
WARM = 3  # calls in which each block looks at its density, is timed, and settles


def bench_speed(model: nn.Module, inputs: Any, infer: Infer, rounds: int = 21) -> dict[str, Any]:
    """Time a trained model as it is and accelerated (mode ``auto``), in turn, on torch's threads.

    Args:
        model: plain or sparsified; stays as it is.
        inputs: a batch that finds its blocks, as :func:`actsparse.find_mlp_blocks` takes it.
        infer: runs a model on what it is to be timed on.
        rounds: timed rounds of each program.

    Returns:
        ``density`` on what ``infer`` runs; ``model``, a :class:`actsparse.bench.timing.Ratio` of
        dense to accelerated; ``seconds`` of both; ``mlps``, the same of all blocks alone, each by
        the program that ``auto`` chose and exactly 1 where that is the layers for all; ``blocks``,
        of each its ``program``, whether that was ``tried`` or the block is too small, its
        ``density`` and the ratios of every program; ``why``, in words.

    >>> mlp = nn.Sequential(nn.Linear(8, 32), nn.ReLU(), nn.Linear(32, 8))
    >>> x = torch.randn(4, 8)
    >>> found = bench_speed(mlp, x, lambda model: model(x), rounds=3)
    >>> found["mlps"]["value"], found["why"]
    (1.0, '1 of 1 blocks dense: too small: 256 weights in up, 4 tokens')
    """
    handle = handle_of(model)
    blocks = list(find_mlp_blocks(model, inputs) if handle is None else handle.blocks)
    model.eval()
    with observe(model, blocks=blocks) as seen, torch.no_grad():
        infer(model)
    summary = seen.summary("inference")
    assert summary is not None
    densities = {row["block"]: row["density"] for row in summary["blocks"]}
    given = _inputs(model, blocks, infer)
    fast = copy.deepcopy(model)
    ran = dict[str, str]()
    try:
        run = accelerate(fast, inputs=inputs)
    except ValueError as error:  # no block can be run sparse
        why = str(error)
    else:
        for _ in range(WARM):
            _infer(infer, fast)
        ran = run.ran()
        why = in_words(ran)
    whole = interleaved(
        {"dense": partial(_infer, infer, model), "accelerated": partial(_infer, infer, fast)},
        rounds,
    )
    rows, turns = [], {"dense": [0.0] * rounds, "chosen": [0.0] * rounds}
    for block in blocks:
        name = block.name or block.up.name
        program, _, kept = ran.get(name, "dense").partition(": ")
        row: dict[str, Any] = {
            "block": name,
            "d_model": block.d_model,
            "d_hidden": block.d_hidden,
            "density": densities[name],
            "program": program,
            "tried": name in ran and not kept.startswith("too small"),
        }
        times = _alone(block, given[name], rounds)
        if times:
            others = [each for each in times if each != "dense"]
            row["tokens"] = given[name].numel() // block.d_model
            row["ratios"] = [asdict(ratio(times, "dense", each)) for each in others]
            for turn, of in (("dense", "dense"), ("chosen", program)):
                turns[turn] = [a + b for a, b in zip(turns[turn], times[of], strict=True)]
        rows.append(row)
    same = all(row["program"] == "dense" for row in rows)
    mlps = Ratio("dense", "chosen", 1.0, 1.0, 1.0) if same else ratio(turns, "dense", "chosen")
    return {
        "density": summary["density"],
        "model": asdict(ratio(whole, "dense", "accelerated")),
        "seconds": {name: statistics.median(values) for name, values in whole.items()},
        "mlps": asdict(mlps),
        "blocks": rows,
        "why": why,
    }


def _alone(block: MLPBlock, x: Tensor, rounds: int) -> dict[str, list[float]]:
    """Each program's seconds on the block's own weights and inputs; empty where none can run."""
    function = function_of(block)
    if function is None or not is_silent(function):
        return {}
    weights = Weights.of(block)
    programs = programs_of(known(x, function, False), weights, function, x, training=False)
    with torch.inference_mode():
        return interleaved(programs, rounds)


def _inputs(model: nn.Module, blocks: list[MLPBlock], infer: Infer) -> dict[str, Tensor]:
    """The first input [..., D] of each block's up layer, by the block's name."""
    found: dict[str, Tensor] = {}

    def keep(name: str, module: nn.Module, args: tuple[Any, ...]) -> None:
        found.setdefault(name, args[0].detach().clone())

    hooks = [
        block.up.module.register_forward_pre_hook(partial(keep, block.name or block.up.name))
        for block in blocks
    ]
    try:
        with torch.no_grad():
            infer(model)
    finally:
        for hook in hooks:
            hook.remove()
    return found


def _infer(infer: Infer, model: nn.Module) -> None:
    with torch.inference_mode():
        infer(model)


def in_words(ran: dict[str, str]) -> str:
    """How many blocks ran in which way, of what :meth:`Accelerated.ran` says."""
    counted = Counter(ran.values()).items()
    return ", ".join(f"{count} of {len(ran)} blocks {how}" for how, count in counted)

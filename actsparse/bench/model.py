"""Time whole models with sparse MLPs, in a training step or in decoding, and their upper bound.

The bound is Amdahl's law. If the MLPs take the share f of the dense time and one MLP alone runs r
times as fast sparse, the whole model runs at most ``1 / (1 − f + f / r)`` times as fast. It never
runs more than ``1 / (1 − f)`` times as fast, as it would without MLPs.
"""

from __future__ import annotations

import copy
import multiprocessing
import statistics
import warnings
from collections.abc import Callable, Sequence
from dataclasses import asdict
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from actsparse import find_mlp_blocks, handle_of, observe
from actsparse.bench.mlp import Dtype, bench_mlp
from actsparse.bench.models_at_density import Subject, arranged, check
from actsparse.bench.timing import high_water, interleaved, kept_for_backward, ratio
from actsparse.kernels import accelerate, build
from actsparse.kernels.accelerated import Accelerated, Mode
from actsparse.observe.registry import Phase
from actsparse.time_left import TimeLeft

Progress = Callable[[str], None]
Programs = dict[str, Callable[[], object]]
CUT = "without MLPs"
COMPILED, OURS_COMPILED = "dense, compiled", "accelerated, compiled"
HALF = "bfloat16"  # the dense model under autocast
LR = 1e-8  # the weights change at every step, and the densities hardly


def bench_model(
    name: str,
    densities: Sequence[float] = (0.01, 0.05),
    rounds: int = 5,
    mode: Mode = "auto",
    memory: bool = True,
    progress: Progress = lambda what: None,
    dtype: Dtype = "float32",
    **sizes: int,
) -> dict[str, Any]:
    """Time a model dense, accelerated and with its MLPs cut out, in turn, on torch's threads.

    Dense is the faster of its own layers and ``accelerate(mode="dense")``. ``vit-b`` and ``gpt2``
    do a training step (zero_grad, forward, backward, AdamW), the others decode greedily after a
    prompt. Weights are random, arranged for the densities and the dtype
    (:func:`actsparse.bench.models_at_density.arranged`, which also takes ``sizes``; T ≥ 197 in
    training).
    Without MLPs a block hands on what its norm gives, and AdamW works on all weights as before.
    ``mlp_ratio`` is of one MLP alone, without a gate, :func:`bench_mlp`'s better sparse program; in
    decoding of prompt and tokens together, each by its number of calls.

    Returns:
        ``rows``, of each density: the measured ``density``, of ``blocks`` too, and ``after`` the
        timed steps; ``seconds``, ``ratios`` of dense to the two others; ``mlps``, rows of
        :func:`bench_mlp` at these T and densities, with ``calls``, and ``mlp_ratio``;
        ``mlp_share`` f; ``amdahl``; ``reached``, dense ÷ accelerated over ``amdahl``; ``error``,
        largest difference over largest value of logits, and of loss and gradient or, in decoding,
        the number of ``tokens`` that differ; ``memory`` (Linux), peaks of processes of their own;
        ``ran``, how the blocks ran.

    Raises:
        ValueError: no such model, or a density outside (0, 1).
        ImportError: transformers is missing (``pip install "actsparse[train]"``).
    """
    if not densities:
        raise ValueError("densities is empty; give at least one, such as 0.05")
    check(name, densities)
    rows: list[dict[str, Any]] = []
    left = TimeLeft()
    for i, density in enumerate(densities):
        about = left(i / len(densities))
        progress(f"{name} at density {density:g}: arranging the weights{about}")
        subject = arranged(name, density, dtype, **sizes)
        rows.append(_row(subject, rounds, mode, progress, dtype))
        if memory:
            progress("peak memory")
            rows[-1]["memory"] = {
                "dense": _apart(name, density, dtype, sizes, None),
                "accelerated": _apart(name, density, dtype, sizes, mode),
            }
    return {
        "benchmark": "model",
        "model": name,
        "sizes": {**subject.sizes, "dtype": dtype, "rounds": rounds},
        "threads": torch.get_num_threads(),
        "kernels": build.level(),
        "rows": rows,
    }


def bench_trained(
    model: nn.Module,
    inputs: Any,
    loss: Callable[[nn.Module], Tensor],
    infer: Callable[[nn.Module], object],
    score: Callable[[nn.Module], dict[str, float]],
    rounds: int = 5,
    mode: Mode = "auto",
    progress: Progress = lambda what: None,
) -> dict[str, Any]:
    """Time a trained model dense, accelerated and with its MLPs cut out, as it is.

    Args:
        model: plain or sparsified; its weights move by the timed steps, at a rate of 1e-8.
        inputs: a batch that finds its blocks, as :func:`actsparse.find_mlp_blocks` takes it.
        loss: the loss [] of a training batch; a step is zero_grad, this, backward and AdamW.
        infer: runs the model over what it is tested on, in batches.
        score: its loss and quality on the same.

    Returns:
        For ``inference`` and ``training`` the ``density`` measured, ``seconds``, ``ratios`` of
        dense to the two others and to the dense model under bfloat16 autocast, and ``mlp_ratio``,
        what the MLPs alone gain: what they add to the time of a model without them, dense ÷
        accelerated (None where noise hides it). Of training ``kept``, the bytes that a forward
        pass keeps for backward, by program. ``score`` of the dense and the accelerated model;
        ``ran``.
    """
    models, idle, handle = _four(model, inputs, mode)
    models[HALF] = copy.deepcopy(models["dense programs"])

    def density(phase: Phase, run: Callable[[nn.Module], object]) -> float:
        with observe(model, inputs=inputs) as seen, torch.no_grad():
            run(model)
        summary = seen.summary(phase)
        assert summary is not None
        return summary["density"]

    for each in models.values():
        each.eval()
    result: dict[str, Any] = {"benchmark": "model", "model": type(model).__name__}
    programs: Programs = {
        name: partial(_infer, _halved(infer) if name == HALF else infer, each)
        for name, each in models.items()
    }
    result["inference"] = {"density": density("inference", infer)}
    result["inference"] |= timed(programs, rounds, "inference", progress)
    with torch.inference_mode():
        result["score"] = {
            "dense": score(models["layers"]),
            "accelerated": score(models["accelerated"]),
        }
    for each in models.values():
        each.train()
    passes = {
        name: partial(_halved(loss) if name == HALF else loss, each)
        for name, each in models.items()
    }
    programs = {
        name: _step(each, passes[name], idle if name == CUT else [])
        for name, each in models.items()
    }
    with warnings.catch_warnings():  # a schedule that ended is to stand still
        warnings.filterwarnings("ignore", ".*(?:stand|stood) still")
        result["training"] = {"density": density("train", loss)}
        result["training"] |= timed(programs, rounds, "training", progress)
        result["training"]["kept"] = {
            to: kept_for_backward(passes[name], models[name].parameters())
            for to, name in (("dense", "layers"), ("accelerated", "accelerated"))
        }
    for phase in ("inference", "training"):
        seconds = result[phase]["seconds"]
        alone, fast = (seconds[name] - seconds[CUT] for name in ("dense", "accelerated"))
        result[phase]["mlp_ratio"] = alone / fast if min(alone, fast) > 0 else None
    result["ran"] = handle.lines()
    result |= {"threads": torch.get_num_threads(), "kernels": build.level(), "rounds": rounds}
    return result


def cut_out(model: nn.Module, inputs: Any) -> list[Tensor]:
    """Let the MLPs of ``model`` hand on their input; returns the parameters that are idle then.

    The norm before them and the residual run as they did, and their gradients flow. What
    ``sparsify`` attached goes too.

    >>> mlp = nn.Sequential(nn.Linear(8, 32), nn.ReLU(), nn.Linear(32, 8))
    >>> x = torch.randn(4, 8)
    >>> len(cut_out(mlp, x)), mlp(x).equal(x)
    (4, True)
    """
    handle = handle_of(model)
    if handle is not None:
        handle.remove()
    idle: list[Tensor] = []
    for block in find_mlp_blocks(model, inputs):
        parts = [block.activation.module, *(part.module for part in block.between)]
        if block.gate is not None:  # as a factor of 1
            idle += list(block.gate.module.parameters())
            block.gate.module.forward = _one
        for module in (block.up.module, *parts, block.down.module):
            if module is not None:
                idle += list(module.parameters())
                module.forward = _identity
    return idle


def amdahl(share: float, mlp_ratio: float) -> float:
    """How many times as fast a program is whose ``share`` of the time runs ``mlp_ratio`` × faster.

    >>> amdahl(0.5, 2.0)
    1.3333333333333333
    """
    return 1 / (1 - share + share / mlp_ratio)


def _row(
    subject: Subject, rounds: int, mode: Mode, progress: Progress, dtype: Dtype
) -> dict[str, Any]:
    model = subject.model
    row = subject.densities()
    models, idle, handle = _four(model, subject.inputs, mode)
    progress("error of the accelerated model")
    row["error"] = _error(subject, models["accelerated"])
    programs = {
        name: _program(subject, each, idle if name == CUT else []) for name, each in models.items()
    }
    row |= timed(programs, rounds, "steps" if subject.training else "decoding", progress)
    row["after"] = subject.densities()["density"]
    row["ran"] = handle.lines()
    progress("one MLP alone")
    block = subject.blocks(model)[0]
    row["mlps"] = bench_mlp(
        block.d_model,
        block.d_hidden,
        [row["density"]],
        [tokens for _, tokens in subject.mlps],
        rounds=rounds,
        training=subject.training,
        dtype=dtype,
    )["rows"]
    dense = best = 0.0
    for (calls, _), mlp in zip(subject.mlps, row["mlps"], strict=True):
        mlp["calls"] = calls
        seconds = mlp["training" if subject.training else "forward"]["seconds"]
        dense += calls * seconds["dense"]
        best += calls * min(seconds["sparse"], seconds["screened"])
    row["mlp_ratio"] = dense / best
    row["mlp_share"] = 1 - row["seconds"][CUT] / row["seconds"]["dense"]
    row["amdahl"] = amdahl(row["mlp_share"], row["mlp_ratio"])
    row["reached"] = row["ratios"][0]["value"] / row["amdahl"]
    return row


def _four(
    model: nn.Module, inputs: Any, mode: Mode
) -> tuple[dict[str, nn.Module], list[Tensor], Accelerated]:
    """The model and three copies: by dense programs alone, accelerated, and cut out.

    Also the parameters that idle where it is cut out.
    """
    plain, fast, cut = (copy.deepcopy(model) for _ in range(3))
    accelerate(plain, inputs=inputs, mode="dense")
    handle = accelerate(fast, inputs=inputs, mode=mode)
    models = {"layers": model, "dense programs": plain, "accelerated": fast, CUT: cut}
    return models, cut_out(cut, inputs), handle


def timed(programs: Programs, rounds: int, what: str, progress: Progress) -> dict[str, Any]:
    """Time programs in turn: seconds, the best dense one, and its ratios to the others."""
    progress(f"{what}: {', '.join(programs)}")
    left = TimeLeft()

    def told(done: int) -> None:
        about = left(done / rounds).replace("left", "left of these")
        progress(f"{what}: round {done} of {rounds}{about}")

    times = interleaved(programs, rounds, progress=told)
    seconds = {name: statistics.median(values) for name, values in times.items()}
    dense = [name for name in ("layers", "dense programs", COMPILED) if name in programs]
    best = min(dense, key=seconds.__getitem__)
    times["dense"], seconds["dense"] = times[best], seconds[best]
    others = [name for name in ("accelerated", OURS_COMPILED, CUT, HALF) if name in programs]
    return {
        "best_dense": best,
        "seconds": seconds,
        "ratios": [asdict(ratio(times, "dense", name)) for name in others],
    }


def _program(subject: Subject, model: nn.Module, idle: Sequence[Tensor]) -> Callable[[], object]:
    if not subject.training:
        return partial(subject.run, model)
    return _step(model, lambda: subject.run(model)[1], idle)


def _step(
    model: nn.Module, loss: Callable[[], Tensor], idle: Sequence[Tensor]
) -> Callable[[], None]:
    """A training step; AdamW works on ``idle`` parameters too, by gradients of zero."""
    optimizer = torch.optim.AdamW(model.parameters(), lr=LR)
    zeros = [torch.zeros_like(parameter) for parameter in idle]

    def step() -> None:
        optimizer.zero_grad()
        loss().backward()
        for parameter, zero in zip(idle, zeros, strict=True):
            parameter.grad = zero
        optimizer.step()

    return step


def _halved(run: Callable[[nn.Module], Any]) -> Callable[[nn.Module], Any]:
    """The same under bfloat16 autocast."""

    def call(model: nn.Module) -> Any:
        kind = next(model.parameters()).device.type
        with torch.autocast(kind, torch.bfloat16):
            return run(model)

    return call


def _infer(infer: Callable[[nn.Module], object], model: nn.Module) -> None:
    with torch.inference_mode():
        infer(model)


def _identity(x: Tensor) -> Tensor:
    return x


def _one(x: Tensor) -> Tensor:
    return x.new_ones(1)


def _error(subject: Subject, fast: nn.Module) -> dict[str, float]:
    wanted = _results(subject, subject.model)
    for _ in range(3):  # the first call is for counting zeros
        given = _results(subject, fast)
    error: dict[str, float] = {}
    if not subject.training:
        same = wanted.pop("tokens") == given.pop("tokens")
        error["tokens"] = int((~same).sum())
        # logits that follow the same text
        alike = int(same[0, :-1].long().cumprod(0).sum())
        wanted, given = ({"logits": each["logits"][:, :alike]} for each in (wanted, given))
    for name, value in wanted.items():
        error[name] = float((value - given[name]).abs().max() / value.abs().max())
    return error


def _results(subject: Subject, model: nn.Module) -> dict[str, Tensor]:
    if not subject.training:
        logits, tokens = subject.run(model)
        return {"logits": logits, "tokens": tokens}
    logits, loss = subject.run(model)
    loss.backward()
    gradient = torch.cat([p.grad.flatten() for p in model.parameters() if p.grad is not None])
    model.zero_grad()
    return {"logits": logits.detach(), "loss": loss.detach(), "gradient": gradient}


def _apart(*task: Any) -> dict[str, float]:
    """Peak memory in a process of its own."""
    with multiprocessing.get_context("spawn").Pool(1) as pool:
        return pool.apply(_peak, (*task, torch.get_num_threads()))


def _peak(
    name: str, density: float, dtype: str, sizes: dict[str, int], mode: Mode | None, threads: int
) -> dict[str, float]:
    torch.set_num_threads(threads)
    subject = arranged(name, density, dtype, **sizes)
    if mode is not None:
        accelerate(subject.model, inputs=subject.inputs, mode=mode)
    program = _program(subject, subject.model, [])
    before = high_water()
    for _ in range(3):
        program()
    return {"peak_mib": high_water(), "step_mib": high_water() - before}

"""What the measures cost on a ViT-S: time and peak memory of a training step, and of a trace."""

from __future__ import annotations

import multiprocessing
import time
from collections.abc import Callable
from dataclasses import asdict
from typing import Any

import torch

from actsparse import find_mlp_blocks, observe
from actsparse.bench.timing import high_water, interleaved, ratio
from actsparse.observe.curvature import gauss_newton_trace
from actsparse_lab.bench.training_step import VIT_S, vit_batch, vit_s

WATCHED: dict[str, tuple[str, ...]] = {
    "plain": (),
    "density": ("density",),
    "flatness and gradient": ("flatness", "gradient"),
    "density, flatness and gradient": ("density", "flatness", "gradient"),
    "noise": ("noise",),
}


def bench_measures(
    rounds: int = 15,
    batch: int = 8,
    probes: int = 10,
    activation: str = "relu",
    progress: Callable[[str], None] = lambda what: None,
) -> dict[str, Any]:
    """Time and peak memory of a training step with measures, and of a Gauss–Newton trace.

    Memory (Linux) is the largest resident set of a process of its own that does three steps, and
    how much of it came after the model and its inputs were there.

    Returns:
        ``seconds`` and ``ratios`` to the plain step; ``memory``: ``peak_mib`` and ``step_mib`` of
        each; ``gauss_newton``: the trace over the MLP weights with its ``seconds``; ``sizes``.

    Raises:
        ImportError: transformers is missing (``pip install "actsparse[train]"``).
    """
    programs = {}
    for name, measures in WATCHED.items():
        programs[name] = _step(measures, batch, activation)
    progress("training steps")
    times = interleaved(programs, rounds)
    ratios = [ratio(times, name, "plain") for name in programs if name != "plain"]
    del programs
    memory = {}
    spawn = multiprocessing.get_context("spawn")
    for name, measures in WATCHED.items():
        progress(f"memory: {name}")
        with spawn.Pool(1) as pool:
            memory[name] = pool.apply(_peak, (measures, batch, activation, torch.get_num_threads()))
    progress("Gauss–Newton trace")
    trace, seconds = _trace(batch, probes, activation)
    return {
        "benchmark": "measures",
        "sizes": {**VIT_S, "hidden_act": activation, "batch": batch, "rounds": rounds},
        "seconds": {name: sorted(values)[len(values) // 2] for name, values in times.items()},
        "ratios": [asdict(row) for row in ratios],
        "memory": memory,
        "gauss_newton": {
            "value": trace.value,
            "standard_error": trace.standard_error,
            "probes": probes,
            "samples": trace.samples,
            "seconds": seconds,
        },
    }


def _step(measures: tuple[str, ...], size: int, activation: str) -> Callable[[], None]:
    model, batch = vit_s(hidden_act=activation), vit_batch(size)
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-4, weight_decay=0.1)
    if measures:
        observe(model, measures, inputs=batch["pixel_values"][:1])

    def step() -> None:
        optimizer.zero_grad()
        model(**batch).loss.backward()
        optimizer.step()

    return step


def _peak(measures: tuple[str, ...], size: int, activation: str, threads: int) -> dict[str, float]:
    torch.set_num_threads(threads)
    step = _step(measures, size, activation)
    before = high_water()
    for _ in range(3):
        step()
    return {"peak_mib": high_water(), "step_mib": high_water() - before}


def _trace(size: int, probes: int, activation: str) -> tuple[Any, float]:
    model, batch = vit_s(hidden_act=activation), vit_batch(size)
    blocks = find_mlp_blocks(model, batch["pixel_values"][:1])
    weights = [f"{layer.name}.weight" for block in blocks for layer in (block.up, block.down)]

    def predict(model: Any, batch: Any) -> Any:
        return model(pixel_values=batch["pixel_values"]).logits, batch["labels"]

    start = time.perf_counter()
    trace = gauss_newton_trace(model, predict, [batch], parameters=weights, probes=probes)
    return trace, time.perf_counter() - start

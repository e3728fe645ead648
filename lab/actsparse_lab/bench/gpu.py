"""Sparse MLPs on a GPU beside dense ones: decoding, training, tuning and models, in minutes.

A GPU is often had for minutes only. So a run has a budget, takes what matters most first, passes
over what does not fit any more and says so; a measurement that breaks is told, and the rest goes
on. Times are the GPU's own, by CUDA events, of programs in turn.
"""

from __future__ import annotations

import functools
import importlib
import pkgutil
import time
from collections.abc import Callable, Iterable, Iterator
from functools import partial
from importlib.util import find_spec
from typing import Any

import torch

from actsparse import kernels
from actsparse_lab.bench import gpu_models
from actsparse_lab.bench.gpu_mlp import (
    BEST,
    Block,
    Place,
    Row,
    bandwidth,
    decode,
    place_at,
    train,
    tune,
)

SECTIONS = ("decode", "training", "tuning", "models")
DTYPES = ("bfloat16", "float16", "float32")
FEW = (1, 16)  # tokens of a decoder's call
# Triton tunes a kernel at the first density it meets: those that issue 8 asks about come first
DECODE = (0.05, 0.01, 0.02, 0.1, 0.2)
TRAINING = (0.01, 0.005, 0.002, 0.02, 0.05, 0.1, 0.3, 0.5)
TUNING = (0.005, 0.01, 0.05)
# seconds of a first measurement of a kind, in which all is compiled and tuned: guesses
FIRST = {"decode": 75.0, "training": 120.0, "tuning": 20.0, "models": 60.0}


class Budget:
    """The seconds of a run, and what became of its measurements."""

    def __init__(self, seconds: float, clock: Callable[[], float] = time.monotonic) -> None:
        self.clock, self.end = clock, clock() + seconds
        self.took: dict[str, float] = {}  # seconds of the last measurement of a kind
        self.passed_over: list[str] = []
        self.failed: dict[str, str] = {}

    def measure(
        self, section: str, what: str, run: Callable[[], Row], kind: str = ""
    ) -> Row | None:
        """``run()``, unless it will hardly end in time; None then, and where it breaks.

        ``kind``: measurements of one kind are taken to last alike; of a new one something must
        be compiled first.
        """
        left = self.end - self.clock()
        if left < self.took.get(f"{section} {kind}", FIRST[section]):
            self.passed_over.append(f"{section}: {what}")
            return None
        begun = self.clock()
        try:
            row = run()
        except Exception as error:  # whatever it was: what comes next may still be measured
            self.failed[f"{section}: {what}"] = f"{type(error).__name__}: {error}"
            return None
        row["took"] = self.took[kind] = self.clock() - begun
        return row


def chosen() -> dict[str, list[Row]]:
    """By kernel: for each key that Triton's autotuner met, the size it chose."""
    if find_spec("triton") is None:
        return {}
    found: dict[str, list[Row]] = {}
    for module in pkgutil.iter_modules(kernels.__path__):
        if not module.name.startswith("triton_"):
            continue
        for name, each in vars(importlib.import_module(f"actsparse.kernels.{module.name}")).items():
            forms = each if isinstance(each, tuple) else (each,)
            for number, form in enumerate(forms):
                if hasattr(form, "configs") and hasattr(form, "cache"):  # an autotuner
                    label = f"{name}[{number}]" if forms is each else name
                    sizes = [_size(key, config) for key, config in form.cache.items()]
                    found[f"{module.name}.{label}"] = sizes
    return found


def _size(key: tuple[Any, ...], config: Any) -> Row:
    how = {"warps": config.num_warps, "stages": config.num_stages}
    return {"key": [str(part) for part in key], **config.kwargs, **how}


def bench_gpu(
    d: int = 4096,
    h: int = 16384,
    dtype: str = "bfloat16",
    tokens: int = 8192,
    minutes: float = 8.0,
    sections: Iterable[str] = SECTIONS,
    compiled: bool = True,
    device: str = "cuda",
    progress: Callable[[str], None] = lambda what: None,
    keep: Callable[[Row], None] = lambda result: None,
    clock: Callable[[], float] = time.monotonic,
) -> Row:
    """Measure what issue 8 asks of a GPU, the most wanted first, in about ``minutes``.

    Args:
        d, h, dtype: of the MLP block; ``tokens``: of its training step.
        sections: of :data:`SECTIONS`, in this order: :func:`decode` at :data:`FEW` tokens,
            :func:`train`, :func:`tune`, and whole models
            (:mod:`actsparse_lab.bench.gpu_models`).
        compiled: time ``torch.compile`` of the dense block too.
        device: ``"cpu"`` runs all but tuning by PyTorch's own operators, to test this program.
        keep: called with the result after every measurement.

    Returns:
        A list of rows by section; ``bandwidth``, bytes a second of a plain copy; ``tuned``,
        :func:`chosen`; ``targets``, :func:`targets`; ``passed_over`` and ``failed``.

    Raises:
        ValueError: no GPU; an unknown dtype or section.
    """
    wanted = list(sections)
    for section in wanted:
        if section not in SECTIONS:
            raise ValueError(f"unknown section {section!r}; known: {', '.join(SECTIONS)}")
    if dtype not in DTYPES:
        raise ValueError(f"unknown dtype {dtype!r}; known: {', '.join(DTYPES)}")
    place = place_at(device, dtype, compiled)
    budget = Budget(60 * minutes, clock)
    speed = bandwidth(place, 2**30 if place.gpu else 2**20)
    result: Row = {
        "benchmark": "gpu",
        "sizes": {"d": d, "h": h, "dtype": dtype, "tokens": tokens, "minutes": minutes},
        "gpu": _gpu(place),
        "bandwidth": speed,
        **{section: [] for section in wanted},
    }
    for section, what, kind, run in _plan(place, d, h, tokens, speed, wanted):
        progress(f"{section}: {what}")
        row = budget.measure(section, what, run, kind)
        if row is not None:
            result[section].append(row)
        result |= {"passed_over": budget.passed_over, "failed": budget.failed}
        result |= {"tuned": chosen(), "targets": targets(result)}
        keep(result)
    return result


def _plan(
    place: Place, d: int, h: int, tokens: int, speed: float, sections: Iterable[str]
) -> Iterator[tuple[str, str, str, Callable[[], Row]]]:
    """Section, what is measured, its kind, and how; blocks are made when they are first needed."""
    for few in FEW if "decode" in sections else ():
        blocks = functools.cache(partial(_blocks, place, few, d, h))
        for density in DECODE:
            run = partial(_decode, place, blocks, density, speed)
            yield "decode", f"T = {few}, density {density:g}", f"T = {few}", run
        blocks.cache_clear()
    block = functools.cache(partial(Block, place, tokens, d, h, 0))
    for section, densities, measure in (("training", TRAINING, train), ("tuning", TUNING, tune)):
        for density in densities if section in sections else ():
            run = partial(_at_many, measure, place, block, density)
            yield section, f"T = {tokens}, density {density:g}", "", run
    block.cache_clear()
    if "models" in sections:
        for name, density in gpu_models.MODELS:
            run = partial(gpu_models.measure, place, name, density)
            yield "models", f"{name}, density {density:g}", name, run


def _decode(place: Place, blocks: Callable[[], list[Block]], density: float, speed: float) -> Row:
    return decode(place, blocks(), density, speed)


def _at_many(
    measure: Callable[[Place, Block, float], Row],
    place: Place,
    block: Callable[[], Block],
    density: float,
) -> Row:
    return measure(place, block(), density)


def _blocks(place: Place, tokens: int, d: int, h: int) -> list[Block]:
    """So many that what the leanest program reads of them is four times what the L2 holds."""
    count = 2
    if place.gpu:
        cache = torch.cuda.get_device_properties(place.device).L2_cache_size
        count = max(count, -(-4 * cache // (d * h)))
    return [Block(place, tokens, d, h, seed) for seed in range(count)]


def targets(result: Row) -> list[Row]:
    """What issue 8 wants, and what was found: None where it was not measured.

    Gains are over the faster form of the dense block; those of ``auto``, which falls back on the
    block's own layers, over these.
    """
    decoding = _at([row for row in result.get("decode", []) if row["tokens"] == 1])
    training = _at(result.get("training", []))
    five, one, half = decoding.get(0.05), training.get(0.01), training.get(0.005)
    autos = [gain(row["training"], "auto", BEST[:1]) for row in training.values()]
    held = [
        ("decode, T = 1, 5 %: dense ÷ sparse", 1.7, five and gain(five, "sparse")),
        ("decode, T = 1, 5 %: dense ÷ screened", 2.3, five and gain(five, "screened")),
        ("decode, T = 1, 5 %: floor ÷ sparse", 0.6, five and five["reached"]["sparse"]),
        ("decode, T = 1, 5 %: floor ÷ screened", 0.6, five and five["reached"]["screened"]),
        ("training, 1 %: dense ÷ sparse", 1.5, one and gain(one["training"], "sparse")),
        ("training, any density: dense ÷ auto", 0.97, min(autos, default=None)),
        ("forward, 0.5 %: dense ÷ sparse", 1.205, half and gain(half["forward"], "sparse")),
        ("training, 0.5 %: dense ÷ sparse", 1.219, half and gain(half["training"], "sparse")),
    ]
    return [{"what": what, "wanted": wanted, "found": found} for what, wanted, found in held]


def gain(timed: Row, to: str, of: Iterable[str] = BEST) -> float:
    """The least of the ratios to a program, of the forms in ``of``.

    >>> ratios = [{"of": "dense", "to": "sparse", "value": 2.0}]
    >>> gain({"ratios": [*ratios, {"of": "compiled", "to": "sparse", "value": 1.5}]}, "sparse")
    1.5
    """
    return min(r["value"] for r in timed["ratios"] if r["to"] == to and r["of"] in of)


def _at(rows: list[Row]) -> dict[float, Row]:
    return {row["wanted"]: row for row in rows}


def _gpu(place: Place) -> Row | None:
    if not place.gpu:
        return None
    has = torch.cuda.get_device_properties(place.device)
    return {
        "name": has.name,
        "memory_bytes": has.total_memory,
        "l2_bytes": has.L2_cache_size,
        "multiprocessors": has.multi_processor_count,
        "capability": f"{has.major}.{has.minor}",
        "cuda": torch.version.cuda,
    }

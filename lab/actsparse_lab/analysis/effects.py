"""Numbers of runs, and effects: one number for each seed that two arms share."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from statistics import fmean
from typing import Any, Literal

from actsparse_lab.records import Entry, Run

Reader = Callable[[Run], float | None]
Effects = dict[int, float]  # by seed
Lines = Literal["train", "measured"]


class Arms(dict[str, dict[int, Run]]):
    """The finished runs, ``arms[arm][seed]``; an arm that has none is empty."""

    def __init__(self, runs: Sequence[Run]) -> None:
        super().__init__()
        for run in runs:
            if run.finished:
                self.setdefault(run.arm, {})[run.seed] = run

    def __missing__(self, arm: str) -> dict[int, Run]:
        return {}


# -- of one run ---------------------------------------------------------------------------------


def number(entry: Entry | None, *keys: str) -> float | None:
    """The number there; None where a key is missing, or null or no finite number stands.

    >>> number({"measures": {"flatness": 2}}, "measures", "flatness")
    2.0
    >>> number({"measures": None}, "measures", "flatness") is None
    True
    """
    value: Any = entry
    for key in keys:
        value = value.get(key) if isinstance(value, dict) else None
    plain = isinstance(value, int | float) and not isinstance(value, bool)
    return float(value) if plain and math.isfinite(value) else None


def of_result(*keys: str) -> Reader:
    """Reads a number of the result."""
    return lambda run: number(run.result, *keys)


QUALITY, LOSS, BIGRAM = of_result("quality"), of_result("loss"), of_result("baselines", "bigram")
INFERENCE, TRAINING = of_result("inference", "density"), of_result("training", "density")
LIVING = of_result("inference", "living_density")  # of the units that are active anywhere


def dead_share(run: Run) -> float | None:
    """The share of hidden units that are never active on held-out data."""
    dead, units = (number(run.result, "inference", key) for key in ("dead", "units"))
    return dead / units if dead is not None and units else None


def final(run: Run, lines: Lines) -> Entry | None:
    """The line that a run wrote at its last step; None where there is none."""
    entries: list[Entry] = getattr(run, lines)
    done = run.result["step"] if run.result else None
    return entries[-1] if entries and entries[-1]["step"] == done else None


def at_end(lines: Lines, *keys: str) -> Reader:
    """Reads a number of a run's `final` line."""
    return lambda run: number(final(run, lines), *keys)


def over_run(lines: Lines, *keys: str, least_loss: float | None = None) -> Reader:
    """Reads ``ln(last / first)`` of a number over a run's lines of one kind.

    With ``least_loss`` the last line is the last whose ``loss`` is at least that. None where there
    are fewer than two lines, or the first or the last has no number above 0 there.
    """

    def read(run: Run) -> float | None:
        entries: list[Entry] = getattr(run, lines)
        if least_loss is not None:
            losses = [number(entry, "loss") for entry in entries]
            large = [at for at, loss in enumerate(losses) if loss and loss >= least_loss]
            entries = entries[: large[-1] + 1] if large else []
        if len(entries) < 2:
            return None
        first, last = number(entries[0], *keys), number(entries[-1], *keys)
        return None if first is None or last is None else log_ratio(last, first)

    return read


# -- by seed ------------------------------------------------------------------------------------


def paired(
    arms: Arms, arm: str, other: str, read: Reader, combine: Callable[[float, float], float | None]
) -> Effects:
    """``combine(own, other's)`` for each seed that both arms have a number of."""
    return combined(within(arms, arm, read), within(arms, other, read), combine)


def combined(
    own: Effects, other: Effects, combine: Callable[[float, float], float | None]
) -> Effects:
    """``combine(own, other's)`` for each seed that both have, where it is not None."""
    found = {seed: combine(value, other[seed]) for seed, value in own.items() if seed in other}
    return {seed: effect for seed, effect in found.items() if effect is not None}


def mean_of(several: Sequence[Effects]) -> Effects:
    """The mean for each seed that all of them have.

    >>> mean_of([{0: 1.0, 1: 2.0}, {0: 2.0}])
    {0: 1.5}
    """
    seeds = sorted(set.intersection(*map(set, several))) if several else []
    return {seed: fmean(each[seed] for each in several) for seed in seeds}


def within(arms: Arms, arm: str, read: Reader) -> Effects:
    """One number of each run of an arm."""
    return by_seed(arms[arm], read)


def by_seed(runs: Mapping[int, Run], read: Reader) -> Effects:
    """The number of each run that has it."""
    found = {seed: read(run) for seed, run in runs.items()}
    return {seed: value for seed, value in found.items() if value is not None}


def log_ratio(own: float, other: float) -> float | None:
    """``ln(own / other)``; None unless both are above 0.

    >>> log_ratio(1.0, 1.0)
    0.0
    """
    return math.log(own / other) if own > 0 and other > 0 else None


def difference(own: float, other: float) -> float:
    """``own − other``."""
    return own - other


def fewer(own: float, other: float) -> float | None:
    """By which share ``own`` is less than ``other``; None unless that is above 0."""
    return (other - own) / other if other > 0 else None

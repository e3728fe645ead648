"""What accelerating trained checkpoints gained: ``speed.json`` of `actsparse bench run`, by arm."""

from __future__ import annotations

import math
import statistics
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from actsparse.untrusted import read_json
from actsparse.values import Above0, Count, Name, Share, Text, check
from actsparse_lab.record_schema import Entry
from actsparse_lab.report.comparison import t_interval

SPEED = "speed.json"
_RATIO = {"value": Above0, "low": Above0, "high": Above0}
_RUN = {"arm": Name, "seed": Count, "density": Share, "model": _RATIO, "mlps": _RATIO, "why": Text}
_SHAPE = {
    "benchmark": Literal["speed"],
    "threads": Count,
    "runs": [_RUN],
}


@dataclass(frozen=True)
class Factor:
    """A ratio over ``n`` runs: geometric mean, its 95 % t-interval on the log scale, median."""

    mean: float
    low: float | None
    high: float | None
    median: float
    n: int


@dataclass(frozen=True)
class Speed:
    """Dense time ÷ accelerated in inference, of the ``model`` and of its ``mlps`` alone.

    Over several seeds the interval is of their mean; of one, of its rounds. ``why`` says how the
    blocks ran.
    """

    model: Factor
    mlps: Factor
    why: str


def factor(ratios: Iterable[float]) -> Factor | None:
    """The factor of ratios above 0; None for none.

    >>> found = factor([1.0, 2.0, 4.0])
    >>> round(found.mean, 9), found.median, found.low < 1
    (2.0, 2.0, True)
    """
    seen = list(ratios)
    found = t_interval(map(math.log, seen))
    if found is None:
        return None
    low, high = (None if end is None else math.exp(end) for end in (found.low, found.high))
    return Factor(math.exp(found.mean), low, high, statistics.median(seen), found.n)


def factor_text(found: Factor | None) -> str:
    """``1.52 (1.40 to 1.66)``: the median, and the interval of the geometric mean.

    >>> factor_text(factor([2.0])), factor_text(None)
    ('2.00', '–')
    """
    if found is None:
        return "–"
    ends = f" ({found.low:.2f} to {found.high:.2f})" if found.low and found.high else ""
    return f"{found.median:.2f}{ends}"


def read_speeds(folder: str | Path) -> dict[str, Speed]:
    """What `actsparse bench run` measured, by arm; empty without ``speed.json``.

    Raises `RecordError` for a file that holds something else.
    """
    path = Path(folder) / SPEED
    if not path.is_file():
        return {}
    rows = read_checked(path, _SHAPE)["runs"]
    found = {}
    for arm in dict.fromkeys(row["arm"] for row in rows):
        own = {row["seed"]: row for row in rows if row["arm"] == arm}.values()
        model, mlps = (_over_seeds([row[part] for row in own]) for part in ("model", "mlps"))
        found[arm] = Speed(model, mlps, "; ".join(dict.fromkeys(row["why"] for row in own)))
    return found


def read_checked(path: Path, shape: Any) -> Entry:
    """A JSON object of that shape; `RecordError` for anything else."""
    found = read_json(path)
    check(str(path), found, shape)
    return dict(found)


def _over_seeds(ratios: list[Entry]) -> Factor:
    if len(ratios) == 1:
        (only,) = ratios
        return Factor(only["value"], only["low"], only["high"], only["value"], 1)
    found = factor(each["value"] for each in ratios)
    assert found is not None
    return found

"""What accelerating trained checkpoints gained: ``speed.json`` of `actsparse bench run`, by arm."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from actsparse.values import Above0, Count, Name, Share, Text
from actsparse_lab.analysis.intervals import Factor, factor
from actsparse_lab.analysis.manifest import read_checked
from actsparse_lab.record_schema import Entry

SPEED = "speed.json"
_RATIO = {"value": Above0, "low": Above0, "high": Above0}
_RUN = {"arm": Name, "seed": Count, "density": Share, "model": _RATIO, "mlps": _RATIO, "why": Text}
_SHAPE = {
    "benchmark": Literal["speed"],
    "threads": Count,
    "runs": [_RUN],
}


@dataclass(frozen=True)
class Speed:
    """Dense time ÷ accelerated in inference, of the ``model`` and of its ``mlps`` alone.

    Over several seeds the interval is of their mean; of one, of its rounds. ``why`` says how the
    blocks ran.
    """

    model: Factor
    mlps: Factor
    why: str


def read_speeds(folder: str | Path) -> dict[str, Speed]:
    """What `actsparse bench run` measured, by arm; empty without ``speed.json``.

    Raises `RecordError` for a file that holds something else.
    """
    record = read_checked(Path(folder) / SPEED, _SHAPE)
    rows = record["runs"] if record else []
    found = {}
    for arm in dict.fromkeys(row["arm"] for row in rows):
        own = {row["seed"]: row for row in rows if row["arm"] == arm}.values()
        model, mlps = (_over_seeds([row[part] for row in own]) for part in ("model", "mlps"))
        found[arm] = Speed(model, mlps, "; ".join(dict.fromkeys(row["why"] for row in own)))
    return found


def _over_seeds(ratios: list[Entry]) -> Factor:
    if len(ratios) == 1:
        (only,) = ratios
        return Factor(only["value"], only["low"], only["high"], only["value"], 1)
    found = factor(each["value"] for each in ratios)
    assert found is not None
    return found

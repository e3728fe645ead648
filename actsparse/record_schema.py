"""What a record must hold: its fields, what each must be, and the check."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

VERSION = 2

Entry = dict[str, Any]


class RecordError(Exception):
    """A record that cannot be written or read; the message names the file and what is wrong."""


@dataclass(frozen=True)
class Rule:
    """What a field must be: in words, and as a test."""

    right: str
    holds: Callable[[Any], bool]


def _number(value: Any) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool) and math.isfinite(value)


def _count(value: Any) -> bool:
    return isinstance(value, int) and not isinstance(value, bool) and value >= 0


NUMBER = Rule("a finite number", _number)
SHARE = Rule("a share from 0 to 1", lambda value: _number(value) and 0 <= value <= 1)
COUNT = Rule("a whole number, 0 or more", _count)
TEXT = Rule("text that is not empty", lambda value: isinstance(value, str) and value != "")
FLAG = Rule("true or false", lambda value: isinstance(value, bool))
OBJECT = Rule("an object", lambda value: isinstance(value, dict))
NUMBERS = Rule(
    "an object of finite numbers",
    lambda value: isinstance(value, dict) and all(_number(each) for each in value.values()),
)

# A shape is a rule, an object of shapes, a list of one shape, or (shape, None): may be null. In an
# object a field whose name ends in "?" may be absent.
Shape = Any

_DENSITIES: dict[str, Shape] = {
    "density": SHARE,
    "derivative_density": SHARE,
    "dead": COUNT,
    "units": COUNT,
    "living_density": (SHARE, None),  # null where every unit is dead
}
MEASURES: Shape = ({**_DENSITIES, "blocks": [{"block": TEXT, **_DENSITIES}]}, None)  # null: no MLPs
SCHEMA: dict[str, dict[str, Shape]] = {
    "run": {
        "schema": COUNT,
        "run_id": TEXT,  # another in every run; a resumed run keeps its own
        "time": {"started": TEXT},
        "processes": COUNT,
        "task": TEXT,
        "arm": TEXT,
        "seed": COUNT,
        "config": OBJECT,
        "versions": OBJECT,
        "hardware": OBJECT,
        "git": (OBJECT, None),  # null outside a git checkout
    },
    "train": {  # over the training batches since the previous such line, in train mode
        "step": COUNT,
        "loss": NUMBER,
        "lr": NUMBER,
        "time": {"seconds": NUMBER},  # since training began
        "penalty": (NUMBER, None),
        "measures": MEASURES,
    },
    "eval": {
        "split": TEXT,
        "step": COUNT,
        "loss": NUMBER,
        "quality": NUMBER,
        "measures": MEASURES,
        "time?": {"seconds": NUMBER},  # when the evaluation was done, since training began
    },
    "result": {
        "split": TEXT,
        "step": COUNT,
        "loss": NUMBER,
        "quality": NUMBER,
        "quality_name": TEXT,
        "higher_is_better": FLAG,
        "inference": MEASURES,
        "training": MEASURES,  # over the last fifth of training
        "skippable": ({"forward": SHARE, "backward": SHARE, "products?": NUMBERS}, None),  # shares
        "before?": {"loss": NUMBER, "quality": NUMBER, "inference": MEASURES},  # of finetuning
        "baselines": NUMBERS,
        "time": {"seconds": NUMBER},
    },
    "measured": {  # by passes of its own, in eval mode
        "step": COUNT,
        "how": OBJECT,
        "measures": (OBJECT, None),
        "curvature": OBJECT,
        "trials?": OBJECT,
    },
    "failed": {"step": COUNT, "reason": TEXT},
}


def check_shape(name: str, value: Any, shape: Shape) -> None:
    """Raise RecordError, naming the field, where ``value`` has not the fields of ``shape``.

    >>> check_shape("train", {"step": 3}, {"step": COUNT, "before?": NUMBER})
    """
    if isinstance(shape, tuple):
        if value is not None:
            check_shape(name, value, shape[0])
    elif isinstance(shape, dict):
        needed = [field for field in shape if not field.endswith("?")]
        if not isinstance(value, dict):
            raise RecordError(f"{name} must be an object of {', '.join(needed)}; got {value!r}")
        for field in needed:
            if field not in value:
                raise RecordError(f"{name} lacks {field!r}; it needs {', '.join(needed)}")
        for field, inner in shape.items():
            field = field.removesuffix("?")
            if field in value:
                check_shape(f"{name}.{field}", value[field], inner)
    elif isinstance(shape, list):
        if not isinstance(value, list):
            raise RecordError(f"{name} must be a list; got {value!r}")
        for index, each in enumerate(value):
            check_shape(f"{name}[{index}]", each, shape[0])
    elif not shape.holds(value):
        raise RecordError(f"{name} must be {shape.right}; got {value!r}")

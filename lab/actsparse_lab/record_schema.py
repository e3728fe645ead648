"""What a record must hold: its fields, and what each must be."""

from __future__ import annotations

from typing import Any

from actsparse.values import BadValue, Count, Name, Shape, Share, Text

VERSION = 2

Entry = dict[str, Any]


RecordError = BadValue  # the message names the file and what is wrong

_DENSITIES: dict[str, Shape] = {
    "density": Share,
    "derivative_density": Share,
    "dead": Count,
    "units": Count,
    "living_density": (Share, None),  # null where every unit is dead
}
MEASURES: Shape = ({**_DENSITIES, "blocks": [{"block": Name, **_DENSITIES}]}, None)  # null: no MLPs
SCHEMA: dict[str, dict[str, Shape]] = {
    "run": {
        "schema": Count,
        "run_id": Text,  # another in every run; a resumed run keeps its own
        "time": {"started": Text},
        "processes": Count,
        "task": Name,
        "arm": Name,
        "seed": Count,
        "config": dict,
        "versions": dict,
        "hardware": dict,
        "git": (dict, None),  # null outside a git checkout
    },
    "train": {  # over the training batches since the previous such line, in train mode
        "step": Count,
        "loss": float,
        "lr": float,
        "time": {"seconds": float},  # since training began
        "penalty": (float, None),
        "measures": MEASURES,
    },
    "eval": {
        "split": Name,
        "step": Count,
        "loss": float,
        "quality": float,
        "measures": MEASURES,
        "time?": {"seconds": float},  # when the evaluation was done, since training began
    },
    "result": {
        "split": Name,
        "step": Count,
        "loss": float,
        "quality": float,
        "quality_name": Name,
        "higher_is_better": bool,
        "inference": MEASURES,
        "training": MEASURES,  # over the last fifth of training
        "skippable": (
            {"forward": Share, "backward": Share, "products?": dict[str, float]},
            None,
        ),  # shares
        "before?": {"loss": float, "quality": float, "inference": MEASURES},  # of finetuning
        "baselines": dict[str, float],
        "time": {"seconds": float},
    },
    "measured": {  # by passes of its own, in eval mode
        "step": Count,
        "how": dict,
        "measures": ({"blocks?": ([{"block?": (Name, None)}], None)}, None),
        "curvature": dict,
        "trials?": dict,
    },
    "failed": {"step": Count, "reason": Text},
}

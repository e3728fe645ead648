"""Which runs: functions that return a run's config, and running many of them side by side."""

from __future__ import annotations

from typing import Any

from actsparse.experiments.arms import ARMS, DEFAULT_ARMS, Arm, arm_named
from actsparse.experiments.digits import DIGITS
from actsparse.experiments.lm import LM
from actsparse.experiments.text import TEXT
from actsparse.observe import CURVATURES
from actsparse.train.config import RunConfig

__all__ = ["ARMS", "DEFAULT_ARMS", "EXPERIMENTS", "Arm", "arm_named", "run_config"]

EXPERIMENTS: dict[str, dict[str, Any]] = {"digits": DIGITS, "text": TEXT, "lm": LM}


def run_config(task: str, arm: str, seed: int, **overrides: Any) -> RunConfig:
    """The config of one run: the task's settings, the arm's recipe, then ``overrides``.

    An override of None leaves the setting as it is. ``model`` changes some of the model's settings,
    the rest stay the task's. ``measures`` may name measures of both kinds:
    those read in each pass, density always among them, and those ``active``. Raises `ValueError`
    for an unknown task or arm, naming the known ones, and `TypeError` for an unknown setting.

    >>> run_config("digits", "paper", seed=1, steps=20).recipe["name"]
    'paper'
    """
    if task not in EXPERIMENTS:
        raise ValueError(f"unknown task {task!r}; known: {', '.join(EXPERIMENTS)}")
    chosen = arm_named(arm)
    settings = {**EXPERIMENTS[task], "recipe": chosen.recipe.to_json(), "no_decay": chosen.no_decay}
    settings |= {name: value for name, value in overrides.items() if value is not None}
    settings["model"] = {**EXPERIMENTS[task]["model"], **settings["model"]}
    asked = dict.fromkeys(("density", *settings.get("measures", ())))
    active = [name for name in asked if name in CURVATURES]
    settings["measures"] = tuple(name for name in asked if name not in active)
    settings["active"] = tuple(dict.fromkeys((*settings.get("active", ()), *active)))
    return RunConfig(task=task, arm=arm, seed=seed, **settings)

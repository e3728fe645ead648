"""Which runs: functions that return a run's config, and running many of them side by side."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import fields
from typing import Any

from actsparse.observe import CURVATURES, TRIALS
from actsparse.values import checked_arguments
from actsparse_lab.engine.config import RunConfig
from actsparse_lab.tasks import digits, finetune, lm, t5, text, vit
from actsparse_lab.tasks.arms import ARMS, Arm, arm_named, default_arms, ramped

__all__ = ["ARMS", "EXPERIMENTS", "Arm", "arm_named", "default_arms", "run_config"]

EXPERIMENTS: dict[str, Callable[[bool], dict[str, Any]]] = {
    each.__name__: each
    for each in (
        digits.digits, text.text, lm.lm, finetune.digits_finetune, finetune.lm_finetune,
        vit.cifar10, vit.vit_cifar10, t5.t5_web, lm.lm_web, vit.vit_cifar10_finetune,
        vit.vit_imagenet, vit.vit_imagenet_finetune, t5.t5_c4, t5.t5_c4_finetune,
    )
}  # fmt: skip


def run_config(
    task: str, arm: str, seed: int, *, quick: bool = False, **overrides: Any
) -> RunConfig:
    """The config of one run: the task's settings, the arm's recipe, then ``overrides``.

    ``model``, ``data`` and ``lora`` change some of the task's settings of these, the rest stay;
    ``model`` is for models made anew.
    ``{seed}`` in ``start`` stands for the seed. ``measures`` may name measures of all kinds: those
    read in each pass, density always among them, and those ``active``: curvature and trials, which
    come to what ``active`` itself names, or maps to options. ``quick`` takes the task's
    form of a few minutes on two cores.

    Raises `ValueError` for an unknown task, arm or setting, naming the known ones, and for a
    finetuning task without a ``start``.

    >>> run_config("digits", "paper", seed=1, steps=20).recipe["name"]
    'paper'
    """
    return config_of(task, arm, arm_named(arm), seed, quick=quick, **overrides)


def config_of(
    task: str, name: str, chosen: Arm, seed: int, *, quick: bool = False, **overrides: Any
) -> RunConfig:
    """As `run_config`, of an arm that is not among `ARMS`, under a name of its own."""
    if task not in EXPERIMENTS:
        raise ValueError(f"unknown task {task!r}; known: {', '.join(EXPERIMENTS)}")
    own = EXPERIMENTS[task](quick)
    spared = tuple(dict.fromkeys((*own.get("no_decay", ()), *chosen.no_decay)))
    recipe = ramped(chosen.recipe.to_json(), own.pop("ramp", None))
    settings = {**own, "recipe": recipe, "no_decay": spared}
    known = {each.name for each in fields(RunConfig)} - {"task", "arm", "seed", "recipe"}
    for key, value in overrides.items():
        if key not in known:
            raise ValueError(f"unknown setting {key!r}; known: {', '.join(sorted(known))}")
        checked_arguments(RunConfig, {key: value}, "run")
        if key in ("model", "data", "lora") and isinstance(value, Mapping):
            value = {**(own.get(key) or {}), **value}
        settings[key] = value
    if "start" in own and not settings["start"]:
        raise ValueError(
            f"{task} finetunes a checkpoint: say which, --from FOLDER ({{seed}} in it stands for "
            f"the seed)"
        )
    if settings.get("start"):
        settings["start"] = settings["start"].replace("{seed}", str(seed))
    asked = dict.fromkeys(("density", *settings.get("measures", ())))
    apart = [each for each in asked if each in (*CURVATURES, *TRIALS)]
    settings["measures"] = tuple(each for each in asked if each not in apart)
    active = settings.get("active", ())
    names = tuple(dict.fromkeys((*active, *apart)))
    options = isinstance(active, Mapping)
    settings["active"] = {each: active.get(each, {}) for each in names} if options else names
    return RunConfig(task=task, arm=name, seed=seed, **settings)

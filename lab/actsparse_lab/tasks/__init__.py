"""Which runs: functions that return a run's config, and running many of them side by side."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import fields
from typing import Any, Literal, get_args

from actsparse.observe import CURVATURES, TRIALS
from actsparse.values import checked_arguments, shown
from actsparse_lab.engine.config import RunConfig
from actsparse_lab.tasks import digits, finetune, lm, t5, text, vit
from actsparse_lab.tasks.arms import ARMS, Arm, arm_named, by_program, default_arms, ramped

__all__ = ["ARMS", "TASK_SETTINGS", "Arm", "arm_named", "default_arms", "run_config"]

Whose = Literal["paper", "program"]
TASK_SETTINGS: dict[str, Callable[[bool], dict[str, Any]]] = {
    each.__name__: each
    for each in (
        digits.digits, text.text, lm.lm, finetune.digits_finetune, finetune.lm_finetune,
        vit.cifar10, vit.vit_cifar10, t5.t5_web, lm.lm_web, vit.vit_cifar10_finetune,
        vit.vit_imagenet, vit.vit_imagenet_finetune, t5.t5_c4, t5.t5_c4_finetune,
    )
}  # fmt: skip


def run_config(
    task: str,
    arm: str,
    seed: int,
    *,
    quick: bool = False,
    settings: Whose = "paper",
    **overrides: Any,
) -> RunConfig:
    """The config of one run: the task's settings, the arm's recipe, then ``overrides``.

    ``model``, ``data`` and ``lora`` change some of the task's settings of these, the rest stay;
    ``model`` is for models made anew. ``{seed}`` in ``start`` stands for the seed. ``measures`` may
    name any measure: curvature and trials are moved to the setting ``active``, and density is
    always added. ``quick`` takes the task's form of a few minutes on two cores. ``settings``: those
    that the papers state, or where their authors' ``"program"`` differs, its own (docs/training.md,
    "The papers' settings").

    Raises `ValueError` for an unknown task, arm or setting, naming the known ones, and for a
    finetuning task without a ``start``.

    >>> run_config("digits", "paper", seed=1, steps=20).recipe["name"]
    'paper'
    """
    chosen = arm_named(arm)
    return config_of(task, arm, chosen, seed, quick=quick, settings=settings, **overrides)


def config_of(
    task: str,
    name: str,
    chosen: Arm,
    seed: int,
    *,
    quick: bool = False,
    settings: Whose = "paper",
    **overrides: Any,
) -> RunConfig:
    """As `run_config`, of an arm that is not among `ARMS`, under a name of its own."""
    if task not in TASK_SETTINGS:
        raise ValueError(f"unknown task {task!r}; known: {', '.join(TASK_SETTINGS)}")
    if settings not in get_args(Whose):
        raise ValueError(f"settings={shown(settings)}: expected paper or program")
    own = TASK_SETTINGS[task](quick)
    spared = tuple(dict.fromkeys((*own.get("no_decay", ()), *chosen.no_decay)))
    recipe = ramped(chosen.recipe.to_json(), own.pop("ramp", None))
    at_once = own.pop("program_swaps_at_once", False)
    if settings == "program":
        recipe = by_program(recipe, at_once)
    found = {**own, "recipe": recipe, "no_decay": spared}
    known = {each.name for each in fields(RunConfig)} - {"task", "arm", "seed", "recipe"}
    for key, value in overrides.items():
        if key not in known:
            raise ValueError(f"unknown setting {key!r}; known: {', '.join(sorted(known))}")
        checked_arguments(RunConfig, {key: value}, "run")
        if key in ("model", "data", "lora") and isinstance(value, Mapping):
            value = {**(own.get(key) or {}), **value}
        found[key] = value
    if "start" in own and not found["start"]:
        raise ValueError(
            f"{task} finetunes a checkpoint: say which, --set start=FOLDER ({{seed}} in it stands "
            f"for the seed)"
        )
    if found.get("start"):
        found["start"] = found["start"].replace("{seed}", str(seed))
    asked = dict.fromkeys(("density", *found.get("measures", ())))
    apart = [each for each in asked if each in (*CURVATURES, *TRIALS)]
    found["measures"] = tuple(each for each in asked if each not in apart)
    active = found.get("active", ())
    names = tuple(dict.fromkeys((*active, *apart)))
    options = isinstance(active, Mapping)
    found["active"] = {each: active.get(each, {}) for each in names} if options else names
    return RunConfig(task=task, arm=name, seed=seed, **found)

"""The arms: what is compared. An arm is a recipe and a choice of what weight decay spares."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from actsparse.modify import (
    ActivationPenalty,
    Modification,
    NormFloor,
    Recipe,
    SwapActivation,
    TopK,
    WeightNoise,
    ZerothBias,
    recipe_named,
)

ONE_DIMENSIONAL = ("norm", "bias")


@dataclass(frozen=True)
class Arm:
    """``no_decay``: the kinds of parameters that weight decay spares, see `decay_groups`."""

    recipe: Recipe
    no_decay: tuple[str, ...] = ()


_HOYER = Recipe("hoyer", (ActivationPenalty("hoyer", weight=0.5, ramp=0.5),))
_HOYER_STRONG = Recipe("hoyer", (ActivationPenalty("hoyer", weight=2.0, ramp=0.5),))
_L1 = Recipe("l1", (ActivationPenalty("l1", weight=1.0, ramp=0.5),))


def _best(name: str, *penalties: Modification, phi: str = "jsrelu") -> Recipe:
    """`best`, but for one thing."""
    return Recipe(name, (SwapActivation(phi), *penalties))


_PAPER = recipe_named("paper")
_FINETUNE = recipe_named("paper-finetune")
_THIRD = 1 / 3  # as in the papers' finetuning

ARMS = {
    "vanilla": Arm(recipe_named("vanilla")),
    "paper": Arm(_PAPER),
    "vanilla-no-1d-decay": Arm(recipe_named("vanilla"), ONE_DIMENSIONAL),
    "hoyer-no-1d-decay": Arm(_HOYER, ONE_DIMENSIONAL),
    "no-mlp": Arm(recipe_named("no-mlp")),
    "best": Arm(recipe_named("best"), ONE_DIMENSIONAL),
    # one change at a time, and the strong baselines' neighbours
    "paper-no-1d-decay": Arm(_PAPER, ONE_DIMENSIONAL),
    "hoyer": Arm(_HOYER),
    "l1-no-1d-decay": Arm(_L1, ONE_DIMENSIONAL),
    "squared-relu": Arm(Recipe("squared-relu", (SwapActivation("squared_relu"),)), ONE_DIMENSIONAL),
    # what each part of best does, and its neighbours
    "best-1d-decay": Arm(recipe_named("best")),
    "best-at-once": Arm(_best("best-at-once", ActivationPenalty("l1")), ONE_DIMENSIONAL),
    "best-hoyer": Arm(
        _best("best-hoyer", ActivationPenalty("hoyer", weight=1.0, ramp=0.5)), ONE_DIMENSIONAL
    ),
    "best-capped": Arm(
        _best("best-capped", *_L1.modifications, phi="jsrelu(cap=2)"), ONE_DIMENSIONAL
    ),
    "best-jump": Arm(
        _best("best-jump", *_L1.modifications, phi="jsrelu(jump=0.5)"), ONE_DIMENSIONAL
    ),
    "jsrelu-no-1d-decay": Arm(Recipe("jsrelu", (SwapActivation("jsrelu"),)), ONE_DIMENSIONAL),
    "top-k": Arm(Recipe("top-k", (TopK(0.025, ramp=0.3),)), ONE_DIMENSIONAL),
    "zeroth-bias": Arm(Recipe("zeroth-bias", (ZerothBias(),))),
    "norm-floor": Arm(Recipe("norm-floor", (NormFloor(),))),
    "jsrelu": Arm(Recipe("jsrelu", (SwapActivation("jsrelu"),))),
    "weight-noise": Arm(Recipe("weight-noise", (WeightNoise(),))),
    # of a trained model; vanilla is plain finetuning
    "paper-finetune": Arm(_FINETUNE),
    "paper-finetune-noise": Arm(
        Recipe(
            "paper-finetune-noise",
            (*_FINETUNE.modifications, WeightNoise(0.05, ("up", "down", "attention"))),
        )
    ),
    "relu-finetune": Arm(Recipe("relu-finetune", (SwapActivation("relu", mix=_THIRD),))),
    "hoyer-finetune": Arm(
        Recipe("hoyer-finetune", (SwapActivation("relu", mix=_THIRD), *_HOYER_STRONG.modifications))
    ),
    "paper-hoyer-finetune": Arm(
        Recipe("paper-hoyer-finetune", _FINETUNE.modifications + _HOYER_STRONG.modifications)
    ),
}
_DEFAULT = ("vanilla", "paper", "vanilla-no-1d-decay", "best", "no-mlp")
_FINETUNING = ("vanilla", "paper-finetune", "relu-finetune", "hoyer-finetune")


def default_arms(task: str) -> tuple[str, ...]:
    """The arms that `actsparse compare` takes where none are named.

    >>> default_arms("digits_finetune")[0]
    'vanilla'
    """
    return _FINETUNING if task.endswith("_finetune") else _DEFAULT


def ramped(recipe: dict[str, Any], steps: int | None) -> dict[str, Any]:
    """A recipe as JSON, with mixing and uplift over so many steps; None leaves them as they are.

    >>> ramped(_FINETUNE.to_json(), 3000)["modifications"][2]["mix"]
    3000
    """
    if steps is None:
        return recipe
    changes = [
        change | {name: steps for name in ("mix", "uplift") if change.get(name) is not None}
        for change in recipe["modifications"]
    ]
    return recipe | {"modifications": changes}


def by_program(recipe: dict[str, Any], at_once: bool) -> dict[str, Any]:
    """A recipe as JSON, changed to what the papers' authors' program does.

    It adds zeroth biases to the MLP's output, and raises norms to the floor before an optimizer
    step rather than after it (cdgyp/sparsity at ae2ff7b, ``modules/robustness.py``). ``at_once``:
    an activation function is swapped at the start, not mixed in.

    >>> by_program(_PAPER.to_json(), False)["modifications"][0]["at"]
    'output'
    """
    own: dict[str, dict[str, Any]] = {
        "ZerothBias": {"at": "output"},
        "NormFloor": {"before": True},
        "SwapActivation": {"mix": None} if at_once else {},
    }
    changes = [change | own.get(change["modification"], {}) for change in recipe["modifications"]]
    return recipe | {"modifications": changes}


def arm_named(name: str) -> Arm:
    """The arm of that name; `ValueError` lists the known ones.

    >>> arm_named("vanilla-no-1d-decay").no_decay
    ('norm', 'bias')
    """
    if name not in ARMS:
        raise ValueError(f"unknown arm {name!r}; known: {', '.join(ARMS)}")
    return ARMS[name]

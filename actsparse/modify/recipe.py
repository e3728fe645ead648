"""Recipes: named lists of modifications."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, fields
from typing import Annotated, Any

from actsparse.activations import ActivationFunction
from actsparse.modify.drop_small import DropSmall
from actsparse.modify.modification import Modification
from actsparse.modify.no_mlp import LeaveOutMLP
from actsparse.modify.norm_floor import NormFloor
from actsparse.modify.penalty import ActivationPenalty
from actsparse.modify.prune_gradient import PruneGradient
from actsparse.modify.swap_activation import SwapActivation
from actsparse.modify.top_k import TopK
from actsparse.modify.weight_noise import WeightNoise
from actsparse.modify.zeroth_bias import ZerothBias
from actsparse.values import BadValue, Rule, Text, check, checked, shown

MODIFICATIONS: dict[str, type[Modification]] = {
    cls.__name__: cls
    for cls in (
        ZerothBias, NormFloor, SwapActivation, TopK, DropSmall, WeightNoise, ActivationPenalty,
        PruneGradient, LeaveOutMLP,
    )
}  # fmt: skip


@dataclass(frozen=True)
class Recipe:
    """A named list of modifications, which ``sparsify`` makes in this order.

    Args:
        name: any name, for print and for files.
        modifications: the modifications.

    >>> recipe = Recipe("mine", (NormFloor(floor=2.0), SwapActivation("relu")))
    >>> Recipe.from_json(recipe.to_json()) == recipe
    True
    """

    name: str
    modifications: tuple[Modification, ...] = ()

    def to_json(self) -> dict[str, Any]:
        """The recipe as plain values for JSON; :meth:`from_json` reads them.

        Returns:
            The name, and under ``modifications`` the name and options of each.

        Raises:
            ValueError: a modification holds a function instead of a name.
        """
        items = []
        for modification in self.modifications:
            if isinstance(getattr(modification, "to", None), ActivationFunction):
                raise ValueError(
                    f"{modification} holds a function of your own, which cannot be saved; "
                    f"use an activation by name"
                )
            items.append({"modification": type(modification).__name__, **asdict(modification)})
        return {"name": self.name, "modifications": items}

    @classmethod
    def from_json(cls, values: Any, where: str = "the recipe") -> Recipe:
        """Make a recipe from what :meth:`to_json` returned.

        An option that no longer exists is dropped if its value is null, because it changed nothing.

        Args:
            values: the plain values.
            where: what they were read from, for error messages.

        Returns:
            The recipe.

        Raises:
            BadValue: this is no recipe, or names an unknown modification or option, or has a wrong
                value of one. It is a ``ValueError``.
        """
        check(where, values, _SHAPE)
        modifications = []
        for index, item in enumerate(values["modifications"]):
            at = f"{where}.modifications[{index}]"
            check(at, item, {"modification": str})
            name = item["modification"]
            if name not in MODIFICATIONS:
                known = ", ".join(MODIFICATIONS)
                raise BadValue(f"{at}: unknown modification {shown(name)}; known: {known}")
            made = MODIFICATIONS[name]
            known_options = {field.name for field in fields(made)}
            options = {
                key: value
                for key, value in item.items()
                if key != "modification" and (value is not None or key in known_options)
            }
            modifications.append(checked(made, options, f"{at} ({name})"))
        return cls(values["name"], tuple(modifications))


_MOST = Rule("a list of at most 100 modifications", lambda value: len(value) <= 100)
_SHAPE = {"name": Text, "modifications": Annotated[list[Any], _MOST]}


def _paper() -> Recipe:
    return Recipe("paper", (ZerothBias(), NormFloor(), SwapActivation("jsrelu")))


def _paper_finetune() -> Recipe:
    third = 1 / 3  # mixing and uplift take 5 of 15 epochs, 3000 of 10⁴ steps
    return Recipe(
        "paper-finetune",
        (ZerothBias(finetune=True), NormFloor(uplift=third), SwapActivation("jsrelu", mix=third)),
    )


def _best() -> Recipe:
    """The sparsest at equal quality of all that `actsparse frontier` compared: docs/frontier.md."""
    penalty = ActivationPenalty("l1", weight=1.0, ramp=0.5)
    return Recipe("best", (SwapActivation("jsrelu"), penalty))


RECIPES: dict[str, Callable[[], Recipe]] = {
    "vanilla": lambda: Recipe("vanilla"),
    "best": _best,
    "paper": _paper,
    "paper-finetune": _paper_finetune,
    "no-mlp": lambda: Recipe("no-mlp", (LeaveOutMLP(),)),
}


def recipe_named(name: str) -> Recipe:
    """The recipe called ``name``: ``best``, ``vanilla``, ``paper``, ``paper-finetune``, ``no-mlp``.

    ``best`` wants weight decay that spares norms and biases: ``decay_groups(model, weight_decay,
    exclude=("norm", "bias"))``.

    Args:
        name: one of these.

    Returns:
        The recipe.

    Raises:
        ValueError: no recipe has that name.

    >>> recipe_named("paper").modifications[2]
    SwapActivation(to='jsrelu', mix=None)
    """
    if name not in RECIPES:
        raise ValueError(f"unknown recipe {name!r}; known: {', '.join(RECIPES)}")
    return RECIPES[name]()


RecipeLike = str | Recipe | Modification | Sequence[Modification]


def as_recipe(recipe: RecipeLike) -> Recipe:
    """A recipe from its name, from one modification or from a list of them.

    Raises:
        TypeError: something else was given.
    """
    if isinstance(recipe, str):
        return recipe_named(recipe)
    if isinstance(recipe, Recipe):
        return recipe
    several = isinstance(recipe, Sequence) and not isinstance(recipe, Modification)
    items: tuple[Any, ...] = tuple(recipe) if several else (recipe,)  # type: ignore[arg-type]
    for item in items:
        if not isinstance(item, Modification):
            raise TypeError(f"a recipe is made of modifications, got {item!r}")
    return Recipe(" + ".join(type(item).__name__ for item in items) or "vanilla", items)

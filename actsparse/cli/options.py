"""Options that several verbs share: settings of a run that override the task's own."""

from __future__ import annotations

from json import loads
from typing import Annotated, Any

import typer

Task = Annotated[str, typer.Option(help="digits, text (T5 span corruption) or lm (causal).")]
_OWN = "the task's"
Steps = Annotated[int | None, typer.Option(help="Optimizer steps.", show_default=_OWN)]
Lr = Annotated[float | None, typer.Option(help="Peak learning rate.", show_default=_OWN)]
WeightDecay = Annotated[float | None, typer.Option(help="AdamW's.", show_default=_OWN)]
BatchSize = Annotated[int | None, typer.Option(help="Rows in a batch.", show_default=_OWN)]
Model = Annotated[
    str | None,
    typer.Option(
        help="Settings of the model to change, such as hidden_size=256,intermediate_size=1024.",
        show_default=_OWN,
    ),
]
LogEvery = Annotated[int | None, typer.Option(help="Steps between logs.", show_default=_OWN)]
EvalEvery = Annotated[
    int | None, typer.Option(help="Steps between validations.", show_default=_OWN)
]
Measures = Annotated[
    str | None,
    typer.Option(
        help="With commas between: density, flatness, gradient, noise, spectrum, read in each "
        "pass; gauss_newton, hessian, token_copies, top_eigenvalue, by passes of their own.",
        show_default="density",
    ),
]
MeasureEvery = Annotated[
    int | None,
    typer.Option(help="Steps between the latter.", min=1, show_default="start and end alone"),
]
Accelerate = Annotated[
    bool,
    typer.Option(
        "--accelerate",
        help="Let MLP blocks run sparse in training where that is faster. Small ones, such as the "
        "tasks' own, stay dense. Training density is then that of the logged steps.",
    ),
]


def names(text: str | None) -> tuple[str, ...] | None:
    """The names in ``a,b``; None stays None."""
    return None if text is None else tuple(name.strip() for name in text.split(","))


def settings(text: str | None, task: str) -> dict[str, Any] | None:
    """The settings in ``name=value,name=value``, numbers as numbers; None stays None."""
    from actsparse.experiments import run_config

    if text is None:
        return None
    known = run_config(task, "vanilla", 0).model
    found: dict[str, Any] = {}
    for part in text.split(","):
        name, equals, value = (each.strip() for each in part.partition("="))
        if not (name and equals and value):
            raise ValueError(f"--model {text!r}: expected such as hidden_size=256")
        if name not in known:
            names = ", ".join(known)
            raise ValueError(f"unknown setting {name!r} of {task}'s model; known: {names}")
        try:
            found[name] = loads(value)
        except ValueError:
            found[name] = value
    return found

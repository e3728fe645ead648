"""Options that several verbs share: settings of a run that override the task's own."""

from __future__ import annotations

from typing import Annotated

import typer

Task = Annotated[str, typer.Option(help="digits, text (T5 span corruption) or lm (causal).")]
_OWN = "the task's"
Steps = Annotated[int | None, typer.Option(help="Optimizer steps.", show_default=_OWN)]
Lr = Annotated[float | None, typer.Option(help="Peak learning rate.", show_default=_OWN)]
WeightDecay = Annotated[float | None, typer.Option(help="AdamW's.", show_default=_OWN)]
BatchSize = Annotated[int | None, typer.Option(help="Rows in a batch.", show_default=_OWN)]
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


def names(text: str | None) -> tuple[str, ...] | None:
    """The names in ``a,b``; None stays None."""
    return None if text is None else tuple(name.strip() for name in text.split(","))

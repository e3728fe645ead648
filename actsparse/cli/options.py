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

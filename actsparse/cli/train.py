"""``actsparse train``: one run of one arm."""

from __future__ import annotations

import shlex
import sys
from pathlib import Path
from typing import Annotated

import typer

from actsparse.cli.options import (
    Accelerate,
    BatchSize,
    EvalEvery,
    LogEvery,
    Lr,
    MeasureEvery,
    Measures,
    Model,
    Steps,
    Task,
    WeightDecay,
    names,
    settings,
)


def train(
    task: Task = "digits",
    arm: Annotated[str, typer.Option(help="See `actsparse compare --arms help`.")] = "paper",
    seed: Annotated[int, typer.Option(help="Of the start and the order of the data.", min=0)] = 0,
    out: Annotated[
        Path | None,
        typer.Option(help="Folder for the record and weights.", show_default="runs/TASK"),
    ] = None,
    steps: Steps = None,
    lr: Lr = None,
    weight_decay: WeightDecay = None,
    batch_size: BatchSize = None,
    model: Model = None,
    log_every: LogEvery = None,
    eval_every: EvalEvery = None,
    measures: Measures = None,
    measure_every: MeasureEvery = None,
    accelerate: Accelerate = False,
    json: Annotated[bool, typer.Option("--json", help="Print the result as JSON.")] = False,
) -> None:
    """Train one arm with one seed; the record and the weights stay in its folder.

    A run that is finished is not repeated. Exits with 1 if training failed.

    Examples:

      actsparse train --task digits --arm paper --seed 0 --out runs/x

      actsparse train --task lm --arm hoyer-no-1d-decay --steps 500 --json
    """
    from json import dumps

    from rich.console import Console

    from actsparse.cli.progress import show
    from actsparse.experiments import run_config
    from actsparse.experiments.compare import compare as compare_runs
    from actsparse.records import read_run, run_path

    out = out or Path("runs") / task
    config = run_config(
        task,
        arm,
        seed,
        steps=steps,
        lr=lr,
        weight_decay=weight_decay,
        batch_size=batch_size,
        model=settings(model, task),
        log_every=log_every,
        eval_every=eval_every,
        measures=names(measures),
        active_every=measure_every,
        accelerate=accelerate,
    )
    console = Console(stderr=json)
    command = shlex.join(["actsparse", *sys.argv[1:]])
    place = run_path(out, arm, seed)
    events = compare_runs([config], out, workers=1, command=command)
    console.print(
        f"{arm} seed {seed} on {task}, into {place.parent}", highlight=False, soft_wrap=True
    )
    try:
        failed = show(events, 1, str(out), console)
    except KeyboardInterrupt:
        typer.echo(f"Stopped; the run is not kept. Again from its start: {command}", err=True)
        raise typer.Exit(130) from None
    if failed:
        raise typer.Exit(1)
    result = read_run(place).result or {}
    for line in result.get("accelerated", ()):
        console.print(line, highlight=False, soft_wrap=True)
    if json:
        typer.echo(dumps(result, indent=2))
    console.print(f"record: {place}", highlight=False, soft_wrap=True)

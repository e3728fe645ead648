"""``actsparse train``: one run of one arm."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from actsparse_lab.cli.options import (
    Config,
    Data,
    Quick,
    Settings,
    Steps,
    Task,
    Whose,
    chosen,
)


def train(
    task: Task = "digits",
    arm: Annotated[
        str | None,
        typer.Option(
            help="See `actsparse compare --arms help`.", show_default="best, or paper-finetune"
        ),
    ] = None,
    seed: Annotated[
        int, typer.Option(help="Seed of the initial weights and of the order of the data.", min=0)
    ] = 0,
    out: Annotated[
        Path | None,
        typer.Option(help="Folder for the record and weights.", show_default="runs/TASK"),
    ] = None,
    quick: Quick = False,
    data: Data = None,
    settings: Whose = "paper",
    steps: Steps = None,
    config: Config = None,
    given: Settings = None,
    json: Annotated[bool, typer.Option("--json", help="Print the result as JSON.")] = False,
) -> None:
    """Train one arm with one seed; the record and the weights stay in its folder.

    A run that is finished is not repeated; one that was stopped goes on from its last checkpoint,
    called as it was. Under torchrun, or `accelerate launch`, all processes train it together; the
    batch is that of all. Exits with 1 if training failed, with 130 after Ctrl-C or SIGTERM.

    Examples:

      actsparse train --task digits --arm paper --seed 0 --out runs/x

      actsparse train --task lm --arm hoyer-no-1d-decay --steps 500 --json

      torchrun --nproc_per_node 8 -m actsparse train --task vit_imagenet --data imagenet

      torchrun --nproc_per_node 8 -m actsparse train --task t5_c4 --data c4 --config t5.toml
    """
    from json import dumps

    from actsparse.terminal import Terminal
    from actsparse.train.processes import launched
    from actsparse_lab.cli.progress import called, following, keep_card, outcome
    from actsparse_lab.engine.folder import finished_run
    from actsparse_lab.records import run_path
    from actsparse_lab.tasks import run_config

    out = out or Path("runs") / task
    if arm is None:
        arm = "paper-finetune" if task.endswith("_finetune") else "best"
    overrides, threads = chosen(task, quick, data, settings, steps, config, given)
    asked = run_config(task, arm, seed, **overrides)
    place = run_path(out, arm, seed)
    run = finished_run(asked, out)
    before = run is not None
    first = launched()[0] == 0
    console = Terminal(stderr=json, quiet=not first)
    console.print(
        f"{arm} seed {seed} on {task}, into {place.parent}", highlight=False, soft_wrap=True
    )
    if run is None:
        import torch
        import transformers

        from actsparse.train.loss import TrainingFailed
        from actsparse_lab.engine.interrupt import Interrupted
        from actsparse_lab.engine.run import run as train_run

        torch.set_num_threads(threads)
        transformers.logging.set_verbosity_error()  # it remarks on configs that were made up
        with following(asked, console) as tell:
            try:
                run = train_run(
                    asked,
                    out,
                    command=called(),
                    on_step=tell,
                    told=lambda said: _warn(said, first),
                )
            except Interrupted as interrupted:
                _warn(f"Stopped: {interrupted}", first)
                raise typer.Exit(130) from None
            except TrainingFailed as failed:
                _warn(f"Failed: {failed}", first)
                raise typer.Exit(1) from None
    if first:
        keep_card(run)
    result = run.result or {}
    console.print(outcome(result, before), highlight=False, soft_wrap=True)
    for line in result["time"].get("accelerated", ()):
        console.print(line, highlight=False, soft_wrap=True)
    if json and first:
        typer.echo(dumps(result, indent=2))
    console.print(f"record: {place}", highlight=False, soft_wrap=True)


def _warn(text: str, first: bool) -> None:
    if first:
        typer.echo(text, err=True)

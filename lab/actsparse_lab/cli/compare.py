"""``actsparse compare``: arms × seeds, side by side, and the page."""

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


def compare(
    task: Task = "digits",
    arms: Annotated[
        str | None,
        typer.Option(
            help="Arms, separated by commas; `--arms help` lists all of them.",
            show_default="four or five",
        ),
    ] = None,
    seeds: Annotated[
        int, typer.Option(help="Number of paired seeds of each arm, from 0.", min=1)
    ] = 3,
    out: Annotated[
        Path | None,
        typer.Option(help="Folder for records, weights and the page.", show_default="runs/TASK"),
    ] = None,
    workers: Annotated[
        int | None,
        typer.Option(help="Number of runs at a time.", min=1, show_default="cores"),
    ] = None,
    quick: Quick = False,
    data: Data = None,
    settings: Whose = "paper",
    steps: Steps = None,
    config: Config = None,
    given: Settings = None,
    json: Annotated[
        bool, typer.Option("--json", help="Print the table as JSON; progress goes to stderr.")
    ] = False,
) -> None:
    """Train arms × seeds on a task and write a page that compares them.

    Stopped or failed, it goes on where it was when called again: finished runs are not repeated,
    others go on from their last checkpoint. Exits with 1 if a run failed, with 130 after Ctrl-C.

    Examples:

      actsparse compare --task digits --out runs/demo

      actsparse compare --task lm --arms vanilla,paper,norm-floor --seeds 5

      actsparse compare --arms vanilla,paper --set measures=flatness,gradient,spectrum

      actsparse compare --arms vanilla,paper --steps 100 --json

      actsparse compare --task vit_cifar10 --quick --data cifar10

      actsparse compare --task digits_finetune --set "start=base/runs/vanilla-seed{seed}/weights"
    """
    from actsparse.terminal import Terminal
    from actsparse_lab.cli.campaign import Campaign, exit_if
    from actsparse_lab.cli.progress import keep_card
    from actsparse_lab.records import read_runs
    from actsparse_lab.report import compare as table_of
    from actsparse_lab.report import print_table, to_json, write_report
    from actsparse_lab.tasks import ARMS, default_arms, run_config

    if arms == "help":
        typer.echo("\n".join(ARMS))
        return
    asked = default_arms(task) if arms is None else tuple(dict.fromkeys(arms.split(",")))
    out = out or Path("runs") / task
    overrides, threads = chosen(task, quick, data, settings, steps, config, given)
    configs = [
        run_config(task, arm.strip(), seed, **overrides) for seed in range(seeds) for arm in asked
    ]
    console = Terminal(stderr=json)
    campaign = Campaign(f"{len(asked)} arms × {seeds} seeds on {task}", out, {"": configs})
    failed = campaign.run(console, workers=workers, threads=threads)
    page = write_report(out)
    runs = read_runs(out)
    for run in runs:
        if run.finished:
            keep_card(run)
    if json:
        typer.echo(to_json(table_of(runs)))
    else:
        print_table(runs, console)
    console.print(f"page: {page}", highlight=False, soft_wrap=True)
    exit_if(failed)

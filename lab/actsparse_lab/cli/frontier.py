"""``actsparse frontier``: train what is missing of the frontier, and write the scoreboard."""

from __future__ import annotations

from collections.abc import Iterable
from json import dumps
from pathlib import Path
from typing import Annotated, Any

import typer

from actsparse.terminal import Terminal
from actsparse_lab.cli.options import Threads, names

RACE = "race"


def frontier(
    tasks: Annotated[
        list[str] | None,
        typer.Argument(
            help="digits, text, cifar10, web, text-long, web-long, width-64, -128, -256 and -384, "
            "or all; race: dense against accelerated, timed one run at a time.",
            show_default="all",
        ),
    ] = None,
    arms: Annotated[
        str | None,
        typer.Option(help="Arms to train, separated by commas.", show_default="all"),
    ] = None,
    seeds: Annotated[
        int | None,
        typer.Option(
            help="Number of paired seeds of each arm, from 0; fewer than 5 decide nothing.",
            min=1,
            show_default="the task's",
        ),
    ] = None,
    steps: Annotated[
        int | None,
        typer.Option(
            help="Number of steps of every run, for a quick trial.", min=1, show_default="its own"
        ),
    ] = None,
    data: Annotated[
        list[str] | None,
        typer.Option(
            help="Where a task's data lie, such as cifar10=data/cifar10; several times for several "
            "tasks. A path alone is for the one task asked for.",
            metavar="TASK=PATH",
        ),
    ] = None,
    out: Annotated[
        Path, typer.Option(help="Folder of all tasks: records, weights and pages.")
    ] = Path("runs/frontier"),
    workers: Annotated[
        int | None,
        typer.Option(help="Number of runs at a time.", min=1, show_default="cores; 1 in a race"),
    ] = None,
    threads: Threads = 1,
    json: Annotated[
        bool, typer.Option("--json", help="Print the scoreboard as JSON; progress goes to stderr.")
    ] = False,
) -> None:
    """Which recipe is sparsest at equal quality? Trains what is missing, then judges it.

    Every task runs controls and recipes over paired seeds, into OUT/TASK; the scoreboard is made of
    the records. Stopped or failed, it goes on where it was when called again. A task whose data are
    not given is passed over, with a line. Exits with 1 if a run failed, with 130 after Ctrl-C.

    Examples:

      actsparse frontier digits text

      actsparse frontier --data cifar10=data/cifar10 --data web=data/web.jsonl.xz

      actsparse frontier race --data cifar10=data/cifar10
    """
    from actsparse_lab.analysis.manifest import FRONTIER
    from actsparse_lab.campaigns.frontier import RACE as SETTING
    from actsparse_lab.campaigns.frontier import TASKS, race
    from actsparse_lab.campaigns.frontier import frontier as runs_of
    from actsparse_lab.cli.campaign import Campaign, exit_if
    from actsparse_lab.report import write_prediction

    asked = list(dict.fromkeys(tasks or ["all"]))
    if "all" in asked:
        asked = list(dict.fromkeys([*TASKS, *(name for name in asked if name != "all")]))
    if unknown := [name for name in asked if name not in (*TASKS, RACE)]:
        raise ValueError(f"unknown task {unknown[0]!r}; known: {', '.join(TASKS)}, race, all")
    if arms is not None and RACE in asked:
        raise ValueError("--arms is not for race, whose arms are set in campaigns/frontier.py")
    subjects = {name: SETTING.task if name == RACE else name for name in asked}
    places = _places(data, [task for task in subjects.values() if TASKS[task].reads_data])
    console = Terminal(stderr=json)
    campaigns = []
    for name, task in subjects.items():
        form: dict[str, Any] = {"seeds": seeds, "steps": steps, "data": places.get(task)}
        if TASKS[task].reads_data and task not in places:
            told = f"{name}: passed over, it needs --data {task}=PATH"
            console.print(told, highlight=False)
        elif name == RACE:  # its records say it all
            campaigns.append(Campaign(RACE, out / task / RACE, {"": race(**form)}))
        else:
            again = ("--data", f"{name}=DATA") if TASKS[task].reads_data else ()
            campaigns.append(
                Campaign(
                    name,
                    out / name,
                    {"": runs_of(name, arms=arms and names(arms), **form)},
                    FRONTIER,
                    about={"task": name},
                    again=("frontier", name, *again),
                    seeds=TASKS[name].seeds,
                    steps=steps,
                )
            )
    if not campaigns:
        raise ValueError("nothing to do: no task that was asked for has its data")
    for campaign in campaigns:  # what is wrong in the last should not cost the first
        campaign.check()
    write_prediction(out)  # before a run of the width that it predicts begins
    failed = 0
    for campaign in campaigns:
        at_once = workers or (1 if campaign.name == RACE else None)
        failed += campaign.run(console, workers=at_once, threads=threads)
    _tell(out, {subjects[campaign.name] for campaign in campaigns}, json, console)
    exit_if(failed)


def _places(data: Iterable[str] | None, needing: list[str]) -> dict[str, str]:
    """Where each task's data lie, out of ``TASK=PATH`` and at most one path alone."""
    found: dict[str, str] = {}
    for text in data or ():
        task, equals, path = text.partition("=")
        if not equals and len(set(needing)) == 1:
            task, path = needing[0], text
        elif not equals:
            raise ValueError(f"--data {text!r}: say for which task, as TASK={text}")
        if task not in needing:
            known = ", ".join(needing) or "none"
            raise ValueError(
                f"--data {text!r}: no task {task!r} that is asked for reads data; those that do: "
                f"{known}"
            )
        found[task] = path
    return found


def _tell(out: Path, tasks: set[str], json: bool, console: Terminal) -> None:
    """Write the pages of ``tasks`` and the scoreboard of all, and print it."""
    from actsparse_lab.records import read_runs
    from actsparse_lab.report import (
        frontiers_in,
        print_board,
        scoreboard,
        write_report,
        write_scoreboard,
    )
    from actsparse_lab.report.frontier import board

    for task in sorted(tasks):
        for place in (out / task, out / task / RACE):
            if any(run.finished for run in read_runs(place)):
                page = write_report(place)
                console.print(f"page: {page}", highlight=False, soft_wrap=True)
    judged = [found for place in frontiers_in(out) if (found := board(place)) is not None]
    if not judged:
        console.print("no run of a frontier task is finished, so there is nothing to judge")
        return
    for found in judged:
        print_board(found, console)
    path = write_scoreboard(out)
    console.print(f"scoreboard: {path}", highlight=False, soft_wrap=True)
    if json:
        typer.echo(dumps(scoreboard(out), indent=2))

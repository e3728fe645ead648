"""``actsparse frontier``: train what is missing of the frontier, and write the scoreboard."""

from __future__ import annotations

import shlex
import sys
import time
from collections.abc import Iterable
from json import dumps
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from actsparse.terminal import Terminal
from actsparse_lab.cli.options import Threads, names

if TYPE_CHECKING:
    from actsparse_lab.engine.config import RunConfig

RACE = "race"


def frontier(
    tasks: Annotated[
        list[str] | None,
        typer.Argument(
            help="digits, text, cifar10, web, text-long, web-long, or all; race: dense against "
            "accelerated, timed one run at a time.",
            show_default="all",
        ),
    ] = None,
    arms: Annotated[
        str | None,
        typer.Option(help="Some of the arms, with commas between.", show_default="all"),
    ] = None,
    seeds: Annotated[
        int | None,
        typer.Option(
            help="Paired seeds of each arm, from 0; fewer than 5 decide nothing.",
            min=1,
            show_default="the task's",
        ),
    ] = None,
    steps: Annotated[
        int | None,
        typer.Option(help="Of every run, to try the machinery.", min=1, show_default="its own"),
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
    ] = Path("benchmarks/frontier"),
    workers: Annotated[
        int | None, typer.Option(help="Runs at a time.", min=1, show_default="cores; 1 in a race")
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
    from actsparse_lab.campaigns.frontier import RACE as SETTING
    from actsparse_lab.campaigns.frontier import TASKS, race
    from actsparse_lab.campaigns.frontier import frontier as runs_of

    asked = list(dict.fromkeys(tasks or ["all"]))
    if "all" in asked:
        asked = list(dict.fromkeys([*TASKS, *(name for name in asked if name != "all")]))
    if unknown := [name for name in asked if name not in (*TASKS, RACE)]:
        raise ValueError(f"unknown task {unknown[0]!r}; known: {', '.join(TASKS)}, race, all")
    if arms is not None and RACE in asked:
        raise ValueError("--arms is not for race, whose arms are set in experiments/frontier.py")
    subjects = {name: SETTING.task if name == RACE else name for name in asked}
    places = _places(data, [task for task in subjects.values() if TASKS[task].reads_data])
    console = Terminal(stderr=json)
    plans: dict[str, list[RunConfig]] = {}
    for name, task in subjects.items():
        if TASKS[task].reads_data and task not in places:
            told = f"{name}: passed over, it needs --data {task}=PATH"
            console.print(told, highlight=False)
        elif name == RACE:
            plans[name] = race(seeds=seeds, steps=steps, data=places.get(task))
        else:
            plans[name] = runs_of(
                name, arms=arms and names(arms), seeds=seeds, steps=steps, data=places.get(task)
            )
    if not plans:
        raise ValueError("nothing to do: no task that was asked for has its data")
    folders = {name: out / task / (RACE if name == RACE else "") for name, task in subjects.items()}
    for name, configs in plans.items():  # what is wrong in the last should not cost the first
        _check(name, configs, folders[name], steps)
    command = shlex.join(["actsparse", *sys.argv[1:]])
    failed = 0
    for name, configs in plans.items():
        at_once = workers or (1 if name == RACE else None)
        failed += _run(name, configs, folders[name], steps, at_once, threads, command, console)
    _tell(out, {subjects[name] for name in plans}, json, console)
    if failed:
        typer.echo(f"{failed} runs failed; to try them again: {command}", err=True)
        raise typer.Exit(1)


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


def _check(name: str, configs: list[RunConfig], place: Path, steps: int | None) -> None:
    """Refuse a folder that holds something else, and data that cannot be read."""
    from actsparse_lab.campaigns.compare import compare
    from actsparse_lab.engine.folder import finished_run
    from actsparse_lab.engine.tasks import task_of
    from actsparse_lab.packed import record_paths
    from actsparse_lab.report.frontier import read_manifest

    manifest = read_manifest(place)
    if manifest is not None and (manifest["task"], manifest["steps"]) != (name, steps):
        raise ValueError(f"{place} holds runs of `{manifest['command']}`; choose another --out")
    if manifest is None and name != RACE and record_paths(place):
        raise ValueError(f"{place} holds other runs, of no frontier; choose another --out")
    compare(configs, place)  # says what is wrong; nothing runs before it is asked
    missing = [config for config in configs if finished_run(config, place) is None]
    if missing and missing[0].data:
        task_of(missing[0].task).splits(missing[0])


def _run(
    name: str,
    configs: list[RunConfig],
    place: Path,
    steps: int | None,
    workers: int | None,
    threads: int,
    command: str,
    console: Terminal,
) -> int:
    """Do what is not done yet; returns how many runs failed."""
    from actsparse_lab.campaigns.compare import compare
    from actsparse_lab.cli.progress import show, stoppable
    from actsparse_lab.report.frontier import read_manifest, write_manifest

    earlier = None if name == RACE else read_manifest(place)
    spent = 0.0 if earlier is None else float(earlier["time"]["seconds"])
    planned = len({config.seed for config in configs})
    seeds = max(planned, earlier["seeds"] if earlier else 0)  # none is dropped
    began, done = time.perf_counter(), 0

    def note() -> None:
        if name != RACE:  # its records say it all
            seconds = spent + (time.perf_counter() - began if done else 0)
            write_manifest(
                place,
                task=name,
                seeds=seeds,
                steps=steps,
                command=_again(name, seeds, steps),
                time={"seconds": round(seconds, 1)},
            )

    console.print(f"{name}: {len(configs)} runs, into {place}", highlight=False, soft_wrap=True)
    note()
    events = compare(configs, place, workers=workers, threads=threads, command=command)

    def counted() -> Iterable[Any]:
        nonlocal done
        for event in events:
            done += event.kind != "skipped"
            yield event

    with stoppable(command):
        try:
            return len(show(counted(), len(configs), str(place), console))
        finally:
            note()


def _again(name: str, seeds: int, steps: int | None) -> str:
    """The command without where it ran and where data lie."""
    from actsparse_lab.campaigns.frontier import TASKS

    task = TASKS[name]
    parts = ["actsparse", "frontier", name]
    parts += ["--data", f"{name}=DATA"] if task.reads_data else []
    parts += [] if seeds == task.seeds else ["--seeds", str(seeds)]
    return shlex.join([*parts, *([] if steps is None else ["--steps", str(steps)])])


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

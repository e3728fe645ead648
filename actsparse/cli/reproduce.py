"""``actsparse reproduce``: an experiment of the papers, its verdicts and its page."""

from __future__ import annotations

import shlex
import signal
import sys
import time
from json import dumps
from pathlib import Path
from typing import Annotated

import typer

from actsparse.cli.options import Threads


def reproduce(
    name: Annotated[
        str | None,
        typer.Argument(help="Which; `all`, or nothing for a list.", show_default=False),
    ] = None,
    full: Annotated[
        bool,
        typer.Option("--full", help="The form for a GPU: a ViT-S on images of 32 px; hours."),
    ] = False,
    data: Annotated[
        str | None,
        typer.Option(
            help="For --full: a folder of images (train/<class>/…), as `benchmarks/"
            "unpack_images.py` makes of CIFAR-10; for noise the folder of MNIST's .npz files."
        ),
    ] = None,
    seeds: Annotated[
        int, typer.Option(help="Paired seeds for each arm, from 0; fewer than 5 decide nothing.")
    ] = 5,
    steps: Annotated[
        int | None,
        typer.Option(help="Of every run, to try the machinery.", min=1, show_default="its own"),
    ] = None,
    out: Annotated[
        Path | None,
        typer.Option(help="Folder for records and page.", show_default="runs/reproduce/NAME"),
    ] = None,
    workers: Annotated[
        int | None, typer.Option(help="Runs at a time.", min=1, show_default="cores")
    ] = None,
    threads: Threads = 1,
    json: Annotated[
        bool, typer.Option("--json", help="Print the verdicts as JSON; progress goes to stderr.")
    ] = False,
) -> None:
    """Run an experiment of the two papers small, and say which of their claims hold here.

    Every claim gets a verdict by one rule on its paired seeds: holds, does not hold here, or
    undecided. Stopped, it goes on where it was when called again.

    Examples:

      actsparse reproduce ratio

      actsparse reproduce all --seeds 8

      actsparse reproduce ablation --full --data data/cifar10 --workers 2
    """
    from rich.console import Console

    from actsparse.cli.progress import show
    from actsparse.experiments.compare import compare
    from actsparse.experiments.reproduce import REPRODUCTIONS, Form, reproduction
    from actsparse.report import CLAIMS, findings_in, print_findings, write_report
    from actsparse.report.findings import read_manifest, write_manifest

    if name is None:
        for each, experiment in CLAIMS.items():
            typer.echo(f"{each:13} {experiment.title}")
        return
    chosen = list(REPRODUCTIONS) if name == "all" else [name]
    home = out or Path("runs") / "reproduce"
    command = shlex.join(["actsparse", *sys.argv[1:]])
    console = Console(stderr=json)
    failed = []
    # all plans before any work: what is wrong in the last should not cost the first
    places = {each: home / each if name == "all" or out is None else home for each in chosen}
    plans = {
        each: reproduction(each, Form(full, seeds, str(places[each]), data, steps))
        for each in chosen
    }
    found = []
    for each, stages in plans.items():
        place = places[each]
        total = sum(map(len, stages.values()))
        console.print(f"{each}: {total} runs, into {place}", highlight=False)
        earlier = read_manifest(place) or {"time": {"seconds": 0.0}}
        began, spent = time.perf_counter(), float(earlier["time"]["seconds"])
        before = signal.signal(signal.SIGTERM, signal.default_int_handler)  # as Ctrl-C
        try:
            for folder, configs in stages.items():
                events = compare(
                    configs, place / folder, workers=workers, threads=threads, command=command
                )
                failed += show(events, len(configs), str(place / folder), console)
        except KeyboardInterrupt:
            typer.echo(f"Stopped. What is finished is kept; to go on: {command}", err=True)
            raise typer.Exit(130) from None
        finally:
            signal.signal(signal.SIGTERM, before)
            took = time.perf_counter() - began
            write_manifest(
                place,
                name=each,
                full=full,
                seeds=seeds,
                command=_again(each, full, data, seeds, steps),
                time={"seconds": round(spent + took, 1)},
            )
        page = write_report(place)
        said = findings_in(place)
        assert said is not None
        print_findings(said, console)
        found.append(said.to_json())
        console.print(f"page: {page}", highlight=False, soft_wrap=True)
    if json:
        typer.echo(dumps(found, indent=2))
    if failed:
        typer.echo(f"{len(failed)} runs failed; to try them again: {command}", err=True)
        raise typer.Exit(1)


def _again(name: str, full: bool, data: str | None, seeds: int, steps: int | None) -> str:
    """The command without where it ran."""
    parts = ["actsparse", "reproduce", name]
    parts += ["--full"] if full else []
    parts += ["--data", "DATA"] if data else []
    parts += [] if seeds == 5 else ["--seeds", str(seeds)]
    return shlex.join([*parts, *([] if steps is None else ["--steps", str(steps)])])

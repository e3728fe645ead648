"""``actsparse reproduce``: an experiment of the papers, its verdicts and its page."""

from __future__ import annotations

import shlex
import sys
import time
from json import dumps
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from actsparse.terminal import Terminal
from actsparse_lab.cli.options import Threads

if TYPE_CHECKING:
    from actsparse_lab.papers.form import Form, Stages


def reproduce(
    name: Annotated[
        str | None,
        typer.Argument(
            help="ratio, ablation, manipulate, pruning, noise, robustness, weight-noise, finetune, "
            "or all; nothing for a list that says what each asks.",
            show_default=False,
        ),
    ] = None,
    full: Annotated[
        bool,
        typer.Option(
            "--full",
            help="A ViT-S on images of 32 px, hours on a GPU; for noise MNIST, hours on a CPU.",
        ),
    ] = False,
    data: Annotated[
        str | None,
        typer.Option(
            help="For --full: a folder of images (train/<class>/…), as `benchmarks/"
            "unpack_images.py` makes of CIFAR-10; for noise one with MNIST's two .npz files; for "
            "all a folder that holds both."
        ),
    ] = None,
    seeds: Annotated[
        int,
        typer.Option(help="Paired seeds of each arm, from 0; fewer than 5 decide nothing.", min=1),
    ] = 5,
    steps: Annotated[
        int | None,
        typer.Option(help="Of every run, to try the machinery.", min=1, show_default="its own"),
    ] = None,
    out: Annotated[
        Path | None,
        typer.Option(
            help="Folder for records and page; with `all` for a folder of each.",
            show_default="runs/reproduce/NAME, of --full runs/reproduce-full/NAME",
        ),
    ] = None,
    workers: Annotated[
        int | None, typer.Option(help="Runs at a time.", min=1, show_default="cores; 2 on a GPU")
    ] = None,
    threads: Threads = 1,
    json: Annotated[
        bool, typer.Option("--json", help="Print the verdicts as JSON; progress goes to stderr.")
    ] = False,
) -> None:
    """Run an experiment of the two papers, small: which of their claims hold here?

    Minutes on two cores each. Every claim gets a verdict by one rule on its paired seeds: it holds,
    it does not hold here, or it is undecided. Stopped or failed, it goes on where it was when
    called again. Exits with 1 if a run failed, with 130 after Ctrl-C.

    Examples:

      actsparse reproduce ratio

      actsparse reproduce all --seeds 8

      actsparse reproduce ablation --full --data data/cifar10
    """
    from actsparse_lab.papers.experiments import EXPERIMENTS
    from actsparse_lab.papers.form import Form, runs_of

    if name is None:
        for each, experiment in EXPERIMENTS.items():
            typer.echo(f"{each:13} {experiment.title}")
        return
    home = out or Path("runs") / ("reproduce-full" if full else "reproduce")
    alone = name != "all" and out is not None
    chosen = list(EXPERIMENTS) if name == "all" else [name]
    forms = {
        each: Form(full, seeds, str(home if alone else home / each), data, steps) for each in chosen
    }
    plans = {each: runs_of(each, form) for each, form in forms.items()}
    for each, form in forms.items():  # what is wrong in the last should not cost the first
        _check(each, form, plans[each])
    console = Terminal(stderr=json)
    command = shlex.join(["actsparse", *sys.argv[1:]])
    found = []
    for each, form in forms.items():
        on_gpu = full and each != "noise"
        said = _run(
            each, form, plans[each], workers or (2 if on_gpu else None), threads, command, console
        )
        found.append(said)
    if json:
        typer.echo(dumps(found, indent=2))
    failed = sum(said["failed"] for said in found)
    if failed:
        typer.echo(f"{failed} runs failed; to try them again: {command}", err=True)
        raise typer.Exit(1)


def _check(name: str, form: Form, stages: Stages) -> None:
    """Refuse a folder that holds something else, and data that cannot be read."""
    from actsparse_lab.analysis.findings import read_manifest
    from actsparse_lab.campaigns.compare import compare
    from actsparse_lab.packed import record_paths
    from actsparse_lab.papers.form import check_data

    place = Path(form.out)
    manifest = read_manifest(place)
    own = {"name": name, "full": form.full, "steps": form.steps}
    if manifest is not None and own != {key: manifest.get(key) for key in own}:
        raise ValueError(f"{place} holds runs of `{manifest['command']}`; choose another --out")
    if manifest is None and record_paths(place):
        raise ValueError(f"{place} holds other runs, of no experiment; choose another --out")
    for folder, configs in stages.items():
        compare(configs, place / folder)  # says what is wrong; nothing runs before it is asked
    check_data(stages)


def _run(
    name: str,
    form: Form,
    stages: Stages,
    workers: int | None,
    threads: int,
    command: str,
    console: Terminal,
) -> dict[str, Any]:
    """Do what is not done yet, write the page, and return what came of it."""
    from actsparse_lab.analysis.findings import read_manifest, write_manifest
    from actsparse_lab.campaigns.compare import compare
    from actsparse_lab.cli.progress import show, stoppable
    from actsparse_lab.packed import record_paths
    from actsparse_lab.records import read_runs
    from actsparse_lab.report import findings_in, print_findings, write_report

    place = Path(form.out)
    earlier = read_manifest(place) if any(record_paths(place / each) for each in stages) else None
    spent = 0.0 if earlier is None else float(earlier["time"]["seconds"])
    seeds = max(form.seeds, earlier["seeds"] if earlier else 0)  # none is dropped
    began = time.perf_counter()

    def note() -> None:
        write_manifest(
            place,
            name=name,
            full=form.full,
            seeds=seeds,
            steps=form.steps,
            command=_again(name, form, seeds),
            time={"seconds": round(spent + time.perf_counter() - began, 1)},
        )

    total = sum(map(len, stages.values()))
    console.print(f"{name}: {total} runs, into {place}", highlight=False, soft_wrap=True)
    failed = 0
    for folder, configs in stages.items():
        note()
        if len(stages) > 1:
            console.print(f"{len(configs)} runs, into {place / folder}", highlight=False)
        events = compare(configs, place / folder, workers=workers, threads=threads, command=command)
        with stoppable(command):
            try:
                failed += len(show(events, len(configs), str(place / folder), console))
            finally:
                note()
        if failed:  # the next stage may begin from what failed
            break
    said: dict[str, Any] = {"name": name, "folder": str(place), "page": None, "failed": failed}
    runs = read_runs(place)
    findings = findings_in(place, runs)
    if findings is None or not any(run.finished for run in runs):
        console.print(f"{name}: no run is finished, so there is nothing to judge")
        return said
    page = write_report(place)
    print_findings(findings, console)
    console.print(f"page: {page}", highlight=False, soft_wrap=True)
    return said | {"page": str(page)} | findings.to_json()


def _again(name: str, form: Form, seeds: int) -> str:
    """The command without where it ran."""
    parts = ["actsparse", "reproduce", name]
    parts += ["--full", "--data", "DATA"] if form.full else []
    parts += [] if seeds == 5 else ["--seeds", str(seeds)]
    return shlex.join([*parts, *([] if form.steps is None else ["--steps", str(form.steps)])])

"""``actsparse reproduce``: an experiment of the papers, its verdicts and its page."""

from __future__ import annotations

from json import dumps
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from actsparse.terminal import Terminal
from actsparse_lab.cli.options import Threads

if TYPE_CHECKING:
    from actsparse_lab.cli.campaign import Campaign
    from actsparse_lab.papers.runs import Form


def reproduce(
    name: Annotated[
        str | None,
        typer.Argument(
            help="ratio, ablation, manipulate, pruning, noise, robustness, weight-noise, finetune, "
            "learning-rate, decay, or all. Without a name: a list of what each asks.",
            show_default=False,
        ),
    ] = None,
    full: Annotated[
        bool,
        typer.Option(
            "--full",
            help="The large form: a ViT-S on images of 32 px, hours on a GPU; for noise MNIST and "
            "for decay digits, hours on a CPU.",
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
        typer.Option(
            help="Number of paired seeds of each arm, from 0; fewer than 5 decide nothing.", min=1
        ),
    ] = 5,
    steps: Annotated[
        int | None,
        typer.Option(
            help="Number of steps of every run, for a quick trial.", min=1, show_default="its own"
        ),
    ] = None,
    out: Annotated[
        Path | None,
        typer.Option(
            help="Folder for records and page; with `all` for a folder of each.",
            show_default="runs/reproduce/NAME, of --full runs/reproduce-full/NAME",
        ),
    ] = None,
    workers: Annotated[
        int | None,
        typer.Option(help="Number of runs at a time.", min=1, show_default="cores; 2 on a GPU"),
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

    if name is None:
        for each, experiment in EXPERIMENTS.items():
            typer.echo(f"{each:13} {experiment.title}")
        return
    from actsparse_lab.cli.campaign import exit_if
    from actsparse_lab.papers.runs import Form

    home = out or Path("runs") / ("reproduce-full" if full else "reproduce")
    alone = name != "all" and out is not None
    chosen = list(EXPERIMENTS) if name == "all" else [name]
    places = {each: home if alone else home / each for each in chosen}
    campaigns = [
        _campaign(each, Form(full, seeds, str(place), data, steps))
        for each, place in places.items()
    ]
    for campaign in campaigns:  # what is wrong in the last should not cost the first
        campaign.check()
    console = Terminal(stderr=json)
    found = []
    for campaign in campaigns:
        at_once = workers or (2 if full and campaign.name != "noise" else None)
        failed = campaign.run(console, workers=at_once, threads=threads)
        found.append(_judged(campaign, console) | {"failed": failed})
    if json:
        typer.echo(dumps(found, indent=2))
    exit_if(sum(said["failed"] for said in found))


def _campaign(name: str, form: Form) -> Campaign:
    from actsparse_lab.analysis.manifest import REPRODUCTION
    from actsparse_lab.cli.campaign import Campaign
    from actsparse_lab.papers.runs import runs_of

    again = (*(["--full"] if form.full else []), *(["--data", "DATA"] if form.data else []))
    return Campaign(
        name,
        Path(form.out),
        runs_of(name, form),
        REPRODUCTION,
        about={"name": name, "full": form.full},
        again=("reproduce", name, *again),
        steps=form.steps,
    )


def _judged(campaign: Campaign, console: Terminal) -> dict[str, Any]:
    """Write the page and print the verdicts; returns both for `--json`."""
    from actsparse_lab.records import read_runs
    from actsparse_lab.report import findings_in, print_findings, write_report

    place = campaign.place
    said: dict[str, Any] = {"name": campaign.name, "folder": str(place), "page": None}
    runs = read_runs(place)
    findings = findings_in(place, runs)
    if findings is None or not any(run.finished for run in runs):
        console.print(f"{campaign.name}: no run is finished, so there is nothing to judge")
        return said
    page = write_report(place)
    print_findings(findings, console)
    console.print(f"page: {page}", highlight=False, soft_wrap=True)
    return said | {"page": str(page)} | findings.to_json()

"""``actsparse demo``: train, time and read, in minutes: what sparsity gains on this machine."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Annotated

import typer

from actsparse_lab.cli.options import Threads

TIMED, FILLED = 512, 3  # rows of the test split


def demo(
    out: Annotated[Path, typer.Option(help="Folder for records, weights and the page.")] = Path(
        "runs/demo"
    ),
    steps: Annotated[
        int | None,
        typer.Option(
            help="Number of steps of every run, for a quick trial.", min=1, show_default="its own"
        ),
    ] = None,
    rounds: Annotated[int, typer.Option(min=1, help="Number of timed rounds of each program.")] = 5,
    workers: Annotated[
        int | None,
        typer.Option(help="Number of runs at a time.", min=1, show_default="cores"),
    ] = None,
    threads: Threads = 1,
) -> None:
    """Train a small language model with and without sparsity, then time the sparse one.

    One seed, on real text, in about five minutes on two cores: vanilla as the papers decay it, the
    best vanilla, the papers' recipe, and `best`. Then `best` is timed as it is and accelerated,
    against the best dense program, and both fill in a few lines. Stopped, it goes on where it was
    when called again. `actsparse frontier demo` is the full form, with five paired seeds.

    Examples:

      actsparse demo

      actsparse demo --steps 50 --out runs/trial
    """
    import torch

    from actsparse import accelerate
    from actsparse.bench.model import bench_trained
    from actsparse.cli.result import keep_record, tell, write_result
    from actsparse.terminal import Terminal
    from actsparse_lab.analysis.manifest import FRONTIER
    from actsparse_lab.campaigns.demo import LIVE, SHOWN, filled_in
    from actsparse_lab.campaigns.frontier import frontier
    from actsparse_lab.cli.campaign import Campaign, exit_if
    from actsparse_lab.cli.runs import task_batches
    from actsparse_lab.cli.trained import trained_of
    from actsparse_lab.records import run_path
    from actsparse_lab.report import print_board, write_report
    from actsparse_lab.report.demo import FILLED_IN
    from actsparse_lab.report.frontier import board

    console = Terminal()
    campaign = Campaign(
        "demo",
        out,
        {"": frontier("demo", arms=LIVE, seeds=1, steps=steps)},
        FRONTIER,
        about={"task": "demo"},
        again=("demo",),
        seeds=1,
        steps=steps,
    )
    campaign.check()
    exit_if(campaign.run(console, workers=workers, threads=threads))
    torch.set_num_threads(threads)
    trained, where = trained_of(run_path(out, SHOWN, 0).parent, rows=TIMED)
    result = {**bench_trained(**trained, rounds=rounds, progress=tell), **where}
    keep_record(result, out / f"{SHOWN}.json", False)
    model = trained["model"].eval()
    _, (batch, *_), *_ = task_batches(model, None, "text", "test", FILLED, FILLED)
    tell("dense and sparse fill in the same text")
    dense = filled_in(model, batch)
    accelerate(model, inputs=trained["inputs"])
    rows = [
        {"given": given, "dense": text, "sparse": sparse}
        for (given, text), (_, sparse) in zip(dense, filled_in(model, batch), strict=True)
    ]
    write_result(out / FILLED_IN, json.dumps({"rows": rows}, indent=1) + "\n")
    page = write_report(out)
    judged = board(out)
    assert judged is not None
    print_board(judged, console)
    for row in rows:
        same = "the same" if row["dense"] == row["sparse"] else repr(row["sparse"])
        told = f"{row['given']!r}: dense {row['dense']!r}, sparse {same}"
        console.print(told, highlight=False, markup=False)
    console.print(f"page: {page}", highlight=False, soft_wrap=True)

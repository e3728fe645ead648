"""The laboratory's part of ``actsparse bench``: what its own runs and programs cost."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any

import typer

from actsparse.cli.bench import (
    Densities,
    DtypeOption,
    Hidden,
    Json,
    Out,
    Threads,
    Tokens,
    Width,
    bench,
    check_dtype,
    numbers,
)
from actsparse.cli.progress import Progressing
from actsparse.cli.result import in_turn, keep_record, ratio_text, tell, telling
from actsparse.terminal import Terminal
from actsparse_lab.cli.gpu import gpu
from actsparse_lab.cli.slim import slim


@bench.command()
def step(
    rounds: Annotated[
        int, typer.Option(min=3, help="Number of timed rounds of each program.")
    ] = 21,
    batch: Annotated[int, typer.Option(min=1, help="Number of images in a batch.")] = 2,
    compiled: Annotated[bool, typer.Option(help="Time torch.compile too (slow to start).")] = True,
    threads: Threads = None,
    out: Out = None,
    json: Json = False,
) -> None:
    """What the paper recipe and observation cost in a training step of a ViT-S.

    Example: actsparse bench step --rounds 11 --out benchmarks/training_step.json
    """
    import torch
    from rich.table import Table

    from actsparse_lab.bench.training_step import bench_training_step

    if threads is not None:
        torch.set_num_threads(threads)
    with Progressing(Terminal(stderr=True), "rounds") as told:
        result: dict[str, Any] = bench_training_step(
            rounds, batch, compiled, lambda done: told("training steps", done, rounds)
        )
    if keep_record(result, out, json):
        return
    table = Table("training step", "ratio", "95 % interval", title="ViT-S, ratios of medians")
    for row in result["ratios"]:
        interval = f"{row['low']:.3f} … {row['high']:.3f}"
        table.add_row(f"{row['of']} ÷ {row['to']}", f"{row['value']:.3f}", interval)
    Terminal().print(table)


@bench.command()
def measures(
    rounds: Annotated[
        int, typer.Option(min=3, help="Number of timed rounds of each program.")
    ] = 15,
    batch: Annotated[int, typer.Option(min=1, help="Number of images in a batch.")] = 8,
    probes: Annotated[
        int, typer.Option(min=2, help="Number of random probes of the Gauss–Newton trace.")
    ] = 10,
    activation: Annotated[str, typer.Option(help="Activation: relu, gelu, ….")] = "relu",
    threads: Threads = None,
    out: Out = None,
    json: Json = False,
) -> None:
    """What the measures cost in a training step of a ViT-S, and a Gauss–Newton trace of it.

    Example: actsparse bench measures --out benchmarks/measures.json
    """
    import torch
    from rich.table import Table

    from actsparse_lab.bench.measures import WATCHED, bench_measures

    if threads is not None:
        torch.set_num_threads(threads)
    steps = rounds * len(WATCHED)
    began = telling([steps, *[5.0] * len(WATCHED), 3.0 * probes])  # in steps; memory: a process
    result = bench_measures(rounds, batch, probes, activation, began)
    if keep_record(result, out, json):
        return
    table = Table("observed", "time", "95 % interval", "peak memory", title="÷ the plain step")
    plain = result["memory"]["plain"]["peak_mib"]
    for row in result["ratios"]:
        interval = f"{row['low']:.3f} … {row['high']:.3f}"
        peak = result["memory"][row["of"]]["peak_mib"] / plain
        table.add_row(row["of"], f"{row['value']:.3f}", interval, f"{peak:.3f}")
    Terminal().print(table)
    trace = result["gauss_newton"]
    Terminal().print(
        f"Gauss–Newton trace, {trace['probes']} probes, {trace['samples']} images: "
        f"{trace['value']:.4g} ± {trace['standard_error']:.2g} in {trace['seconds']:.1f} s"
    )


@bench.command()
def auto(
    d: Width = 768,
    h: Hidden = 3072,
    tokens: Tokens = "1,4,16,64,197,1576",
    densities: Densities = "0,.01,.05,.1,.3,.5,1",
    dtype: DtypeOption = "float32",
    rounds: Annotated[int, typer.Option(min=3, help="Number of timed rounds.")] = 51,
    threads: Threads = None,
    out: Out = None,
    json: Json = False,
) -> None:
    """Whether `accelerate` is ever slower than the best dense program, at any density.

    Example: actsparse bench auto --threads 1 --rounds 15 --out benchmarks/auto.json
    """
    import torch
    from rich.table import Table

    from actsparse_lab.bench.auto import bench_auto

    check_dtype(dtype)
    if threads is not None:
        torch.set_num_threads(threads)
    asked = numbers("--densities", densities, float), numbers("--tokens", tokens, int)
    progress = telling([1.0 for t in asked[1] for _ in asked[0]])
    result = bench_auto(d, h, *asked, rounds, dtype, progress)  # type: ignore[arg-type]
    if keep_record(result, out, json):
        return
    title = f"dense ÷ accelerated, d = {d}, H = {h}, {dtype}"
    table = Table(
        "tokens", "density", "chosen", "best dense", "best dense ÷", "own layers ÷", title=title
    )
    for row in result["rows"]:
        cells = [row["program"], row["dense"], ratio_text(row["ratio"]), ratio_text(row["layers"])]
        table.add_row(str(row["tokens"]), f"{row['density']:.3f}", *cells)
    Terminal().print(table)


@bench.command()
def run(
    runs: Annotated[
        list[Path], typer.Argument(help="Folders of runs, each with record.jsonl and weights/.")
    ],
    rounds: Annotated[
        int, typer.Option(min=1, help="Number of timed rounds of each program.")
    ] = 21,
    threads: Annotated[int, typer.Option(help="Threads.", min=1)] = 1,
    out: Out = None,
    json: Json = False,
) -> None:
    """Dense time ÷ accelerated time of trained checkpoints in inference, on a batch of test data.

    In the folder of a frontier task, as speed.json, the scoreboard shows it. Runs without MLPs, or
    whose weights are gone, are passed over with a line.

    Example:

      actsparse bench run runs/frontier/text/runs/*-seed0 --out benchmarks/frontier/text/speed.json
    """
    import torch
    from rich.table import Table

    from actsparse_lab.cli.trained import speed_of

    torch.set_num_threads(threads)
    each = in_turn(runs)
    rows = [row for folder in each if (row := speed_of(folder, rounds, tell)) is not None]
    if not rows:
        raise ValueError("none of these runs can be timed, see above")
    result = {"benchmark": "speed", "threads": threads, "rounds": rounds, "runs": rows}
    if keep_record(result, out, json):
        return
    names = ["task", "arm", "seed", "density", "MLPs alone", "model", "blocks"]
    table = Table(*names, title=f"dense ÷ accelerated, inference, threads: {threads}")
    for row in rows:
        times = [ratio_text(row["mlps"]), ratio_text(row["model"])]
        where = [row["task"], row["arm"], str(row["seed"]), f"{row['density']:.4f}"]
        table.add_row(*where, *times, row["why"])
    Terminal().print(table)


bench.command()(slim)
bench.command()(gpu)

"""``actsparse bench``: timings, printed and kept as records."""

from __future__ import annotations

import json as jsonlib
from pathlib import Path
from typing import Annotated, Any

import typer

bench = typer.Typer(
    help="Time actsparse on this machine.",
    no_args_is_help=True,
    context_settings={"help_option_names": ["-h", "--help"]},
)


@bench.callback()
def _bench() -> None:
    """Timings run interleaved in one process and are reported as ratios of medians."""


@bench.command()
def step(
    rounds: Annotated[int, typer.Option(min=3, help="Timed rounds of each program.")] = 21,
    batch: Annotated[int, typer.Option(min=1, help="Images in a batch.")] = 2,
    compiled: Annotated[bool, typer.Option(help="Time torch.compile too (slow to start).")] = True,
    threads: Annotated[int | None, typer.Option(help="Threads; all cores if left out.")] = None,
    out: Annotated[Path | None, typer.Option(help="Also write the record to this file.")] = None,
    json: Annotated[bool, typer.Option("--json", help="Print JSON instead of a table.")] = False,
) -> None:
    """What the paper recipe and observation cost in a training step of a ViT-S.

    Example: actsparse bench step --rounds 11 --out benchmarks/training_step.json
    """
    import torch
    from rich.console import Console
    from rich.progress import Progress
    from rich.table import Table

    from actsparse.bench.training_step import bench_training_step

    if threads is not None:
        torch.set_num_threads(threads)
    log = Console(stderr=True)
    with Progress(console=log, disable=not log.is_terminal) as bar:
        task = bar.add_task("training steps", total=rounds)
        result: dict[str, Any] = bench_training_step(
            rounds, batch, compiled, lambda done: bar.update(task, completed=done)
        )
    if _record(result, out, json):
        return
    table = Table("training step", "ratio", "95 % interval", title="ViT-S, ratios of medians")
    for row in result["ratios"]:
        interval = f"{row['low']:.3f} … {row['high']:.3f}"
        table.add_row(f"{row['of']} ÷ {row['to']}", f"{row['value']:.3f}", interval)
    Console().print(table)


@bench.command()
def measures(
    rounds: Annotated[int, typer.Option(min=3, help="Timed rounds of each program.")] = 15,
    batch: Annotated[int, typer.Option(min=1, help="Images in a batch.")] = 8,
    probes: Annotated[int, typer.Option(min=2, help="Of the Gauss–Newton trace.")] = 10,
    activation: Annotated[str, typer.Option(help="relu, gelu, ….")] = "relu",
    threads: Annotated[int | None, typer.Option(help="Threads; all cores if left out.")] = None,
    out: Annotated[Path | None, typer.Option(help="Also write the record to this file.")] = None,
    json: Annotated[bool, typer.Option("--json", help="Print JSON instead of a table.")] = False,
) -> None:
    """What the measures cost in a training step of a ViT-S, and a Gauss–Newton trace of it.

    Example: actsparse bench measures --out benchmarks/measures.json
    """
    import torch
    from rich.console import Console
    from rich.table import Table

    from actsparse.bench.measures import bench_measures

    if threads is not None:
        torch.set_num_threads(threads)
    log = Console(stderr=True)
    result = bench_measures(rounds, batch, probes, activation, lambda what: log.print(what))
    if _record(result, out, json):
        return
    table = Table("observed", "time", "95 % interval", "peak memory", title="÷ the plain step")
    plain = result["memory"]["plain"]["peak_mib"]
    for row in result["ratios"]:
        interval = f"{row['low']:.3f} … {row['high']:.3f}"
        peak = result["memory"][row["of"]]["peak_mib"] / plain
        table.add_row(row["of"], f"{row['value']:.3f}", interval, f"{peak:.3f}")
    Console().print(table)
    trace = result["gauss_newton"]
    Console().print(
        f"Gauss–Newton trace, {trace['probes']} probes, {trace['samples']} images: "
        f"{trace['value']:.4g} ± {trace['standard_error']:.2g} in {trace['seconds']:.1f} s"
    )


@bench.command()
def mlp(
    d: Annotated[int, typer.Option(min=1, help="Width of the model.")] = 768,
    h: Annotated[int, typer.Option(min=1, help="Hidden units.")] = 3072,
    tokens: Annotated[str, typer.Option(help="With commas between.")] = "1,16,197,1576",
    densities: Annotated[str, typer.Option(help="With commas between.")] = ".01,.03,.05,.1,.2",
    rounds: Annotated[int, typer.Option(min=3, help="Timed rounds; of few tokens 8 ×.")] = 11,
    activation: Annotated[str, typer.Option(help="relu, jsrelu, squared_relu, ….")] = "relu",
    training: Annotated[bool, typer.Option(help="Time training steps too.")] = True,
    threads: Annotated[int | None, typer.Option(help="Threads; all cores if left out.")] = None,
    out: Annotated[Path | None, typer.Option(help="Also write the record to this file.")] = None,
    json: Annotated[bool, typer.Option("--json", help="Print JSON instead of a table.")] = False,
) -> None:
    """Dense time ÷ sparse time of one MLP, by density and number of tokens.

    Example: actsparse bench mlp --tokens 1,1576 --out benchmarks/mlp.json
    """
    import torch
    from rich.console import Console
    from rich.table import Table

    from actsparse.bench.mlp import bench_mlp

    if threads is not None:
        torch.set_num_threads(threads)
    result = bench_mlp(
        d,
        h,
        [float(each) for each in densities.split(",")],
        [int(each) for each in tokens.split(",")],
        activation,
        rounds,
        training,
    )
    if _record(result, out, json):
        return
    names = ["tokens", "density", "forward", "screened", "training", "screened"]
    table = Table(*names, title=f"dense ÷ sparse, d = {d}, H = {h}")
    for row in result["rows"]:
        cells = [
            f"{each['value']:.2f} [{each['low']:.2f}, {each['high']:.2f}]"
            for kind in ("forward", "training")
            if kind in row
            for each in row[kind]["ratios"]
        ]
        table.add_row(str(row["tokens"]), f"{row['density']:.3f}", *cells)
    Console().print(table)


def _record(result: dict[str, Any], out: Path | None, json: bool) -> bool:
    """Keep a benchmark's result with where it ran; True where JSON was printed, and no table is."""
    import torch

    from actsparse.records import environment, write_whole

    record = {**environment(threads=torch.get_num_threads()), **result}
    text = jsonlib.dumps(record, indent=1) + "\n"
    if out is not None:
        write_whole(out, text.encode())
        typer.echo(f"record: {out}", err=True)
    if json:
        typer.echo(text, nl=False)
    return json

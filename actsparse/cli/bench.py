"""``actsparse bench``: timings, printed and kept as records."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Annotated, Any

import typer

from actsparse.cli.gpu import gpu
from actsparse.cli.result import keep_record, ratio_text, tell, wide_console
from actsparse.cli.slim import slim

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
    from rich.progress import Progress
    from rich.table import Table

    from actsparse.bench.training_step import bench_training_step
    from actsparse.terminal import Terminal

    if threads is not None:
        torch.set_num_threads(threads)
    log = Terminal(stderr=True)
    with Progress(console=log, disable=not log.is_terminal) as bar:
        task = bar.add_task("training steps", total=rounds)
        result: dict[str, Any] = bench_training_step(
            rounds, batch, compiled, lambda done: bar.update(task, completed=done)
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
    from rich.table import Table

    from actsparse.bench.measures import bench_measures
    from actsparse.terminal import Terminal

    if threads is not None:
        torch.set_num_threads(threads)
    log = Terminal(stderr=True)
    result = bench_measures(rounds, batch, probes, activation, lambda what: log.print(what))
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
def mlp(
    d: Annotated[int, typer.Option(min=1, help="Width of the model.")] = 768,
    h: Annotated[int, typer.Option(min=1, help="Hidden units.")] = 3072,
    tokens: Annotated[str, typer.Option(help="With commas between.")] = "1,16,197,1576",
    densities: Annotated[str, typer.Option(help="With commas between.")] = ".01,.03,.05,.1,.2",
    rounds: Annotated[int, typer.Option(min=3, help="Timed rounds; of few tokens 8 ×.")] = 11,
    activation: Annotated[str, typer.Option(help="relu, jsrelu, squared_relu, ….")] = "relu",
    training: Annotated[bool, typer.Option(help="Time training steps too.")] = True,
    pattern: Annotated[
        str, typer.Option(help="even: all units are as often active; zipf: few units, mostly.")
    ] = "even",
    compiled: Annotated[
        bool, typer.Option(help="Time torch.compile of the dense MLP too.")
    ] = False,
    threads: Annotated[int | None, typer.Option(help="Threads; all cores if left out.")] = None,
    out: Annotated[Path | None, typer.Option(help="Also write the record to this file.")] = None,
    json: Annotated[bool, typer.Option("--json", help="Print JSON instead of a table.")] = False,
) -> None:
    """Dense time ÷ sparse time of one MLP, by density and number of tokens.

    Example: actsparse bench mlp --tokens 1,1576 --out benchmarks/mlp.json
    """
    import torch
    from rich.table import Table

    from actsparse.activations import ACTIVATIONS
    from actsparse.bench.mlp import bench_mlp

    if pattern not in ("even", "zipf"):
        raise ValueError(f"--pattern {pattern!r}; known: even, zipf")
    if activation not in ACTIVATIONS:
        raise ValueError(f"--activation {activation!r}; known: {', '.join(ACTIVATIONS)}")
    if threads is not None:
        torch.set_num_threads(threads)
    result = bench_mlp(
        d,
        h,
        _numbers("--densities", densities, float),
        _numbers("--tokens", tokens, int),
        activation,
        rounds,
        training,
        pattern,  # type: ignore[arg-type]
        compiled,
        tell,
    )
    if keep_record(result, out, json):
        return
    names = ["tokens", "density", "forward", "training", "kept for backward", "error"]
    table = Table(*names, title=f"dense ÷ sparse, screened; d = {d}, H = {h}, {activation}")
    for row in result["rows"]:
        times = [
            "\n".join(f"{each['to']} {ratio_text(each)}" for each in row[kind]["ratios"])
            if kind in row
            else ""
            for kind in ("forward", "training")
        ]
        memory = row.get("memory")
        kept = f"{memory['sparse'] / memory['dense']:.3f}" if memory else ""
        error = f"{row['error']['sparse'] / row['error']['dense']:.1f} × dense's"
        table.add_row(str(row["tokens"]), f"{row['density']:.3f}", *times, kept, error)
    wide_console().print(table)
    for kind, found in result["break_even"].items():
        for tokens_, density in found.items():
            at = "beyond the densities timed" if density is None else f"at density {density:.2g}"
            wide_console().print(f"break-even, {kind}, T = {tokens_}: {at}", highlight=False)


@bench.command()
def auto(
    d: Annotated[int, typer.Option(min=1, help="Width of the model.")] = 768,
    h: Annotated[int, typer.Option(min=1, help="Hidden units.")] = 3072,
    tokens: Annotated[str, typer.Option(help="With commas between.")] = "1,16,197,1576",
    densities: Annotated[
        str, typer.Option(help="With commas between.")
    ] = "0,.01,.03,.1,.2,.25,.3,.4,.5,.75,1",
    rounds: Annotated[int, typer.Option(min=3, help="Timed pairs.")] = 101,
    threads: Annotated[int | None, typer.Option(help="Threads; all cores if left out.")] = None,
    out: Annotated[Path | None, typer.Option(help="Also write the record to this file.")] = None,
    json: Annotated[bool, typer.Option("--json", help="Print JSON instead of a table.")] = False,
) -> None:
    """Whether `accelerate` is ever slower than the layers, at any density.

    Example: actsparse bench auto --threads 1 --out benchmarks/auto.json
    """
    import torch
    from rich.table import Table

    from actsparse.bench.auto import bench_auto

    if threads is not None:
        torch.set_num_threads(threads)
    result = bench_auto(
        d,
        h,
        _numbers("--densities", densities, float),
        _numbers("--tokens", tokens, int),
        rounds,
        tell,
    )
    if keep_record(result, out, json):
        return
    title = f"dense ÷ accelerated, d = {d}, H = {h}"
    table = Table("tokens", "density", "chosen", "gain", title=title)
    for row in result["rows"]:
        cells = [row["program"], ratio_text(row["ratio"])]
        table.add_row(str(row["tokens"]), f"{row['density']:.3f}", *cells)
    wide_console().print(table)


@bench.command()
def model(
    name: Annotated[
        str | None, typer.Argument(help="vit-b, gpt2 (training steps) or t5-base (decoding).")
    ] = None,
    run: Annotated[
        Path | None,
        typer.Option(help="Instead: a trained model, the folder of a run with record and weights."),
    ] = None,
    densities: Annotated[str, typer.Option(help="With commas between.")] = ".01,.05",
    rounds: Annotated[int, typer.Option(min=1, help="Timed rounds of each program.")] = 5,
    memory: Annotated[bool, typer.Option(help="Peak memory too, in processes of its own.")] = True,
    threads: Annotated[int | None, typer.Option(help="Threads; all cores if left out.")] = None,
    out: Annotated[Path | None, typer.Option(help="Also write the record to this file.")] = None,
    json: Annotated[bool, typer.Option("--json", help="Print JSON instead of a table.")] = False,
) -> None:
    """Dense time ÷ sparse time of a whole model, and the limits: no MLPs at all, and Amdahl's.

    The weights are random, arranged for the densities; those of --run are trained and stay.

    Examples:

      actsparse bench model vit-b --threads 1 --out benchmarks/vit-b.json

      actsparse bench model --run runs/demo/runs/paper-seed0
    """
    import torch

    from actsparse.bench.model import bench_model, bench_trained
    from actsparse.cli.trained import trained_of

    if (name is None) == (run is None):
        raise ValueError("give a model (vit-b, gpt2 or t5-base), or --run with a run's folder")
    if threads is not None:
        torch.set_num_threads(threads)
    if run is not None:
        trained, where = trained_of(run)
        result = {**bench_trained(**trained, rounds=rounds, progress=tell), **where}
    else:
        assert name is not None
        wanted = _numbers("--densities", densities, float)
        result = bench_model(name, wanted, rounds, memory=memory, progress=tell)
    if not keep_record(result, out, json):
        _print_trained(result) if run is not None else _print_model(result)


@bench.command()
def run(
    runs: Annotated[
        list[Path], typer.Argument(help="Folders of runs, each with record.jsonl and weights/.")
    ],
    rounds: Annotated[int, typer.Option(min=1, help="Timed rounds of each program.")] = 21,
    threads: Annotated[int, typer.Option(help="Threads.", min=1)] = 1,
    out: Annotated[Path | None, typer.Option(help="Also write the record to this file.")] = None,
    json: Annotated[bool, typer.Option("--json", help="Print JSON instead of a table.")] = False,
) -> None:
    """Dense time ÷ accelerated time of trained checkpoints in inference, on a batch of test data.

    In the folder of a frontier task, as speed.json, the scoreboard shows it. Runs without MLPs, or
    whose weights are gone, are passed over with a line.

    Example:

      actsparse bench run runs/frontier/text/runs/*-seed0 --out benchmarks/frontier/text/speed.json
    """
    import torch
    from rich.table import Table

    from actsparse.cli.trained import speed_of

    torch.set_num_threads(threads)
    rows = [row for folder in runs if (row := speed_of(folder, rounds, tell)) is not None]
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
    wide_console().print(table)


bench.command()(slim)
bench.command()(gpu)


def _print_model(result: dict[str, Any]) -> None:
    from rich.table import Table

    names = ["density", "dense", "dense ÷ sparse", "MLPs cut out", "MLP alone", "Amdahl", "reached"]
    title = f"{result['model']}, threads: {result['threads']}; dense ÷ sparse, and its limits"
    table = Table(*names, "error", "memory", title=title)
    for row in result["rows"]:
        shares, memory = row["blocks"].values(), row.get("memory")
        peaks = [memory[name]["peak_mib"] for name in ("accelerated", "dense")] if memory else None
        table.add_row(
            f"{row['density']:.3f} ({min(shares):.3f}…{max(shares):.3f})",
            f"{row['seconds']['dense']:.3g} s",
            ratio_text(row["ratios"][0]),
            f"{row['ratios'][1]['value']:.2f}",
            f"{row['mlp_ratio']:.2f}",
            f"{row['amdahl']:.2f}",
            f"{row['reached']:.0%}",
            f"{row['error']['logits']:.1e}",
            f"{peaks[0] / peaks[1]:.2f}" if peaks else "",
        )
    wide_console().print(table)


def _print_trained(result: dict[str, Any]) -> None:
    from rich.table import Table

    names = ["", "density", "dense", "dense ÷ sparse", "MLPs cut out"]
    title = f"{result['task']}, {result['arm']}, seed {result['seed']}: a trained model"
    table = Table(*names, title=title)
    for phase in ("inference", "training"):
        row = result[phase]
        seconds = f"{row['seconds']['dense']:.3g} s"
        ratios = [ratio_text(each) for each in row["ratios"]]
        table.add_row(phase, f"{row['density']:.3f}", seconds, *ratios)
    wide_console().print(table)
    quality = {name: each["quality"] for name, each in result["score"].items()}
    told = ", ".join(f"{name} {value:.4f}" for name, value in quality.items())
    wide_console().print(f"{result['quality_name']}: {told}", highlight=False)


def _numbers(option: str, text: str, kind: Callable[[str], Any]) -> list[Any]:
    try:
        return [kind(each) for each in text.split(",")]
    except ValueError:
        raise ValueError(f"{option} {text!r}: expected numbers with commas between") from None

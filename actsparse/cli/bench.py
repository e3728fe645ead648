"""``actsparse bench``: time actsparse, print the results and write them to records."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Annotated, Any

import typer

from actsparse.cli.laboratory import laboratory
from actsparse.cli.result import cells, keep_record, ratio_text, tell, telling
from actsparse.extras import how_to_install
from actsparse.terminal import Terminal

DECODE = "t5-base, llama-135m or llama-135m-generate"
Width = Annotated[int, typer.Option("--d-model", min=1, help="Width D of the model.")]
Hidden = Annotated[int, typer.Option("--d-hidden", min=1, help="Number H of hidden units.")]
Tokens = Annotated[str, typer.Option(help="Numbers of tokens T, separated by commas.")]
Densities = Annotated[str, typer.Option(help="Densities from 0 to 1, separated by commas.")]
Threads = Annotated[
    int | None, typer.Option(help="Number of threads.", min=1, show_default="all cores")
]
Out = Annotated[Path | None, typer.Option(help="Also write the record to this file.")]
DtypeOption = Annotated[str, typer.Option("--dtype", help="float32 or bfloat16.")]
Json = Annotated[bool, typer.Option("--json", help="Print JSON instead of a table.")]

bench = typer.Typer(
    help="Time actsparse on this machine.",
    no_args_is_help=True,
    context_settings={"help_option_names": ["-h", "--help"]},
)


@bench.callback()
def _bench() -> None:
    """What is compared is timed in turn in one process, and reported as ratios of medians."""


@bench.command()
def mlp(
    d: Width = 768,
    h: Hidden = 3072,
    tokens: Tokens = "1,16,197,1576",
    densities: Densities = ".01,.03,.05,.1,.2",
    rounds: Annotated[
        int, typer.Option(min=3, help="Number of timed rounds; 8 times as many for few tokens.")
    ] = 11,
    activation: Annotated[
        str, typer.Option(help="Activation: relu, jsrelu, squared_relu, ….")
    ] = "relu",
    training: Annotated[bool, typer.Option(help="Time training steps too.")] = True,
    pattern: Annotated[
        str,
        typer.Option(
            help="even: all units are active equally often; zipf: a few units are active mostly."
        ),
    ] = "even",
    compiled: Annotated[
        bool, typer.Option(help="Time the dense MLP under torch.compile too.")
    ] = False,
    dtype: DtypeOption = "float32",
    threads: Threads = None,
    out: Out = None,
    json: Json = False,
) -> None:
    """Time one MLP: the best dense time ÷ sparse time, by density and number of tokens.

    The best dense of the dtype is the fastest of PyTorch's layers, oneDNN, and oneDNN with packed
    weights; with --compiled also of torch.compile.

    Examples:

      actsparse bench mlp --tokens 1,1576 --out benchmarks/mlp.json

      actsparse bench mlp --dtype bfloat16 --threads 1
    """
    import torch
    from rich.table import Table

    from actsparse.activations import ACTIVATIONS
    from actsparse.bench.mlp import bench_mlp, where_faster

    if pattern not in ("even", "zipf"):
        raise ValueError(f"--pattern {pattern!r}; known: even, zipf")
    if activation not in ACTIVATIONS:
        raise ValueError(f"--activation {activation!r}; known: {', '.join(ACTIVATIONS)}")
    check_dtype(dtype)
    if threads is not None:
        torch.set_num_threads(threads)
    asked = numbers("--densities", densities, float), numbers("--tokens", tokens, int)
    result = bench_mlp(
        d,
        h,
        *asked,
        activation,
        rounds,
        training,
        pattern,  # type: ignore[arg-type]
        compiled,
        dtype,  # type: ignore[arg-type]
        telling(cells(asked[1], asked[0])),
    )
    if keep_record(result, out, json):
        return
    names = ["tokens", "density", "forward", "training", "kept for backward", "error"]
    title = f"best dense ÷ each program; d = {d}, H = {h}, {activation}, {dtype}"
    table = Table(*names, title=title)
    for row in result["rows"]:
        times = [
            "\n".join(
                [
                    f"dense: {row[kind]['best_dense']}, {row[kind]['gflops']:.0f} GFLOP/s",
                    *(f"{each['to']} {ratio_text(each)}" for each in row[kind]["ratios"]),
                ]
            )
            if kind in row
            else ""
            for kind in ("forward", "training")
        ]
        memory = row.get("memory")
        kept = f"{memory['sparse'] / memory['dense']:.3f}" if memory else ""
        error = f"{row['error']['sparse'] / row['error']['dense']:.1f} × dense's"
        table.add_row(str(row["tokens"]), f"{row['density']:.3f}", *times, kept, error)
    Terminal().print(table)
    for kind, found in result["break_even"].items():
        for tokens_, density in found.items():
            timed = [row for row in result["rows"] if row["tokens"] == tokens_]
            at = f"at density {density:.2g}" if density else where_faster(timed, kind)
            Terminal().print(f"break-even, {kind}, T = {tokens_}: {at}", highlight=False)


@bench.command()
def here(threads: Threads = None, out: Out = None, json: Json = False) -> None:
    """What to expect on this machine, in about two minutes.

    One MLP, d = 768 and H = 3072: the best dense program and its speed, up to which density a
    sparse one beats it, and by how much at a density of 2 %.

    Examples:

      actsparse bench here

      actsparse bench here --threads 1 --json
    """
    import torch
    from rich.table import Table

    from actsparse.bench.here import DENSITIES, DTYPES, TOKENS, bench_here

    if threads is not None:
        torch.set_num_threads(threads)
    result = bench_here(progress=telling(cells(TOKENS, DENSITIES) * len(DTYPES)))
    if keep_record(result, out, json):
        return
    names = ["dtype", "tokens", "pass", "best dense", "GFLOP/s", "break-even", "gain at 2 %"]
    title = f"threads: {result['threads']}, kernels: {result['kernels']}"
    table = Table(*names, title=f"{title}, memory: {result['bandwidth']:.0f} GB/s")
    for row in result["rows"]:
        at = f"{row['break_even']:.2g}" if row["break_even"] else row["faster"]
        table.add_row(
            row["dtype"], str(row["tokens"]), row["kind"], row["dense"], f"{row['gflops']:.0f}", at,
            f"{row['gain']:.2f}",
        )  # fmt: skip
    Terminal().print(table)


@bench.command()
def model(
    name: Annotated[
        str | None, typer.Argument(help=f"vit-b or gpt2 (training steps), {DECODE} (decoding).")
    ] = None,
    run: Annotated[
        Path | None,
        typer.Option(help="Time a trained model instead: the folder of a run, with its weights."),
    ] = None,
    densities: Densities = ".01,.05",
    rounds: Annotated[int, typer.Option(min=1, help="Number of timed rounds of each program.")] = 5,
    memory: Annotated[
        bool, typer.Option(help="Measure peak memory too, in extra processes.")
    ] = True,
    dtype: DtypeOption = "float32",
    threads: Threads = None,
    out: Out = None,
    json: Json = False,
) -> None:
    """Time a whole model: dense time ÷ sparse time, and what it could be at most.

    The limits are the model without MLPs, and what Amdahl's law predicts from one MLP's speed-up.
    Weights are random, arranged so that blocks have the densities; with --run they are the run's.

    Examples:

      actsparse bench model vit-b --threads 1 --out benchmarks/vit-b.json

      actsparse bench model --run runs/demo/runs/paper-seed0
    """
    import torch

    from actsparse.bench.model import bench_model, bench_trained

    if (name is None) == (run is None):
        raise ValueError(f"give a model (vit-b, gpt2, {DECODE}), or --run with a run's folder")
    if threads is not None:
        torch.set_num_threads(threads)
    if run is not None:
        if laboratory() is None:
            raise ValueError(f"--run needs the laboratory: {how_to_install('actsparse_lab')}")
        trained, where = laboratory().trained_of(run)
        result = {**bench_trained(**trained, rounds=rounds, progress=tell), **where}
    else:
        assert name is not None
        wanted = numbers("--densities", densities, float)
        check_dtype(dtype)
        result = bench_model(
            name,
            wanted,
            rounds,
            memory=memory,
            progress=tell,
            dtype=dtype,  # type: ignore[arg-type]
        )
    if not keep_record(result, out, json):
        _print_trained(result) if run is not None else _print_model(result)


@bench.command()
def checkpoint(
    folder: Annotated[Path, typer.Argument(help="A folder that actsparse convert wrote.")],
    dense: Annotated[Path, typer.Option(help="The checkpoint it was made of.")],
    prompt: Annotated[
        str, typer.Option(help="Text to decode after.")
    ] = "The history of the city begins in the twelfth century, when",
    tokens: Annotated[int, typer.Option(min=2, help="Number of tokens to decode.")] = 32,
    prefill: Annotated[int, typer.Option(min=2, help="Number of tokens that prefill reads.")] = 512,
    rounds: Annotated[int, typer.Option(min=3, help="Number of timed rounds.")] = 7,
    compiled: Annotated[
        bool,
        typer.Option("--compiled", help="Time torch.compile's decode loops too: takes minutes."),
    ] = False,
    threads: Threads = None,
    out: Out = None,
    json: Json = False,
) -> None:
    """Time a converted checkpoint: the best dense time ÷ accelerated time.

    Dense is the checkpoint before conversion, in the same dtype, by the faster of its own layers
    and accelerate(mode="dense"). Decoding is a bare greedy loop with a static cache, and generate;
    prefill reads a prompt. An encoder reads 64 texts of 128 tokens.

    Examples:

      actsparse bench checkpoint my_model-sparse --dense my_model --threads 1
    """
    import torch

    from actsparse import load
    from actsparse.bench.checkpoint import bench_checkpoint
    from actsparse.convert.checkpoint import in_dtype, load_checkpoint

    if threads is not None:
        torch.set_num_threads(threads)
    sparse = load(folder).eval()
    plain, tokenizer = load_checkpoint(dense)
    ids = torch.tensor([tokenizer(prompt)["input_ids"]])
    in_dtype(plain, next(sparse.parameters()).dtype)
    result = bench_checkpoint(plain, sparse, ids, tokens, prefill, rounds, compiled, tell)
    if not keep_record(result, out, json):
        _print_checkpoint(result)


def _print_checkpoint(result: dict[str, Any]) -> None:
    from actsparse.bench.model import CUT, OURS_COMPILED
    from actsparse.cli.result import table_of

    rows = []
    for work in ("decode", "generate", "prefill", "encode"):
        if (found := result.get(work)) is None:
            continue
        speeds = found.get("tokens_a_second", {})
        ratios = {each["to"]: each for each in found["ratios"]}
        rows.append(
            {
                "": work,
                "best dense": f"{found['seconds']['dense']:.3g} s, {found['best_dense']}",
                "dense ÷ accelerated": ratio_text(ratios["accelerated"]),
                **(
                    {"compiled": ratio_text(ratios[OURS_COMPILED])}
                    if OURS_COMPILED in ratios
                    else {}
                ),
                "limit": f"{ratios[CUT]['value']:.2f}",
                "expected": f"{found['expected']:.2f}" if "expected" in found else "",
                "tokens a second": f"{speeds['dense']:.1f} → {speeds['accelerated']:.1f}"
                if speeds
                else "",
            }
        )
    Terminal().print(table_of(rows))
    if "error" in result:
        Terminal().print(f"states differ from those by the layers by {result['error']:.2g} at most")
    else:
        same = "the same tokens" if result["same_tokens"] else "other tokens (rounding)"
        Terminal().print(f"accelerated decodes {same} as by the layers")


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
    Terminal().print(table)


def _print_trained(result: dict[str, Any]) -> None:
    from rich.table import Table

    names = ["", "density", "dense", "dense ÷ sparse", "MLPs cut out", "dense bfloat16"]
    title = f"{result['task']}, {result['arm']}, seed {result['seed']}: a trained model"
    table = Table(*names, title=title)
    for phase in ("inference", "training"):
        row = result[phase]
        seconds = f"{row['seconds']['dense']:.3g} s"
        ratios = [ratio_text(each) for each in row["ratios"]]
        table.add_row(phase, f"{row['density']:.3f}", seconds, *ratios)
    Terminal().print(table)
    quality = {name: each["quality"] for name, each in result["score"].items()}
    told = ", ".join(f"{name} {value:.4f}" for name, value in quality.items())
    Terminal().print(f"{result['quality_name']}: {told}", highlight=False)


def check_dtype(dtype: str) -> None:
    """Raise ValueError for a dtype that no benchmark takes."""
    if dtype not in ("float32", "bfloat16"):
        raise ValueError(f"--dtype {dtype!r}; known: float32, bfloat16")


def numbers(option: str, text: str, kind: Callable[[str], Any]) -> list[Any]:
    """The numbers of an option, separated by commas."""
    try:
        return [kind(each) for each in text.split(",")]
    except ValueError:
        raise ValueError(f"{option} {text!r}: expected numbers, separated by commas") from None

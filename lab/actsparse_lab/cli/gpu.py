"""``actsparse bench gpu``: what waits for a GPU, in one command of a few minutes."""

from __future__ import annotations

import json as jsonlib
import time
from pathlib import Path
from typing import Annotated, Any

import typer

from actsparse.cli.bench import Hidden, Width
from actsparse.time_left import in_words
from actsparse_lab.cli.options import names as names_in


def gpu(
    d: Width = 4096,
    h: Hidden = 16384,
    dtype: Annotated[str, typer.Option(help="Dtype: bfloat16, float16 or float32.")] = "bfloat16",
    tokens: Annotated[int, typer.Option(min=1, help="Number of tokens of a training step.")] = 8192,
    minutes: Annotated[
        float,
        typer.Option(min=0, help="Time limit in minutes; what does not fit any more is left out."),
    ] = 8.0,
    sections: Annotated[
        str, typer.Option(help="Parts to time, separated by commas.")
    ] = "decode, training, tuning, models",
    compiled: Annotated[bool, typer.Option(help="Time torch.compile too (slow to start).")] = True,
    out: Annotated[
        Path | None, typer.Option(help="Write the record to this file, after every measurement.")
    ] = None,
    json: Annotated[bool, typer.Option("--json", help="Print JSON instead of tables.")] = False,
) -> None:
    """Sparse MLPs and models beside dense ones on an NVIDIA GPU, and what they are held against.

    Decoding, training, the sizes that Triton's autotuner chose, and a Llama-like model and a ViT-B
    with their energy. Exits with 1 where a measurement broke; the others stand in the record.

    Example: actsparse bench gpu --out benchmarks/gpu.json
    """
    import torch

    from actsparse.cli.result import keep_record, tell
    from actsparse_lab.bench.gpu import bench_gpu
    from actsparse_lab.bench.gpu_mlp import place_at
    from actsparse_lab.records import environment, write_whole

    place_at("cuda", "float32")  # no GPU: says so
    name = torch.cuda.get_device_name()
    where = environment(threads=torch.get_num_threads(), gpu=name)

    def keep(result: dict[str, Any]) -> None:
        if out is not None:
            write_whole(out, (jsonlib.dumps({**where, **result}, indent=1) + "\n").encode())

    end = time.monotonic() + 60 * minutes

    def told(what: str) -> None:
        tell(f"{what}, at most {in_words(max(0.0, end - time.monotonic()))} left")

    result = bench_gpu(
        d, h, dtype, tokens, minutes, list(names_in(sections)), compiled, progress=told, keep=keep
    )
    if not keep_record({**where, **result}, out, json):
        _print(result)
    for what in result["passed_over"]:
        tell(f"passed over, no time left: {what}")
    for what, why in result["failed"].items():
        tell(f"failed: {what}: {why}")
    if result["failed"]:
        raise typer.Exit(1)


def _print(result: dict[str, Any]) -> None:
    from rich.table import Table

    from actsparse.cli.result import ratio_text
    from actsparse.terminal import Terminal

    sizes, console = result["sizes"], Terminal()
    shape = f"d = {sizes['d']}, H = {sizes['h']}, {sizes['dtype']}"

    def ratios(timed: dict[str, Any]) -> str:
        return "\n".join(f"{r['of']} ÷ {r['to']} {ratio_text(r)}" for r in timed["ratios"])

    def lines(found: dict[str, Any], form: str) -> str:
        told = ((name, "–" if each is None else format(each, form)) for name, each in found.items())
        return "\n".join(f"{name} {each}" for name, each in told)

    if result.get("decode"):
        names = ["T", "density", "units", "time", "gain", "floor ÷ time", "error ÷ dense's"]
        table = Table(*names, title=f"decoding; {shape}; copies at {result['bandwidth']:.3g} B/s")
        for row in result["decode"]:
            cells = [str(row["tokens"]), f"{row['density']:.4f}", f"{row['units']:.4f}"]
            cells += [lines({k: 1e6 * s for k, s in row["seconds"].items()}, ".1f") + " µs"]
            cells += [ratios(row), lines(row["reached"], ".0%")]
            table.add_row(*cells, lines(row["relative_error"], ".2f"))
        console.print(table)
    if result.get("training"):
        names = ["density", "forward", "forward + backward", "auto ran", "memory, MiB"]
        table = Table(*names, title=f"training, T = {sizes['tokens']}; {shape}")
        for row in result["training"]:
            ran = ", ".join(sorted({each["program"] for each in row["auto_ran"]}))
            memory = {name: each and each / 2**20 for name, each in row["memory"].items()}
            cells = [ratios(row["forward"]), ratios(row["training"]), ran or "dense"]
            table.add_row(f"{row['density']:.4f}", *cells, lines(memory, ".0f"))
        console.print(table)
    if result.get("tuning"):
        table = Table("density", "packing", "sampling", title="choices made by estimate")
        for row in result["tuning"]:
            cells = [ratios(row["packing"]), ratios(row["sampling"])]
            table.add_row(f"{row['density']:.4f}", *cells)
        console.print(table)
    if result.get("models"):
        names = ["model", "density", "", "a second", "gain", "joules each", "memory, bytes"]
        table = Table(*names, title="whole models: tokens, or images")
        for row in result["models"]:
            for kind in ("decoding", "forward", "training"):
                if (found := row.get(kind)) is not None:
                    cells = [row["model"], f"{row['density']:.4f}", kind]
                    cells += [lines(found["per_second"], ".4g"), ratios(found)]
                    table.add_row(
                        *cells, lines(found["joules"], ".3g"), lines(found["memory"], ".3g")
                    )
        console.print(table)
    table = Table("held against", "wanted", "found", title="targets")
    for each in result["targets"]:
        found = "not measured" if each["found"] is None else f"{each['found']:.2f}"
        table.add_row(each["what"], f"≥ {each['wanted']:g}", found)
    console.print(table)

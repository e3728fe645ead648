"""``actsparse bench slim``: trained checkpoints, pruned and with thresholds."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Annotated, Any

import typer

from actsparse_lab.cli.runs import trained_at


def slim(
    runs: Annotated[
        list[Path], typer.Argument(help="Folders of runs, each with record.jsonl and weights/.")
    ],
    budget: Annotated[
        float,
        typer.Option(help="Share of the validation loss that thresholds may cost.", min=0),
    ] = 0.003,
    rounds: Annotated[int, typer.Option(min=1, help="Timed rounds of each form.")] = 21,
    threads: Annotated[int, typer.Option(help="Threads.", min=1)] = 1,
    out: Annotated[Path | None, typer.Option(help="Also write the record to this file.")] = None,
    json: Annotated[bool, typer.Option("--json", help="Print JSON instead of a table.")] = False,
) -> None:
    """What is left of trained checkpoints without dead units and small activations.

    Dead units and thresholds are found on the validation split, quality is of the test split, and
    times are of inference on a batch of it: time as trained ÷ that of each form, by dense layers or
    accelerated. Runs without MLPs, without weights or without a result are passed over with a line.
    In the folder of a frontier task, as slim.json, the frontier's page shows it.

    Example:

      actsparse bench slim runs/frontier/text/runs/* --out benchmarks/frontier/text/slim.json
    """
    import torch

    from actsparse.cli.result import in_turn, keep_record, tell

    torch.set_num_threads(threads)
    each = in_turn(runs)
    rows = [row for folder in each if (row := _slim(folder, budget, rounds, tell)) is not None]
    if not rows:
        raise ValueError("none of these runs can be made slim, see above")
    result = {"benchmark": "slim", "threads": threads, "rounds": rounds, "budget": budget}
    if not keep_record({**result, "runs": rows}, out, json):
        _print(rows, threads)


def _slim(
    folder: Path, budget: float, rounds: int, told: Callable[[str], None]
) -> dict[str, Any] | None:
    """A run's row of ``slim.json``; None where there is none, and ``told`` is why."""
    from actsparse_lab.campaigns.slim import slim as slim_model

    found = trained_at(folder, told)
    if found is None:
        return None
    model, run = found
    if not run.finished:
        told(f"passed over: {run.path} has no result, the run is not finished")
        return None
    told(f"{run.task}, {run.arm}, seed {run.seed}")
    row = slim_model(
        model, run, timed=lambda models, infer: _times(models, infer, rounds), budget=budget
    )
    for form, why in row["refused"].items():
        told(f"  not {form}: {why}")
    return row


def _times(models: dict[str, Any], infer: Callable[[Any], object], rounds: int) -> dict[str, Any]:
    """Time as trained ÷ each form's, in turn: by dense layers, and accelerated.

    ``seconds`` by program, ``ratios``, and in ``ran`` by which programs the blocks of the
    accelerated ones ran.
    """
    import copy
    import statistics
    from dataclasses import asdict
    from functools import partial

    import torch

    from actsparse.bench.timing import interleaved, ratio
    from actsparse.kernels import accelerate
    from actsparse_lab.bench.trained import WARM, in_words

    programs: dict[str, Callable[[], object]] = {
        name: partial(infer, model)
        for name, model in models.items()
        if name in ("trained", "pruned")
    }
    with torch.inference_mode():
        ran = {}
        for name in ("trained", "both"):
            if name not in models:
                continue
            fast = copy.deepcopy(models[name])
            try:
                handle = accelerate(fast)
            except ValueError as error:  # no block can be run sparse
                ran[name] = str(error)
                continue
            for _ in range(WARM):
                infer(fast)
            ran[name] = in_words(handle.ran())
            programs[f"{name}, accelerated"] = partial(infer, fast)
        times = interleaved(programs, rounds)
    return {
        "seconds": {name: statistics.median(values) for name, values in times.items()},
        "ratios": [asdict(ratio(times, "trained", name)) for name in programs if name != "trained"],
        "ran": ran,
    }


def _print(rows: list[dict[str, Any]], threads: int) -> None:
    from rich.table import Table

    from actsparse.cli.result import ratio_text
    from actsparse.terminal import Terminal

    names = ["task", "arm", "seed", "form", "quality", "density", "units", "MLP parameters"]
    title = f"as trained ÷ each form, inference, threads: {threads}"
    table = Table(*names, "bytes", "dense layers", "accelerated", title=title)
    for row in rows:
        ratios = {each["to"]: ratio_text(each) for each in row["speed"]["ratios"]}
        for form, found in row["forms"].items():
            table.add_row(
                *(row["task"], row["arm"], str(row["seed"]), form),
                f"{found['quality']:.4f}",
                f"{found['density']:.4f}",
                f"{found['units']:,}",
                f"{found['parameters']['mlps']:,}",
                f"{found['bytes']:,}",
                ratios.get(form, ""),
                ratios.get(f"{form}, accelerated", ""),
            )
    console = Terminal()
    console.print(table)
    for row in rows:
        if (found := row["prune"]) is not None:
            console.print(
                f"{row['arm']}, seed {row['seed']}: {found['cut']} of {found['units']} units cut; "
                f"largest logit on validation rows {found['logit']:.3g}, pruning moved one by "
                f"{found['moved']:.2g}; off from float64: {found['trained_off']:.2g} trained, "
                f"{found['pruned_off']:.2g} pruned",
                highlight=False,
            )

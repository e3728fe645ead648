"""``actsparse measure``: measure a trained model, to see why it is sparse."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any

import typer

from actsparse.cli.laboratory import laboratory
from actsparse.extras import how_to_install

DEFAULT = "density, flatness, gradient, spectrum, gauss_newton, token_copies"


def measure(
    context: typer.Context,
    target: Annotated[
        Path,
        typer.Argument(
            help="The folder of a checkpoint, written by actsparse.save or Hugging Face's "
            "save_pretrained; or the folder of a run, with record.jsonl and weights/."
        ),
    ],
    task: Annotated[
        str | None,
        typer.Option(help="Measure on the data of this task.", show_default="the run's"),
    ] = None,
    data: Annotated[
        str | None,
        typer.Option(
            help="Measure on data of your own: package.module:function, a function that "
            "returns (predict, batches). predict(model, batch) gives logits and targets."
        ),
    ] = None,
    measures: Annotated[
        str,
        typer.Option(
            help="Names, separated by commas: density, flatness, gradient, gradient_sizes, noise, "
            "spectrum, magnitudes, gauss_newton, token_copies, hessian, top_eigenvalue, "
            "robustness, covering, pruning. Or JSON with "
            'options: \'{"gradient": {"epsilon": 1e-4}}\'.'
        ),
    ] = DEFAULT,
    labels: Annotated[
        str,
        typer.Option(
            help="Labels for measures of gradients: data (the data's own) or model (drawn from it)."
        ),
    ] = "data",
    reduction: Annotated[
        str, typer.Option(help="A sample's loss over its positions: mean or sum.")
    ] = "mean",
    split: Annotated[
        str, typer.Option(help="Split of the task's data: train, validation or test.")
    ] = "validation",
    rows: Annotated[
        int, typer.Option(help="Number of samples, evenly spread over the split.", min=1)
    ] = 256,
    batch_size: Annotated[int, typer.Option(help="Number of samples in a pass.", min=1)] = 64,
    probes: Annotated[
        int, typer.Option(help="Number of random draws for each estimate.", min=2)
    ] = 10,
    seed: Annotated[int, typer.Option(help="Seed of the random draws.", min=0)] = 0,
    out: Annotated[
        Path | None,
        typer.Option(
            help="Write the result to this file.", show_default="measures.json in a run's folder"
        ),
    ] = None,
    json: Annotated[bool, typer.Option("--json", help="Print JSON instead of tables.")] = False,
) -> None:
    """Measure a trained model: density, flatness, gradients, curvature, attacks.

    Nothing is trained, and the model stays as it is. The measures of a run are written beside its
    record, where `actsparse report` finds them. docs/measures.md explains every number.

    Examples:

      actsparse measure runs/demo/runs/paper-seed0

      actsparse measure runs/demo/runs/paper-seed0 --measures hessian,top_eigenvalue --probes 50

      actsparse measure my_checkpoint --data my_package.data:batches --labels model --json
    """
    from json import dumps

    import torch

    from actsparse.cli.progress import Progressing
    from actsparse.cli.result import write_result
    from actsparse.environment import environment
    from actsparse.terminal import Terminal

    if data is not None and task is not None:
        raise ValueError("give --task or --data, not both")
    if data is None and laboratory() is None:
        raise ValueError(
            "give --data, the data to measure on (--task needs the laboratory: "
            f"{how_to_install('actsparse_lab')})"
        )
    log = Terminal(stderr=True)
    run = None if laboratory() is None else laboratory().run_at(target)
    if run is not None and out is None:
        context.with_resource(run.alone())  # or they could be of weights that were replaced
        out = run.measures
    model = model_at(target) if run is None else saved_model(run.weights)
    if data is not None:
        loss_fn, batches, where, info = batches_of(data)
    else:
        loss_fn, batches, where, info = laboratory().task_batches(
            model, run and run.record, task, split, rows, batch_size
        )
    asked = asked_of(measures)
    with Progressing(log, "passes") as told:
        from actsparse.observe import measure as measure_model
        from actsparse.observe.measuring import within_bounds

        found = measure_model(
            model,
            loss_fn,
            batches,
            within_bounds(asked, info),
            labels=labels,  # type: ignore[arg-type]
            reduction=reduction,  # type: ignore[arg-type]
            probes=probes,
            seed=seed,
            progress=told,
        )
    record = {
        "kind": "measures",
        "schema": 1,
        **({} if run is None else run.said),
        **found.to_json(),
        **environment(torch.get_num_threads()),
    }
    record["how"] |= where
    text = dumps(record, indent=1, allow_nan=False) + "\n"
    if json:
        typer.echo(text, nl=False)
    else:
        console = Terminal()
        for table in found.tables():
            console.print(table)
    if out is not None:
        write_result(out, text)
        log.print(f"measures: {out}", highlight=False, soft_wrap=True)


def asked_of(measures: str) -> Any:
    """Names, or name → options, out of text.

    >>> asked_of("density, hessian"), asked_of('{"pruning": {"thresholds": [0.1]}}')
    (['density', 'hessian'], {'pruning': {'thresholds': [0.1]}})
    """
    from actsparse.untrusted import parse_json

    if not measures.lstrip().startswith("{"):
        return [name.strip() for name in measures.split(",")]
    return parse_json(measures.encode(), f"--measures {measures!r}")


def model_at(target: Path) -> Any:
    """The model of a checkpoint that `actsparse.save` or Hugging Face wrote.

    Raises:
        ValueError: there is none, it cannot be loaded, or its recipe leaves the MLPs out.
    """
    from actsparse.modify.pretrained import pretrained

    if not (target / "actsparse.json").is_file():
        if (target / "config.json").is_file():
            return pretrained(target)
        runs = sorted(path.parent for path in target.glob("runs/*/record.jsonl"))
        hint = f"; it holds runs: give one, as {runs[0]}" if runs else ""
        raise ValueError(
            f"{target} is neither a run's folder (record.jsonl) nor a checkpoint (actsparse.json, "
            f"or Hugging Face's config.json){hint}"
        )
    return saved_model(target)


def saved_model(target: Path) -> Any:
    """The model that `actsparse.save` wrote.

    Raises:
        ValueError: it cannot be loaded, or its recipe leaves the MLPs out.
    """
    from actsparse import LeaveOutMLP, handle_of, load

    try:
        model = load(target)
    except FileNotFoundError as error:
        raise ValueError(f"cannot load {target}: {error}") from error
    handle = handle_of(model)
    if handle is not None and any(
        isinstance(change, LeaveOutMLP) for change in handle.recipe.modifications
    ):
        raise ValueError(
            f"{target}: nothing to measure, recipe {handle.recipe.name!r} leaves the MLPs out"
        )
    return model


def batches_of(data: str) -> tuple[Any, Any, dict[str, Any], dict[str, Any]]:
    """A loss function, batches, what they are in words, and what the data say of themselves."""
    from actsparse.cli.models import called

    made = called(data)
    if not (isinstance(made, tuple) and len(made) == 2 and callable(made[0])):
        raise ValueError(f"{data} returned {type(made).__name__}; expected (predict, batches)")
    return *made, {"data": data}, {}

"""Trained models made slim: dead units pruned, small activations dropped; what goes, what it costs.

Of a run's model four forms are saved, loaded anew and looked at: as trained, pruned, with
thresholds, with both. Both changes are made from the whole validation split; quality is of the
test split. What is timed is up to the caller.
"""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import torch
from torch import Tensor, nn
from transformers import EvalPrediction

from actsparse.modify import calibrate_thresholds, handle_of, load, prune_dead_units, save
from actsparse.observe import observe
from actsparse_lab.engine.config import recorded_config
from actsparse_lab.engine.run import batches_of
from actsparse_lab.engine.tasks import Scores, Task, task_of
from actsparse_lab.records import Run

FORMS = ("trained", "pruned", "thresholds", "both")
BUDGET = 0.003  # of the validation loss: so much may thresholds cost

Batch = Mapping[str, Tensor]
Infer = Callable[..., Any]
Timed = Callable[[dict[str, nn.Module], Callable[[nn.Module], object]], dict[str, Any]]


def slim(model: nn.Module, run: Run, *, timed: Timed, budget: float = BUDGET) -> dict[str, Any]:
    """Prune the model of a finished run, give it thresholds, and measure what comes of either.

    Dead are units that were never active on the validation split
    (:func:`actsparse.prune_dead_units`). Thresholds drop as much as the validation loss bears
    within ``budget``, a share of it (:func:`actsparse.calibrate_thresholds`); "both" are those of
    the same share of a token's Σ a² after pruning, which changes nothing on these data.

    Args:
        model: as ``load`` gives it; it is as before in the end.
        run: its record.
        timed: is given the forms, by their names in `FORMS`, and a function that runs a model on a
            batch of test rows; what it returns is ``speed``.
        budget: see above.

    Returns:
        A row of ``slim.json``. ``forms``, by name: ``loss`` (nats) and ``quality`` on the test
        split, there too ``density`` and ``active`` (units active for a token in a block, mean),
        ``units``, ``parameters`` (of the ``model``, of its ``mlps``), ``bytes`` of the saved
        folder. ``prune``: how many ``units`` there were, how many were ``cut``, and `rounding`.
        ``thresholds``: ``budget`` and ``loss_before`` and ``loss_after`` on validation rows (nats),
        the ``share`` of a token's Σ a² that may go, and ``blocks``. ``refused``: a form that cannot
        be, and why. ``rows``: how many of each split, and ``timed``. ``speed``.

    Raises:
        ValueError: the run is not finished, its data have changed, or its config is of another
            actsparse.
    """
    if not run.finished:
        raise ValueError(f"{run.path} has no result: the run is not finished")
    task, validation, test = _data(run)
    assert run.result is not None
    with TemporaryDirectory() as place:
        found = _saved(model, Path(place), task, validation, budget)
        models = {name: load(found["folders"][name]) for name in FORMS if name in found["folders"]}
        forms = {
            name: _form(each, found["folders"][name], task, test) for name, each in models.items()
        }
        if found["prune"] is not None:
            exact = load(found["folders"]["trained"]).double()
            found["prune"] |= rounding(models["trained"], models["pruned"], exact, validation)
    rows = {"validation": _count(validation), "test": _count(test), "timed": _count(test[:1])}
    return {
        "task": run.task,
        "arm": run.arm,
        "seed": run.seed,
        "quality_name": run.result["quality_name"],
        "rows": rows,
        "forms": forms,
        "prune": found["prune"],
        "thresholds": found["thresholds"],
        "refused": found["refused"],
        "speed": timed(models, lambda each: task.predict(each, test[0])),
    }


def rounding(
    trained: Infer, pruned: Infer, exact: Infer, batches: Iterable[Batch]
) -> dict[str, float]:
    """How far pruning moved the logits, beside how far float32 is off anyway.

    Sums without their zero terms are the same sums, added up in another order. What that may do is
    measured, as the worst case of a deep model lies far above what happens: ``exact`` is
    ``trained`` in float64.

    Returns:
        The largest absolute value, over all logits of all batches, of: ``logit``, what ``trained``
        gives; ``moved``, pruned − trained; ``trained_off`` and ``pruned_off``, what either is off
        from ``exact``. Pruning is exact up to rounding where ``pruned_off`` is as small as
        ``trained_off``; ``moved`` is at most their sum.

    >>> from types import SimpleNamespace
    >>> layer, double = nn.Linear(4, 2), nn.Linear(4, 2).double()
    >>> _ = double.load_state_dict(layer.state_dict())
    >>> model, exact = (lambda x, of=of: SimpleNamespace(logits=of(x)) for of in (layer, double))
    >>> found = rounding(model, model, exact, [{"x": torch.randn(8, 4)}])
    >>> found["moved"], found["trained_off"] == found["pruned_off"] < 1e-6
    (0.0, True)
    """
    names = ("logit", "moved", "trained_off", "pruned_off")
    largest = dict.fromkeys(names, 0.0)
    with torch.inference_mode():
        for batch in batches:
            full, short = (each(**batch).logits.double() for each in (trained, pruned))
            true = exact(**_in_float64(batch)).logits
            errors = (full, short - full, full - true, short - true)
            for name, error in zip(names, errors, strict=True):
                largest[name] = max(largest[name], float(error.abs().max()))
    return largest


def _data(run: Run) -> tuple[Task, list[Batch], list[Batch]]:
    """The run's task, and its validation and test rows."""
    config = recorded_config(run)
    task = task_of(config.task)
    splits = task.splits(config)
    noted = run.header.get("data_sha256")
    if noted not in (None, splits.info["sha256"]):
        raise ValueError(
            f"the data of {config.task} have changed since {run.path} was written: sha256 "
            f"{splits.info['sha256']}, noted {noted}"
        )
    validation, test = (
        batches_of(rows, sys.maxsize, config.batch_size)
        for rows in (splits.validation, splits.test)
    )
    return task, [*validation], [*test]


def _saved(
    model: nn.Module, place: Path, task: Task, validation: Sequence[Batch], budget: float
) -> dict[str, Any]:
    """Save each form to a folder in ``place``; the model is as before in the end."""

    def loss() -> float:
        return _score(model, task, validation)["loss"]

    folders = {"trained": save(model, place / "trained")}
    refused: dict[str, str] = {}
    facts: dict[str, Any] = {"prune": None, "thresholds": None}
    with observe(model, ("density", "magnitudes")) as seen:
        before = loss()
    try:
        dropped = calibrate_thresholds(model, seen, budget * before, evaluate=loss)
    except ValueError as error:
        refused["thresholds"] = str(error)
    else:
        folders["thresholds"] = save(model, place / "thresholds")
        facts["thresholds"] = {
            "budget": budget * before,
            "loss_before": dropped.loss_before,
            "loss_after": dropped.loss_after,
            "share": dropped.share,
            "blocks": dropped.rows(),
        }
        dropped.remove()
    try:
        pruned = prune_dead_units(model, seen)
    except ValueError as error:
        refused["pruned"] = str(error)
    else:
        folders["pruned"] = save(model, place / "pruned")
        facts["prune"] = {
            "units": sum(units for _, units, _ in pruned.rows),
            "cut": sum(units - left for _, units, left in pruned.rows),
        }
        if facts["thresholds"] is not None:
            again = calibrate_thresholds(model, seen, share=facts["thresholds"]["share"])
            folders["both"] = save(model, place / "both")
            again.remove()
        pruned.remove()
    return {"folders": folders, "refused": refused, **facts}


def _form(model: nn.Module, folder: Path, task: Task, test: Sequence[Batch]) -> dict[str, Any]:
    """What a form is, and does on the test split."""
    handle = handle_of(model)
    assert handle is not None
    with observe(model) as seen:
        scores = _score(model, task, test)
    summary = seen.summary("inference")
    assert summary is not None
    tokens = sum(row["tokens"] for row in summary["blocks"])
    active = sum(row["density"] * row["units"] * row["tokens"] for row in summary["blocks"])
    layers = [layer for b in handle.blocks for layer in (b.up, b.gate, b.down) if layer is not None]
    ours = [p for layer in layers for p in (layer.weight, layer.bias) if p is not None]
    return {
        **scores,
        "density": summary["density"],
        "active": active / tokens,
        "units": summary["units"],
        "parameters": {
            "model": sum(each.numel() for each in model.parameters()),
            "mlps": sum(each.numel() for each in ours),
        },
        "bytes": sum(file.stat().st_size for file in folder.iterdir()),
    }


def _score(model: nn.Module, task: Task, batches: Iterable[Batch]) -> Scores:
    """Loss and quality over all rows, in evaluation mode."""
    model.eval()
    with torch.inference_mode():
        kept = [task.reduce(model(**each).logits, each["labels"]) for each in batches]
    return task.score(EvalPrediction(torch.cat(kept).numpy(), None))


def _in_float64(batch: Batch) -> dict[str, Tensor]:
    return {name: t.double() if t.is_floating_point() else t for name, t in batch.items()}


def _count(batches: Sequence[Batch]) -> int:
    return sum(len(each["labels"]) for each in batches)

"""The card of a trained model: what a README.md on the Hugging Face Hub tells of a run."""

from __future__ import annotations

from pathlib import PurePath
from typing import Any

from actsparse.values import Text, check
from actsparse_lab.analysis.numbers import counted, decimal, percent
from actsparse_lab.analysis.tables import Cell, Column, Table, code, markdown
from actsparse_lab.records import Entry, RecordError, Run
from actsparse_lab.report.provenance import what_ran

_HEAD = """\
---
library_name: actsparse
tags:
- activation-sparsity
---
"""
_LOAD = """\
`weights` is the folder beside the run's record.

```python
import actsparse

model = actsparse.load("weights")
```
"""
_CONFIG = {
    "recipe": {"name": Text, "modifications": [{"modification": Text}]},
    "start?": (str, None),
}
_TOLD = ("started", "time in all", "hardware", "versions", "git")


def model_card(run: Run) -> str:
    """The README.md of a finished run, with the Hub's metadata; its licence is for you to add.

    It says what was trained and how it was changed, how sparse each block is at inference (all of
    the test split) and was in training (its last fifth), the quality, where finetuning began, how
    to load the weights, and on what all this ran. The command, which may name folders of the
    machine, is left out.

    ``Path("README.md").write_text(model_card(read_run(path)))`` writes it.

    Raises `RecordError` for a run that is not finished.
    """
    result = run.result
    if result is None:
        raise RecordError(f"{run.path}: there is no result yet; a card is of a finished run")
    check(f"{run.path}: result", result, {"data?": {"name?": Text}})
    data = markdown(result.get("data", {}).get("name", run.task))
    parts = [
        f"# {markdown(run.task)}: {markdown(run.arm)}, seed {run.seed}",
        _what(run, result, data),
        "## Sparsity",
        _sparsity(result),
        f"## Quality on the {markdown(result['split'])} split of {data}",
        _quality(result),
        "## Loading it",
        _LOAD,
        "## How it was made",
        "\n".join(f"- {name}: {markdown(said)}" for name, said in what_ran([run]) if name in _TOLD),
    ]
    return _HEAD + "\n" + "\n\n".join(part.rstrip("\n") for part in parts) + "\n"


def _what(run: Run, result: Entry, data: str) -> str:
    config = run.header["config"]
    check(f"{run.path}: run.config", config, _CONFIG)
    recipe = config["recipe"]
    start = "/".join(PurePath(config.get("start") or "").parts[-2:])  # not whose machine it was on
    how = f"finetuned from {code(start)}" if start else "trained"
    changes = [f"- {code(_call(change))}" for change in recipe["modifications"]]
    said = (
        f"A model {how} on {data} for {counted(result['step'], 'step')} with actsparse. The recipe "
        f"{code(recipe['name'])} {'makes these changes to it:' if changes else 'changes nothing.'}"
    )
    return "\n\n".join([said, *(["\n".join(changes)] if changes else [])])


def _call(change: Entry) -> str:
    options = (
        f"{key}={value!r}"
        for key, value in change.items()
        if key != "modification" and value is not None  # not set; it may no longer exist
    )
    return f"{change['modification']}({', '.join(options)})"


def _sparsity(result: Entry) -> str:
    inference, training = result["inference"], result["training"]
    if inference is None:
        return "Nothing to tell: the model runs without its MLP blocks."
    late = {each["block"]: each for each in (training or {}).get("blocks", [])}
    shown = [(Cell("whole model"), inference, training or {})]
    shown += [
        (Cell(each["block"], markdown=code(each["block"])), each, late.get(each["block"], {}))
        for each in inference["blocks"]
    ]
    heads = ("block", "inference", "training", "derivative", "living units", "dead units")
    rows = tuple(
        (
            name,
            _sparse(now, "density"),
            _sparse(then, "density"),
            _sparse(then, "derivative_density"),
            _sparse(now, "living_density"),
            f"{now['dead']} of {now['units']}",
        )
        for name, now, then in shown
    )
    table = Table("sparsity", "sparsity", tuple(map(Column, heads)), rows).markdown()
    return (
        "Shares of the entries of the MLPs' hidden layers that are 0: at inference, in training, "
        "those of the activation's derivative in training, and at inference among the units that "
        f"are not dead. A dead unit is 0 at every token.\n\n{table}"
    )


def _quality(result: Entry) -> str:
    name = result["quality_name"]
    better = "more" if result["higher_is_better"] else "less"
    before = result.get("before")
    states = [("as it is", result)] + ([("before finetuning", before)] if before else [])
    heads = ["", f"{name} ({better} is better)", "loss"] + ["inference sparsity"] * bool(before)
    rows = []
    for said, at in states:
        row = [said, _scored(name, at["quality"]), decimal(at["loss"], 4)]
        row += [_sparse(at["inference"] or {}, "density")] if before else []
        rows.append(tuple(row))
    return Table("quality", "quality", tuple(map(Column, heads)), tuple(rows)).markdown()


def _scored(name: str, quality: float) -> str:
    return percent(quality, 2) if name == "accuracy" else decimal(quality, 4)


def _sparse(measures: dict[str, Any], key: str) -> str:
    density = measures.get(key)
    return percent(None if density is None else 1 - density)

"""Options that several verbs share: settings of a run that override the task's own."""

from __future__ import annotations

import tomllib
from collections.abc import Iterator
from dataclasses import fields
from pathlib import Path
from typing import Annotated, Any

import typer

from actsparse.untrusted import parse_json, read_bytes
from actsparse.values import Positive, check, shown

Task = Annotated[
    str,
    typer.Option(
        help="digits, text (T5 span corruption), lm (causal); digits_finetune, lm_finetune; on "
        "data of yours cifar10, vit_cifar10, t5_web, lm_web, and the papers' vit_imagenet, t5_c4, "
        "vit_cifar10_finetune, vit_imagenet_finetune, t5_c4_finetune."
    ),
]
Quick = Annotated[
    bool, typer.Option("--quick", help="Train the task's small form, a few minutes on two cores.")
]
Data = Annotated[
    str | None,
    typer.Option(
        help="Folder of images (train/<class>/…, val/<class>/…, or tables as on the Hub), or "
        "shards of text: a folder, file, glob or address of JSON lines, as C4's."
    ),
]
Whose = Annotated[
    str,
    typer.Option(
        "--settings",
        help="Where the papers and their authors' program differ: paper or program.",
    ),
]
Steps = Annotated[
    int | None, typer.Option(help="Number of optimizer steps.", show_default="the task's")
]
Settings = Annotated[
    list[str] | None,
    typer.Option(
        "--set",
        help="Any other setting of a run, such as --set lr=1e-3 --set batch_size=64 --set "
        "model.hidden_size=256 --set data.tokenizer=spiece.model --set measures=flatness,gradient "
        "--set accelerate=true --set threads=2; values as in JSON. Tasks that finetune need --set "
        "start=FOLDER, a run's weights/ or Hugging Face's. `--set help` lists all.",
        metavar="NAME=VALUE",
    ),
]
Config = Annotated[
    Path | None,
    typer.Option(help="The same settings from a TOML or JSON file; --set wins over it."),
]
Threads = Annotated[
    int, typer.Option(help="Number of CPU threads of a run.", min=1, show_default="1")
]
_GROUPS = ("model", "data", "lora")
_OWN_OPTION = {"task", "arm", "seed", "quick", "settings"}


def names(text: str) -> tuple[str, ...]:
    """The names in ``a,b``."""
    return tuple(name.strip() for name in text.split(","))


def chosen(
    task: str,
    quick: bool,
    data: str | None,
    whose: str,
    steps: int | None,
    file: Path | None,
    given: list[str] | None,
) -> tuple[dict[str, Any], int]:
    """Overrides of `run_config` out of options, and the threads of a run.

    Raises:
        ValueError: text that is no ``name=value``, a file that is no table of settings, or a name
            that the task does not have.
    """
    from actsparse_lab.engine.config import RunConfig
    from actsparse_lab.tasks import TASK_SETTINGS

    if task not in TASK_SETTINGS:
        raise ValueError(f"unknown task {task!r}; known: {', '.join(TASK_SETTINGS)}")
    if "help" in (given or ()):
        known = {each.name for each in fields(RunConfig)} - {*_OWN_OPTION, "recipe"}
        typer.echo("\n".join(sorted({*known, "threads"})))
        raise typer.Exit
    own = TASK_SETTINGS[task](quick)
    found: dict[str, Any] = {"quick": quick, "settings": whose}
    found |= {} if steps is None else {"steps": steps}
    if data is not None:
        place = "path" if "path" in own.get("data", {}) else "shards"
        if place not in own.get("data", {}):
            raise ValueError(f"{task} brings its own data; --data is not its")
        found["data"] = {place: data}
    in_file = () if file is None else _settings_in(file)
    for where, name, value in (*in_file, *(("--set", *_pair(each)) for each in given or ())):
        if name in _OWN_OPTION:
            raise ValueError(f"{where} {name}: it has an option of its own, --{name}")
        group, _, inner = name.partition(".")
        if inner and group in _GROUPS:
            if group == "model" and not own["model"]:
                raise ValueError(f"{where} {name}: {task} takes the model that start names")
            if not isinstance(held := found.setdefault(group, {}), dict):
                raise ValueError(f"{where} {name}: {group} was set to {shown(held)} before")
            held[inner] = value
        elif name == "measures" and isinstance(value, str):
            found[name] = names(value)
        else:
            found[name] = tuple(value) if isinstance(value, list) else value
    threads: int = found.pop("threads", 1)
    check("--set threads", threads, Positive)
    return found, threads


def _settings_in(file: Path) -> Iterator[tuple[str, str, Any]]:
    """Each setting of a file: where it stands, its name and its value."""
    where, content = f"{file}:", read_bytes(file)
    try:
        table = tomllib.loads(content.decode()) if file.suffix == ".toml" else None
    except ValueError as error:
        raise ValueError(f"{file} is no TOML: {error}") from error
    table = parse_json(content, str(file)) if table is None else table
    if not isinstance(table, dict):
        raise ValueError(f"{file}: expected a table of settings, such as lr = 1e-3")
    for name, value in table.items():
        if name in _GROUPS and isinstance(value, dict):
            for inner, each in value.items():
                yield where, f"{name}.{inner}", each
        else:
            yield where, name, value


def _pair(text: str) -> tuple[str, Any]:
    name, equals, value = (each.strip() for each in text.partition("="))
    if not (name and equals and value):
        raise ValueError(f"--set {text!r}: expected name=value, such as model.hidden_size=256")
    try:
        return name, parse_json(value.encode(), "--set")
    except ValueError:
        return name, value

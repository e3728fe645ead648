"""Kinds of input that are values: recipes, configs, settings and command lines."""

from __future__ import annotations

import json
import os
from pathlib import Path
from random import Random

from tests.fuzz import mutate
from tests.fuzz.kinds import Action, Make, kind

# -- values ----------------------------------------------------------------------------------------


@kind(220)
def recipes(folder: Path) -> Make:
    from actsparse.modify import Recipe
    from actsparse.modify.recipe import MODIFICATIONS, recipe_named

    changes = [
        {"modification": "PruneGradient", "threshold": 0.1},
        *({"modification": name} for name in ("TopK", "WeightNoise", "LeaveOutMLP")),
    ]
    right = recipe_named("paper-finetune").to_json()
    right["modifications"] += [each for each in changes if each["modification"] in MODIFICATIONS]
    right["modifications"] += recipe_named("best").to_json()["modifications"]

    def once(random: Random) -> Action:
        values = mutate.plain(right, random)
        return lambda: Recipe.from_json(values)

    return once


@kind(220)
def run_configs(folder: Path) -> Make:
    from actsparse.values import checked
    from actsparse_lab.engine.config import RunConfig
    from actsparse_lab.tasks import run_config

    right = run_config("digits", "best", 0, active=("hessian", "pruning")).to_json()

    def once(random: Random) -> Action:
        values = mutate.plain(right, random)
        return lambda: checked(RunConfig, values, "config.json")

    return once


@kind(60)
def settings(folder: Path) -> Make:
    """``--set NAME=VALUE``."""
    from actsparse_lab.cli.options import chosen
    from actsparse_lab.engine.config import RunConfig
    from actsparse_lab.tasks import TASK_SETTINGS, run_config

    tasks = [each for each in TASK_SETTINGS if not each.endswith("_finetune")]
    names = [
        *RunConfig.__dataclass_fields__,
        "model.hidden_size",
        "data.size",
        "lora.r",
        "active.x",
    ]

    def once(random: Random) -> Action:
        values = [random.choice(mutate.VALUES) for _ in range(3)]
        texts = [
            v if isinstance(v, str) and random.random() < 0.5 else json.dumps(v) for v in values
        ]
        given = [f"{random.choice(names)}={text}" for text in texts[: random.randint(1, 3)]]
        task = random.choice(tasks)

        def read() -> None:
            overrides, _ = chosen(task, True, None, None, None, None, given)
            run_config(task, "best", 0, **overrides)

        return read

    return once


@kind(40)
def data_settings(folder: Path) -> Make:
    """Settings of data and of models that a record's config names."""
    from actsparse_lab.data.text import load_documents
    from actsparse_lab.engine.tasks import task_of
    from actsparse_lab.tasks import run_config

    load_documents()  # once for all
    tasks = ("digits", "lm", "text", "vit_cifar10", "t5_web", "lm_web", "cifar10")
    (folder / "some.jsonl").write_text('{"text": "a b c"}\n' * 40)
    place = {"shards": str(folder / "some.jsonl"), "tokenizer": "bytes", "length": 8, "rows": 2}

    def once(random: Random) -> Action:
        name = random.choice(tasks)
        config = run_config(name, "vanilla", 0, quick=True)
        data = {**config.data, **(place if "shards" in config.data else {})}
        whole = mutate.plain({"data": data, "model": config.model}, random)
        if isinstance(whole, dict) and isinstance(whole.get("data"), dict):
            whole["data"] = {k: v for k, v in whole["data"].items() if "://" not in str(v)}

        def read() -> None:
            made = run_config(name, "vanilla", 0, quick=True, **whole)
            task_of(name).splits(made)

        return read if isinstance(whole, dict) else lambda: None

    return once


@kind(10)
def command_lines(folder: Path) -> Make:
    from typer.testing import CliRunner

    from actsparse.cli.main import VERBS, app

    options = (
        "--task --arm --arms --seed --out --steps --lr --model --data --tokenizer --settings --set "
        "--measures --json --markdown --batch-size --threads --split --rows --run"
    ).split()
    words = ["digits", "paper", "0", "1", "hidden_size=8", "data.x=1", "runs/x", "-h", "--", "lm"]
    words += [v for v in mutate.VALUES if isinstance(v, str) and "\0" not in v and v != "\ud800"]
    trains = ("train", "compare")  # a last option says something wrong, or training would begin

    def once(random: Random) -> Action:
        verb = random.choice(["report", *trains, *VERBS])
        given = [verb]
        for _ in range(random.randint(0, 4)):
            given += [random.choice(options), random.choice(words)]
        given += ["--steps", random.choice(["0", "x", "-1", ""])] if verb in trains else []

        def read() -> None:
            os.chdir(folder)
            done = CliRunner().invoke(app, given)
            if done.exception is not None and not isinstance(done.exception, SystemExit):
                raise done.exception
            if done.exit_code not in (0, 2):
                raise AssertionError(f"exit code {done.exit_code} of {given}")

        return read

    return once

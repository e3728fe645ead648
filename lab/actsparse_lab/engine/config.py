"""What one run is: everything it depends on besides the code, as plain data."""

from __future__ import annotations

import json
import math
from dataclasses import asdict, dataclass, field
from typing import Annotated, Any, Literal

from actsparse.modify import Recipe, recipe_named
from actsparse.observe import CURVATURES, MEASURES, TRIALS
from actsparse.observe.measuring import checked_options
from actsparse.values import (
    Above0,
    AtLeast0,
    BadValue,
    Count,
    Name,
    Positive,
    Rule,
    Text,
    check_fields,
    checked,
    shown,
)
from actsparse_lab.engine import flatness_correct as flatness_correct  # measures of runs, too
from actsparse_lab.engine import occupancy as occupancy
from actsparse_lab.records import Run


@dataclass(frozen=True)
class RunConfig:
    """One run, resolved: saved as it is in the record's header.

    ``task`` names the model, the data and how they are scored; ``recipe`` is what
    `Recipe.to_json` gives, so that every knob of it is on record. ``model`` goes to the Hugging
    Face config, ``data`` to the function that makes the splits.

    ``batch_size`` counts the rows of an optimizer step, over all processes; each takes them
    ``micro_batch`` at a time (None: all of its share). The learning rate rises over ``warmup``
    (steps, or a fraction of ``steps``) to ``lr``; then it follows half a cosine to zero, which with
    ``epochs`` falls in so many equal stairs, or with ``schedule="inverse_sqrt"`` 1/√step.
    ``no_decay`` are the kinds of parameters that weight decay spares (`decay_groups`). ``clip``
    bounds the norm of the gradient (None: not at all). ``precision`` is that of autocast;
    ``"mixed"`` is fp16 with a scaled loss on a GPU, and bf16 on a CPU.

    ``start`` is a checkpoint to finetune: a folder of `actsparse.save` or of Hugging Face's
    ``save_pretrained``; None: random weights. ``lora`` are options of `lora_config`; None: all
    weights are trained. ``fsdp`` names classes of layers whose parameters are to be sharded over
    processes (FSDP2), such as ``("ViTLayer",)``.

    Evaluation, a log line and a checkpoint come every ``eval_every``, ``log_every`` and
    ``save_every`` steps (None: a checkpoint only when interrupted), of which ``keep`` are kept.
    ``validate_on`` limits the validation rows (None: all); the test split is always read whole.
    ``workers`` are processes that load data, ``report_to`` Trainer's trackers.

    ``measures`` are read in each pass (`observe`); those of ``active`` (`measure`) at the start,
    every ``active_every`` steps (None: never between), after the steps ``active_at`` and at the
    end, on ``active_on`` rows of the validation split. ``active`` is names, or name → options, as
    plain values; attacks in it stay within the data's own range of inputs unless they have
    ``bounds`` of their own (null: none).

    ``accelerate`` lets MLP blocks run sparse in training (`SparsityCallback`): True where that is
    faster, ``"sparse"`` at any density. Passive measures of training are then of the steps that
    end in a log line, and of the last.

    Raises `ValueError` for a value that cannot work, naming it.

    >>> config = RunConfig(task="digits", arm="vanilla", seed=0, steps=100)
    >>> config.to_json()["recipe"]
    {'name': 'vanilla', 'modifications': []}
    """

    task: Name
    arm: Name
    seed: Count
    recipe: dict[str, Any] = field(default_factory=recipe_named("vanilla").to_json)
    steps: Positive = 1500
    batch_size: Positive = 64
    micro_batch: Positive | None = None
    lr: Above0 = 5e-3
    schedule: Literal["cosine", "inverse_sqrt"] = "cosine"
    warmup: Annotated[
        int | float,
        Rule(
            "a number of steps (int), or a fraction of them",
            lambda warmup: warmup >= 0 and (isinstance(warmup, int) or warmup <= 1),
        ),
    ] = 0.1
    epochs: Positive | None = None
    weight_decay: AtLeast0 = 0.5
    no_decay: tuple[str, ...] = ()
    clip: Above0 | None = 1.0
    label_smoothing: Annotated[float, Rule("0 to below 1", lambda value: 0 <= value < 1)] = 0.0
    precision: Literal["float32", "bf16", "fp16", "mixed"] = "float32"
    gradient_checkpointing: bool = False
    start: Text | None = None
    lora: dict[str, Any] | None = None
    fsdp: tuple[str, ...] = ()
    log_every: Positive = 50
    eval_every: Positive = 100
    save_every: Positive | None = None
    keep: Positive = 2
    validate_on: Positive | None = None
    workers: Count = 0
    report_to: tuple[str, ...] = ()
    measures: tuple[str, ...] = ("density",)
    active: Annotated[
        tuple[str, ...] | dict[str, dict[str, Any]],
        Rule("names, or name → options as JSON has them", lambda active: True),
    ] = ()
    active_every: Positive | None = None
    active_at: tuple[Positive, ...] = ()
    active_on: Positive = 128
    model: dict[str, Any] = field(default_factory=dict)
    data: dict[str, Any] = field(default_factory=dict)
    accelerate: Literal[False, True, "sparse"] = False

    def __post_init__(self) -> None:
        check_fields(self)
        Recipe.from_json(self.recipe)
        passive, active = list(MEASURES), [*MEASURES, *CURVATURES, *TRIALS]
        for name, known in [("measures", passive), ("active", active)]:
            unknown = [each for each in getattr(self, name) if each not in known]
            if unknown:
                raise BadValue(f"{name} holds {shown(unknown[0])}; known: {', '.join(known)}")
        if isinstance(self.active, dict):
            _check_plain(self.active)
        if "density" not in self.measures:
            raise BadValue(f"measures={self.measures!r} lacks 'density', which each record needs")
        if self.fsdp and self.active:
            raise BadValue(
                f"active={self.active!r} is measured by one process, which has only its own shards "
                f"with fsdp={self.fsdp!r}; leave one of them out"
            )

    def share(self, processes: int) -> tuple[int, int]:
        """Rows of a pass of one of ``processes``, and how many passes make its optimizer step.

        Raises `ValueError` where the batch cannot be shared out evenly.

        >>> RunConfig("digits", "vanilla", 0, batch_size=64, micro_batch=8).share(processes=2)
        (8, 4)
        """
        own, rest = divmod(self.batch_size, processes)
        if rest:
            raise ValueError(
                f"batch_size={self.batch_size} rows cannot be shared evenly by {processes} "
                f"processes; give a multiple of {processes}"
            )
        rows = own if self.micro_batch is None else self.micro_batch
        if rows > own or own % rows:
            raise ValueError(
                f"micro_batch={rows} does not divide the {own} rows that each of {processes} "
                f"processes takes of batch_size={self.batch_size}"
            )
        return rows, own // rows

    @property
    def warmup_steps(self) -> int:
        """Steps in which the learning rate rises."""
        if isinstance(self.warmup, int):
            return self.warmup
        return math.ceil(self.warmup * self.steps)

    def to_json(self) -> dict[str, Any]:
        """All fields as JSON has them (a tuple is a list)."""
        return json.loads(json.dumps(asdict(self)))


def recorded_config(run: Run) -> RunConfig:
    """The config of a run on disk, whoever wrote its record.

    Raises:
        ValueError: it is none, or one of another actsparse; or its data lie at an address, which
            is not fetched because a record says so.
    """
    where = f"{run.path}: run.config"
    try:
        config = checked(RunConfig, run.header["config"], where)
    except BadValue as error:
        raise BadValue(f"{run.path} has the config of another actsparse: {error}") from error
    for name, value in config.data.items():
        for each in value if isinstance(value, list) else [value]:
            if isinstance(each, str) and ("://" in each or "::" in each):
                raise BadValue(
                    f"{where}.data.{name}={shown(each)}: an address that a record names is not "
                    f"fetched; say yourself where the data are"
                )
    return config


def _check_plain(active: dict[str, Any]) -> None:
    try:
        json.dumps(active, allow_nan=False)
        checked_options(active)
    except (TypeError, ValueError) as error:
        raise ValueError(
            f"active={active!r}: expected names, or name → options as JSON has them ({error})"
        ) from error

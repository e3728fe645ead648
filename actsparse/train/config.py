"""What one run is: everything it depends on besides the code, as plain data."""

from __future__ import annotations

import json
import math
from dataclasses import asdict, dataclass, field
from typing import Any, Literal

from actsparse.modify import recipe_named
from actsparse.observe import CURVATURES, MEASURES, TRIALS
from actsparse.observe.measure import checked_options
from actsparse.observe.session import Names


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
    bounds the norm of the gradient (None: not at all). ``precision`` is that of autocast.

    ``start`` is a checkpoint to finetune: a folder of `actsparse.save` or of Hugging Face's
    ``save_pretrained``; None: random weights. ``lora`` are options of `lora_config`; None: all
    weights are trained. ``fsdp`` names classes of layers whose parameters are to be sharded over
    processes (FSDP2), such as ``("ViTLayer",)``.

    Evaluation, a log line and a checkpoint come every ``eval_every``, ``log_every`` and
    ``save_every`` steps (None: a checkpoint only when interrupted), of which ``keep`` are kept.
    ``validate_on`` limits the validation rows (None: all); the test split is always read whole.
    ``workers`` are processes that load data, ``report_to`` Trainer's trackers.

    ``measures`` are read in each pass (`observe`); those of ``active`` (`measure`) at the start,
    every ``active_every`` steps (None: never between) and at the end, on ``active_on`` rows of the
    validation split. ``active`` is names, or name → options, as plain values; attacks in it stay
    within the data's own range of inputs unless they have ``bounds`` of their own (null: none).

    ``accelerate`` lets MLP blocks run sparse in training (`SparsityCallback`): True where that is
    faster, ``"sparse"`` at any density. Passive measures of training are then of the steps that
    end in a log line, and of the last.

    Raises `ValueError` for a value that cannot work, naming it.

    >>> config = RunConfig(task="digits", arm="vanilla", seed=0, steps=100)
    >>> config.to_json()["recipe"]
    {'name': 'vanilla', 'modifications': []}
    """

    task: str
    arm: str
    seed: int
    recipe: dict[str, Any] = field(default_factory=recipe_named("vanilla").to_json)
    steps: int = 1500
    batch_size: int = 64
    micro_batch: int | None = None
    lr: float = 5e-3
    schedule: Literal["cosine", "inverse_sqrt"] = "cosine"
    warmup: int | float = 0.1
    epochs: int | None = None
    weight_decay: float = 0.5
    no_decay: tuple[str, ...] = ()
    clip: float | None = 1.0
    label_smoothing: float = 0.0
    precision: Literal["float32", "bf16", "fp16"] = "float32"
    gradient_checkpointing: bool = False
    start: str | None = None
    lora: dict[str, Any] | None = None
    fsdp: tuple[str, ...] = ()
    log_every: int = 50
    eval_every: int = 100
    save_every: int | None = None
    keep: int = 2
    validate_on: int | None = None
    workers: int = 0
    report_to: tuple[str, ...] = ()
    measures: tuple[str, ...] = ("density",)
    active: tuple[str, ...] | dict[str, dict[str, Any]] = ()
    active_every: int | None = None
    active_on: int = 128
    model: dict[str, Any] = field(default_factory=dict)
    data: dict[str, Any] = field(default_factory=dict)
    accelerate: bool | Literal["sparse"] = False

    def __post_init__(self) -> None:
        for name in _NAMES:
            names = getattr(self, name)
            if isinstance(names, str) or not all(isinstance(each, str) for each in names):
                raise ValueError(f"{name}={names!r}: expected a list of names")
        for name in _NUMBERS:
            if not _number(value := getattr(self, name)):
                raise ValueError(f"{name}={value!r}: expected a number")
        for name in _COUNTS:
            value = getattr(self, name)
            if value is None and name in _MAY_BE_NONE:
                continue
            if not _whole(value, 1):
                raise ValueError(f"{name}={value!r}: expected a whole number, 1 or more")
        for name in ("seed", "workers"):
            if not _whole(value := getattr(self, name), 0):
                raise ValueError(f"{name}={value!r}: expected a whole number, 0 or more")
        passive, active = list(MEASURES), [*MEASURES, *CURVATURES, *TRIALS]
        for name, known in [("measures", passive), ("active", active)]:
            unknown = [each for each in getattr(self, name) if each not in known]
            if unknown:
                raise ValueError(f"{name} holds {unknown[0]!r}; known: {', '.join(known)}")
        if isinstance(self.active, dict):
            _check_plain(self.active)
        if "density" not in self.measures:
            raise ValueError(f"measures={self.measures!r} lacks 'density', which each record needs")
        for name, choices in _CHOICES.items():
            if (value := getattr(self, name)) not in choices:
                said = ", ".join(map(repr, choices))
                raise ValueError(f"{name}={value!r}: expected one of {said}")
        if not self.lr > 0:
            raise ValueError(f"lr={self.lr!r}: expected a number above 0")
        if not self.weight_decay >= 0:
            raise ValueError(f"weight_decay={self.weight_decay!r}: expected 0 or more")
        if not (_whole(self.warmup, 0) or 0 <= self.warmup <= 1):
            raise ValueError(
                f"warmup={self.warmup!r}: expected a number of steps (int), or a fraction of them"
            )
        if self.clip is not None and not (_number(self.clip) and self.clip > 0):
            raise ValueError(f"clip={self.clip!r}: expected a gradient norm above 0, or None")
        if self.fsdp and self.active:
            raise ValueError(
                f"active={self.active!r} is measured by one process, which has only its own shards "
                f"with fsdp={self.fsdp!r}; leave one of them out"
            )
        if not 0 <= self.label_smoothing < 1:
            raise ValueError(f"label_smoothing={self.label_smoothing!r}: expected 0 to below 1")

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


_COUNTS = (
    "steps", "batch_size", "micro_batch", "epochs", "log_every", "eval_every", "save_every", "keep",
    "active_on", "active_every",
)  # fmt: skip
_MAY_BE_NONE = ("micro_batch", "epochs", "save_every", "active_every")
_CHOICES: dict[str, tuple[Any, ...]] = {
    "schedule": ("cosine", "inverse_sqrt"),
    "precision": ("float32", "bf16", "fp16"),
    "accelerate": (False, True, "sparse"),
}


_NAMES = ("no_decay", "fsdp", "report_to", "measures", "active")
_NUMBERS = ("lr", "warmup", "weight_decay", "label_smoothing")


def within_bounds(measures: Names, info: dict[str, Any]) -> dict[str, dict[str, Any]]:
    """Measures as name → options, attacks within the ``bounds`` of the data that ``info`` is of.

    >>> within_bounds(["density", "covering"], {"bounds": [0, 1]})
    {'density': {}, 'covering': {'bounds': [0, 1]}}
    """
    attacks = ("robustness", "covering")
    return {
        name: {"bounds": info.get("bounds"), **own} if name in attacks else own
        for name, own in checked_options(measures).items()
    }


def _check_plain(active: dict[str, Any]) -> None:
    try:
        json.dumps(active, allow_nan=False)
        checked_options(active)
    except (TypeError, ValueError) as error:
        raise ValueError(
            f"active={active!r}: expected names, or name → options as JSON has them ({error})"
        ) from error


def _number(value: Any) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool)


def _whole(value: Any, least: int) -> bool:
    return isinstance(value, int) and not isinstance(value, bool) and value >= least

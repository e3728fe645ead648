"""What one run is: everything it depends on besides the code, as plain data."""

from __future__ import annotations

import json
from dataclasses import asdict, dataclass, field
from typing import Any, Literal

from actsparse.modify import recipe_named
from actsparse.observe import CURVATURES, MEASURES


@dataclass(frozen=True)
class RunConfig:
    """One run, resolved: saved as it is in the record's header.

    ``recipe`` is what `Recipe.to_json` gives, so that every knob of it is on record.
    ``no_decay`` are the kinds of parameters that weight decay spares (`decay_groups`);
    ``warmup`` is a fraction of ``steps``, of which the rest is a cosine to zero. ``model`` goes to
    the Hugging Face config, ``data`` to the function that makes the splits. ``validate_on`` limits
    the validation rows (None: all); the test split is always read whole. Evaluation and a log line
    come every ``eval_every`` and ``log_every`` steps.

    ``measures`` are read in each pass (`observe`); those of ``active`` (`measure`) at the start,
    every ``active_every`` steps (None: never between) and at the end, on ``active_on`` rows of the
    validation split.

    ``accelerate`` lets MLP blocks run sparse in training (`SparsityCallback`): True where that is
    faster, ``"sparse"`` at any density. Passive measures of training are then of the steps that
    end in a log line, and of the last.

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
    lr: float = 5e-3
    weight_decay: float = 0.5
    no_decay: tuple[str, ...] = ()
    warmup: float = 0.1
    clip: float = 1.0
    log_every: int = 50
    eval_every: int = 100
    validate_on: int | None = None
    measures: tuple[str, ...] = ("density",)
    active: tuple[str, ...] = ()
    active_every: int | None = None
    active_on: int = 128
    model: dict[str, Any] = field(default_factory=dict)
    data: dict[str, Any] = field(default_factory=dict)
    accelerate: bool | Literal["sparse"] = False

    def __post_init__(self) -> None:
        for name in ("steps", "batch_size", "log_every", "eval_every", "active_on", "active_every"):
            value = getattr(self, name)
            if name == "active_every" and value is None:
                continue
            if not isinstance(value, int) or value < 1:
                raise ValueError(f"{name}={value!r}: expected a whole number, 1 or more")
        passive, active = list(MEASURES), [*MEASURES, *CURVATURES]
        for name, known in [("measures", passive), ("active", active)]:
            unknown = [each for each in getattr(self, name) if each not in known]
            if unknown:
                raise ValueError(f"{name} holds {unknown[0]!r}; known: {', '.join(known)}")
        if "density" not in self.measures:
            raise ValueError(f"measures={self.measures!r} lacks 'density', which each record needs")
        if self.accelerate not in (False, True, "sparse"):
            raise ValueError(f"accelerate={self.accelerate!r}: expected True, False or 'sparse'")
        if not isinstance(self.seed, int) or self.seed < 0:
            raise ValueError(f"seed={self.seed!r}: expected a whole number, 0 or more")
        if not self.lr > 0:
            raise ValueError(f"lr={self.lr!r}: expected a number above 0")
        if not self.weight_decay >= 0:
            raise ValueError(f"weight_decay={self.weight_decay!r}: expected 0 or more")
        if not 0 <= self.warmup <= 1:
            raise ValueError(f"warmup={self.warmup!r}: expected a fraction of the steps, 0 to 1")
        if not self.clip > 0:
            raise ValueError(f"clip={self.clip!r}: expected a gradient norm above 0")

    def to_json(self) -> dict[str, Any]:
        """All fields as JSON has them (a tuple is a list)."""
        return json.loads(json.dumps(asdict(self)))

"""What one run of the experiment on gradient noise is, as plain data."""

from __future__ import annotations

from dataclasses import asdict, dataclass, field
from typing import Annotated, Any, ClassVar

from actsparse.values import Above0, AtLeast0, BadValue, Count, Name, Positive, Rule, check_fields


@dataclass(frozen=True)
class GradientNoiseConfig:
    """One run: a net of ``layers`` residual layers of ``width`` p, and how it is trained.

    SGD without momentum at a constant ``lr``, with ``weight_decay`` as L2 on every parameter: a
    step multiplies the weights by ``decay = 1 − lr·weight_decay`` first. Batches are ``batch_size``
    images of a shuffled epoch; what is left of an epoch is dropped.

    ``data`` is ``{"mnist": folder}`` for `mnist_splits`, or ``{"mnist": None}`` for the digits.
    Moments are written after step 1, every ``measure_every`` steps (None: never between) and at
    the end; train and eval lines every ``log_every`` and ``eval_every`` steps.

    Raises `ValueError` for a value that cannot work, naming it.

    >>> config = GradientNoiseConfig(arm="p16", seed=0, width=16, lr=0.1, weight_decay=0.1)
    >>> round(config.decay, 12)
    0.99
    """

    task: ClassVar[str] = "gradient_noise"

    arm: Name
    seed: Count
    # layer norm turns a single feature into 0
    width: Annotated[int, Rule("a whole number, 2 or more", lambda value: value >= 2)]
    layers: Positive = 4
    weight_decay: AtLeast0 = 0.0
    lr: Above0 = 1e-3
    batch_size: Positive = 32
    steps: Positive = 2000
    measure_every: Positive | None = None
    log_every: Positive = 100
    eval_every: Positive = 500
    data: Annotated[
        dict[str, str | None],
        Rule("{'mnist': a folder, or None}", lambda data: set(data) == {"mnist"}),
    ] = field(default_factory=lambda: {"mnist": None})

    def __post_init__(self) -> None:
        check_fields(self)
        if not self.lr * self.weight_decay < 1:
            raise BadValue(
                f"weight_decay={self.weight_decay!r}: expected 0 or more, and below 1/lr = "
                f"{1 / self.lr:g}, where a step would leave nothing of the weights"
            )

    @property
    def decay(self) -> float:
        """``r = 1 − lr·weight_decay``."""
        return 1 - self.lr * self.weight_decay

    def to_json(self) -> dict[str, Any]:
        """All fields, and the task."""
        return {"task": self.task, **asdict(self)}

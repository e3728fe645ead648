"""What is easily forgotten in a training loop; each is said once, as a warning."""

from __future__ import annotations

import warnings
from collections.abc import Iterable

from actsparse.modify.modification import Attached, Modification


class Forgotten:
    """Warnings about the training of one model, whose recipe has this name."""

    def __init__(self, recipe: str) -> None:
        self._recipe = recipe
        self._warned: set[str] = set()  # once is enough
        self.asked = False  # whether penalty() was called since the last step
        self._start = 0  # where the optimizer that is followed began

    def began(self, step: int) -> None:
        """An optimizer is followed from this step on."""
        self._start = step

    def penalty(self, attached: Iterable[Attached], whose: str, stacklevel: int) -> None:
        """``handle.penalty()`` was not asked for, although there is one."""
        if not self.asked and any(each.unclaimed for each in attached):
            self._say(
                f"recipe {self._recipe!r} has a penalty that {whose} loss lacked; "
                "add it before backward: loss = loss + handle.penalty()",
                stacklevel,
            )

    def steps(self, configs: Iterable[Modification], following: bool) -> None:
        """Weights change, but no step of an optimizer is seen."""
        waiting = [type(config).__name__ for config in configs]
        if waiting:
            why = (
                "the optimizer that was attached makes no step; attach the one that does"
                if following
                else "call handle.attach(optimizer, steps=...)"
            )
            self._say(
                f"weights change in training, but no optimizer step is seen, so "
                f"{', '.join(dict.fromkeys(waiting))} stood still: {why}",
                stacklevel=6,
            )

    def attaching(self, configs: Iterable[Modification]) -> None:
        """Schedules are asked for their penalty, and no optimizer is followed."""
        moving = [type(config).__name__ for config in configs if config.ramps()]
        if moving:
            self._say(
                f"schedules stand still ({', '.join(dict.fromkeys(moving))}): "
                f"call handle.attach(optimizer, steps=...)",
                stacklevel=4,
            )

    def more(self, step: int, steps: int | None) -> None:
        """A step is made beyond those that schedules were told of."""
        if steps is not None and self._start < steps == step - 1:
            self._say(
                f"step {step} of {steps}: the optimizer makes more steps than were told, so "
                f"schedules ended too early; attach(steps=) is the number of optimizer steps of "
                f"the whole training, over all epochs",
                stacklevel=6,
            )

    def _say(self, message: str, stacklevel: int) -> None:
        if message not in self._warned:
            self._warned.add(message)
            warnings.warn(message, stacklevel=stacklevel)

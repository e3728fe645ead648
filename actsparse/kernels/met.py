"""What a block knows of the kinds of calls that it has met."""

from __future__ import annotations

import threading
from collections.abc import Hashable
from dataclasses import dataclass, field
from typing import Any, NamedTuple

import torch
from torch import Tensor

from actsparse.blocks.site import Site
from actsparse.blocks.stages import OnNorms
from actsparse.kernels.choose import CEILING, NEAR, Trial, apart

EVERY = 64  # calls between two looks at the density where looking costs something

_counting = threading.Lock()  # what threads count together


@dataclass
class Met:
    """What a block knows of one kind of call, and runs then."""

    training: bool
    dtype: torch.dtype
    tokens: int = 0
    program: str = "dense"
    density: float | None = None  # of the last calls
    decided_at: float | None = None  # the density when ``program`` was chosen
    ceiling: float = CEILING  # the density above which there is nothing to choose
    trial: Trial | None = None
    reason: str | None = None  # why the layers run, where that was not the outcome of a trial
    calls: dict[str, int] = field(default_factory=dict)

    def count(self, active: int, entries: int) -> None:
        """Take the density of a call into account."""
        now = active / max(entries, 1)
        with _counting:
            self.density = now if self.density is None else 0.75 * self.density + 0.25 * now

    def call(self, program: str) -> int:
        """Count a call; how many ran so before it."""
        with _counting:
            before = self.calls.get(program, 0)
            self.calls[program] = before + 1
        return before

    def rests(self, program: str = "dense") -> bool:
        """Whether the layers run this call without a question; it is counted as ``program`` then.

        A look at the density, and the call after it, which may decide anew, ask all of them.
        """
        with _counting:
            before = self.calls.get(program, 0)
            if before % EVERY < 2:
                return False
            self.calls[program] = before + 1
        return True

    @property
    def decided(self) -> bool:
        """Whether the density is about what it was when the program was chosen."""
        density, then = self.density, self.decided_at
        if density is None or then is None:
            return False
        return min(density, then) > self.ceiling or apart(density, then) <= NEAR

    def row(self) -> dict[str, Any]:
        """As :meth:`Accelerated.table` says."""
        ratio = None if self.trial is None else self.trial.ratio(self.program)
        known = {"training": self.training, "tokens": self.tokens, "program": self.program}
        known |= {"reason": self.reason, "density": self.density, "ratio": ratio}
        return {**known, "calls": dict(self.calls)}

    def __str__(self) -> str:
        density = "unknown" if self.density is None else f"{self.density:.3f}"
        what = "training" if self.training else "forward"
        gain = "" if self.trial is None else f", {self.trial.ratio(self.program):.2f} × dense"
        calls = ", ".join(f"{count} {name}" for name, count in self.calls.items())
        if self.reason is not None:
            return f"{what}, T = {self.tokens}: its layers, {self.reason} ({calls})"
        return f"{what}, T = {self.tokens}: {self.program} at density {density}{gain} ({calls})"


@dataclass(slots=True)
class Last:
    """The program of a block's last call, which compiled code keeps to."""

    program: str = "dense"


class Known(NamedTuple):
    """What was found for calls like this one; ``rests``: that their layers run."""

    kind: Hashable
    met: Met
    tokens: int
    rests: bool


class Resting:
    """The plan of a call that the layers run, of which nothing is to be known."""

    runs = False

    def __call__(self, site: Site, x: Tensor, on_norms: OnNorms | None) -> Tensor:
        """Never asked, as nothing runs."""
        raise AssertionError

    def passed(self, d: Tensor) -> None:
        """Nothing to count."""


RESTING = Resting()

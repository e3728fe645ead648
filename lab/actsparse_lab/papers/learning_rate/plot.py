"""The plot of the grid: density, flatness and accuracy against the learning rate."""

from __future__ import annotations

from actsparse_lab.analysis.effects import INFERENCE, QUALITY, Arms
from actsparse_lab.papers.learning_rate.claims import BATCHES, FLATNESS, RATES, arm
from actsparse_lab.papers.lines_plot import Panel, by_tick, lines_plot

PANELS: tuple[Panel, ...] = (
    ("inference density", INFERENCE, False),
    ("augmented flatness AF  (down is flatter)", FLATNESS, True),
    ("accuracy", QUALITY, False),
)


def grid(arms: Arms, dark: bool = False) -> bytes | None:
    """A panel for each number, a line for each batch size; None where no run has a density."""
    if not any(by_tick(arms, batch, _arm, RATES, INFERENCE) for batch in BATCHES):
        return None
    names = {batch: f"batch of {batch}" for batch in BATCHES}
    label = "learning rate (of the quick form)"
    return lines_plot(arms, PANELS, names, _arm, RATES, label, dark)


def _arm(batch: int, rate: float) -> str:
    return arm(rate, batch)


PLOTS = {"grid": grid}

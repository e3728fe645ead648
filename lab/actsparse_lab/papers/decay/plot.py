"""The plot over Σ lr·decay: density, accuracy, and the factors of density."""

from __future__ import annotations

from actsparse_lab.analysis.effects import INFERENCE, LIVING, QUALITY, Arms, at_end
from actsparse_lab.papers.decay.claims import CONTROL, LEVELS, arm
from actsparse_lab.papers.lines_plot import Panel, by_tick, lines_plot

NAMES = {
    "vanilla": "vanilla",
    "paper": "the papers’ recipe",
    CONTROL: "vanilla, no 1-D decay",
    "paper-no-1d-decay": "the recipe, no 1-D decay",
}
PANELS: tuple[Panel, ...] = (
    ("inference density", INFERENCE, True),
    ("density of neurons that are not dead", LIVING, True),
    ("accuracy", QUALITY, False),
    ("input norm ‖x‖²", at_end("measured", "measures", "input_norm"), True),
    ("gradient² of active units", at_end("measured", "measures", "activation_gradient"), True),
    ("augmented flatness AF  (down is flatter)", at_end("measured", "measures", "flatness"), True),
)  # fmt: skip


def over_decay(arms: Arms, dark: bool = False) -> bytes | None:
    """A panel for each number, a line for each arm; None where no run has a density."""
    known = [
        panel for panel in PANELS if any(by_tick(arms, own, arm, LEVELS, panel[1]) for own in NAMES)
    ]
    if not known or known[0][1] is not INFERENCE:
        return None
    label = "Σ learning rate × weight decay over all steps"
    levels = [
        level
        for level in LEVELS
        if any(by_tick(arms, own, arm, [level], INFERENCE) for own in NAMES)
    ]
    return lines_plot(arms, known, NAMES, arm, levels, label, dark)


PLOTS = {"over-decay": over_decay}

"""The plot over Σ lr·decay: density, accuracy, and the factors of density."""

from __future__ import annotations

from actsparse_lab.analysis.effects import INFERENCE, QUALITY, Arms, at_end
from actsparse_lab.papers.decay.claims import CONTROL, LEVELS, PARTS, arm
from actsparse_lab.papers.lines_plot import Panel, by_tick, lines_plot

NAMES = {
    "vanilla": "vanilla",
    "paper": "the papers’ recipe",
    CONTROL: "vanilla, no 1-D decay",
    "paper-no-1d-decay": "the recipe, no 1-D decay",
}
PANELS: tuple[Panel, ...] = (
    ("inference density", INFERENCE, True),
    ("accuracy", QUALITY, False),
    ("input norm ‖x‖²", at_end("measured", "measures", "input_norm"), True),
    ("gradient² of active units", at_end("measured", "measures", "activation_gradient"), True),
    ("augmented flatness AF  (down is flatter)", at_end("measured", "measures", "flatness"), True),
)  # fmt: skip


def over_decay(arms: Arms, dark: bool = False) -> bytes | None:
    """A panel for each number, a line for each arm; None where no run has a density."""
    return _lines(arms, NAMES, PANELS, dark)


def parts(arms: Arms, dark: bool = False) -> bytes | None:
    """Density of vanilla and of each part alone; None where no part was run."""
    if not any(by_tick(arms, part, arm, LEVELS, INFERENCE) for part in PARTS):
        return None
    names = {"vanilla": "vanilla", "bias": "zeroth biases", "floor": "norm floor"}
    return _lines(arms, names | {"jsrelu": "JSReLU"}, PANELS[:1], dark)


def _lines(
    arms: Arms, names: dict[str, str], panels: tuple[Panel, ...], dark: bool
) -> bytes | None:
    known = [
        panel for panel in panels if any(by_tick(arms, own, arm, LEVELS, panel[1]) for own in names)
    ]
    if not known or known[0][1] is not INFERENCE:
        return None
    label = "Σ learning rate × weight decay over all steps"
    levels = [
        level
        for level in LEVELS
        if any(by_tick(arms, own, arm, [level], INFERENCE) for own in names)
    ]
    return lines_plot(arms, known, names, arm, levels, label, dark)


PLOTS = {"over-decay": over_decay, "parts": parts}

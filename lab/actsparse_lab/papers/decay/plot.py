"""The plot over Σ lr·decay: density, accuracy, and the factors of density."""

from __future__ import annotations

from statistics import fmean, geometric_mean

from actsparse_lab.analysis.effects import INFERENCE, QUALITY, Arms, Reader, at_end, within
from actsparse_lab.analysis.plots import draw_seeds, log_axis, palette, render, stacked
from actsparse_lab.papers.decay.claims import CONTROL, LEVELS, PARTS, arm

NAMES = {
    "vanilla": "vanilla",
    "paper": "the papers’ recipe",
    CONTROL: "vanilla, norms and biases do not decay",
}
PANELS: tuple[tuple[str, Reader, bool], ...] = (
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
    if not any(_series(arms, part, INFERENCE) for part in PARTS):
        return None
    names = {"vanilla": "vanilla", "bias": "zeroth biases", "floor": "norm floor"}
    return _lines(arms, names | {"jsrelu": "JSReLU"}, PANELS[:1], dark)


def _lines(
    arms: Arms, names: dict[str, str], panels: tuple[tuple[str, Reader, bool], ...], dark: bool
) -> bytes | None:
    panels = tuple(panel for panel in panels if any(_series(arms, own, panel[1]) for own in names))
    if not panels or panels[0][1] is not INFERENCE:
        return None
    figure, every = stacked(dark, [title for title, *_ in panels], 1.75, 1.3)
    lines = {}
    for axes, (_, read, log) in zip(every, panels, strict=True):
        for (own, name), colour in zip(names.items(), palette(dark), strict=False):
            mean = geometric_mean if log else fmean
            line, _ = draw_seeds(axes, _series(arms, own, read), colour, mean, marker="o")
            if line is not None:
                lines[name] = line
        axes.set_xscale("log")
        if log:
            log_axis(axes, "y", few=True)
        axes.set_xticks(LEVELS, [str(total) for total in LEVELS])
        axes.minorticks_off()
    every[-1].set_xlabel("Σ learning rate × weight decay over all steps")
    return render(figure, lines)


def _series(arms: Arms, name: str, read: Reader) -> list[dict[float, float]]:
    """Of each seed its values by Σ."""
    found: dict[int, dict[float, float]] = {}
    for total in LEVELS:
        for seed, value in within(arms, arm(name, total), read).items():
            if value > 0:
                found.setdefault(seed, {})[total] = value
    return list(found.values())


PLOTS = {"over-decay": over_decay, "parts": parts}

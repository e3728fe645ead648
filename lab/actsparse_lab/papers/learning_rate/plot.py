"""The plot of the grid: density, flatness and accuracy against the learning rate."""

from __future__ import annotations

from statistics import fmean, geometric_mean

from actsparse_lab.analysis.effects import INFERENCE, QUALITY, Arms, Reader, within
from actsparse_lab.analysis.plots import draw_seeds, log_axis, palette, render, stacked
from actsparse_lab.papers.learning_rate.claims import BATCHES, FLATNESS, RATES, arm

PANELS: tuple[tuple[str, Reader, bool], ...] = (
    ("inference density", INFERENCE, False),
    ("augmented flatness AF  (down is flatter)", FLATNESS, True),
    ("accuracy", QUALITY, False),
)


def grid(arms: Arms, dark: bool = False) -> bytes | None:
    """A panel for each number, a line for each batch size; None where no run has a density."""
    if not any(_series(arms, batch, INFERENCE) for batch in BATCHES):
        return None
    figure, every = stacked(dark, [title for title, *_ in PANELS], 1.75, 0.9)
    lines = {}
    for axes, (_, read, log) in zip(every, PANELS, strict=True):
        for batch, colour in zip(BATCHES, palette(dark), strict=False):
            mean = geometric_mean if log else fmean
            line, _ = draw_seeds(axes, _series(arms, batch, read), colour, mean, marker="o")
            if line is not None:
                lines[f"batch of {batch}"] = line
        axes.set_xscale("log")
        if log:
            log_axis(axes, "y", few=True)
        axes.set_xticks(RATES, [f"{rate:g}" for rate in RATES])
        axes.minorticks_off()
    every[-1].set_xlabel("learning rate (of the quick form)")
    return render(figure, lines)


def _series(arms: Arms, batch: int, read: Reader) -> list[dict[float, float]]:
    """Of each seed its values by learning rate."""
    found: dict[int, dict[float, float]] = {}
    for rate in reversed(RATES):
        for seed, value in within(arms, arm(rate, batch), read).items():
            found.setdefault(seed, {})[rate] = value
    return list(found.values())


PLOTS = {"grid": grid}

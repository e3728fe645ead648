"""The plot of weight noise: density, trace and accuracy against its size."""

from __future__ import annotations

from statistics import fmean, geometric_mean

from actsparse_lab.analysis.effects import INFERENCE, QUALITY, Arms, Reader, within
from actsparse_lab.analysis.plots import SERIES_INK, draw_seeds, log_axis, palette, render, stacked
from actsparse_lab.papers.questions import SPARED
from actsparse_lab.papers.weight_noise.claims import GAUSS_NEWTON

RHO = {"vanilla": 0.0, "weight-noise": 0.1, "weight-noise-0.3": 0.3}
ENDINGS = {  # of the arms' names: name, dash, number of the colour
    "": ("decay of all", "-", 0),
    SPARED: ("norms, biases spared", "--", 1),
}


def against_noise(arms: Arms, dark: bool = False) -> bytes | None:
    """Density, trace and accuracy at the end against ρ, with decay of 1-D parameters and without.

    Thin lines are seeds, thick ones their mean (of the trace the geometric one).
    """
    panels: tuple[tuple[str, Reader, bool], ...] = (
        ("inference density", INFERENCE, False),
        ("Gauss–Newton trace  (down is flatter)", GAUSS_NEWTON, True),
        ("accuracy", QUALITY, False),
    )
    shown = [panel for panel in panels if any(_series(arms, end, *panel[1:]) for end in ENDINGS)]
    if not any(read is not QUALITY for _, read, _ in shown):
        return None
    figure, every = stacked(dark, [title for title, *_ in shown], 1.75, 0.9)
    lines = {}
    for axes, (_, read, log) in zip(every, shown, strict=True):
        for ending, (name, dash, color) in ENDINGS.items():
            line, _ = draw_seeds(
                axes,
                _series(arms, ending, read, log),
                palette(dark)[color],
                geometric_mean if log else fmean,
                linestyle=dash,
                marker="o",
            )
            if line is not None:
                lines[name] = line
        if read is QUALITY and (without := within(arms, "no-mlp", QUALITY)):
            level = sum(without.values()) / len(without)
            lines["without MLPs"] = axes.axhline(level, color=SERIES_INK[dark], linestyle=":")
        if log:
            log_axis(axes, "y", few=True)
        elif read is INFERENCE:
            axes.set_ylim(0, 1.08 * axes.get_ylim()[1])
        axes.set_xticks(list(RHO.values()), [f"{rho:g}" for rho in RHO.values()])
    every[-1].set_xlabel("noise ρ, of the weights’ root mean square")
    return render(figure, lines)


def _series(arms: Arms, ending: str, read: Reader, log: bool) -> list[dict[float, float]]:
    """Of each seed its values by ρ."""
    found: dict[int, dict[float, float]] = {}
    for arm, rho in RHO.items():
        for seed, value in within(arms, f"{arm}{ending}", read).items():
            if value > 0 or not log:
                found.setdefault(seed, {})[rho] = value
    return list(found.values())


PLOTS = {"weight-noise": against_noise}

"""Training with weight noise (Peng et al. 2023, arXiv 2309.03004, "v1").

In training each token sees its own draw of up's and down's weights, with Gaussian noise of ρ times
the weights' root mean square. v1 derives sparsity from flatness by such noise: it should lead to
flatter minima, and these to sparser MLPs. How much noise, its quality and its controls are asked by
us.

Flat is a small trace of the Gauss–Newton matrix of the MLPs' weights, shared by all tokens or each
token with a copy of its own. The latter is what augmented flatness (`measures` of the same lines)
estimates from other draws of labels, so that one is not asked twice.

It cannot tell flat from small: weights scaled down before a norm, outputs unchanged, have a larger
trace. Nor do two things that move together show which moves the other.
"""

from __future__ import annotations

from statistics import fmean, geometric_mean

from actsparse_lab.report.claims.arm_questions import SPARED, mlps_matter, quality_kept, sparser
from actsparse_lab.report.effects import (
    INFERENCE,
    QUALITY,
    Arms,
    Reader,
    at_end,
    log_ratio,
    paired,
    within,
)
from actsparse_lab.report.findings import Asked
from actsparse_lab.report.plots import (
    SERIES_INK,
    draw_seeds,
    log_axis,
    palette,
    render,
    stacked,
)
from actsparse_lab.report.prose import experiment

CONTROL = f"vanilla{SPARED}"
RHO = {"vanilla": 0.0, "weight-noise": 0.1, "weight-noise-0.3": 0.3}
GAUSS_NEWTON = at_end("measured", "curvature", "gauss_newton", "value")
TOKEN_COPIES = at_end("measured", "curvature", "token_copies", "value")
ENDINGS = {  # of the arms' names: name, dash, number of the colour
    "": ("decay of all", "-", 0),
    SPARED: ("norms, biases spared", "--", 1),
}


def _flatter(arm: str, other: str, read: Reader = GAUSS_NEWTON, of: str = "") -> Asked:
    effect = (
        f"ln of the Gauss–Newton trace of up’s and down’s weights{of} at the end (validation "
        f"rows), {arm} over {other}"
    )
    return Asked("falls", lambda arms: paired(arms, arm, other, read, log_ratio), effect, "log")


NOISE, MORE = "weight-noise", "weight-noise-0.3"
QUESTIONS = {
    "flatter": _flatter(NOISE, "vanilla"),
    "flatter-copies": _flatter(NOISE, "vanilla", TOKEN_COPIES, ", a copy for each token,"),
    "flatter-spared": _flatter(f"{NOISE}{SPARED}", CONTROL),
    "sparser": sparser(NOISE, "vanilla"),
    "sparser-spared": sparser(f"{NOISE}{SPARED}", CONTROL),
    "against-spared": sparser(NOISE, CONTROL),
    "more-noise": sparser(MORE, NOISE),
    "more-noise-spared": sparser(f"{MORE}{SPARED}", f"{NOISE}{SPARED}"),
    "much-noise": sparser(MORE, "vanilla"),
    "much-noise-spared": sparser(f"{MORE}{SPARED}", CONTROL),
    "quality": quality_kept(NOISE, "vanilla"),
    "mlps-matter": mlps_matter(),
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


EXPERIMENT = experiment("weight-noise", QUESTIONS, {"weight-noise": against_noise})

"""The plots of the width tasks: densities and loss over width, and densities over tokens."""

from __future__ import annotations

from collections.abc import Sequence
from statistics import geometric_mean

from actsparse_lab.analysis.comparison import BEST, HALVES, REFERENCE, SUBJECT, WHOLE
from actsparse_lab.analysis.effects import (
    INFERENCE,
    LIVING,
    LOSS,
    TRAINING,
    number,
    within,
)
from actsparse_lab.analysis.intervals import t_interval
from actsparse_lab.analysis.plots import draw_seeds, log_axis, palette, render, stacked
from actsparse_lab.analysis.prose import pictures
from actsparse_lab.papers.lines_plot import Panel
from actsparse_lab.records import Run
from actsparse_lab.report.width import Width, tokens_of

NAMES = {
    REFERENCE: "vanilla",
    SUBJECT: "the papers’ recipe",
    WHOLE: "vanilla, no 1-D decay",
    BEST: "best",
}
PANELS: tuple[Panel, ...] = (
    ("inference density", INFERENCE, True),
    ("density of neurons that are not dead", LIVING, True),
    ("training density", TRAINING, True),
    ("loss, nats per token", LOSS, False),
)


def over_width(widths: Sequence[Width], dark: bool = False) -> bytes | None:
    """A panel for each number, a line for each arm through its means, with 95 % intervals."""
    if len(widths) < 2:
        return None
    figure, every = stacked(dark, [title for title, *_ in PANELS], 1.75, 1.3)
    lines = {}
    for axes, (_, read, log) in zip(every, PANELS, strict=True):
        for (arm, name), colour in zip(NAMES.items(), palette(dark), strict=False):
            found = [(each.d, t_interval(within(each.arms, arm, read).values())) for each in widths]
            known = [(d, mean) for d, mean in found if mean is not None]
            if not known:
                continue
            means = [mean.mean for _, mean in known]
            halves = [mean.half or 0.0 for _, mean in known]
            below = [min(half, 0.9 * mean) for half, mean in zip(halves, means, strict=True)]
            lines[name] = axes.errorbar(
                [d for d, _ in known], means, yerr=[below, halves], color=colour, marker="o",
                elinewidth=1.4, capsize=3,
            )  # fmt: skip
        axes.set_xscale("log")
        if log:
            log_axis(axes, "y", few=True)
        axes.set_xticks([each.d for each in widths], [str(each.d) for each in widths])
        axes.minorticks_off()
    every[-1].set_xlabel("width D")
    return render(figure, lines)


def over_tokens(widths: Sequence[Width], dark: bool = False) -> bytes | None:
    """A panel for each width: on the way dashed, ends of trainings as marks that a line joins."""
    shown = [width for width in widths if any(map(_on_the_way, width.runs))]
    if not shown:
        return None
    titles = [f"inference density, D = {width.d}" for width in shown]
    figure, every = stacked(dark, titles, 1.75, 1.3)
    halves = {whole: half for half, whole in HALVES.items()}
    lines = {}
    for axes, width in zip(every, shown, strict=True):
        for (arm, name), colour in zip(NAMES.items(), palette(dark), strict=False):
            own = width.arms
            ways = [way for run in own[arm].values() if (way := _on_the_way(run))]
            draw_seeds(axes, ways, colour, geometric_mean, linestyle="--", linewidth=1.4)
            ends = [
                _ends(run, own[halves[arm]].get(seed) if arm in halves else None)
                for seed, run in own[arm].items()
            ]
            line, _ = draw_seeds(axes, ends, colour, geometric_mean, marker="o")
            if line is not None:
                lines[name] = line
        axes.set_xscale("log")
        log_axis(axes, "x", few=True)
        log_axis(axes, "y", few=True)
    every[-1].set_xlabel("tokens")
    return render(figure, lines)


def _on_the_way(run: Run) -> dict[float, float]:
    """Density on validation rows by the tokens read, from an eighth of them on."""
    whole, steps = tokens_of(run), (run.result or {}).get("step")
    if not whole or not steps:
        return {}
    return {
        whole * entry["step"] / steps: density
        for entry in run.evals
        if entry["step"] >= steps / 8 and (density := number(entry, "measures", "density"))
    }


def _ends(*runs: Run | None) -> dict[float, float]:
    found = {tokens: INFERENCE(run) for run in runs if run and (tokens := tokens_of(run))}
    return {tokens: value for tokens, value in sorted(found.items()) if value}


WIDTH_PICTURES = pictures(
    {"over-width": over_width, "over-tokens": over_tokens}, "report/captions.md"
)

"""The runs of the experiment on gradient noise."""

from __future__ import annotations

from actsparse_lab.engine.gradient_noise_config import GradientNoiseConfig
from actsparse_lab.papers.runs import Form, Stages


def runs(form: Form) -> Stages:
    """Second moments of features and gradients, accumulated over training, by width and decay."""
    widths = (16, 32, 64, 128, 256, 512, 1024) if form.full else (16, 64, 256)
    decays = (0.0, 0.03, 0.1, 0.3) if form.full else (0.0, 0.1, 0.3)
    steps = form.steps or (6000 if form.full else 2000)
    return {
        "": [
            GradientNoiseConfig(
                arm=f"p{width}-decay{decay:g}",
                seed=seed,
                width=width,
                weight_decay=decay,
                lr=0.03,  # v1's 0.001, so that lr · decay · steps comes near its 19 to 56
                steps=steps,
                measure_every=max(1, steps // 10),
                data={"mnist": form.data},
            )
            for seed in range(form.seeds)
            for width in widths
            for decay in decays
        ]
    }

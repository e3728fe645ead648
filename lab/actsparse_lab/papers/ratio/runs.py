"""The runs of the ratio experiment."""

from __future__ import annotations

from actsparse_lab.papers.runs import Form, Stages, named, with_controls


def runs(form: Form) -> Stages:
    """Flatness, its coefficient and density over training."""
    return {
        "": form.runs(
            with_controls(named("vanilla", "paper")),
            steps=900,
            log_every=45,
            eval_every=300,
            measures=("density", "flatness"),
            active=("flatness",),
            active_every=90,
        )
    }

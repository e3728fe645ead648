"""The runs of the ratio experiment."""

from __future__ import annotations

from actsparse_lab.papers.runs import Form, Stages, named, with_controls

EPOCH = {False: 19, True: 78}  # steps that see every training image once; True: of the full form


def runs(form: Form) -> Stages:
    """Flatness, its coefficient and density over training; densely in the first epoch."""
    epoch = EPOCH[form.full]
    doubled = (2**power for power in range(epoch.bit_length()))
    return {
        "": form.runs(
            with_controls(named("vanilla", "paper")),
            steps=900,
            log_every=45,
            eval_every=300,
            measures=("density", "flatness"),
            active=("flatness", "flatness_correct"),
            active_every=90,
            active_at=(*doubled, epoch),
        )
    }

"""The runs of the robustness experiment."""

from __future__ import annotations

from actsparse_lab.papers.runs import Form, Stages, named

# such that vanilla keeps neither all of its accuracy nor none (seed 100)
SIZES = {"x": (1.0, 2.0), "d": (2.0,), "weights": (1.0, 2.0)}
TRIALS = {
    "robustness": {
        "against": [
            {"disturbance": "fgsm", "size": 0.3},
            {"disturbance": "pgd", "size": 0.3},
            *(
                {"disturbance": "noise", "at": at, "size": size}
                for at, sizes in SIZES.items()
                for size in sizes
            ),
        ]
    },
    "covering": {"attack": {"disturbance": "fgsm", "size": 0.1}},
    "gradient": {"epsilon": 1e-3},
}


def runs(form: Form) -> Stages:
    """Attacks on inputs, noise on features and weights, at checkpoints of training."""
    names = ("vanilla", "paper", "vanilla-no-1d-decay", "paper-no-1d-decay", "weight-noise")
    return {
        "": form.runs(
            named(*names, "hoyer-no-1d-decay"),
            steps=600,
            log_every=100,
            eval_every=200,
            active=TRIALS,
            active_every=100,
            active_on=300,
        )
    }

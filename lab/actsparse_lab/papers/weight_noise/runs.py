"""The runs of the experiment on weight noise."""

from __future__ import annotations

from actsparse.modify import WeightNoise
from actsparse_lab.papers.runs import Form, Stages, arm_of, named, with_controls


def runs(form: Form) -> Stages:
    """Training with weight noise: flatness and density."""
    strong = {"weight-noise-0.3": arm_of("weight-noise-0.3", WeightNoise(rho=0.3))}
    arms = with_controls(named("vanilla", "weight-noise") | strong)
    measured = ("flatness", "gauss_newton", "token_copies")
    return {"": form.runs(arms, steps=700, log_every=100, eval_every=175, active=measured)}

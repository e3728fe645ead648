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

from actsparse_lab.analysis.effects import Reader, at_end, log_ratio, paired
from actsparse_lab.analysis.findings import Asked
from actsparse_lab.papers.questions import SPARED, mlps_matter, quality_kept, sparser

CONTROL = f"vanilla{SPARED}"
GAUSS_NEWTON = at_end("measured", "curvature", "gauss_newton", "value")
TOKEN_COPIES = at_end("measured", "curvature", "token_copies", "value")


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

"""Certify a budget: what the losses of some documents say of the mean over all of their kind."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from math import exp, log, log1p, sqrt

from torch import Tensor

CLIP = 5  # times the budget; an excess beyond ± this counts as this


@dataclass(frozen=True)
class Certificate:
    """Whether a budget holds for new documents of the same kind.

    Args:
        budget: the mean excess loss allowed, in nats for each token.
        delta: the probability with which the statement may be wrong.
        documents: how many there were.
        mean: their mean excess loss, clipped, in nats for each token.
        p_value: of "the mean over all documents is above the budget".
        clipped: how many documents were clipped, at ± 5 times the budget.

    >>> print(Certificate(0.03, 0.1, 120, 0.02, 0.04, 0))
    certified: mean excess ≤ 0.0300 nats, wrong with probability ≤ 0.1 (120 documents, mean
    0.0200, p = 0.04)
    """

    budget: float
    delta: float
    documents: int
    mean: float
    p_value: float
    clipped: int

    @property
    def holds(self) -> bool:
        """Whether the budget is certified."""
        return self.p_value <= self.delta

    def __str__(self) -> str:
        seen = f"{self.documents} documents, mean {self.mean:.4f}, p = {self.p_value:.2g}"
        if self.clipped:
            seen += f", {self.clipped} clipped at {CLIP * self.budget:.3g} nats"
        if self.holds:
            return (
                f"certified: mean excess ≤ {self.budget:.4f} nats, wrong with probability ≤ "
                f"{self.delta:g} ({seen})"
            )
        return f"cannot be certified: mean excess ≤ {self.budget:.4f} nats ({seen})"


def certify(excess: Tensor, budget: float, delta: float = 0.1) -> Certificate:
    """Test whether the mean excess loss over all documents of this kind is within a budget.

    Losses are clipped at ± 5 times the budget. With X_i in [0, 1] these, m the budget on that
    scale and σ̂² a running estimate, the wealth of bets against "the mean is above m" is

        ``K_n = Π_i (1 + λ_i (m − X_i))``,
        ``λ_i = min(√(2 ln(1/δ) / (n σ̂²_{i−1})), 0.75 / (1 − m))``

    and ``p = min(1, 1 / max_n K_n)`` is valid whatever their distribution is (Waudby-Smith and
    Ramdas 2024, arXiv 2010.09686; used so for risk control by Angelopoulos et al. 2021, Learn then
    Test, arXiv 2110.01052).

    Args:
        excess: the excess loss of each document in nats for each token [documents]; the documents
            are drawn alike and took no part in any choice.
        budget: the mean that is allowed, in nats for each token.
        delta: the probability with which the statement may be wrong.

    Returns:
        The certificate; print it.

    Raises:
        ValueError: an excess is not finite, ``delta`` is not between 0 and 1, or ``budget`` not
            above 0.

    >>> import torch
    >>> certify(torch.full((200,), 0.01), budget=0.03).holds
    True
    >>> certify(torch.full((5,), 0.01), budget=0.03).holds  # too few to know
    False
    """
    if not bool(excess.isfinite().all()):
        raise ValueError("an excess loss is not finite")
    check_delta(delta)
    if not budget > 0:
        raise ValueError(f"budget={budget!r}: expected nats above 0")
    clip = CLIP * budget
    clipped = excess.double().clamp(-clip, clip)
    losses = ((clipped + clip) / (2 * clip)).tolist()
    p_value = _p_value(losses, (budget + clip) / (2 * clip), delta)
    mean = float(clipped.mean()) if len(excess) else 0.0
    count = int((excess.abs() > clip).sum())
    return Certificate(budget, delta, len(excess), mean, p_value, count)


def check_delta(delta: float) -> None:
    """Refuse a probability of being wrong that is not between 0 and 1.

    Raises:
        ValueError: it is not.
    """
    if not 0 < delta < 1:
        raise ValueError(f"delta={delta!r}: expected a probability between 0 and 1")


def _p_value(losses: Sequence[float], m: float, delta: float) -> float:
    wealth = best = 0.0  # logarithms
    total, squares, n = 0.5, 0.25, len(losses)
    for i, x in enumerate(losses, 1):
        spread = squares / i
        bet = min(sqrt(2 * log(1 / delta) / (n * spread)), 0.75 / (1 - m))
        wealth += log1p(bet * (m - x))
        best = max(best, wealth)
        total += x
        squares += (x - total / (i + 1)) ** 2
    return min(1.0, exp(-best))


def largest_certified(
    shares: Sequence[float],
    excess_at: Callable[[float], Tensor],
    budget: float,
    delta: float = 0.1,
) -> tuple[float, Certificate] | None:
    """Find the largest share of activations to drop whose budget is certified.

    Shares are tested in their order, and the search ends at the first that fails (fixed sequence
    testing, Learn then Test), so that all that passed hold together with probability 1 − δ.

    Args:
        shares: candidates, increasing.
        excess_at: the excess loss of each document at a share.
        budget: as for :func:`certify`.
        delta: as for :func:`certify`.

    Returns:
        The share and its certificate; None where not even the first can be certified.

    Raises:
        ValueError: as :func:`certify`.

    >>> import torch
    >>> drop = lambda share: torch.full((300,), share / 10)
    >>> found = largest_certified([0.1, 0.2, 0.3, 0.4], drop, budget=0.05)
    >>> found[0]
    0.4
    """
    found = None
    for share in shares:
        certificate = certify(excess_at(share), budget, delta)
        if not certificate.holds:
            break
        found = share, certificate
    return found

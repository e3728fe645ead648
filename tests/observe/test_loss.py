"""The contract of a loss function; a sample's loss and drawn labels against their definitions."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from actsparse.observe.loss import (
    IGNORE,
    Reduction,
    check_logits,
    check_loss,
    draw_labels,
    position_weights,
    sample_losses,
)

REDUCTIONS: list[Reduction] = ["mean", "sum"]


def by_definition(logits: Tensor, targets: Tensor, reduction: str) -> list[float]:
    losses = []
    for sample, labels in zip(logits.tolist(), targets.tolist(), strict=True):
        rows, each = (sample, labels) if isinstance(labels, list) else ([sample], [labels])
        nats = [
            math.log(math.fsum(math.exp(v) for v in row)) - row[label]
            for row, label in zip(rows, each, strict=True)
            if label != IGNORE
        ]
        losses.append(math.fsum(nats) / (max(len(nats), 1) if reduction == "mean" else 1))
    return losses


def close(actual: Tensor, expected: list[float]) -> bool:
    # exp, log and sums of under 10 terms below 100: some 20 roundings of a number below 100
    return torch.allclose(
        actual, torch.tensor(expected, dtype=torch.float64), rtol=0, atol=20 * 100 * 2**-53
    )


@pytest.mark.parametrize("reduction", REDUCTIONS)
@pytest.mark.parametrize("shape", [(4,), (4, 6)])
def test_sample_losses_by_their_definition(shape: tuple[int, ...], reduction: Reduction) -> None:
    logits, targets = torch.randn(*shape, 5).double(), torch.randint(5, shape)
    targets[0] = IGNORE
    targets.view(-1)[-2] = IGNORE
    losses = sample_losses(logits, targets, reduction)
    assert losses.shape == (4,)
    assert close(losses, by_definition(logits, targets, reduction))
    assert losses[0] == 0


@given(st.integers(1, 4), st.integers(1, 5), st.floats(-50, 50), st.integers(0, 9))
def test_the_sum_is_n_means_and_a_shift_of_logits_changes_nothing(
    b: int, t: int, shift: float, seed: int
) -> None:
    generator = torch.Generator().manual_seed(seed)
    logits = torch.randn(b, t, 3, generator=generator, dtype=torch.float64)
    targets = torch.randint(-1, 3, (b, t), generator=generator)
    targets[targets == -1] = IGNORE
    n = (targets != IGNORE).sum(1)
    mean = sample_losses(logits, targets, "mean")
    assert close(sample_losses(logits, targets, "sum"), (n * mean).tolist())
    assert close(sample_losses(logits + shift, targets, "mean"), mean.tolist())
    weights = position_weights(targets, "mean", torch.float64)
    assert weights.sum() == pytest.approx(int((n > 0).sum()), abs=1e-14)


def test_what_is_not_predicted_does_not_matter_even_if_nan() -> None:
    logits, targets = torch.randn(2, 3, 4).double(), torch.tensor([[1, IGNORE, 2], [3, 0, IGNORE]])
    spoilt = logits.clone()
    spoilt[targets == IGNORE] = math.nan
    spoilt.requires_grad_()
    assert check_loss((spoilt, targets)) == (spoilt, targets)
    losses = sample_losses(spoilt, targets, "mean")
    assert torch.equal(losses, sample_losses(logits, targets, "mean"))
    losses.sum().backward()
    assert spoilt.grad is not None
    assert torch.equal(spoilt.grad[targets == IGNORE], torch.zeros(2, 4).double())


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision_logits_are_summed_in_float32(dtype: torch.dtype) -> None:
    logits, targets = torch.randn(2, 3, 300).to(dtype), torch.randint(300, (2, 3))
    losses = sample_losses(logits, targets)
    assert losses.dtype == torch.float32
    assert torch.equal(losses, sample_losses(logits.float(), targets))


def test_drawn_labels_follow_softmax_independently() -> None:
    n, p = 40_000, torch.tensor([0.5, 0.3, 0.15, 0.05]).double()
    logits = p.log().expand(n, 2, 4)
    targets = torch.zeros(n, 2, dtype=torch.long)
    labels = draw_labels(logits, targets, torch.Generator().manual_seed(1))
    joint = torch.zeros(4, 4).double()
    joint.index_put_((labels[:, 0], labels[:, 1]), torch.ones(n).double(), accumulate=True)
    expected = n * p.outer(p)
    # chi-square with 15 degrees of freedom: mean 15, standard deviation √30; above 43 with
    # probability 1.6e-4
    assert ((joint - expected).square() / expected).sum() < 43


def test_drawn_labels_keep_what_is_ignored_and_the_global_random_state() -> None:
    logits, targets = torch.randn(3, 5, 4), torch.randint(4, (3, 5), dtype=torch.int32)
    targets[:, 3:] = IGNORE
    before = torch.get_rng_state()
    first = draw_labels(logits, targets, torch.Generator().manual_seed(0))
    again = draw_labels(logits, targets, torch.Generator().manual_seed(0))
    assert torch.equal(first, again)
    assert torch.equal(torch.get_rng_state(), before)
    assert first.dtype == targets.dtype
    assert torch.equal(first == IGNORE, targets == IGNORE)
    assert torch.equal(targets[:, :3], targets[:, :3].clamp(0, 3))  # the given ones are not written


def test_drawn_label_gradients_have_mean_zero_and_the_softmax_hessian_as_covariance() -> None:
    logits = torch.tensor([0.3, -0.7, 1.1], dtype=torch.float64, requires_grad=True)
    p = logits.detach().softmax(0)
    mean, second = torch.zeros(3).double(), torch.zeros(3, 3).double()
    for label in range(3):  # the expectation, term by term
        loss = sample_losses(logits[None], torch.tensor([label])).sum()
        (g,) = torch.autograd.grad(loss, logits)
        mean += p[label] * g
        second += p[label] * g.outer(g)
    # sums of three terms below 1 in size, a handful of roundings each
    assert mean.abs().max() < 32 * 2**-53
    assert (second - (p.diag() - p.outer(p))).abs().max() < 32 * 2**-53


def pair(logits: Any = None, targets: Any = None) -> tuple[Tensor, Tensor]:
    return (
        torch.randn(2, 3, 4) if logits is None else logits,
        torch.zeros(2, 3, dtype=torch.long) if targets is None else targets,
    )


def with_value(value: float) -> Tensor:
    return torch.tensor([[[0.0, value, 0.0, 0.0]] * 3] * 2)


@pytest.mark.parametrize(
    ("output", "complaint"),
    [
        (torch.ones(3), r"a loss of shape \[3\]; return a scalar, or the pair"),
        (torch.tensor(1), "type torch.int64; return a scalar"),
        (torch.tensor(math.nan), "the loss nan; it must be finite"),
        (torch.tensor(math.inf), "the loss inf; it must be finite"),
        (0.5, "or the pair .* got float"),
        (pair()[:1], "or the pair .* got tuple"),
        (pair(targets=torch.zeros(2, 2, dtype=torch.long)), r"\[2, 3, 4\] and targets \[2, 2\]"),
        (pair(torch.zeros(2), torch.zeros(2, dtype=torch.long)), r"logits \[2\] and targets \[2\]"),
        (pair(torch.zeros(2, 3, 4, dtype=torch.long)), "logits of type torch.int64"),
        (pair(targets=torch.zeros(2, 3)), "targets of type torch.float32; they must be integers"),
        (pair(targets=torch.ones(2, 3, dtype=torch.bool)), "targets of type torch.bool"),
        (pair(targets=torch.full((2, 3), IGNORE)), "no predicted position: all targets are -100"),
        (pair(targets=torch.full((2, 3), 4)), "the target 4; with 4 logits targets must be 0..3"),
        (pair(targets=torch.full((2, 3), -1)), "the target -1; .* or -100 where nothing"),
        (pair(with_value(math.nan)), "logits that are NaN or infinite at predicted positions"),
        (pair(with_value(math.inf)), "logits that are NaN or infinite at predicted positions"),
    ],
)
def test_what_a_loss_function_may_not_return(output: Any, complaint: str) -> None:
    with pytest.raises(ValueError, match=f"loss_fn on batch 7 .*{complaint}"):
        check_loss(output, "loss_fn on batch 7")


def test_a_class_may_be_ruled_out_by_minus_infinity() -> None:
    logits, targets = pair(with_value(-math.inf))
    check_loss((logits, targets))
    assert torch.allclose(sample_losses(logits, targets), torch.tensor(3.0).log())
    assert (draw_labels(logits, targets) != 1).all()


def test_a_scalar_is_not_enough_where_logits_are_needed() -> None:
    with pytest.raises(ValueError, match="Gauss–Newton needs logits: loss_fn must return the pair"):
        check_logits(torch.tensor(1.0), "Gauss–Newton")
    logits, targets = pair()
    assert check_logits([logits, targets], "Gauss–Newton") == (logits, targets)


def test_an_unknown_reduction_is_named() -> None:
    with pytest.raises(ValueError, match='"mean" or "sum" over positions, got \'avg\''):
        sample_losses(*pair(), "avg")  # type: ignore[arg-type]

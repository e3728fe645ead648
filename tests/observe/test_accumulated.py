"""Accumulated second moments against exact arithmetic, known matrices and random rows."""

from __future__ import annotations

import math
from fractions import Fraction

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor
from torch.nn.functional import layer_norm

from actsparse.observe.spectrum import MarchenkoPastur, spectrum
from actsparse_lab.engine.accumulated import Accumulated
from tests.observe.test_spectrum import at_most

U = 2.0**-53
EPS = torch.finfo(torch.float64).eps
sizes = st.integers(1, 5)
decays = st.floats(0.05, 1)


def random_rows(seed: int, *shape: int) -> Tensor:
    return torch.randn(shape, dtype=torch.float64, generator=torch.Generator().manual_seed(seed))


def accumulated(batches: Tensor, decay: float = 1.0) -> Accumulated:
    """Of batches [k, B, p]."""
    seen = Accumulated(batches.shape[-1], decay)
    for rows in batches:
        seen.add(rows)
    return seen


def with_eigenvalues(values: Tensor) -> Accumulated:
    """A moment with these eigenvalues, in directions that are not the axes."""
    turn, _ = torch.linalg.qr(random_rows(0, len(values), len(values)))
    return accumulated((values.sqrt()[:, None] * turn.T)[None])


# ---- the sum


@given(k=sizes, b=sizes, p=sizes, decay=decays, seed=st.integers(0, 99))
def test_the_recursion_is_the_weighted_sum_within_its_bound(
    k: int, b: int, p: int, decay: float, seed: int
) -> None:
    batches = random_rows(seed, k, b, p)
    seen = accumulated(batches, decay)
    rows = [[[Fraction(x) for x in row] for row in batch] for batch in batches.tolist()]
    exact = [
        [
            sum(
                Fraction(decay) ** (k - 1 - step) * row[i] * row[j]
                for step, batch in enumerate(rows)
                for row in batch
            )
            for j in range(p)
        ]
        for i in range(p)
    ]
    off = [
        float(Fraction(seen.moment[i, j].item()) - exact[i][j]) for i in range(p) for j in range(p)
    ]
    n = b + 2 * k
    trace = float(sum(exact[i][i] for i in range(p)))
    assert math.hypot(*off) <= n * U / (1 - n * U) * trace


def test_whole_numbers_and_a_half_are_summed_exactly() -> None:
    seen = Accumulated(2, decay=0.5)
    seen.add(torch.tensor([[1.0, 2.0], [3.0, 0.0]]))
    seen.add(torch.tensor([[0.0, 4.0]]))
    assert seen.moment.tolist() == [[5.0, 1.0], [1.0, 18.0]]
    assert seen.mean_square() == 23 / (2 * 0.5 + 1)
    assert (seen.batches, seen.rows) == (2, 3)


# ---- anisotropy


@pytest.mark.parametrize("p", [1, 5, 64])
def test_equal_directions_have_no_anisotropy_and_a_single_one_has_the_most(p: int) -> None:
    assert accumulated(3 * torch.eye(p, dtype=torch.float64)[None]).anisotropy() == 0
    single = accumulated(random_rows(1, 1, 1, p)).anisotropy()
    assert single is not None
    # p(p − (tr C)²/‖C‖²) has the relative error of two sums of p and p² positive terms, below
    # 2p² eps, on p; √ of what rounds to 0 at p = 1
    assert single**2 == pytest.approx(p * (p - 1), abs=2 * p**4 * EPS)


@given(p=st.integers(2, 40), spike=st.floats(1.5, 100))
def test_a_spiked_covariance_has_its_closed_form(p: int, spike: float) -> None:
    values = torch.ones(p, dtype=torch.float64)
    values[0] = spike
    found = with_eigenvalues(values).anisotropy()
    assert found is not None
    expected = p * (p - (p - 1 + spike) ** 2 / (p - 1 + spike**2))
    # C is within γ of what it should be by p rounded products and a Q orthogonal to about p eps;
    # relative to (tr C)²/‖C‖² ≤ p that is a few p eps, times p for the square below
    assert found**2 == pytest.approx(expected, abs=20 * p**3 * EPS)


def test_a_moment_of_zeros_has_no_anisotropy_and_no_law() -> None:
    seen = accumulated(torch.zeros(2, 3, 4))
    assert seen.anisotropy() is None
    assert seen.marchenko_pastur() is None


@pytest.mark.parametrize("rank", [12, 5])
@pytest.mark.parametrize("decay", [1.0, 0.8])
def test_gaussian_rows_have_the_random_anisotropy(decay: float, rank: int) -> None:
    p, n = 12, 400
    weights = 4 * sum(decay**age for age in range(10))
    ratios = []
    for seed in range(n):
        seen = Accumulated(p, decay)
        for rows in random_rows(seed, 10, 4, p):
            rows[:, rank:] = 0
            seen.add(rows)
        ratios.append(float(seen.moment.square().sum()) / (rank * weights**2))
    # E ‖C‖² / (q (Σw)²) = 1 + c exactly, and the anisotropy squared is p (p − q/(1 + c))
    expected = rank / (p - seen.random_anisotropy(rank=rank) ** 2 / p)
    error = float(np.std(ratios)) / math.sqrt(n)
    assert abs(np.mean(ratios) - expected) < 5 * error
    assert expected - 1 > 10 * error  # so 5 can tell


# ---- how many samples


@pytest.mark.parametrize("decay", [0.5, 0.9, 0.99, 0.9997])
def test_beyond_the_window_the_weights_add_up_to_tau(decay: float) -> None:
    window = Accumulated(2, decay).window
    assert decay ** (window + 1) / (1 - decay) == pytest.approx(1e-3, rel=1e-9)


def test_the_window_is_at_least_a_batch_and_endless_without_decay() -> None:
    assert Accumulated(2, decay=1e-3).window == 1
    assert Accumulated(2).window == math.inf
    assert Accumulated(2).samples == Accumulated(2).equal_samples == 0


def test_samples_stop_at_the_window() -> None:
    seen = accumulated(torch.zeros(40, 3, 2), 0.5)
    assert seen.samples == pytest.approx(3 * (math.log(0.5e-3) / math.log(0.5) - 1))
    assert accumulated(torch.zeros(4, 3, 2), 0.5).samples == 12
    assert accumulated(torch.zeros(40, 3, 2)).samples == 120


@given(decay=decays, batches=st.lists(st.integers(1, 4), min_size=1, max_size=8))
def test_equal_samples_are_those_of_the_weights(decay: float, batches: list[int]) -> None:
    seen = Accumulated(1, decay)
    for size in batches:
        seen.add(torch.ones(size, 1))
    ages = np.repeat(np.arange(len(batches))[::-1], batches)
    weights = decay**ages
    # some 40 positive terms on either side
    assert seen.equal_samples == pytest.approx(weights.sum() ** 2 / (weights**2).sum(), rel=1e-12)
    if decay == 1:
        assert seen.equal_samples == seen.samples == sum(batches)


# ---- Marchenko and Pastur


def fits(p: int, b: int, k: int, n: int, **how: float | None) -> list[MarchenkoPastur]:
    found = [accumulated(random_rows(seed, k, b, p)).marchenko_pastur(**how) for seed in range(n)]  # type: ignore[arg-type]
    return [law for law in found if law is not None]


@pytest.mark.parametrize(("p", "b", "k"), [(16, 8, 20), (48, 8, 6), (40, 8, 3)])
def test_gaussian_rows_are_accepted_at_the_stated_level(p: int, b: int, k: int) -> None:
    laws = fits(p, b, k, n=300)
    assert sum(not law.accepted for law in laws) <= at_most(MarchenkoPastur.level, 300)
    assert laws[0].size == (min(p, b * k), max(p, b * k))


def test_another_number_of_samples_is_rejected() -> None:
    assert not any(law.accepted for law in fits(16, 8, 20, n=50, samples=4 * 160))


def test_fewer_rows_than_features_give_the_law_of_their_gram_matrix() -> None:
    rows = random_rows(3, 6, 4, 40)
    law = accumulated(rows).marchenko_pastur()
    expected = spectrum(rows.flatten(0, 1)).marchenko_pastur
    assert law is not None
    assert (law.size, law.outliers, law.below) == (expected.size, expected.outliers, expected.below)
    # eigenvalues of C are exact to p eps λ₁, some 1e-13 of the smallest; the law is smooth there
    assert law.ks == pytest.approx(expected.ks, abs=1e-10)
    assert law.variance == pytest.approx(expected.variance, rel=1e-10)


def test_normed_rows_follow_the_law_in_one_dimension_less() -> None:
    rejected = 0
    for seed in range(200):
        seen = accumulated(layer_norm(random_rows(seed, 10, 8, 16), (16,), eps=0))
        assert seen.eigenvalues()[-1] == 0
        whole, less = seen.marchenko_pastur(), seen.marchenko_pastur(rank=15)
        assert whole is not None
        assert less is not None
        assert not whole.accepted  # an eigenvalue beneath the lower edge
        rejected += not less.accepted
    assert rejected <= at_most(MarchenkoPastur.level, 200)


@pytest.mark.slow
def test_with_decay_gaussian_rows_are_rejected_as_the_docstring_says() -> None:
    ks, equal_ks, rejected, equal_rejected = [], [], 0, 0
    for seed in range(60):
        seen = Accumulated(64, decay=0.99)
        generator = torch.Generator().manual_seed(seed)
        for _ in range(2000):
            seen.add(torch.randn(32, 64, dtype=torch.float64, generator=generator))
        law = seen.marchenko_pastur()
        equal = seen.marchenko_pastur(samples=seen.equal_samples)
        assert law is not None
        assert equal is not None
        ks.append(law.ks)
        equal_ks.append(equal.ks)
        rejected += not law.accepted
        equal_rejected += not equal.accepted
    assert (round(seen.samples), round(seen.equal_samples)) == (36625, 6368)
    assert round(float(np.mean(ks)), 2) == 0.53
    assert round(float(np.mean(equal_ks)), 3) == 0.031
    assert (rejected, equal_rejected) == (60, 1)


# ---- bad input


@pytest.mark.parametrize(
    ("p", "decay", "said"),
    [
        (0, 1.0, "p=0: expected"),
        (3, 0.0, "decay=0.0: expected"),
        (3, 1.01, "decay=1.01: expected"),
        (3, math.nan, "decay=nan: expected"),
    ],
)
def test_what_cannot_be_accumulated_is_refused(p: int, decay: float, said: str) -> None:
    with pytest.raises(ValueError, match=said):
        Accumulated(p, decay)


@pytest.mark.parametrize("shape", [(3,), (0, 3), (2, 4), (2, 2, 3)], ids=str)
def test_rows_of_another_shape_are_refused(shape: tuple[int, ...]) -> None:
    with pytest.raises(ValueError, match=r"rows must be \[B, 3\] with B ≥ 1, got shape"):
        Accumulated(3).add(torch.zeros(shape))

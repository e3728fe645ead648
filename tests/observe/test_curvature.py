"""Traces and eigenvalues are those of the explicit matrices, within the errors they state."""

from __future__ import annotations

import json
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor, nn

from actsparse.observe.curvature import (
    Trace,
    gauss_newton_trace,
    hessian_trace,
    top_eigenvalue,
)
from actsparse.observe.curvature_product import Matrix
from actsparse.observe.loss import IGNORE
from tests.observe.test_curvature_product import (
    CASES,
    MATRICES,
    PRODUCTS,
    Mixer,
    classifier,
    columns,
    exact,
    pair,
    sequence,
    tolerance,
)

REPETITIONS = 100


class Quadratic(nn.Module):
    """½ θᵀAθ: its Hessian is A, whatever θ."""

    def __init__(self, a: Tensor) -> None:
        super().__init__()
        self.a, self.theta = a, nn.Parameter(torch.zeros(len(a), dtype=a.dtype))


def value(model: Quadratic, batch: Tensor) -> Tensor:
    return model.theta @ model.a @ model.theta / 2


ONE = [torch.zeros(1)]


def with_spectrum(*eigenvalues: float) -> Tensor:
    q = torch.linalg.qr(torch.randn(len(eigenvalues), len(eigenvalues)).double()).Q
    a = q @ torch.tensor(eigenvalues, dtype=torch.float64).diag() @ q.T
    return (a + a.T) / 2


def unbiased_with_its_standard_error(traces: list[Trace], expected: float) -> bool:
    """Of 100 z-scores at least 97 within 3, and their mean, of standard error 0.1, within 0.3."""
    z = torch.tensor([(trace.value - expected) / trace.standard_error for trace in traces])
    return len(z) == 100 and int((z.abs() <= 3).sum()) >= 97 and float(z.mean().abs()) < 0.3


@pytest.mark.parametrize("case", CASES)
def test_sampled_labels_give_the_gauss_newton_trace(case: str) -> None:
    build, reduction = CASES[case]
    model, batches = build()
    expected = float(exact(model, batches, "gauss_newton", reduction).trace())
    traces = [
        gauss_newton_trace(model, pair, batches, reduction=reduction, probes=400, seed=seed)
        for seed in range(REPETITIONS)
    ]
    assert unbiased_with_its_standard_error(traces, expected)


def test_hutchinson_gives_the_hessian_trace() -> None:
    model, batches = sequence()
    expected = float(exact(model, batches, "hessian", "mean").trace())
    traces = [
        hessian_trace(model, pair, batches, probes=400, seed=seed) for seed in range(REPETITIONS)
    ]
    assert unbiased_with_its_standard_error(traces, expected)


def test_hutch_plus_plus_gives_the_hessian_trace() -> None:
    # more parameters than probes, so that the part outside the sketch is not zero
    model, batches = classifier(d=8, h=12)
    expected = float(exact(model, batches, "hessian", "mean").trace())
    traces = [
        hessian_trace(model, pair, batches, probes=90, method="hutch++", seed=seed)
        for seed in range(REPETITIONS)
    ]
    assert traces[0].standard_error > 0
    assert unbiased_with_its_standard_error(traces, expected)


def test_hutch_plus_plus_is_exact_where_its_sketch_holds_the_range() -> None:
    a = with_spectrum(5, 3, -2, *[0] * 27)
    trace = hessian_trace(Quadratic(a), value, ONE, probes=12, method="hutch++")
    plain = hessian_trace(Quadratic(a), value, ONE, probes=12)
    # 30 × 30 products, and an orthonormal basis of 4 vectors to some 30 roundings
    assert trace.value == pytest.approx(6, abs=tolerance(a, terms=30 * 30 * 30))
    assert trace.standard_error < tolerance(a, terms=30 * 30 * 30)
    assert plain.standard_error > 0.1


@pytest.mark.parametrize("method", ["hutchinson", "hutch++"])
def test_each_parameter_has_its_block_of_the_trace(method: Any) -> None:
    model, batches = classifier(d=8, h=12)
    matrix = exact(model, batches, "hessian", "mean")
    blocks = {"0.weight": matrix[:96, :96], "3.weight": matrix[96:, 96:]}
    runs = [
        hessian_trace(model, pair, batches, probes=30, method=method, seed=seed).by_parameter
        for seed in range(50)
    ]
    for name, block in blocks.items():
        values = torch.tensor([run[name] for run in runs])
        error = values.std() / len(runs) ** 0.5
        assert (
            values.mean() - block.trace()
        ).abs() < 4 * error  # once in 5000, and seeds are fixed


def test_each_parameter_has_its_block_of_the_gauss_newton_trace() -> None:
    model, batches = sequence()
    matrix = exact(model, batches, "gauss_newton", "mean")
    trace = gauss_newton_trace(model, pair, batches, probes=2000)
    for name, block in (("embed.weight", matrix[:15, :15]), ("head.weight", matrix[15:, 15:])):
        alone = gauss_newton_trace(model, pair, batches, probes=2000, parameters=[name])
        # the same draws, so the same number but for the order of the sum
        assert trace.by_parameter[name] == pytest.approx(alone.value, rel=2000 * 2**-52)
        assert abs(alone.value - float(block.trace())) < 4 * alone.standard_error


def test_a_trace_says_what_it_is_of() -> None:
    model, batches = sequence()
    trace = gauss_newton_trace(model, pair, batches * 2, probes=3, reduction="sum")
    assert (trace.samples, trace.positions, trace.reduction) == (6, (3 + 1 + 4) / 3, "sum")
    assert Trace(**json.loads(json.dumps(trace.to_json()))) == trace
    scalar = hessian_trace(Quadratic(torch.eye(3)), value, [torch.zeros(5)], probes=3)
    assert (scalar.samples, scalar.positions, scalar.reduction) == (5, None, None)
    assert (scalar.value, scalar.standard_error, scalar.probes) == (3.0, 0.0, 3)


def test_uneven_batches_are_one_batch() -> None:
    model, [(x, y)] = sequence()
    x, y = x.flip(0), y.flip(0)
    parts = list(zip(x.split([3, 1]), y.split([3, 1]), strict=True))
    one = hessian_trace(model, pair, [(x, y)])
    apart = hessian_trace(model, pair, parts)
    scale = exact(model, parts, "hessian", "mean")
    assert abs(one.value - apart.value) < 27 * tolerance(scale, terms=20 * 3 * 4 * 27)
    expected = float(exact(model, parts, "gauss_newton", "mean").trace())
    traces = [gauss_newton_trace(model, pair, parts, probes=40, seed=s) for s in range(100)]
    assert unbiased_with_its_standard_error(traces, expected)


@given(st.floats(-1e3, 1e3), st.integers(0, 99))
def test_the_hessian_trace_is_linear_in_the_loss(scale: float, seed: int) -> None:
    a = with_spectrum(3, 1, -1, -2, 0.5)
    once = hessian_trace(Quadratic(a), value, ONE, seed=seed)
    scaled = hessian_trace(Quadratic(scale * a), value, ONE, seed=seed)
    # a probe sums 5 × 5 entries; the sum over probes is divided again
    assert abs(scaled.value - scale * once.value) <= tolerance(scale * a, terms=25) + 2**-1000


@given(st.integers(-99, 99), st.sampled_from([-1, 1]), st.integers(0, 99))
def test_hutch_plus_plus_is_linear_in_the_loss(power: int, sign: int, seed: int) -> None:
    a, scale = with_spectrum(3, 1, -1, -2, 0.5), sign * 2.0**power  # nothing rounds differently
    once = hessian_trace(Quadratic(a), value, ONE, method="hutch++", seed=seed)
    scaled = hessian_trace(Quadratic(scale * a), value, ONE, method="hutch++", seed=seed)
    assert scaled.value == scale * once.value


@given(st.integers(1, 4), st.integers(1, 5), st.integers(0, 99))
def test_laws_of_the_gauss_newton_trace(b: int, t: int, seed: int) -> None:
    torch.manual_seed(seed)
    model, batch = Mixer().double(), (torch.randint(5, (b, t)), torch.zeros(b, t).long())
    mean = gauss_newton_trace(model, pair, [batch], probes=2, seed=seed)
    total = gauss_newton_trace(model, pair, [batch], probes=2, seed=seed, reduction="sum")
    # the same draws; each gradient entry sums b·t·4 terms
    assert total.value == pytest.approx(t * mean.value, rel=4 * b * t * 27 * 2**-52, abs=1e-300)
    for trace in (mean, total):
        assert min(trace.by_parameter.values()) >= 0
        assert sum(trace.by_parameter.values()) == pytest.approx(trace.value, rel=4 * 2**-52)


@pytest.mark.parametrize("steps", [1, 2, 3, 5, 27])
@pytest.mark.parametrize("matrix", MATRICES)
def test_an_eigenvalue_lies_within_the_error_bound(matrix: Matrix, steps: int) -> None:
    model, batches = sequence()
    explicit = exact(model, batches, matrix, "mean")
    spectrum = torch.linalg.eigvalsh(explicit)
    top = top_eigenvalue(model, pair, batches, matrix=matrix, iterations=steps, tolerance=1e-14)
    rounding = 27 * tolerance(explicit, terms=20 * 3 * 4)
    assert (spectrum - top.value).abs().min() <= top.error_bound + rounding
    assert top.value <= spectrum[-1] + rounding
    assert top.products <= steps
    if steps == 27:
        assert abs(top.value - spectrum[-1]) <= top.error_bound + rounding
        assert top.error_bound < rounding
    else:
        assert not top.converged


@pytest.mark.parametrize(
    "spectrum",
    [(5, 1, 0, -3), (-1, -2, -9, -4), (2, 2, 2, 2), (0, 0, 0, 0), (1e-3, 0, -7, -7), (3, 3, 1, -3)],
)
def test_the_algebraically_largest_eigenvalue_of_any_spectrum(spectrum: tuple[float, ...]) -> None:
    a = with_spectrum(*spectrum)
    top = top_eigenvalue(Quadratic(a), value, ONE, tolerance=1e-9)
    assert top.converged
    assert abs(top.value - max(spectrum)) <= top.error_bound + tolerance(a, terms=4 * 4 * 4)
    assert top.products <= max(len(set(spectrum)), 1)  # a Krylov space has no more dimensions
    assert (top.matrix, top.samples, top.positions, top.reduction) == ("hessian", 1, None, None)
    assert json.loads(json.dumps(top.to_json()))["value"] == top.value


def test_lanczos_finds_the_edge_of_a_wide_spectrum_in_few_steps() -> None:
    a = torch.cat([torch.linspace(-1, 1, 399), torch.tensor([1.5])]).diag()
    top = top_eigenvalue(Quadratic(a), value, ONE, tolerance=1e-4)
    assert top.converged
    assert top.products < 30
    # in float32 here: 400 terms to a product, of numbers below 1.5
    assert abs(top.value - 1.5) < top.error_bound + 400 * 2**-23 * 1.5


def test_lanczos_keeps_its_vectors_orthogonal() -> None:
    # the eigenvalue −10⁴ converges at once, after which neighbours alone would not stay orthogonal
    # to it, and the two at the top, 10⁻³ apart, would not be told apart in 30 steps
    a = with_spectrum(-1e4, 1, 0.999, *torch.linspace(0, 0.9, 27).tolist())
    top = top_eigenvalue(Quadratic(a), value, ONE, tolerance=1e-15)
    rounding = tolerance(a, terms=30)
    assert top.products == 30
    assert top.error_bound < rounding
    assert abs(top.value - 1) < rounding


def test_padding_and_parameters_left_out_change_what_is_measured() -> None:
    model, [(x, y)] = sequence()
    expected = exact(model, [(x, y)], "hessian", "mean")[15:, 15:]
    top = top_eigenvalue(model, pair, [(x, y)], parameters=["head.weight"], tolerance=1e-12)
    rounding = 12 * tolerance(expected, terms=20 * 3 * 4)
    assert abs(top.value - torch.linalg.eigvalsh(expected)[-1]) <= top.error_bound + rounding
    spoilt = x.clone()
    spoilt[3] = 0  # the sample that predicts nothing
    assert hessian_trace(model, pair, [(spoilt, y)]) == hessian_trace(model, pair, [(x, y)])
    assert (y[3] == IGNORE).all()


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
def test_lower_precision_stays_near(dtype: torch.dtype) -> None:
    model, [(x, y)] = classifier()
    expected = gauss_newton_trace(model, pair, [(x, y)], probes=1000)
    model.to(dtype)
    actual = gauss_newton_trace(model, pair, [(x.to(dtype), y)], probes=1000)
    # weights, inputs, three layers and a backward pass: a dozen roundings, doubled by the square;
    # the draws differ where a probability crosses a threshold, which the standard errors hold
    rounding = 24 * torch.finfo(dtype).eps * expected.value
    sampling = 4 * (expected.standard_error + actual.standard_error)
    assert abs(actual.value - expected.value) < rounding + sampling


def test_bad_numbers_are_named() -> None:
    model, batches = classifier()
    with pytest.raises(ValueError, match="probes must be at least 2 for a standard error, got 1"):
        gauss_newton_trace(model, pair, batches, probes=1)
    with pytest.raises(ValueError, match="probes must be at least 4"):
        hessian_trace(model, pair, batches, probes=3, method="hutch++")
    with pytest.raises(ValueError, match='"hutchinson" or "hutch\\+\\+", got \'xtrace\''):
        hessian_trace(model, pair, batches, method="xtrace")  # type: ignore[arg-type]
    with pytest.raises(ValueError, match='"hessian" or "gauss_newton", got \'fisher\''):
        top_eigenvalue(model, pair, batches, matrix="fisher")  # type: ignore[arg-type]
    with pytest.raises(
        ValueError, match="iterations must be at least 1 and tolerance above 0, got 0"
    ):
        top_eigenvalue(model, pair, batches, iterations=0)
    with pytest.raises(ValueError, match="got 30, 0"):
        top_eigenvalue(model, pair, batches, tolerance=0)
    with pytest.raises(ValueError, match="no parameter of the model is called 'weight'"):
        hessian_trace(model, pair, batches, parameters=["weight"])


@pytest.mark.filterwarnings("ignore::DeprecationWarning")  # of its own, and of what it imports
@pytest.mark.parametrize("matrix", MATRICES)
def test_curvlinops_agrees(matrix: Matrix) -> None:
    try:
        from curvlinops import GGNLinearOperator, HessianLinearOperator
    except Exception as error:  # missing, or one of the many packages it needs is
        pytest.skip(f"curvlinops does not import: {error}")
    model, batches = classifier()
    model.eval()
    operator = HessianLinearOperator if matrix == "hessian" else GGNLinearOperator
    theirs = operator(model, nn.CrossEntropyLoss(), list(model.parameters()), batches)
    vectors = torch.randn(24, 3).double()
    product = PRODUCTS[matrix]
    for v, expected in zip(vectors.T, (theirs @ vectors).T, strict=True):
        parts = {"0.weight": v[:12].view(4, 3), "3.weight": v[12:].view(3, 4)}
        actual = columns(product(model, pair, batches, parts))
        assert (actual - expected).abs().max() < tolerance(expected, terms=6 * 3 * 4 * 24)

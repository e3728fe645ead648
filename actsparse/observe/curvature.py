"""Curvature: the traces and the largest eigenvalue of a loss's second derivative.

Flat means a small curvature of the loss, the mean over all samples of all batches: of its Hessian,
or of its Gauss–Newton matrix G, which has no negative part (both in
:mod:`actsparse.observe.curvature_product`, with how the model is run). Of a linear layer, tr G
with every token's weight a copy of its own is the augmented flatness of
:mod:`actsparse.observe.flatness` under drawn labels; here copies share one weight.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import asdict, dataclass
from typing import Any, Literal

import torch
from torch import Tensor, nn

from actsparse.observe.curvature_product import LossSurface, Matrix, Progress, pull
from actsparse.observe.loss import LossFn, Reduction


@dataclass(frozen=True)
class Trace:
    """A trace, estimated without bias.

    ``standard_error`` is that of ``value`` over random draws, not over data. ``by_parameter``
    splits ``value`` into the traces of the parameters' diagonal blocks. ``samples`` is B, and
    ``positions`` the mean number predicted in one; a scalar loss leaves it and ``reduction`` None.
    """

    value: float
    standard_error: float
    probes: int
    by_parameter: dict[str, float]
    samples: int
    positions: float | None
    reduction: Reduction | None

    def to_json(self) -> dict[str, Any]:
        """As plain values."""
        return asdict(self)


@dataclass(frozen=True)
class Eigenvalue:
    """The algebraically largest eigenvalue, as Lanczos found it.

    Some eigenvalue lies within ``error_bound`` of ``value``, up to the rounding of the products.
    ``products`` counts those with the whole matrix; the rest is as in :class:`Trace`.
    """

    value: float
    error_bound: float
    converged: bool
    products: int
    matrix: Matrix
    samples: int
    positions: float | None
    reduction: Reduction | None

    def to_json(self) -> dict[str, Any]:
        """As plain values."""
        return asdict(self)


def gauss_newton_trace(
    model: nn.Module,
    loss_fn: LossFn,
    batches: Iterable[Any],
    *,
    parameters: Iterable[str] | None = None,
    reduction: Reduction = "mean",
    probes: int = 10,
    seed: int = 0,
    progress: Progress | None = None,
) -> Trace:
    """The trace of the Gauss–Newton matrix, from gradients with labels drawn from the model.

    With labels ŷ drawn from softmax(logits), independently at every predicted position,

        ``tr G = E ‖∇ Σ_b Σ_t √w_bt ℓ_bt(ŷ_bt)‖² / B``

    exactly: the gradient at the logits, p − e_ŷ, has mean zero, so that in the square the cross
    terms of different (b, t) vanish, and covariance diag(p) − ppᵀ. The square makes of √w the
    weight w that G has. So one backward pass over a whole batch is one probe, for a loss that is
    the mean over positions too; batches are independent, and their squares add up. (Martens 2020,
    JMLR 21:146, section 5, for G as the Fisher matrix of drawn labels.)

    Costs a forward pass and ``probes`` backward passes over each batch, and one gradient's memory.
    A probe's standard deviation is about √(2 tr G²), at most √2 tr G, where a batch has many
    positions.

    Args:
        model: any model.
        loss_fn: ``loss_fn(model, batch)`` returns the pair (logits, targets); only where targets
            are −100 matters.
        batches: a list of batches, or a DataLoader.
        parameters: names of the parameters; None: all that require gradients.
        reduction: of a sample's loss over its predicted positions: sets w.
        probes: labels drawn for each position; at least 2.
        seed: of the draws.
        progress: called with (done, total), in probes × batches; small models take many at once.

    Raises:
        ValueError: too few probes, unknown parameters, batches that can be read only once, and
            what :func:`actsparse.observe.loss.check_logits` says of the loss.
        ArithmeticError: a gradient is not finite.

    >>> model = nn.Linear(1, 2, bias=False)
    >>> _ = nn.init.zeros_(model.weight)  # p = (1/2, 1/2), so ‖p − e_ŷ‖² = 1/2 for both labels
    >>> batch = {"x": torch.tensor([[2.0]]), "y": torch.tensor([0])}
    >>> trace = gauss_newton_trace(model, lambda m, b: (m(b["x"]), b["y"]), [batch])
    >>> trace.value, trace.standard_error, trace.by_parameter
    (2.0, 0.0, {'weight': 2.0})
    """
    _check_probes(probes, 2)
    surface = LossSurface(model, loss_fn, batches, parameters, reduction, probes, progress)
    generators: dict[torch.device, torch.Generator] = {}
    squares: list[Tensor] = []

    def visit(output: Any, samples: int) -> None:
        logits, weights = surface.predictions(output)
        p, root = logits.detach().softmax(-1), weights.sqrt()[:, None]
        if p.device not in generators:
            generators[p.device] = torch.Generator(p.device).manual_seed(seed)
        labels = torch.multinomial(p, probes, replacement=True, generator=generators[p.device])
        rows, mean = [], root * p
        for some in labels.T[..., None].split(surface.together):  # [K, N, 1]
            slopes = mean.expand(len(some), -1, -1).scatter_add(2, some, -root.expand_as(some))
            parts = pull([logits], surface.chosen, [slopes])  # of √w (p − e_ŷ)
            rows.append(_dots(parts, parts))
            surface.tick(len(some))
        squares.append(surface.checked(torch.cat(rows)))

    with surface.still():
        surface.sweep("gauss_newton", visit)
        return _trace(surface, sum(squares[1:], squares[0]), probes)


def hessian_trace(
    model: nn.Module,
    loss_fn: LossFn,
    batches: Iterable[Any],
    *,
    parameters: Iterable[str] | None = None,
    reduction: Reduction = "mean",
    probes: int = 10,
    method: Literal["hutchinson", "hutch++"] = "hutchinson",
    seed: int = 0,
    progress: Progress | None = None,
) -> Trace:
    """The trace of the Hessian A, from products with random signs.

    "hutchinson": ``tr A = E vᵀAv`` with v ∈ {±1}^P (Hutchinson 1989; Avron and Toledo 2011 for its
    error). Costs a forward, a backward and ``probes`` second backward passes over each batch, and
    three vectors of the size of the parameters.

    "hutch++": a third of the probes, S, finds an orthonormal Q of the range of AS, a third takes
    the trace there, and the rest, g, estimate what is left (Meyer, Musco, Musco, Woodruff 2021,
    arXiv 2010.09649, Algorithm 1): ``tr A = tr QᵀAQ + E gᵀ(I − QQᵀ)A(I − QQᵀ)g``. Its error falls
    faster where few eigenvalues hold most of the trace; the standard error is that of the second
    term, the only random one given Q. Costs three forward and backward passes over each batch with
    ``probes`` second backward passes, and about ``probes`` vectors of the size of the parameters.

    Args:
        model: any model.
        loss_fn: ``loss_fn(model, batch)`` returns a scalar, the mean over the batch's samples
            (as many as the batch's first tensor is long), or the pair (logits, targets).
        batches: a list of batches, or a DataLoader.
        parameters: names of the parameters; None: all that require gradients.
        reduction: of a sample's loss over its predicted positions; a scalar is taken as it is.
        probes: products with A; at least 2, for "hutch++" 4.
        method: "hutchinson" or "hutch++".
        seed: of the draws.
        progress: called with (done, total), in products × batches.

    Raises:
        ValueError: too few probes, an unknown method or parameter, batches that can be read only
            once, and what :func:`actsparse.observe.loss.check_loss` says of the loss.
        ArithmeticError: a product is not finite.

    >>> model = nn.Linear(2, 1, bias=False)
    >>> x = torch.tensor([[2.0, 0.0], [0.0, 1.0]])
    >>> trace = hessian_trace(model, lambda m, x: m(x).square().mean() / 2, [x])
    >>> trace.value, trace.standard_error  # signs square to 1: no error where A is diagonal
    (2.5, 0.0)
    """
    if method not in ("hutchinson", "hutch++"):
        raise ValueError(f'method must be "hutchinson" or "hutch++", got {method!r}')
    sketch = probes // 3 if method == "hutch++" else 0
    _check_probes(probes, 4 if method == "hutch++" else 2)
    surface = LossSurface(model, loss_fn, batches, parameters, reduction, probes, progress)
    with surface.still():
        generator = torch.Generator(surface.chosen[0].device).manual_seed(seed)

        def signs(count: int) -> Tensor:
            v = surface.zeros().expand(count, -1).clone()
            return v.bernoulli_(0.5, generator=generator).mul_(2).sub_(1)

        if not sketch:
            return _trace(surface, _forms(surface, probes, generator, signs), probes)
        q = torch.linalg.qr(surface.multiply("hessian", signs(sketch)).T).Q.T.contiguous()
        within = _dots(surface.split(q), surface.split(surface.multiply("hessian", q))).sum(0)

        def outside(count: int) -> Tensor:
            g = signs(count)
            return g - (g @ q.T) @ q

        forms = _forms(surface, probes - 2 * sketch, generator, outside)
        return _trace(surface, forms + surface.samples * within, probes)


def top_eigenvalue(
    model: nn.Module,
    loss_fn: LossFn,
    batches: Iterable[Any],
    *,
    parameters: Iterable[str] | None = None,
    reduction: Reduction = "mean",
    matrix: Matrix = "hessian",
    iterations: int = 30,
    tolerance: float = 1e-3,
    seed: int = 0,
    progress: Progress | None = None,
) -> Eigenvalue:
    """The algebraically largest eigenvalue of the Hessian or the Gauss–Newton matrix A.

    Lanczos from a random start with full reorthogonalisation: orthonormal Q and tridiagonal T with
    ``A Q = Q T + β_m q eₘᵀ``, so that for each eigenpair (λ, s) of T an eigenvalue of A lies within
    ``|β_m s_m|`` of λ (Parlett 1998, *The Symmetric Eigenvalue Problem*, section 13.2). Stops when
    that is at most ``tolerance`` times the largest |λ|.

    Costs one product over all batches a step, and keeps as many vectors of the size of the
    parameters as it takes steps. A product with the Hessian is a forward, a backward and a second
    backward pass over each batch; one with G a forward and three backward passes.

    Args:
        model, loss_fn, batches, parameters, reduction: as in :func:`hessian_trace`;
            "gauss_newton" needs the pair (logits, targets).
        matrix: "hessian" or "gauss_newton".
        iterations: the most steps.
        tolerance: relative; > 0.
        seed: of the start.
        progress: called with (done, total), in products × batches.

    Raises:
        ValueError: as :func:`hessian_trace`, or a value above is out of range.
        ArithmeticError: a product is not finite.

    >>> model = nn.Linear(2, 1, bias=False)
    >>> x = torch.tensor([[2.0, 0.0], [0.0, 1.0]])
    >>> top = top_eigenvalue(model, lambda m, x: m(x).square().mean() / 2, [x])
    >>> round(top.value, 4), top.converged, top.products
    (2.0, True, 2)
    """
    if iterations < 1 or not tolerance > 0:
        raise ValueError(
            f"iterations must be at least 1 and tolerance above 0, got {iterations}, {tolerance}"
        )
    if matrix not in ("hessian", "gauss_newton"):
        raise ValueError(f'matrix must be "hessian" or "gauss_newton", got {matrix!r}')
    surface = LossSurface(model, loss_fn, batches, parameters, reduction, iterations, progress)
    with surface.still():
        q = surface.zeros()
        q.normal_(generator=torch.Generator(q.device).manual_seed(seed))
        length = _dot(q, q).sqrt()
        basis: list[Tensor] = []
        diagonal: list[Tensor] = []
        beside: list[Tensor] = []
        for _ in range(min(iterations, len(q))):
            basis.append(q / length)
            q = surface.multiply(matrix, basis[-1][None])[0]
            diagonal.append(_dot(basis[-1], q))
            for v in basis * 2:  # once leaves rounding errors as large as a small q, twice does not
                q -= _dot(v, q) * v
            length = _dot(q, q).sqrt()
            ritz, s = _eigenpairs(diagonal, beside)
            error_bound = float(length * s[-1, -1].abs())
            converged = error_bound <= max(tolerance, torch.finfo(q.dtype).eps) * ritz.abs().max()
            if converged:
                break
            beside.append(length)
    return Eigenvalue(
        value=float(ritz[-1]),
        error_bound=error_bound,
        converged=bool(converged),
        products=len(basis),
        matrix=matrix,
        **_counts(surface),
    )


def _eigenpairs(diagonal: list[Tensor], beside: list[Tensor]) -> tuple[Tensor, Tensor]:
    """Of the symmetric tridiagonal matrix, in ascending order, in float64."""
    t = torch.diag(torch.tensor([float(x) for x in diagonal], dtype=torch.float64))
    if beside:
        off = torch.diag(torch.tensor([float(x) for x in beside], dtype=torch.float64), 1)
        t = t + off + off.T
    return torch.linalg.eigh(t)


def _forms(
    surface: LossSurface, count: int, generator: torch.Generator, draw: Callable[[int], Tensor]
) -> Tensor:
    """``vᵀAv`` of ``count`` draws, times B, split by parameter: [count, parameters]."""
    forms: list[Tensor] = []
    start = generator.get_state()

    def visit(output: Any, samples: int) -> None:
        product, rows = surface.product("hessian", output, samples), []
        generator.set_state(start)  # the same vectors for every batch
        for done in range(0, count, surface.together):
            v = surface.split(draw(min(surface.together, count - done)))
            rows.append(_dots(v, product(v)))
            surface.tick(len(v[0]))
        forms.append(surface.checked(torch.cat(rows)))

    surface.sweep("hessian", visit)
    return sum(forms[1:], forms[0])


def _dot(a: Tensor, b: Tensor) -> Tensor:
    # BLAS's own is off by 1e-3 in float32 after 10⁷ equal terms; torch's sum adds in a tree
    return (a * b).sum(-1, dtype=torch.promote_types(a.dtype, torch.float32))


def _dots(a: list[Tensor], b: list[Tensor]) -> Tensor:
    """The dot products of K vectors, parameter by parameter: [K, parameters]."""
    k = len(a[0])
    dots = [_dot(x.reshape(k, -1), y.reshape(k, -1)) for x, y in zip(a, b, strict=True)]
    return torch.stack([dot.to(a[0].device) for dot in dots], dim=1)


def _trace(surface: LossSurface, rows: Tensor, probes: int) -> Trace:
    """From estimates of B times the trace, split by parameter: [draws, parameters]."""
    rows = rows.cpu().double() / surface.samples
    means = rows.mean(0)
    return Trace(
        value=float(means.sum()),
        standard_error=float(rows.sum(1).std() / len(rows) ** 0.5),
        probes=probes,
        by_parameter=dict(zip(surface.parameters, means.tolist(), strict=True)),
        **_counts(surface),
    )


def _counts(surface: LossSurface) -> dict[str, Any]:
    pair = surface.predicted > 0
    return {
        "samples": surface.samples,
        "positions": surface.predicted / surface.samples if pair else None,
        "reduction": surface.reduction if pair else None,
    }


def _check_probes(probes: int, least: int) -> None:
    if probes < least:
        raise ValueError(f"probes must be at least {least} for a standard error, got {probes}")

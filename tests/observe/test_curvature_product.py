"""Products with the Hessian and Gauss–Newton matrix are those of the explicit matrices, and leave
the model as it was.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterator
from functools import partial
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.func import functional_call, jacrev
from torch.utils.data import DataLoader, TensorDataset

from actsparse.observe.curvature import gauss_newton_trace, hessian_trace, top_eigenvalue
from actsparse.observe.curvature_product import LossSurface, Matrix
from actsparse.observe.loss import IGNORE, Reduction

Batch = tuple[Tensor, Tensor]
MATRICES: list[Matrix] = ["hessian", "gauss_newton"]


def multiplied(
    matrix: Matrix,
    model: nn.Module,
    loss_fn: Any,
    batches: Any,
    vector: dict[str, Tensor],
    reduction: Reduction = "mean",
) -> dict[str, Tensor]:
    """The matrix times ``vector``, by parameter."""
    surface = LossSurface(model, loss_fn, batches, vector, reduction)
    with surface.still():
        flat = surface.flat([vector[name][None] for name in surface.parameters])
        product = surface.split(surface.multiply(matrix, flat))
    return {name: part[0] for name, part in zip(surface.parameters, product, strict=True)}


PRODUCTS = {matrix: partial(multiplied, matrix) for matrix in MATRICES}


def pair(model: nn.Module, batch: Batch) -> Batch:
    return model(batch[0]), batch[1]


class Mixer(nn.Module):
    """Each position's logits depend on all tokens up to it: ids [B, T] → [B, T, C]."""

    def __init__(self, d: int = 3, c: int = 4) -> None:
        super().__init__()
        self.embed = nn.Embedding(5, d)
        self.head = nn.Linear(d, c, bias=False)

    def forward(self, ids: Tensor) -> Tensor:
        out: Tensor = self.head(torch.tanh(self.embed(ids).cumsum(1)))
        return out


def classifier(d: int = 3, h: int = 4) -> tuple[nn.Module, list[Batch]]:
    model = nn.Sequential(
        nn.Linear(d, h, bias=False), nn.Tanh(), nn.Dropout(0.5), nn.Linear(h, 3, bias=False)
    )
    return model.double(), [(torch.randn(6, d).double() * 2, torch.randint(3, (6,)))]


def sequence() -> tuple[nn.Module, list[Batch]]:
    targets = torch.randint(4, (4, 5))
    targets[0, 3:] = targets[1, 1:] = targets[2, 0] = IGNORE
    targets[3] = IGNORE  # a sample that does not count
    return Mixer().double(), [(torch.randint(5, (4, 5)), targets)]


CASES: dict[str, tuple[Callable[[], tuple[nn.Module, list[Batch]]], Reduction]] = {
    "classifier": (classifier, "mean"),
    "sequence, mean": (sequence, "mean"),
    "sequence, sum": (sequence, "sum"),
}


def exact(model: nn.Module, batches: list[Batch], matrix: Matrix, reduction: Reduction) -> Tensor:
    """The matrix [P, P], position by position."""
    model = copy.deepcopy(model).eval()
    names = {name: p.detach() for name, p in model.named_parameters()}
    theta = torch.cat([p.flatten() for p in names.values()])

    def logits(theta: Tensor, x: Tensor) -> Tensor:
        pieces = theta.split([p.numel() for p in names.values()])
        parts = {n: piece.view_as(names[n]) for n, piece in zip(names, pieces, strict=True)}
        out: Tensor = functional_call(model, parts, (x,))
        return out

    total, samples = torch.zeros(len(theta), len(theta)).double(), 0
    for x, targets in batches:
        for b, labels in enumerate(targets.reshape(len(targets), -1)):
            predicted = (labels != IGNORE).nonzero().flatten().tolist()
            samples += bool(predicted)
            for t in predicted:
                w = 1 / len(predicted) if reduction == "mean" else 1.0

                def at(theta: Tensor, x: Tensor = x, b: int = b, t: int = t) -> Tensor:
                    return logits(theta, x)[b].reshape(-1, logits(theta, x).shape[-1])[t]

                def loss(theta: Tensor, at: Any = at, y: int = int(labels[t])) -> Tensor:
                    z = at(theta)
                    return z.logsumexp(0) - z[y]

                if matrix == "hessian":
                    total += w * jacrev(jacrev(loss))(theta)
                else:
                    p, j = at(theta).softmax(0), jacrev(at)(theta)
                    total += w * j.T @ (p.diag() - p.outer(p)) @ j
    return total / samples


def tolerance(of: Tensor, terms: int) -> float:
    """Of an entry that is a sum of ``terms`` float64 products no larger than 8 × the largest."""
    return terms * 2**-52 * 8 * float(of.abs().max())


def basis(model: nn.Module) -> Iterator[dict[str, Tensor]]:
    """Unit vectors, one for each entry of the parameters."""
    for name, p in model.named_parameters():
        for i in range(p.numel()):
            vector = {n: torch.zeros_like(q) for n, q in model.named_parameters()}
            vector[name].view(-1)[i] = 1
            yield vector


def columns(product: dict[str, Tensor]) -> Tensor:
    return torch.cat([part.flatten() for part in product.values()])


@pytest.mark.parametrize("matrix", MATRICES)
@pytest.mark.parametrize("case", CASES)
def test_products_are_those_of_the_explicit_matrix(case: str, matrix: Matrix) -> None:
    build, reduction = CASES[case]
    model, batches = build()
    expected = exact(model, batches, matrix, reduction)
    product = PRODUCTS[matrix]
    actual = torch.stack(
        [columns(product(model, pair, batches, v, reduction=reduction)) for v in basis(model)]
    )
    if matrix == "hessian":
        assert torch.linalg.eigvalsh(expected)[0] < 0  # what the Gauss–Newton matrix leaves out
    # 6 samples or 20 positions, times the few entries of each layer that one passes through
    assert (actual - expected).abs().max() < tolerance(expected, terms=20 * 3 * 4 * 4)


def test_a_vector_chooses_its_parameters() -> None:
    model, batches = classifier()
    whole = exact(model, batches, "hessian", "mean")
    last = {"3.weight": torch.randn(3, 4).double()}
    product = PRODUCTS["hessian"](model, pair, batches, last)
    assert list(product) == ["3.weight"]
    expected = whole[-12:, -12:] @ last["3.weight"].flatten()
    assert (columns(product) - expected).abs().max() < tolerance(expected, terms=6 * 3 * 4 * 12)


@pytest.mark.parametrize("matrix", MATRICES)
def test_uneven_batches_are_one_batch(matrix: Matrix) -> None:
    model, [(x, y)] = sequence()
    v = {name: torch.randn_like(p) for name, p in model.named_parameters()}
    together = columns(PRODUCTS[matrix](model, pair, [(x, y)], v))
    for sizes in ([1, 3], [3, 1], [2, 2]):
        if sizes[-1] == 1:  # a batch alone must predict something
            x, y = x.flip(0), y.flip(0)
        parts = list(zip(x.split(sizes), y.split(sizes), strict=True))
        apart = columns(PRODUCTS[matrix](model, pair, parts, v))
        assert (apart - together).abs().max() < tolerance(together, terms=20 * 3 * 4 * 27)


def test_a_scalar_loss_weighs_its_batch_by_the_samples_in_it() -> None:
    model, [(x, y)] = classifier()
    v = {name: torch.randn_like(p) for name, p in model.named_parameters()}

    def scalar(model: nn.Module, batch: dict[str, Any]) -> Tensor:
        return nn.functional.cross_entropy(model(batch["x"][0]), batch["y"])

    batches = [{"note": "text", "x": [x[:1]], "y": y[:1]}, {"x": [x[1:]], "y": y[1:]}]
    expected = columns(PRODUCTS["hessian"](model, pair, [(x, y)], v))
    actual = columns(PRODUCTS["hessian"](model, scalar, batches, v))
    assert (actual - expected).abs().max() < tolerance(expected, terms=6 * 3 * 4 * 24)


class Unused(nn.Module):
    """A parameter nothing depends on, one that is frozen, and one without dimensions."""

    def __init__(self) -> None:
        super().__init__()
        self.linear, self.unused = nn.Linear(2, 3), nn.Parameter(torch.ones(2))
        self.scale = nn.Parameter(torch.tensor(1.0))
        self.linear.weight.requires_grad_(False)

    def forward(self, x: Tensor) -> Tensor:
        out: Tensor = self.scale * self.linear(x)
        return out


@pytest.mark.parametrize("matrix", MATRICES)
def test_parameters_that_are_unused_or_frozen(matrix: Matrix) -> None:
    model, batch = Unused(), (torch.randn(4, 2), torch.randint(3, (4,)))
    v = {name: torch.ones_like(p) for name, p in model.named_parameters()}
    v["linear.weight"] = torch.randn(3, 2)
    product = PRODUCTS[matrix](model, pair, [batch], v)
    assert torch.equal(product["unused"], torch.zeros(2))
    assert product["linear.weight"].abs().max() > 0
    assert product["scale"].shape == ()
    assert product["scale"] != 0
    assert not model.linear.weight.requires_grad
    trace = hessian_trace(model, pair, [batch])
    assert list(trace.by_parameter) == ["unused", "scale", "linear.bias"]
    assert trace.by_parameter["unused"] == 0

    def linear(model: Unused, x: Tensor) -> Tensor:
        return model.linear(x).mean()

    none = PRODUCTS["hessian"](model, linear, [batch[0]], v)  # type: ignore[arg-type]
    assert all(not part.any() for part in none.values())


class Unbatchable(torch.autograd.Function):
    """The identity, whose backward pass reads a number, as no batch of them can be."""

    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:
        return x.clone()

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> Tensor:
        return grad * (1 + 0 * float(grad.detach().sum()))


@pytest.mark.parametrize("call", ["gauss_newton_trace", "hutchinson", "hutch++"])
def test_vectors_go_together_where_they_can_and_one_by_one_elsewhere(call: str) -> None:
    model, batches = classifier()

    def odd(model: nn.Module, batch: Batch) -> Batch:
        return Unbatchable.apply(model(batch[0])), batch[1]

    together = calls()[call](model, pair, batches)
    apart = calls()[call](model, odd, batches)
    # each probe sums no more than 24 × 24 products of what sums 6 × 3 × 4
    rounding = tolerance(exact(model, batches, "hessian", "mean"), terms=24 * 24 * 6 * 3 * 4)
    assert apart.value == pytest.approx(together.value, abs=rounding)


class Stateful(nn.Module):
    """What tells train from eval mode, and draws in both."""

    def __init__(self) -> None:
        super().__init__()
        self.up, self.norm, self.drop = nn.Linear(3, 8), nn.BatchNorm1d(8), nn.Dropout(0.5)
        self.down = nn.Linear(8, 3)

    def forward(self, x: Tensor) -> Tensor:
        h = self.drop(torch.tanh(self.norm(self.up(x))))
        out: Tensor = self.down(nn.functional.dropout(h, 0.1, training=True))
        return out


def calls() -> dict[str, Callable[..., Any]]:
    def product(call: Any) -> Callable[..., Any]:
        def run(model: nn.Module, loss_fn: Any, batches: Any, progress: Any = None) -> Any:
            v = {"down.weight": torch.ones(3, 8), "up.bias": torch.ones(8)}
            return call(model, loss_fn, batches, v)

        return run

    return {
        "hvp": product(PRODUCTS["hessian"]),
        "gnvp": product(PRODUCTS["gauss_newton"]),
        "gauss_newton_trace": gauss_newton_trace,
        "hutchinson": hessian_trace,
        "hutch++": lambda *a, **k: hessian_trace(*a, method="hutch++", **k),
        "top": lambda *a, **k: top_eigenvalue(*a, iterations=3, **k),
    }


def state(model: nn.Module) -> list[Any]:
    return [
        [module.training for module in model.modules()],
        [p.requires_grad for p in model.parameters()],
        [None if p.grad is None else p.grad.tolist() for p in model.parameters()],
        [(name, value.tolist()) for name, value in model.state_dict().items()],
        torch.get_rng_state().tolist(),
        torch.is_grad_enabled(),
        torch.backends.cuda.flash_sdp_enabled(),
    ]


@pytest.mark.parametrize("call", calls())
def test_the_entry_mode_does_not_matter_and_nothing_is_left_behind(call: str) -> None:
    model = Stateful()
    model.drop.eval()
    model.up.weight.requires_grad_(False)
    model.down.bias.grad = torch.ones(3)
    data = TensorDataset(torch.randn(7, 3), torch.randint(3, (7,)))
    loader = DataLoader(data, batch_size=3, shuffle=True)
    results = []
    for enter in (lambda: None, model.eval, model.train):
        enter()
        before = state(model)
        for grad in (torch.enable_grad, torch.no_grad, torch.inference_mode):
            with grad():
                results.append(calls()[call](model, pair, loader))
        assert state(model) == before
    for other in results[1:]:  # bit for bit: shuffling and drawing are alike in all
        assert str(other) == str(results[0])


@pytest.mark.parametrize("call", ["gauss_newton_trace", "hutchinson", "hutch++", "top"])
def test_progress_counts_to_its_total_and_can_interrupt(call: str) -> None:
    model, seen = Stateful(), []
    batches = [(torch.randn(3, 3), torch.randint(3, (3,))) for _ in range(2)]
    calls()[call](model, pair, batches, progress=lambda *step: seen.append(step))
    done = [done for done, _ in seen]
    assert done == sorted(set(done))
    assert {total for _, total in seen} == {done[-1]}
    assert len(done) > 1

    def stop(done: int, total: int) -> None:
        raise KeyboardInterrupt

    before = state(model)
    with pytest.raises(KeyboardInterrupt):
        calls()[call](model, pair, batches, progress=stop)
    assert state(model) == before


def one(model: nn.Module, batch: Any) -> Tensor:
    return model(batch[0]).square().mean()


MODEL = nn.Sequential(nn.Linear(2, 3))
GOOD = [(torch.zeros(1, 2), torch.tensor([0]))]
TIED = nn.Sequential(MODEL[0], MODEL[0])
W = {"0.weight": torch.zeros(3, 2)}


@pytest.mark.parametrize(
    ("arguments", "complaint"),
    [
        ((MODEL, pair, iter(GOOD), W), r"got list_iterator: list\(batches\) makes a list of it"),
        ((MODEL, pair, (b for b in GOOD), W), "read again for every product; got generator"),
        ((MODEL, pair, [], W), "at least one batch, got an empty list"),
        ((MODEL, pair, GOOD[0][0], W), "a list of at least one batch, got a Tensor"),
        ((MODEL, pair, {"x": 1}, W), "a list of at least one batch, got a dict"),
        ((MODEL, pair, GOOD, {"0.wait": W["0.weight"]}), "of the model is called '0.wait'"),
        ((MODEL, pair, GOOD, {}), "no parameters: none is named"),
        ((TIED, pair, GOOD, W | {"1.weight": W["0.weight"]}), "name a tied tensor once"),
        ((MODEL, lambda m, b: one(m, b).detach(), GOOD, W), "on batch 0 .* no chosen parameter"),
        ((MODEL, one, [("text",)], W), "no tensor whose length tells its number of samples"),
        ((MODEL, lambda m, b: one(m, b) / 0, GOOD, W), "on batch 0 returned the loss (nan|inf)"),
    ],
)
def test_errors_name_what_is_wrong(arguments: tuple[Any, ...], complaint: str) -> None:
    if "length tells" in complaint:
        arguments = (MODEL, lambda m, b: one(m, GOOD[0]), *arguments[2:])
    with pytest.raises(ValueError, match=complaint):
        PRODUCTS["hessian"](*arguments)


def test_gauss_newton_needs_logits() -> None:
    with pytest.raises(ValueError, match="Gauss–Newton needs logits: loss_fn on batch 0 must"):
        PRODUCTS["gauss_newton"](MODEL, one, GOOD, W)
    with pytest.raises(ValueError, match="Gauss–Newton needs logits"):
        gauss_newton_trace(MODEL, one, GOOD)


def test_a_curvature_that_is_not_finite_names_its_batch() -> None:
    def norm(model: nn.Module, x: Tensor) -> Tensor:  # finite with its gradient at 0, but not twice
        return ((model(x) - model(x).detach()).square() + x.sum()).pow(0.75).sum()

    batches = [torch.ones(1, 2), torch.zeros(1, 2)]
    with pytest.raises(ArithmeticError, match="the curvature of batch 1 is NaN or infinite"):
        PRODUCTS["hessian"](MODEL, norm, batches, {"0.bias": torch.ones(3)})
    with pytest.raises(ArithmeticError, match="the curvature of batch 1 is NaN or infinite"):
        hessian_trace(MODEL, norm, batches, parameters=["0.bias"])

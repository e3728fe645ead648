"""FGSM and PGD against closed forms and independent loops; what stands in their way."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor, nn

from actsparse.observe.attack import Attack, perturb
from actsparse.observe.disturbances import robustness
from actsparse.observe.loss import sample_losses
from tests.observe.test_robustness import Batch, net, predict

C = 4
U64, U32 = 2.0**-53, 2.0**-24


def linear(seed: int = 0, classes: int = C, shape: tuple[int, ...] = (7, 6)) -> tuple[Any, Batch]:
    """A softmax model in float64, its weight [C, n], and a batch."""
    torch.manual_seed(seed)
    features = math.prod(shape[1:])
    model = nn.Sequential(nn.Flatten(), nn.Linear(features, classes)).double()
    return model, {"x": torch.rand(shape).double(), "y": torch.randint(classes, shape[:1])}


def closed_gradient(model: Any, x: Tensor, y: Tensor) -> Tensor:
    """Of cross-entropy of softmax(Wx + b): Wᵀ(p − e_y)."""
    z = x.flatten(1) @ model[1].weight.detach().T + model[1].bias.detach()
    odds = (z - z.amax(1, keepdim=True)).exp()
    p = odds / odds.sum(1, keepdim=True)
    p[torch.arange(len(y)), y] -= 1
    return (p @ model[1].weight.detach()).view_as(x)


def rounding(x: Tensor, epsilon: float, steps: int = 1) -> float:
    """Of x + step − x, shrunk and added again, each step: some eight roundings of values ≤ this."""
    return 8 * steps * U64 * (float(x.abs().max()) + 3 * epsilon)


def lengths(x: Tensor) -> Tensor:
    return x.flatten(1).square().sum(1).sqrt()


def test_fgsm_follows_the_gradient_of_a_linear_softmax_model_by_hand() -> None:
    model, batch = linear(shape=(7, 2, 3))
    x, g = batch["x"], closed_gradient(model, batch["x"], batch["y"])
    for norm, direction in (("linf", g.sign()), ("l2", g / lengths(g)[:, None, None])):
        moved = perturb(model, predict, batch, Attack("fgsm", 0.3, norm))["x"]  # type: ignore[arg-type]
        # the direction: sums of 4 and 6 products, of numbers whose size is within 100 of g's
        assert (moved - x - 0.3 * direction).abs().max() < 1e4 * U64


@pytest.mark.parametrize("random_start", [False, True])
def test_pgd_on_a_logistic_model_ends_at_the_corner_of_the_ball(random_start: bool) -> None:
    # two classes: ∇_x = ±(1 − p_y)(w_1 − w_0), one direction everywhere; 10 steps of 2.5ε/10
    # cross the ball from any start
    model, batch = linear(classes=2)
    x, away = batch["x"], torch.where(batch["y"] == 0, 1.0, -1.0)[:, None]
    direction = (away * (model[1].weight[1] - model[1].weight[0]).detach()).sign()
    attack = Attack("pgd", 0.2, random_start=random_start)
    moved = perturb(model, predict, batch, attack)["x"]
    assert (moved - x - 0.2 * direction).abs().max() <= rounding(x, 0.2, 10)


@pytest.mark.parametrize("norm", ["linf", "l2"])
def test_pgd_agrees_with_an_independent_loop(norm: Any) -> None:
    model, batch = linear(3)
    x, y, epsilon, size = batch["x"], batch["y"], 0.5, 0.2
    moved, expected = x, x.clone()
    for _ in range(6):
        for b in range(len(x)):  # sample by sample
            g = closed_gradient(model, expected[b : b + 1], y[b : b + 1])[0]
            step = size * (g.sign() if norm == "linf" else g / g.norm())
            change = expected[b] + step - x[b]
            if norm == "linf":
                change = torch.minimum(
                    torch.maximum(change, -x.new_tensor(epsilon)), x.new_tensor(epsilon)
                )
            elif change.norm() > epsilon:
                change = change / change.norm() * epsilon
            expected[b] = torch.minimum(torch.maximum(x[b] + change, x[b] * 0), x[b] * 0 + 1)
    attack = Attack("pgd", epsilon, norm, steps=6, step_size=size, random_start=False)
    moved = perturb(model, predict, batch, attack, bounds=(0, 1))["x"]
    assert (moved - expected).abs().max() < 6e4 * U64  # as FGSM's, each step
    assert (expected - x).abs().max() > 0.1


@given(
    seed=st.integers(0, 99),
    norm=st.sampled_from(["linf", "l2"]),
    epsilon=st.floats(1e-3, 10),
    steps=st.integers(1, 5),
    step_size=st.floats(1e-3, 20),
    start=st.booleans(),
)
def test_pgd_stays_within_the_ball_and_the_bounds(
    seed: int, norm: Any, epsilon: float, steps: int, step_size: float, start: bool
) -> None:
    model, batch = linear(seed, shape=(4, 3, 2))
    x, low = batch["x"], torch.tensor([[-0.1], [-0.5], [0.0]])
    attack = Attack("pgd", epsilon, norm, steps, step_size, start)
    generator = torch.Generator().manual_seed(seed)
    for bounds in (None, (low, 1.25)):
        moved = perturb(model, predict, batch, attack, bounds=bounds, generator=generator)["x"]
        far = lengths(moved - x) if norm == "l2" else (moved - x).abs().max()
        # each of 6 entries as far off as adding to x rounds
        assert float(far.max()) <= epsilon + 6 * rounding(x, epsilon)
        assert bounds is None or bool(((moved >= low) & (moved <= 1.25)).all())


@pytest.mark.parametrize("norm", ["linf", "l2"])
def test_one_step_of_pgd_of_size_epsilon_is_fgsm(norm: Any) -> None:
    model, batch = linear()
    one = Attack("pgd", 0.3, norm, steps=1, step_size=0.3, random_start=False)
    moved = perturb(model, predict, batch, one)["x"]
    assert torch.equal(moved, perturb(model, predict, batch, Attack("fgsm", 0.3, norm))["x"])
    assert not torch.equal(moved, batch["x"])


@given(seed=st.integers(0, 999), epsilon=st.floats(1e-6, 5), norm=st.sampled_from(["linf", "l2"]))
def test_fgsm_never_lowers_a_convex_loss(seed: int, epsilon: float, norm: Any) -> None:
    model, batch = linear(seed)
    clean, attacked = robustness(model, predict, [batch], [Attack("fgsm", epsilon, norm)])
    # ℓ(x + δ) ≥ ℓ(x) + ∇ℓ·δ, and ∇ℓ·δ > 0; losses round like the logits they are made of
    assert attacked["loss"] >= clean["loss"] - 1e3 * U64 * (1 + epsilon)


def test_a_model_that_is_sure_is_attacked_by_its_true_gradient() -> None:
    # margins of 2997 nats: the gradient of plain cross-entropy is zero in any precision
    model, batch = linear(classes=2)
    model[1].weight.data[1] = model[1].weight.data[0] + torch.tensor([999.0, -999] * 3)
    model[1].bias.data.zero_()
    batch = {"x": torch.tensor([[1.0, 0] * 3, [0, 1.0] * 3]), "y": torch.tensor([1, 0])}
    model, x = model.float(), batch["x"]
    plain = x.clone().requires_grad_()
    nn.functional.cross_entropy(model(plain), batch["y"]).backward()
    assert plain.grad is not None
    assert not plain.grad.any()
    direction = torch.tensor([[-1.0, 1] * 3, [1, -1.0] * 3])
    for attack, step in ((Attack("fgsm", 0.25), 0.25), (Attack("fgsm", 0.6, "l2"), 0.6 / 6**0.5)):
        moved = perturb(model, predict, batch, attack)["x"]
        assert (moved - x - step * direction).abs().max() < 16 * U32


def test_random_starts_are_uniform_in_the_ball() -> None:
    like, generator = torch.zeros(4000, 3, 2), torch.Generator().manual_seed(1)
    volumes = [(lengths(Attack("pgd", 0.5, "l2").start(like, generator)) / 0.5) ** 6]
    volumes.append((Attack("pgd", 0.5).start(like, generator) + 0.5).flatten())
    for uniform in volumes:  # of mean 1/2, second moment 1/3: variances 1/12 and 4/45
        assert 0 <= float(uniform.min()) < float(uniform.max()) <= 1 + 100 * U32
        for power, variance in ((1, 1 / 12), (2, 4 / 45)):
            error = float((uniform**power).mean()) - 1 / (power + 1)
            assert abs(error) < 6 * (variance / len(uniform)) ** 0.5


def test_positions_of_a_sample_pull_alike_and_unpredicted_ones_not_at_all() -> None:
    model, [first, second] = net()
    batch = {key: torch.cat([first[key], second[key]]) for key in first}
    x = batch["x"].clone().requires_grad_()
    losses = sample_losses(*predict(model.eval(), {**batch, "x": x}))
    (g,) = torch.autograd.grad(losses.sum(), x)
    moved = perturb(model, predict, batch, Attack("fgsm", 0.3, "l2"))["x"]
    norms = lengths(g)[:, None, None]
    assert (norms[:4] > 1e-6).all()
    # sums of some 100 products, through two blocks and back, of numbers within 1e6 of g's length
    assert (moved - batch["x"] - 0.3 * g / norms.clamp(min=1e-9)).abs().max() < 1e9 * U64
    assert torch.equal(moved[4], batch["x"][4])  # nothing is predicted of it


ids = {"ids": torch.zeros(2, 3).long(), "y": torch.zeros(2).long()}
good = {"x": torch.zeros(2, 3), "y": torch.zeros(2).long()}


@pytest.mark.parametrize(
    ("batch", "options", "message"),
    [
        (ids, {}, "token ids"),
        (good | {"mask": torch.ones(2)}, {}, r"key=: \['x', 'mask'\]"),
        (good, {"key": "y"}, "float tensor 'y'"),
        (torch.zeros(2, 3), {}, "got Tensor"),
        (good, {"bounds": (0.5, 1.0)}, "from 0 to 0"),
        (good | {"y": torch.tensor([0, 9])}, {}, "target 9"),
    ],
    ids=["ids", "two", "key", "tensor", "bounds", "targets"],
)
def test_bad_batches_are_refused(batch: Any, options: Any, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        perturb(nn.Linear(3, 2), predict, batch, Attack("fgsm", 0.1), **options)


def test_inputs_without_a_gradient_are_refused() -> None:
    model = nn.Linear(3, 2)
    for how in (
        lambda model, batch: (model(batch["x"].detach()), batch["y"]),
        torch.no_grad()(predict),
    ):
        with pytest.raises(ValueError, match="do not depend on input 'x'"):
            perturb(model, how, good, Attack("fgsm", 0.1))
    with pytest.raises(ArithmeticError, match="NaN or infinite"):
        perturb(model, lambda m, b: (m(b["x"].sqrt()), b["y"]), good, Attack("fgsm", 0.1))


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: Attack("cw", 0.1), "method='cw'"),  # type: ignore[arg-type]
        (lambda: Attack("pgd", 0.1, "l1"), "norm='l1'"),  # type: ignore[arg-type]
        (lambda: Attack("pgd", 0.0), "epsilon=0.0"),
        (lambda: Attack("pgd", 0.1, step_size=math.nan), "step_size=nan"),
        (lambda: Attack("pgd", 0.1, steps=0), "steps=0"),
        (lambda: Attack("fgsm", 0.1, steps=3), "one step"),
    ],
    ids=range(6),
)
def test_bad_settings_are_refused(call: Any, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        call()

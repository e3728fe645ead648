"""Penalties: their formulas token by token, and what of a model's passes they count."""

from __future__ import annotations

import math
import warnings
from collections.abc import Callable
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor, nn

from actsparse import ActivationPenalty, sparsify
from actsparse.blocks.stages import NORMS, token_norm
from actsparse.modify.penalty import PENALTIES
from tests.zoo import BY_ID, call

D, H = 8, 12
EPS64 = torch.finfo(torch.float64).eps


def hoyer_by_hand(a: list[float]) -> float:
    one, two = sum(abs(v) for v in a), sum(v * v for v in a)
    return one * one / (len(a) * two) if two else 0.0


def l1_by_hand(a: list[float]) -> float:
    return sum(abs(v) for v in a) / len(a)


BY_HAND: dict[str, Callable[[list[float]], float]] = {
    "hoyer": hoyer_by_hand,
    "l1": l1_by_hand,
}
KINDS = list(BY_HAND)


def formula(kind: str, a: Tensor) -> Tensor:
    """As a site and the penalty together compute it: [..., H] → [...]."""
    value, norms = PENALTIES[kind]
    return value(a.shape[-1], *(token_norm(a, NORMS[norm])[..., 0] for norm in norms))


def mean_by_hand(kind: str, a: Tensor, keep: Tensor | None = None) -> float:
    """Over the unpadded tokens of [..., H], one by one."""
    rows = a.detach().double().reshape(-1, a.shape[-1])
    rows = rows if keep is None else rows[keep.reshape(-1) != 0]
    return sum(BY_HAND[kind](row.tolist()) for row in rows) / len(rows)


# --- the formulas ------------------------------------------------------------------------------


@given(
    st.lists(st.floats(-1e3, 1e3).filter(lambda v: v == 0 or abs(v) > 1e-3), min_size=1).map(
        lambda row: row[:40]
    )
)
def test_each_is_the_formula_of_a_token_and_hoyer_lies_between_one_over_h_and_one(
    row: list[float],
) -> None:
    a = torch.tensor(row, dtype=torch.float64)
    tolerance = 4 * len(row) * EPS64  # two sums of H terms, a root, a quotient and a square
    for kind in KINDS:
        assert formula(kind, a).item() == pytest.approx(BY_HAND[kind](row), rel=tolerance)
    value = formula("hoyer", a).item()
    if any(row):
        assert 1 / len(row) - tolerance <= value <= 1 + tolerance
        # blind to the scale; a power of two scales without rounding
        assert formula("hoyer", 4 * a).item() == pytest.approx(value, rel=tolerance)
    else:
        assert value == 0


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_half_precision_neither_overflows_nor_rounds_the_sums(
    kind: str, dtype: torch.dtype
) -> None:
    """‖a‖₁² of 4096 activations of size 10 is 10⁹, float16 ends at 65504."""
    a = (10 * torch.randn(3, 4096)).to(dtype).relu()
    a.requires_grad_()
    value = formula(kind, a)
    # sums in float32, not in a's type
    tolerance = 4096 * torch.finfo(torch.float32).eps
    torch.testing.assert_close(
        value.double(), formula(kind, a.detach().double()), rtol=tolerance, atol=0
    )
    value.sum().backward()
    exact = a.detach().double().requires_grad_()
    formula(kind, exact).sum().backward()
    # a difference of two terms of the largest size, each rounded; float16 ends at 2⁻²⁴
    largest = exact.grad.abs().max().item()
    tolerance = max(2**-24, 4 * torch.finfo(dtype).eps * largest)
    torch.testing.assert_close(a.grad.double(), exact.grad, rtol=0, atol=tolerance)


@pytest.mark.parametrize("kind", KINDS)
def test_gradient_is_the_derivative_of_the_formula_and_zero_for_a_silent_token(kind: str) -> None:
    a = torch.randn(4, 6, dtype=torch.float64).relu()
    a[1] = 0
    a.requires_grad_()
    formula(kind, a).sum().backward()
    assert torch.equal(a.grad[1], torch.zeros(6, dtype=torch.float64))
    for t in (0, 2, 3):
        row = a[t].detach().tolist()
        one, two = sum(row), sum(v * v for v in row)
        for h, v in enumerate(row):
            sign = math.copysign(1, v) if v else 0.0
            expected = {
                "l1": sign / 6,
                "hoyer": (2 * one * sign / two - 2 * v * one**2 / two**2) / 6,
            }[kind]
            assert a.grad[t, h].item() == pytest.approx(expected, rel=64 * EPS64, abs=64 * EPS64)


# --- in a model --------------------------------------------------------------------------------


def block(act: nn.Module | None = None) -> nn.Sequential:
    return nn.Sequential(
        nn.LayerNorm(D), nn.Linear(D, H), act or nn.ReLU(), nn.Linear(H, D)
    ).double()


def stream(tokens: int = 5) -> Tensor:
    return torch.randn(2, tokens, D, dtype=torch.float64)


def spy(module: nn.Module) -> list[Tensor]:
    """The module's outputs, in order, with their graphs."""
    seen: list[Tensor] = []
    module.register_forward_hook(lambda *hook: seen.append(hook[-1]))
    return seen


def gradients(model: nn.Module, loss: Tensor) -> dict[str, Tensor]:
    parameters = dict(model.named_parameters())
    grads = torch.autograd.grad(
        loss, list(parameters.values()), retain_graph=True, allow_unused=True
    )
    return {name: g for name, g in zip(parameters, grads, strict=True) if g is not None}


def check_equal(a: dict[str, Tensor], b: dict[str, Tensor], tolerance: float) -> None:
    assert a.keys() == b.keys()
    assert a
    for name in a:
        scale = b[name].abs().max().item()
        torch.testing.assert_close(a[name], b[name], rtol=0, atol=tolerance * max(scale, 1e-3))


EXPLICIT: dict[str, Callable[[Tensor], Tensor]] = {
    "hoyer": lambda a: (a.abs().sum(-1) ** 2 / (a.shape[-1] * (a**2).sum(-1))).mean(),
    "l1": lambda a: a.abs().mean(),
}


@pytest.mark.parametrize("kind", KINDS)
def test_penalty_and_its_gradient_are_those_of_the_explicit_formula(kind: str) -> None:
    model, x = block(nn.GELU()), stream()
    handle = sparsify(model, ActivationPenalty(kind, weight=0.3), inputs=x)
    seen = spy(model[2])
    model(x)
    penalty, explicit = handle.penalty(), 0.3 * EXPLICIT[kind](seen[0])
    tolerance = 8 * H * EPS64  # sums over H units
    torch.testing.assert_close(penalty, explicit, rtol=tolerance, atol=0)
    assert penalty.item() == pytest.approx(0.3 * mean_by_hand(kind, seen[0]), rel=tolerance)
    check_equal(gradients(model, penalty), gradients(model, explicit), 10 * tolerance)


@pytest.mark.parametrize("kind", KINDS)
def test_silent_tokens_give_no_nan_in_the_gradient(kind: str) -> None:
    model, x = block(), stream()
    model[1].bias.data.fill_(-10)
    x[0, 0] = 0  # a token that LayerNorm maps to 0
    model[1].weight.data[0] = 0
    model[1].bias.data[0] = 1
    x[1] = 0
    handle = sparsify(model, ActivationPenalty(kind), inputs=x)
    seen = spy(model[2])
    model[1].bias.data[0] = -1  # now every token is silent
    model(x)
    assert bool((seen[0] == 0).all())
    penalty = handle.penalty()
    penalty.backward()
    assert penalty.item() == 0
    assert all(bool((p.grad == 0).all()) for p in model[:3].parameters())


class Masked(nn.Module):
    """A stack that knows its padding; padded positions hold something else entirely."""

    def __init__(self) -> None:
        super().__init__()
        self.embed = nn.Embedding(20, D)
        self.norm, self.up, self.act = nn.LayerNorm(D), nn.Linear(D, H), nn.ReLU()
        self.down = nn.Linear(H, D)

    def forward(self, input_ids: Tensor, attention_mask: Tensor) -> Tensor:
        x = self.embed(input_ids) + 100 * (attention_mask[..., None] == 0)
        x = x * torch.linspace(1, 2, D, dtype=x.dtype)
        return x + self.down(self.act(self.up(self.norm(x))))


@pytest.mark.parametrize("kind", KINDS)
def test_padding_stays_out_of_the_value_and_of_the_gradient(kind: str) -> None:
    model = Masked().double()
    ids = torch.randint(20, (3, 6))
    mask = torch.tensor([[1] * 6, [0, 0, 1, 1, 1, 1], [1, 0, 0, 0, 0, 0]])
    whole = {"input_ids": ids, "attention_mask": torch.ones_like(mask)}
    handle = sparsify(model, ActivationPenalty(kind, weight=0.5), inputs=whole)
    seen = spy(model.act)
    model(ids, mask)
    penalty = handle.penalty()
    kept = seen[0][mask != 0]
    assert kept.shape == (11, H)
    tolerance = 8 * H * EPS64
    expected = 0.5 * mean_by_hand(kind, seen[0], mask)
    assert penalty.item() == pytest.approx(expected, rel=tolerance)
    got = gradients(model, penalty)
    clean = model.embed(ids[mask != 0]) * torch.linspace(1, 2, D, dtype=torch.float64)
    clean = model.up(model.norm(clean)).relu()
    check_equal(got, gradients(model, 0.5 * EXPLICIT[kind](clean)), 10 * tolerance)


def test_padding_of_a_causal_model_is_read_from_its_attention_mask() -> None:
    model, inputs = BY_ID["gpt2"].build()
    mask = torch.ones_like(inputs["input_ids"])
    mask[0, :4] = 0
    mask[2, :1] = 0
    handle = sparsify(model, ActivationPenalty("hoyer", weight=1.0), inputs=inputs)
    seen = [spy(layer.mlp.act) for layer in model.transformer.h]
    model.train()
    model(**inputs, attention_mask=mask)
    expected = sum(mean_by_hand("hoyer", a, mask) for (a,) in seen) / 2
    # float32 sums over H = 40 units
    assert handle.penalty().item() == pytest.approx(expected, rel=40 * torch.finfo().eps)


def test_gated_blocks_are_penalised_at_the_product_before_dropout() -> None:
    model, inputs = BY_ID["t5-gated-gelu"].build()
    handle = sparsify(model, ActivationPenalty("hoyer", weight=1.0), inputs=inputs)
    model.train()
    parts = []
    for each in handle.blocks:
        assert [part.kind for part in each.between] == ["dropout"]
        each.between[0].module.p = 0.5
        parts.append((spy(each.activation.module), spy(each.up.module)))
    call(model, inputs)
    expected = [mean_by_hand("hoyer", gate[-1] * up[-1]) for gate, up in parts]
    mean = sum(expected) / len(expected)
    assert handle.penalty().item() == pytest.approx(mean, rel=64 * torch.finfo().eps)


def test_a_block_that_runs_several_times_counts_every_pass() -> None:
    model, inputs = BY_ID["albert-one-layer-used-four-times"].build()
    handle = sparsify(model, ActivationPenalty("l1", weight=1.0), inputs=inputs)
    (only,) = handle.blocks
    seen = spy(only.activation.module)
    model.train()
    for _ in range(2):
        seen.clear()
        call(model, inputs)
        assert len(seen) == only.calls == 4
        expected = sum(mean_by_hand("l1", a) for a in seen) / len(seen)
        # float32 sums over H = 40 units
        assert handle.penalty().item() == pytest.approx(expected, rel=40 * torch.finfo().eps)


def test_every_accumulated_batch_gives_its_own_penalty() -> None:
    model, x = block(), stream(8)
    handle = sparsify(model, ActivationPenalty("hoyer", weight=0.5), inputs=x)
    for half in x.chunk(2, dim=1):
        (model(half).square().mean() / 2 + handle.penalty() / 2).backward()
    accumulated = {name: p.grad.clone() for name, p in model.named_parameters()}
    whole = gradients(model, model(x).square().mean() + handle.penalty())
    check_equal(accumulated, whole, 64 * H * EPS64)  # sums over 16 tokens and H units, reordered


def test_it_is_zero_in_eval_mode_even_after_a_training_pass_nobody_asked_about() -> None:
    model, x = block(), stream()
    handle = sparsify(model, ActivationPenalty(), inputs=x)
    model.eval()
    model(x)
    assert handle.penalty().item() == 0
    model.train()
    model(x)
    model.eval()
    model(x)
    assert handle.penalty().item() == 0
    model.train()
    model(x)
    assert handle.penalty().item() > 0


def test_each_call_takes_the_values_so_the_second_after_one_pass_is_zero() -> None:
    model, x = block(), stream()
    handle = sparsify(model, ActivationPenalty(), inputs=x)
    model(x)
    first = handle.penalty()
    assert first.item() > 0
    assert handle.penalty().item() == 0
    model(x)
    assert torch.equal(handle.penalty(), first)


def test_two_penalties_add_up() -> None:
    model, x = block(), stream()
    both = (ActivationPenalty("hoyer", weight=0.5), ActivationPenalty("l1", weight=0.1))
    handle = sparsify(model, both, inputs=x)
    seen = spy(model[2])
    model(x)
    expected = 0.5 * mean_by_hand("hoyer", seen[0]) + 0.1 * mean_by_hand("l1", seen[0])
    assert handle.penalty().item() == pytest.approx(expected, rel=8 * H * EPS64)


def test_frozen_layers_below_are_penalised_as_constants() -> None:
    """Only a forward without gradients is an error, not a block with nothing to train."""
    model, x = block(), stream()
    model[:3].requires_grad_(False)
    handle = sparsify(model, ActivationPenalty("l1", weight=1.0), inputs=x)
    loss = model(x).square().mean()
    seen = spy(model[2])
    model(x)
    penalty = handle.penalty()
    assert not penalty.requires_grad
    assert penalty.item() == pytest.approx(mean_by_hand("l1", seen[0]), rel=8 * H * EPS64)
    (loss + penalty).backward()


def test_a_forward_without_gradients_gives_a_clear_error_in_training() -> None:
    model, x = block(), stream()
    handle = sparsify(model, ActivationPenalty(), inputs=x)
    with torch.no_grad():
        model(x)
        assert handle.penalty().item() > 0
        model(x)
    with pytest.raises(RuntimeError, match="no gradient"):
        handle.penalty()


# --- gradient checkpointing --------------------------------------------------------------------


def checkpointed(reentrant: bool | None) -> tuple[nn.Module, dict[str, Tensor], Any]:
    model, inputs = BY_ID["gpt2"].build()  # with dropout
    model.train()
    if reentrant is not None:
        kwargs = {"use_reentrant": reentrant}
        with warnings.catch_warnings():  # transformers 5.23 has a new name for it, 5.17 has not
            warnings.filterwarnings("ignore", message="`gradient_checkpointing_enable`")
            model.gradient_checkpointing_enable(gradient_checkpointing_kwargs=kwargs)
    handle = sparsify(model, ActivationPenalty("hoyer", weight=0.5), inputs=inputs)
    model.config.use_cache = False
    return model, dict(inputs, labels=inputs["input_ids"]), handle


def test_checkpointing_counts_once_and_gives_the_same_gradient() -> None:
    seen = []
    for reentrant in (None, False):
        model, inputs, handle = checkpointed(reentrant)
        for _ in range(2):
            torch.manual_seed(3)
            model.zero_grad()
            loss, penalty = model(**inputs).loss, handle.penalty()
            (loss + penalty).backward()
            assert handle.penalty().item() == 0, "the second forward, in backward, was counted"
        seen.append((penalty, {n: p.grad for n, p in model.named_parameters()}))
    (plain, expected), (penalty, got) = seen
    assert torch.equal(penalty, plain)
    check_equal(got, expected, 4 * torch.finfo().eps)  # the same operations on the same numbers


def test_reentrant_checkpointing_has_no_gradient_and_says_so() -> None:
    model, inputs, handle = checkpointed(True)
    model(**inputs)
    with pytest.raises(RuntimeError, match="use_reentrant=False"):
        handle.penalty()


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"kind": "l2"}, "unknown penalty 'l2'; known: hoyer, l1"),
        ({"weight": -1.0}, "weight=-1.0"),
        ({"weight": float("nan")}, "weight=nan"),
        ({"ramp": 0}, "ramp=0"),
    ],
)
def test_bad_options_are_named(options: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        ActivationPenalty(**options)


class Repeated(nn.Module):
    """One block, as often as the call says."""

    def __init__(self) -> None:
        super().__init__()
        self.mlp = nn.Sequential(nn.LayerNorm(8), nn.Linear(8, 32), nn.ReLU(), nn.Linear(32, 8))

    def forward(self, x: Tensor, times: int = 2) -> Tensor:
        for _ in range(times):
            x = x + self.mlp(x)
        return x


@pytest.mark.parametrize("times", [1, 2, 5])
def test_every_run_of_a_shared_block_counts_alike(times: int) -> None:
    model, x, means = Repeated(), torch.randn(3, 4, 8), []
    handle = sparsify(model, [ActivationPenalty("l1", 1.0)], inputs=x)
    model.train()
    model.mlp[2].register_forward_hook(lambda *call: means.append(call[2].abs().mean().item()))
    for _ in range(2):  # a pass that nobody asked about leaves nothing
        means.clear()
        model(x, times=times)
    assert handle.penalty().item() == pytest.approx(sum(means) / times, rel=1e-5)

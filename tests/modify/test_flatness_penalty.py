"""The penalty on augmented flatness against sample-by-sample gradients and against differences."""

from __future__ import annotations

import copy
import json
import math
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.autograd import gradcheck
from torch.func import functional_call
from torch.utils.checkpoint import checkpoint

from actsparse import (
    ActivationPenalty,
    FlatnessPenalty,
    Recipe,
    ZerothBias,
    handle_of,
    observe,
    sparsify,
)
from actsparse.modify.handle import Handle

B, T, D, H, CLASSES = 3, 4, 5, 7, 3
EPS64 = torch.finfo(torch.float64).eps
# sums of T·H and of D products of sums over H, in different orders, under a gradient of a few more
TOLERANCE = 64 * T * H * D * EPS64


class Mlp(nn.Module):
    """norm → up → φ → down."""

    def __init__(self, act: nn.Module) -> None:
        super().__init__()
        self.norm, self.up, self.act, self.down = (
            nn.LayerNorm(D), nn.Linear(D, H), act, nn.Linear(H, D),
        )  # fmt: skip

    def forward(self, x: Tensor) -> Tensor:
        return self.down(self.act(self.up(self.norm(x))))


class Gated(nn.Module):
    """Gate and up apart, or, ``fused``, as one layer."""

    def __init__(self, fused: bool) -> None:
        super().__init__()
        self.fused = fused
        if fused:
            self.gate_up = nn.Linear(D, 2 * H)
        else:
            self.gate, self.up = nn.Linear(D, H), nn.Linear(D, H)
        self.act, self.down = nn.SiLU(), nn.Linear(H, D)

    def forward(self, x: Tensor) -> Tensor:
        gate, up = self.gate_up(x).chunk(2, -1) if self.fused else (self.gate(x), self.up(x))
        return self.down(self.act(gate) * up)


class Net(nn.Module):
    """Two blocks in a residual stream; classifies each sample, or each token."""

    def __init__(self, *blocks: nn.Module, tokens: bool = False, reentrant: bool | None = None):
        super().__init__()
        self.blocks, self.head = nn.ModuleList(blocks), nn.Linear(D, CLASSES)
        self.first = nn.Linear(D, D)
        self.tokens, self.reentrant = tokens, reentrant
        self.double()

    def forward(self, inputs_embeds: Tensor, attention_mask: Tensor | None = None) -> Tensor:
        x = self.first(inputs_embeds)
        for block in self.blocks:
            if self.reentrant is None:
                x = x + block(x)
            else:
                x = x + checkpoint(block, x, use_reentrant=self.reentrant)
        return self.head(x if self.tokens else x.mean(1))


def net(act: Callable[[], nn.Module] = nn.GELU, **kwargs: Any) -> Net:
    return Net(Mlp(act()), Mlp(act()), **kwargs)


def stream() -> Tensor:
    return torch.randn(B, T, D, dtype=torch.float64)


def labels(*shape: int) -> Tensor:
    return torch.randint(CLASSES, shape or (B,))


cross_entropy = nn.functional.cross_entropy


def by_hand(
    model: Net,
    x: Tensor,
    loss: Callable[[Tensor, int], Tensor],
    keep: Tensor | None = None,
) -> float:
    """Mean over blocks of AF/(T·H), each sample run through the model alone."""
    means = []
    for block in model.blocks:
        block.act.inplace = False  # which would overwrite the z that is read here
        layer = getattr(block, "gate_up", None) or getattr(block, "gate", None) or block.up
        total, tokens = 0.0, 0
        for b in range(len(x)):
            met: list[tuple[Tensor, Tensor]] = []
            hook = layer.register_forward_hook(
                lambda _, args, out, met=met: met.append((args[0].detach(), out))
            )
            value = loss(model(x[b : b + 1]), b)
            hook.remove()
            for entered, z in met:
                (g,) = torch.autograd.grad(value, z, retain_graph=True)
                for t in range(T):
                    if keep is None or keep[b, t]:
                        total += float(g[0, t, :H].square().sum() * entered[0, t].square().sum())
                        tokens += 1
        means.append(total / (tokens * H))
    return sum(means) / len(means)


# --- the value ---------------------------------------------------------------------------------


BLOCKS: dict[str, Callable[[], list[nn.Module]]] = {
    "gelu": lambda: [Mlp(nn.GELU()), Mlp(nn.GELU())],
    "relu, in place": lambda: [Mlp(nn.ReLU(inplace=True)), Mlp(nn.ReLU(inplace=True))],
    "gated": lambda: [Gated(False), Gated(False)],
    "fused": lambda: [Gated(True), Gated(True)],
    "shared": lambda: [Mlp(nn.GELU())] * 2,
}


@pytest.mark.parametrize("kind", sorted(BLOCKS))
def test_it_is_the_flatness_of_each_sample_by_itself(kind: str) -> None:
    model, x, y = Net(*BLOCKS[kind]()), stream(), labels()
    want = by_hand(copy.deepcopy(model), x, lambda out, b: cross_entropy(out, y[b : b + 1]))
    handle = sparsify(model, FlatnessPenalty(0.7), inputs=x)
    assert want > 0
    for _ in range(2):  # each call takes the values of one forward
        loss = cross_entropy(model(x), y)
        assert handle.penalty(loss).item() == pytest.approx(0.7 * want, rel=TOLERANCE)
    assert not handle.penalty().requires_grad


def test_of_a_mean_over_tokens_it_is_that_of_each_samples_mean() -> None:
    model, x, y = net(tokens=True), stream(), labels(B, T)
    want = by_hand(copy.deepcopy(model), x, lambda out, b: cross_entropy(out[0], y[b]))
    handle = sparsify(model, FlatnessPenalty(1.0), inputs=x)
    loss = cross_entropy(model(x).flatten(0, 1), y.flatten())
    assert handle.penalty(loss).item() == pytest.approx(want, rel=TOLERANCE)


def test_padding_does_not_count() -> None:
    model, x, y = net(), stream(), labels()
    keep = torch.tensor([[1, 1, 1, 1], [1, 1, 0, 0], [0, 1, 1, 1]])
    want = by_hand(copy.deepcopy(model), x, lambda out, b: cross_entropy(out, y[b : b + 1]), keep)
    handle = sparsify(model, FlatnessPenalty(1.0), inputs=x)
    loss = cross_entropy(model(x, attention_mask=keep), y)
    assert handle.penalty(loss).item() == pytest.approx(want, rel=TOLERANCE)


def test_rows_without_tokens_are_samples_of_one() -> None:
    model = nn.Sequential(nn.Linear(D, H), nn.ReLU(), nn.Linear(H, D)).double()
    x, y = torch.randn(B, D, dtype=torch.float64), labels()
    z = model[0](x).detach()
    p = (model[2](z.relu()).softmax(-1) - nn.functional.one_hot(y, D)).detach()
    g = (p @ model[2].weight.detach()) * (z > 0)
    want = (g.square().sum(-1) * x.square().sum(-1)).mean() / H
    handle = sparsify(model, FlatnessPenalty(1.0), inputs=x)
    loss = cross_entropy(model(x), y)
    assert handle.penalty(loss).item() == pytest.approx(want.item(), rel=TOLERANCE)


def test_it_is_what_observe_calls_flatness_with_zeroth_biases_in_x_too() -> None:
    model, x, y = net(), stream(), labels()
    handle = sparsify(model, [ZerothBias(), FlatnessPenalty(2.0)], inputs=x)
    for name, parameter in model.named_parameters():
        if "zeroth" in name:
            nn.init.normal_(parameter)
    with observe(model, ["flatness"], inputs=x) as seen:
        loss = cross_entropy(model(x), y)
        penalty = handle.penalty(loss)
        assert seen.summary("train") is None  # that backward pass is not one of training
        loss.backward()
    found = seen.summary("train")
    assert found is not None
    assert len(found["blocks"]) == 2  # whose flatness adds up, where the penalty is a mean
    want = 2.0 * found["flatness"] / (T * H * 2)
    assert penalty.item() == pytest.approx(want, rel=TOLERANCE)


# --- its gradient ------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", ["gelu", "gated", "fused", "shared"])
def test_its_gradient_is_the_slope_of_its_value(kind: str) -> None:
    """In every parameter, through g_z, x and what the layers before make of them."""
    model, x, y = Net(*BLOCKS[kind]()), stream(), labels()
    handle = sparsify(model, FlatnessPenalty(1.0), inputs=x)
    one = handle.penalty(cross_entropy(model(x), y)).item()
    names = [name for name, _ in model.named_parameters()]

    def penalty(*parameters: Tensor) -> Tensor:
        out = functional_call(model, dict(zip(names, parameters, strict=True)), (x,))
        return handle.penalty(cross_entropy(out, y)) / one

    parameters = [p.detach().clone().requires_grad_() for _, p in model.named_parameters()]
    # differences over 1e-6 of a value of one: rounding 1e-10, truncation 1e-12
    assert gradcheck(penalty, parameters, eps=1e-6, atol=1e-7, rtol=1e-6)


def test_a_step_against_it_lowers_the_flatness() -> None:
    model, x, y = net(), stream(), labels()
    handle = sparsify(model, FlatnessPenalty(1.0), inputs=x)
    before = handle.penalty(cross_entropy(model(x), y))
    parameters = list(model.parameters())
    slopes = torch.autograd.grad(before, parameters, allow_unused=True)
    norm = sum(float(g.square().sum()) for g in slopes if g is not None)
    step = 1e-3 * before.item() / norm
    with torch.no_grad():
        for p, g in zip(parameters, slopes, strict=True):
            p -= step * (g if g is not None else 0)
    after = handle.penalty(cross_entropy(model(x), y)).item()
    # to first order it falls by a thousandth; the next order is a thousandth of that times some 10
    assert after == pytest.approx(before.item() * (1 - 1e-3), rel=1e-4)


def test_beside_another_penalty_both_add_up() -> None:
    model, x, y = net(), stream(), labels()
    twins = [copy.deepcopy(model) for _ in range(2)]
    one, two = FlatnessPenalty(0.5), ActivationPenalty("l1", 0.3)
    alone = []
    for twin, change in zip(twins, (one, two), strict=True):
        handle = sparsify(twin, change, inputs=x)
        alone.append(handle.penalty(cross_entropy(twin(x), y)).item())
    handle = sparsify(model, [one, two], inputs=x)
    both = handle.penalty(cross_entropy(model(x), y))
    assert both.item() == pytest.approx(sum(alone), rel=TOLERANCE)


def test_checkpointing_changes_nothing() -> None:
    plain, x, y = net(), stream(), labels()
    again = copy.deepcopy(plain)
    again.reentrant = False
    found = []
    for model in (plain, again):
        handle = sparsify(model, FlatnessPenalty(3.0), inputs=x)
        loss = cross_entropy(model(x), y)
        penalty = handle.penalty(loss)
        (loss + penalty).backward()
        found.append([penalty, *(p.grad for p in model.parameters())])
    assert all(torch.equal(a, b) for a, b in zip(*found, strict=True))


# --- what it needs -----------------------------------------------------------------------------


def test_reentrant_checkpointing_is_refused() -> None:
    model, x, y = net(), stream(), labels()
    handle = sparsify(model, FlatnessPenalty(1.0), inputs=x)
    model.reentrant = True
    loss = cross_entropy(model(x), y)
    with pytest.raises(RuntimeError, match=r"'blocks\.0'.*use_reentrant=False"):
        handle.penalty(loss)


def test_without_a_loss_it_says_so() -> None:
    model, x, y = net(), stream(), labels()
    handle = sparsify(model, FlatnessPenalty(1.0), inputs=x)
    loss = cross_entropy(model(x), y)
    with pytest.raises(ValueError, match=r"FlatnessPenalty needs the loss: handle\.penalty\(loss"):
        handle.penalty()
    for wrong in (loss.detach(), loss[None]):
        with pytest.raises(ValueError, match="FlatnessPenalty needs a loss with a graph"):
            handle.penalty(wrong)
    with pytest.raises(RuntimeError, match="the loss of the last forward pass"):
        handle.penalty(model.head.weight.sum())


def test_in_evaluation_and_without_gradients_there_is_nothing_to_pay() -> None:
    model, x, y = net(), stream(), labels()
    handle = sparsify(model, FlatnessPenalty(1.0), inputs=x)
    with torch.no_grad():
        model(x)
        assert handle.penalty().item() == 0
    model(x)  # a training pass that nobody asks about
    model.eval()
    assert handle.penalty().item() == 0
    cross_entropy(model(x), y)
    assert handle.penalty().item() == 0


def test_while_it_weighs_nothing_it_needs_nothing_and_the_ramp_is_linear() -> None:
    model, x, y = net(), stream(), labels()
    handle = sparsify(model, FlatnessPenalty(2.0, ramp=4), inputs=x)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.0)
    handle.attach(optimizer, steps=8)
    model(x)
    assert handle.penalty().item() == 0  # no loss given
    values = []
    for _ in range(5):
        optimizer.step()
        values.append(handle.penalty(cross_entropy(model(x), y)).item())
    ratios = [value / values[-1] for value in values]
    assert ratios == pytest.approx([0.25, 0.5, 0.75, 1, 1], rel=4 * EPS64)


class Attention(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        q = x[:, None]
        return nn.functional.scaled_dot_product_attention(q, q, q)[:, 0]


def test_attention_without_a_second_derivative_is_named() -> None:
    from torch.nn.attention import SDPBackend, sdpa_kernel

    model, x, y = Net(Mlp(nn.GELU()), Attention()), stream(), labels()
    handle = sparsify(model, FlatnessPenalty(1.0), inputs=x)
    with sdpa_kernel(SDPBackend.FLASH_ATTENTION):
        loss = cross_entropy(model(x), y)
    with pytest.raises(RuntimeError, match=r"'blocks\.0'.*twice.*attn_implementation='eager'"):
        handle.penalty(loss)
    with sdpa_kernel(SDPBackend.MATH):
        loss = cross_entropy(model(x), y)
    handle.penalty(loss).backward()
    assert model.first.weight.grad is not None


def test_removed_it_leaves_nothing_behind() -> None:
    model, x = net(), stream()
    handle = sparsify(model, FlatnessPenalty(1.0), inputs=x)
    model(x)
    handle.remove()
    assert handle.penalty().item() == 0
    assert handle_of(model) is None
    assert not any("_actsparse" in name for m in model.modules() for name in vars(m))


def test_the_table_and_the_recipe_say_what_it_is() -> None:
    recipe = Recipe("flat", (FlatnessPenalty(10.0, ramp=0.5),))
    assert Recipe.from_json(json.loads(json.dumps(recipe.to_json()))) == recipe
    handle: Handle = sparsify(net(), recipe, inputs=stream())
    assert handle.rows()[0]["change"] == "AF of blocks.0.up, weight 10, over 50% of the steps"


@pytest.mark.parametrize("weight", [-1.0, math.nan], ids=str)
def test_a_weight_that_is_none_is_named(weight: float) -> None:
    with pytest.raises(ValueError, match=rf"FlatnessPenalty\(weight={weight!r}\): expected"):
        FlatnessPenalty(weight)

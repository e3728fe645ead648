"""Top-k keeps the largest activations of each token, exactly as many as it says, and no others."""

from __future__ import annotations

import copy
import json
import math
from fractions import Fraction
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor, nn
from transformers import LlamaConfig, LlamaForCausalLM

from actsparse import (
    Handle,
    Recipe,
    SwapActivation,
    TopK,
    handle_of,
    load,
    observe,
    save,
    sparsify,
)
from actsparse.activations import named
from actsparse.blocks.site import site_of
from actsparse.modify.modification import Modification
from actsparse.modify.top_k import kept
from tests.mlp import Mlp

D, H = 6, 20
FUNCTIONS = {"relu": nn.ReLU(), "gelu": nn.GELU(), "in place": nn.ReLU(inplace=True)}


def block(act: nn.Module) -> nn.Sequential:
    return nn.Sequential(nn.Linear(D, H), act, nn.Linear(H, D)).double()


def stream() -> Tensor:
    return torch.randn(3, 5, D, dtype=torch.float64)


def largest_by_hand(a: Tensor, count: int) -> Tensor:
    """Token by token, unit by unit: of the sorted sizes the first so many."""
    out = torch.zeros_like(a)
    for row, left in zip(a.reshape(-1, a.shape[-1]), out.view(-1, a.shape[-1]), strict=True):
        order = sorted(range(len(row)), key=lambda h: abs(float(row[h])), reverse=True)
        for h in order[:count]:
            left[h] = row[h]
    return out


def followed(
    model: nn.Module, modification: TopK, steps: int
) -> tuple[Handle, torch.optim.Optimizer]:
    handle = sparsify(model, modification, inputs=stream())
    optimizer = torch.optim.SGD(model.parameters(), lr=0.0)
    handle.attach(optimizer, steps)
    return handle, optimizer


# --- what is kept ------------------------------------------------------------------------------


@pytest.mark.parametrize("training", [True, False])
@pytest.mark.parametrize("k", [0.05, 0.12, 0.5, 1.0])
@pytest.mark.parametrize("act", sorted(FUNCTIONS))
def test_values_and_gradients_are_those_of_the_largest_by_hand(
    act: str, k: float, training: bool
) -> None:
    model, x = block(copy.deepcopy(FUNCTIONS[act])), stream().requires_grad_()
    plain = copy.deepcopy(model)
    sparsify(model, TopK(k), inputs=x.detach())
    model.train(training)
    y = model(x)
    a = plain[1](plain[0](x))
    mask = largest_by_hand(a.detach(), math.ceil(k * H)) != 0
    want = plain[2](a * mask)
    assert torch.equal(y, want)
    g_y = torch.randn_like(y)
    (got,), (by_hand,) = (torch.autograd.grad(out, x, g_y) for out in (y, want))
    assert torch.equal(got, by_hand)


def test_a_gated_block_chooses_by_the_gates_factor_alone() -> None:
    model, x = Mlp(nn.SiLU(), D, H, gated=True).double(), stream()
    factor = largest_by_hand(model.act(model.gate(x)).detach(), 3)
    want = x + model.down(factor * model.up(x))
    handle = sparsify(model, TopK(0.15), inputs=x)
    assert torch.equal(model(x), want)
    assert handle.rows()[0]["change"] == "3 of 20 units of a token, silu"


def test_it_may_bring_its_own_activation() -> None:
    model, x = block(nn.GELU()), stream()
    z = model[0](x)
    handle = sparsify(model, TopK(0.15, to="jsrelu(cap=2)"), inputs=x)
    want = model[2](largest_by_hand(named("jsrelu(cap=2)").value(z).detach(), 3))
    assert torch.equal(model(x), want)
    site = site_of(handle.blocks[0])
    assert site.function is None
    slope = named("jsrelu(cap=2)").derivative(z) * (largest_by_hand(z.relu().detach(), 3) != 0)
    assert torch.equal(site.derivative(z), slope)


@pytest.mark.parametrize("ramped", [False, True])
def test_of_equal_values_enough_are_kept_to_make_up_the_number(ramped: bool) -> None:
    model, x = block(nn.ReLU()), stream()
    with torch.no_grad():
        model[0].weight.zero_()
        model[0].bias.copy_(torch.tensor([1.0] * 15 + [2.0, -5.0, 2.0, 0.0, -1.0]))
    if ramped:  # half way down from 20 to 2
        followed(model, TopK(0.1, ramp=2), steps=4)[1].step()
    else:
        sparsify(model, TopK(0.55), inputs=x)
    seen: list[Tensor] = []
    model[1].register_forward_hook(lambda *hook: seen.append(hook[-1]))
    model(x)
    assert bool((seen[0].count_nonzero(-1) == 11).all())
    assert bool((seen[0].sum(-1) == 9 + 2 * 2).all())


def test_a_nan_stays_visible() -> None:
    model, x = block(nn.ReLU()), stream()
    x[0, 1, 2] = math.nan
    sparsify(model, TopK(0.1), inputs=stream())
    y = model(x)
    assert bool(y[0, 1].isnan().all())
    assert not y[1:].isnan().any()


@given(st.integers(1, 10**4), st.integers(1, 10**4))
def test_the_number_kept_is_the_ceiling_of_the_exact_product(units: int, parts: int) -> None:
    assert kept(parts / 10**4, units) == math.ceil(Fraction(parts, 10**4) * units)
    assert kept(1e-9, units) == 1


# --- schedules ---------------------------------------------------------------------------------


@pytest.mark.parametrize("ramp", [4, 0.5])
def test_k_falls_from_one_to_its_value_and_stays(ramp: float) -> None:
    model, x = block(nn.GELU()), stream()
    handle, optimizer = followed(model, TopK(0.2, ramp=ramp), steps=8)
    counts = []
    for _ in range(7):
        seen: list[Tensor] = []
        hook = model[2].register_forward_pre_hook(lambda *hook, seen=seen: seen.append(hook[-1][0]))
        model(x)
        hook.remove()
        z = model[0](x)
        counts.append(int(seen[0].count_nonzero(-1).max()))
        want = largest_by_hand(nn.functional.gelu(z).detach(), counts[-1])
        assert torch.equal(seen[0].detach(), want)
        slope = named("gelu").derivative(z) * (want != 0)
        assert torch.equal(site_of(handle.blocks[0]).derivative(z), slope)
        optimizer.step()
    assert counts == [20, 16, 12, 8, 4, 4, 4]
    assert "over" in handle.rows()[0]["change"]


def test_the_schedule_goes_on_where_a_checkpoint_was_taken() -> None:
    model = block(nn.ReLU())
    handle, optimizer = followed(model, TopK(0.2, ramp=4), steps=8)
    optimizer.step()
    other = block(nn.ReLU())
    again = sparsify(other, TopK(0.2, ramp=4), inputs=stream())
    other.load_state_dict(model.state_dict())
    again.load_state_dict(handle.state_dict())
    x = stream()
    assert torch.equal(other(x), model(x))
    again.load_state_dict({"step": 4, "steps": 8})
    assert not torch.equal(other(x), model(x))


def test_compiled_code_follows_the_ramp_without_compiling_at_every_step() -> None:
    from torch._dynamo.testing import CompileCounter

    model, x = block(nn.ReLU()), stream()
    _, optimizer = followed(model, TopK(0.1, ramp=12), steps=20)
    counter = CompileCounter()
    compiled = torch.compile(model, backend=counter, fullgraph=True)
    for _ in range(14):
        assert torch.equal(compiled(x), model(x))
        optimizer.step()
    assert counter.frame_count == 2  # on the way, and at the end
    torch._dynamo.reset()


# --- beside others -----------------------------------------------------------------------------


def test_what_is_observed_is_what_is_left() -> None:
    model, x = block(nn.GELU()), stream()
    sparsify(model, TopK(0.1), inputs=x)
    with observe(model, ["density", "flatness"], inputs=x) as seen:
        model(x).square().sum().backward()
    found = seen.summary("train")
    assert found is not None
    assert found["density"] == found["derivative_density"] == 2 / H
    # the identity of augmented flatness, whose two sides are summed apart
    assert found["density_from_flatness"] == pytest.approx(2 / H, rel=1e-12)


@pytest.mark.parametrize(
    "recipe",
    [(SwapActivation("jsrelu"), TopK()), (TopK(), SwapActivation("jsrelu"))],
    ids=["swap first", "top-k first"],
)
def test_with_a_swapped_activation_the_second_is_refused(recipe: tuple[Modification, ...]) -> None:
    second = type(recipe[1]).__name__
    with pytest.raises(ValueError, match=f"{second} fits none .* activation replaced already"):
        sparsify(block(nn.ReLU()), recipe, inputs=stream())


def test_removed_it_leaves_nothing_behind() -> None:
    model, x = block(nn.ReLU()), stream()
    plain = model(x)
    handle = sparsify(model, TopK(), inputs=x)
    assert not torch.equal(model(x), plain)
    handle.remove()
    assert torch.equal(model(x), plain)
    assert "_actsparse_site" not in vars(model[0])


def test_it_survives_json_and_a_file(tmp_path: Path) -> None:
    from transformers import GPT2Config, GPT2LMHeadModel

    recipe = Recipe("mine", (TopK(0.1, to="relu(shift=0.5)", ramp=0.5),))
    assert Recipe.from_json(json.loads(json.dumps(recipe.to_json()))) == recipe
    config = GPT2Config(vocab_size=11, n_positions=8, n_embd=8, n_layer=2, n_head=2)
    model, ids = GPT2LMHeadModel(config).eval(), torch.randint(11, (2, 6))
    before = model(input_ids=ids).logits
    handle = sparsify(model, recipe, inputs={"input_ids": ids})
    handle.load_state_dict({"step": 6, "steps": 8})
    assert not torch.equal(model(input_ids=ids).logits, before)
    for twin in (load(save(model, tmp_path / "m")), copy.deepcopy(model)):
        assert torch.equal(twin(input_ids=ids).logits, model(input_ids=ids).logits)


@pytest.mark.parametrize("k", [0, -0.1, 1.01, math.nan], ids=str)
def test_a_k_that_is_no_share_is_named(k: float) -> None:
    with pytest.raises(ValueError, match=rf"TopK\(k={k!r}\): expected a share"):
        TopK(k)


def test_an_unknown_activation_is_named() -> None:
    with pytest.raises(ValueError, match="unknown activation 'reglu'"):
        TopK(to="reglu")


def test_products_are_ranked_where_asked() -> None:
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=40, hidden_size=16, intermediate_size=48, num_hidden_layers=1,
        num_attention_heads=2, num_key_value_heads=2,
    )  # fmt: skip
    model, ids = LlamaForCausalLM(config).eval(), torch.arange(12)[None]
    sparsify(model, TopK(0.25, by="product"), inputs=ids)
    mlp, x = model.model.layers[0].mlp, torch.randn(5, 16)
    a = F.silu(F.linear(x, mlp.gate_proj.weight)) * F.linear(x, mlp.up_proj.weight)
    kept = torch.zeros_like(a).scatter(-1, a.abs().topk(12).indices, 1)
    assert torch.equal(mlp(x), F.linear(a * kept, mlp.down_proj.weight))
    by_gate = copy.deepcopy(model)
    handle_of(by_gate).remove()
    sparsify(by_gate, TopK(0.25), inputs=ids)
    assert not torch.equal(by_gate.model.layers[0].mlp(x), mlp(x))

from __future__ import annotations

import copy
import pickle

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from transformers import (
    GPT2Config,
    GPT2LMHeadModel,
    LlamaConfig,
    LlamaForCausalLM,
    T5Config,
    T5ForConditionalGeneration,
)

from actsparse import DropSmall, load, observe, prune_dead_units, save, set_thresholds, sparsify
from actsparse.modify.drop_small import dropping_blocks

IDS = torch.arange(24).view(2, 12)


def llama() -> LlamaForCausalLM:
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=40, hidden_size=16, intermediate_size=48, num_hidden_layers=2,
        num_attention_heads=2, num_key_value_heads=2, max_position_embeddings=64,
    )  # fmt: skip
    return LlamaForCausalLM(config).eval()


def thresholds(model: nn.Module, at: float) -> dict[str, Tensor]:
    torch.manual_seed(1)
    buffers = {b.name: b.up.module.activation_threshold for b in dropping_blocks(model)}
    return {name: at * torch.rand(buffer.shape) for name, buffer in buffers.items()}


def by_hand(mlp: nn.Module, x: Tensor, t: Tensor, form: str) -> Tensor:
    """The block of LLaMA, written out."""
    z, u = F.linear(x, mlp.gate_proj.weight), F.linear(x, mlp.up_proj.weight)
    f = F.silu(z)
    gate, product = t if form == "both" else (t, t)
    dropped = torch.zeros_like(f, dtype=torch.bool)
    if form != "product":
        dropped |= f.abs() <= gate
    if form != "gate":
        dropped |= (f * u).abs() <= product
    return F.linear(f * u * ~dropped, mlp.down_proj.weight)


@pytest.mark.parametrize("form", ["gate", "product", "both"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16])
def test_gated_block_is_the_formula_and_gradients_are_its_gradients(
    form: str, dtype: torch.dtype
) -> None:
    model = llama().to(dtype)
    handle = sparsify(model, DropSmall(form), inputs=IDS)  # type: ignore[arg-type]
    mlp = model.model.layers[0].mlp
    t = torch.rand(48) * (0.002 if form == "product" else 0.02)
    t = torch.stack([t, 0.1 * t.flip(0)]) if form == "both" else t
    set_thresholds(model, {handle.blocks[0].name: t})
    t = mlp.up_proj.activation_threshold.clone()
    x = torch.randn(3, 5, 16, dtype=dtype, requires_grad=True)
    y, expected = mlp(x), by_hand(mlp, x, t, form)
    assert torch.equal(y, expected)
    gate, product = t if form == "both" else (t, t)
    f = F.silu(F.linear(x, mlp.gate_proj.weight))
    if form != "product":
        assert 0.05 < (f.abs() <= gate).float().mean() < 0.95
    if form == "both":
        alone = ((f * F.linear(x, mlp.up_proj.weight)).abs() <= product) & (f.abs() > gate)
        assert 0.02 < alone.float().mean() < 0.9
    upstream = torch.randn_like(y)
    found = torch.autograd.grad(y, [x, *mlp.parameters()], upstream)
    wanted = torch.autograd.grad(expected, [x, *mlp.parameters()], upstream)
    assert all(map(torch.equal, found, wanted))


@pytest.mark.parametrize("form", ["gate", "product", "both"])
def test_zero_thresholds_change_nothing_and_remove_leaves_nothing(form: str) -> None:
    model = llama()
    before, keys = model(IDS).logits, list(model.state_dict())
    handle = sparsify(model, DropSmall(form), inputs=IDS)  # type: ignore[arg-type]
    assert torch.equal(model(IDS).logits, before)
    set_thresholds(model, thresholds(model, 0.05))
    assert not torch.equal(model(IDS).logits, before)
    handle.remove()
    assert torch.equal(model(IDS).logits, before)
    assert list(model.state_dict()) == keys


def test_ungated_gelu_keeps_both_signs_and_its_density_is_counted() -> None:
    torch.manual_seed(0)
    config = GPT2Config(vocab_size=40, n_positions=32, n_embd=16, n_layer=2, n_head=2)
    model = GPT2LMHeadModel(config).eval()
    handle = sparsify(model, DropSmall(), inputs=IDS)
    mlp = model.transformer.h[0].mlp
    t = torch.rand(64) * 0.2
    set_thresholds(model, {handle.blocks[0].name: t})
    x = torch.randn(7, 16)
    a = mlp.act(mlp.c_fc(x))
    own = torch.nn.functional.gelu(mlp.c_fc(x), approximate="tanh")
    assert torch.equal(a, torch.where(own.abs() <= t, 0, own))
    assert (a < 0).any()
    with observe(model, inputs=IDS) as seen, torch.no_grad():
        mlp(x)
    block = seen.summary("inference")["blocks"][0]
    assert block["density"] == pytest.approx(float((a != 0).float().mean()))
    assert block["derivative_density"] == pytest.approx(float((a != 0).float().mean()))


def test_observe_sees_products_as_down_gets_them() -> None:
    model = llama()
    handle = sparsify(model, DropSmall("product"), inputs=IDS)
    mlp = model.model.layers[0].mlp
    t = torch.full((48,), 0.0005)
    set_thresholds(model, {handle.blocks[0].name: t})
    x = torch.randn(9, 16)
    a = F.silu(mlp.gate_proj(x)) * mlp.up_proj(x)
    with observe(model, inputs=IDS) as seen, torch.no_grad():
        mlp(x)
    found = seen.summary("inference")["blocks"][0]["density"]
    assert found == pytest.approx(float((a.abs() > t).float().mean()))
    assert 0 < found < 1


def test_nan_is_kept() -> None:
    mlp = nn.Sequential(nn.Linear(4, 8), nn.SiLU(), nn.Linear(8, 4))
    handle = sparsify(mlp, DropSmall(), inputs=torch.randn(2, 4))
    set_thresholds(mlp, {handle.blocks[0].name: torch.full((8,), 1e9)})
    assert torch.equal(mlp(torch.randn(3, 4)), mlp[2].bias.expand(3, 4))
    assert mlp(torch.full((3, 4), float("nan"))).isnan().all()


@pytest.mark.parametrize("form", ["gate", "product", "both"])
def test_saved_thresholds_load_and_copies_have_their_own(form: str, tmp_path) -> None:
    model = llama()
    sparsify(model, DropSmall(form), inputs=IDS)  # type: ignore[arg-type]
    set_thresholds(model, thresholds(model, 0.02))
    logits = model(IDS).logits
    again = load(save(model, tmp_path / "saved"))
    assert torch.equal(again(IDS).logits, logits)
    twin = copy.deepcopy(model)
    set_thresholds(twin, {name: t * 0 for name, t in thresholds(model, 1).items()})
    assert torch.equal(model(IDS).logits, logits)
    assert not torch.equal(twin(IDS).logits, logits)
    model.save_pretrained(tmp_path / "hf")
    assert torch.equal(load(tmp_path / "hf")(IDS).logits, logits)


def test_thresholds_of_one_form_do_not_load_as_those_of_another() -> None:
    gate, product = llama(), llama()
    handle = sparsify(gate, DropSmall("gate"), inputs=IDS)
    sparsify(product, DropSmall("product"), inputs=IDS)
    set_thresholds(gate, thresholds(gate, 0.02))
    with pytest.raises(RuntimeError, match=r"thresholds of DropSmall\('gate'\), here of 'product'"):
        product.load_state_dict(gate.state_dict())
    twin = copy.deepcopy(gate)
    with pytest.raises(RuntimeError, match="here of 'product'"):
        product.load_state_dict(pickle.loads(pickle.dumps(twin.state_dict())), strict=False)
    twin.load_state_dict(gate.state_dict())
    product.load_state_dict(dict(gate.state_dict()))  # a plain dict says no form
    handle.remove()
    up = gate.model.layers[0].mlp.up_proj
    assert not up._state_dict_hooks
    assert not up._load_state_dict_pre_hooks


def test_compiled_code_sees_new_thresholds() -> None:
    model = llama()
    sparsify(model, DropSmall(), inputs=IDS)
    compiled = torch.compile(model, backend="eager")
    for at in (0.0, 0.02, 0.1):
        set_thresholds(model, thresholds(model, at))
        assert torch.allclose(compiled(IDS).logits, model(IDS).logits, atol=1e-6)


def test_units_with_thresholds_are_not_pruned() -> None:
    mlp = nn.Sequential(nn.Linear(8, 32), nn.ReLU(), nn.Linear(32, 8)).eval()
    nn.init.constant_(mlp[0].bias[:5], -99.0)
    x = torch.randn(100, 8)
    sparsify(mlp, DropSmall(), inputs=x)
    with observe(mlp, inputs=x) as seen:
        mlp(x)
    with pytest.raises(ValueError, match="its units have thresholds"):
        prune_dead_units(mlp, seen)


def test_refused_by_name() -> None:
    model = llama()
    handle = sparsify(model, DropSmall(), inputs=IDS)
    name = handle.blocks[0].name
    with pytest.raises(ValueError, match=r"expected numbers ≥ 0 of shape \[48\]"):
        set_thresholds(model, {name: torch.zeros(47)})
    with pytest.raises(ValueError, match=r"expected numbers ≥ 0 of shape \[48\]"):
        set_thresholds(model, {name: torch.full((48,), float("nan"))})
    with pytest.raises(ValueError, match="no block 'nowhere'"):
        set_thresholds(model, {"nowhere": torch.zeros(48)})
    with pytest.raises(ValueError, match="form='up'"):
        DropSmall("up")  # type: ignore[arg-type]
    t5 = T5ForConditionalGeneration(
        T5Config(
            vocab_size=40, d_model=16, d_kv=8, d_ff=32, num_layers=1, num_heads=2,
            feed_forward_proj="gated-gelu", decoder_start_token_id=0,
        )
    )  # fmt: skip
    with pytest.raises(ValueError, match="stands between the product and down"):
        sparsify(t5, DropSmall("product"), inputs={"input_ids": IDS, "decoder_input_ids": IDS})
    sparsify(t5, DropSmall(), inputs={"input_ids": IDS, "decoder_input_ids": IDS})

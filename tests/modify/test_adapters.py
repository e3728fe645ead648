"""LoRA through peft: what is trained, and what merging gives."""

from __future__ import annotations

import copy
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from transformers import LlamaConfig, LlamaForCausalLM

from actsparse import (
    DropSmall,
    NormFloor,
    Recipe,
    SwapActivation,
    decay_groups,
    find_mlp_blocks,
    handle_of,
    load,
    observe,
    save,
    set_thresholds,
    sparsify,
)
from actsparse.modify.adapters import lora_config, merge_adapter, save_adapter
from tests.modify.lora_models import (
    ATTENTION,
    MODELS,
    assert_same,
    built,
    half_trained,
    outputs,
    tables,
    three_steps,
    trainable,
    wrapped,
)
from tests.zoo import call

peft = pytest.importorskip("peft")

# peft 0.21 of transformers 5.23
pytestmark = pytest.mark.filterwarnings("ignore:`is_gradient_checkpointing` is deprecated")


# --- the config --------------------------------------------------------------------------------


@pytest.mark.parametrize("name", MODELS)
def test_biases_and_norms_are_trained_beside_the_adapters_and_no_layer_whole(name: str) -> None:
    model, inputs = built(name)
    config = lora_config(model, inputs)
    assert (config.r, config.lora_alpha, config.lora_dropout) == (192, 1, 0.0)
    config.r = 2
    names = {name for name, each in model.named_parameters() if each.ndim == 1}
    model = peft.get_peft_model(model, config)
    others = [name.removeprefix("base_model.model.") for name in trainable(model)]
    others = [name.replace(".base_layer", "") for name in others if "lora_" not in name]
    assert {name.replace(".modules_to_save.default", "") for name in others} == names
    assert len(others) == len(names)
    if name == "vit-classifier":
        assert hasattr(model.base_model.model.classifier, "lora_A")


@pytest.mark.parametrize("name", MODELS)
def test_without_biases_norms_before_mlps_and_what_is_kept_are_trained_beside_the_adapters(
    name: str,
) -> None:
    model, inputs = built(name)
    norms = [block.norm.name for block in find_mlp_blocks(model, inputs)]
    keep = ["classifier"] if name == "vit-classifier" else []
    config = lora_config(model, inputs, r=2, biases=False, keep=keep)
    model = peft.get_peft_model(model, config)
    whole = {name.split(".modules_to_save.")[0] for name in trainable(model) if "lora_" not in name}
    assert whole == {f"base_model.model.{name}" for name in [*norms, *keep]}
    for block in find_mlp_blocks(model, inputs):
        assert "lora_A" in block.up.module._modules
        assert block.norm.parameter("scale").requires_grad
        if keep:
            assert not hasattr(model.base_model.model.classifier, "lora_A")


@pytest.mark.parametrize("name", ["vit-classifier", "gpt2"])
def test_a_target_or_a_head_that_does_not_exist_is_named_with_the_layers_that_do(name: str) -> None:
    model, inputs = built(name)
    layers = {"vit-classifier": "q_proj.*mlp.fc1.*classifier", "gpt2": "attn.c_attn.*mlp.c_fc"}
    good = ATTENTION[name]
    with pytest.raises(ValueError, match=f"LoRA target 'fc7' does not.*{layers[name]}"):
        lora_config(model, inputs, targets=[good, "fc7"])  # peft itself passes over one of two
    with pytest.raises(ValueError, match=f"module to keep 'haed' does not.*{layers[name]}"):
        lora_config(model, inputs, keep="haed")


def test_a_sparsified_model_is_not_wrapped() -> None:
    model, inputs = built("gpt2")
    sparsify(model, "paper-finetune", inputs=inputs)
    with pytest.raises(ValueError, match=r"handle\.remove\(\), wrap the model with peft, then"):
        lora_config(model, inputs)


# --- training ----------------------------------------------------------------------------------


@pytest.mark.parametrize("name", MODELS)
def test_finetuning_starts_from_the_very_function_of_the_checkpoint(name: str) -> None:
    model, inputs = built(name)
    before = outputs(model, inputs)
    model, _ = wrapped(name, fresh=True)
    sparsify(model, "paper-finetune", inputs=inputs)
    for first, second in zip(before, outputs(model, inputs), strict=True):
        assert torch.equal(first, second)  # B, d, k and the floor are all 0


@pytest.mark.parametrize("name", MODELS)
def test_a_step_trains_what_it_should_and_nothing_of_the_base(name: str) -> None:
    model, inputs = wrapped(name)
    handle = sparsify(model, "paper-finetune", inputs=inputs)
    before = {name: p.detach().clone() for name, p in model.named_parameters()}
    optimizer = torch.optim.AdamW(decay_groups(model, 0.1, exclude=("norm",)), lr=1e-2)
    handle.attach(optimizer, steps=6)  # mixed and lifted after two
    model.train()
    for _ in range(3):
        optimizer.zero_grad()
        output = call(model, inputs)
        loss = next(v for v in output.values() if isinstance(v, Tensor)).square().mean()
        loss.backward()
        optimizer.step()
    moved = {name for name, p in model.named_parameters() if not torch.equal(p, before[name])}
    assert moved == set(trainable(model))
    scales = [block.norm.parameter("scale") for block in handle.blocks]
    assert all(float(scale.detach().abs().min()) >= 1 for scale in scales)
    spared = {id(p) for p in optimizer.param_groups[1]["params"]}
    assert {id(scale) for scale in scales} <= spared
    for d, scale in zip(tables(model).values(), scales, strict=True):
        assert float(d.detach().abs().max()) > 0
        assert bool((d.detach().abs() <= 0.1 * scale.detach().abs()).all())
    with observe(model.eval(), "density") as seen:
        outputs(model, inputs)
    assert 0 < seen.summary("inference")["density"] < 1


def test_zeroth_biases_join_the_group_of_their_layers_adapter() -> None:
    model, inputs = wrapped("vit-classifier")
    trained = [p for p in model.parameters() if p.requires_grad]
    mlp = [p for n, p in model.named_parameters() if p.requires_grad and ".fc1." in n]
    rest = [p for p in trained if id(p) not in set(map(id, mlp))]
    optimizer = torch.optim.SGD([{"params": rest}, {"params": mlp}], lr=0.1)
    sparsify(model, "paper-finetune", inputs=inputs).attach(optimizer, steps=9)
    first, second = ({id(p) for p in group["params"]} for group in optimizer.param_groups)
    mine = {id(d) for d in tables(model).values()}
    assert mine <= second
    assert not mine & first


# --- merging -------------------------------------------------------------------------------------


def rounding(model: Any, inputs: Any) -> float:
    """How far apart two roundings of one network's outputs may be.

    A sum of n products is computed as if its factors were off by n·eps, relatively, at most: each
    way of computing is the exact one with parameters a little off. n is the widest layer's input
    plus the rank plus 2 (the scale and the sum). What parameters off by 1e-6 do is measured at
    random signs; 10 times that covers worse ones, and 2 the two ways.
    """
    exact, moved = outputs(model, inputs), copy.deepcopy(model)
    n, off = max(max(p.shape) for p in model.parameters() if p.dim() == 2) + 4 + 2, 1e-6
    with torch.no_grad():
        for parameter in moved.parameters():
            parameter.mul_(1 + off * torch.randn_like(parameter).sign())
    pairs = zip(exact, outputs(moved, inputs), strict=True)
    change = max(float((a - b).abs().max()) for a, b in pairs)
    return 10 * change / off * 2 * n * torch.finfo(exact[0].dtype).eps


@pytest.mark.parametrize("adapted", ["all-linear", "attention"])
@pytest.mark.parametrize("name", MODELS)
def test_merging_gives_the_plain_class_and_the_same_outputs_up_to_rounding(
    name: str, adapted: str, tmp_path: Path
) -> None:
    options = {"targets": ATTENTION[name]} if adapted == "attention" else {}
    model, inputs, handle = half_trained(name, torch.float64, **options)
    before, bound = outputs(model, inputs), rounding(model, inputs)
    ds = [d.detach().clone() for d in tables(model).values()]
    assert bound < 1e-9  # else it would say nothing
    merged = merge_adapter(model)
    plain, _ = built(name)
    assert type(merged) is type(plain)
    keys = [key for key in merged.state_dict() if "actsparse" not in key]
    assert keys == list(plain.state_dict())
    for first, second in zip(before, outputs(merged, inputs), strict=True):
        assert float((first - second).abs().max()) <= bound
    again = handle_of(merged)
    assert again.recipe == handle.recipe
    assert again.state_dict() == {"step": 3, "steps": 10}
    for first, second in zip(ds, tables(merged).values(), strict=True):
        assert torch.equal(first, second)
    twin = load(save(merged, tmp_path / "m"))
    for first, second in zip(outputs(merged, inputs), outputs(twin, inputs), strict=True):
        assert torch.equal(first, second)


def test_a_merged_model_without_its_zeroth_biases_would_be_another(tmp_path: Path) -> None:
    """So the bound of the test above tells them apart."""
    model, inputs, _ = half_trained("vit-classifier", torch.float64)
    before, bound = outputs(model, inputs), rounding(model, inputs)
    merged = merge_adapter(model)
    with torch.no_grad():
        next(iter(tables(merged).values()))[0, 0].add_(1e-6)
    pairs = zip(before, outputs(merged, inputs), strict=True)
    assert max(float((a - b).abs().max()) for a, b in pairs) > 10 * bound


def test_merging_a_recipe_with_a_function_of_ones_own_works_too() -> None:
    from actsparse.activations import shifted_s_shape

    model, inputs = wrapped("vit-classifier")
    recipe = Recipe("mine", (SwapActivation(shifted_s_shape(dy=1.6)), NormFloor(uplift=3)))
    three_steps(model, sparsify(model, recipe, inputs=inputs))
    assert handle_of(merge_adapter(model)).recipe == recipe


@pytest.mark.parametrize("verb", [merge_adapter, lambda model: save_adapter(model, "nowhere")])
def test_what_is_no_sparsified_peft_model_is_refused(verb: Callable[[nn.Module], Any]) -> None:
    model, inputs = built("gpt2")
    sparsify(model, "paper-finetune", inputs=inputs)
    with pytest.raises(ValueError, match="peft's adapters, got GPT2LMHeadModel"):
        verb(model)
    plain, _ = wrapped("gpt2")
    with pytest.raises(ValueError, match="for a sparsified model"):
        verb(plain)
    assert any("lora_A" in name for name, _ in plain.named_parameters())


def test_save_adapter_takes_one_adapter_and_save_all(tmp_path: Path) -> None:
    model, inputs = wrapped("vit-classifier", biases=False)
    model.add_adapter("second", lora_config(*built("vit-classifier"), r=2, biases=False))
    sparsify(model, "paper-finetune", inputs=inputs)
    with pytest.raises(ValueError, match=r"'default', 'second'.*save"):
        save_adapter(model, tmp_path / "a")
    assert not (tmp_path / "a").exists()
    assert_same(model, load(save(model, tmp_path / "m")), inputs)


@pytest.mark.parametrize("form", ["gate", "both"])
def test_merging_keeps_thresholds_and_peft_does_not_unload_a_recipe(form: str) -> None:
    config = LlamaConfig(
        vocab_size=40, hidden_size=16, intermediate_size=48, num_hidden_layers=2,
        num_attention_heads=2, num_key_value_heads=2, max_position_embeddings=64,
    )  # fmt: skip
    ids, targets = torch.arange(12)[None], ["gate_proj", "up_proj", "down_proj"]
    lora = peft.LoraConfig(target_modules=targets, r=2, init_lora_weights=False)
    model = peft.get_peft_model(LlamaForCausalLM(config), lora).eval()
    plain = model(ids).logits
    handle = sparsify(model, DropSmall(form), inputs=ids)  # type: ignore[arg-type]
    buffers = {b.name: b.up.module.activation_threshold for b in handle.blocks}
    set_thresholds(model, {name: 0.03 * torch.rand(t.shape) for name, t in buffers.items()})
    logits = model(ids).logits
    assert not torch.allclose(logits, plain, atol=1e-4)
    for each in (model, copy.deepcopy(model)):
        for unload in ("merge_and_unload", "unload"):
            with pytest.raises(RuntimeError, match="merge_adapter"):
                getattr(each, unload)()
    twin = copy.deepcopy(model)
    merged = merge_adapter(model)
    assert torch.allclose(merged(ids).logits, logits, atol=1e-5)
    assert any("activation_threshold" in name for name in merged.state_dict())
    handle_of(twin).remove()
    assert torch.allclose(twin.merge_and_unload()(ids).logits, plain, atol=1e-5)

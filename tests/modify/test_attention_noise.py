"""Weight noise on attention, and on the effective weight of layers with adapters."""

from __future__ import annotations

import copy
import re
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from actsparse import Recipe, WeightNoise, find_mlp_blocks, handle_of, load, save, sparsify
from actsparse.modify.adapters import lora_config, merge_adapter
from tests.modify.lora_models import ATTENTION, built, wrapped
from tests.modify.test_weight_noise import check_standard_normal, entering, leaving
from tests.zoo import BY_ID, call

RHO = 0.05
EVERYWHERE = WeightNoise(RHO, ("up", "down", "attention"))


def training(model: nn.Module) -> nn.Module:
    """In training mode and float64, without dropout."""
    for module in model.modules():
        if isinstance(module, nn.Dropout):
            module.p = 0.0
    return model.double().train()


def doubled(inputs: Any) -> Any:
    if isinstance(inputs, dict):
        return {key: doubled(value) for key, value in inputs.items()}
    floats = isinstance(inputs, Tensor) and inputs.is_floating_point()
    return inputs.double() if floats else inputs


def attention_of(model: nn.Module) -> dict[str, nn.Module]:
    """Every linear layer below a module whose class says Attention, by brute force."""
    inside = [m for m in model.modules() if "Attention" in type(m).__name__]
    held = {id(part) for m in inside for part in m.modules()}
    return {
        name: module
        for name, module in model.named_modules()
        if id(module) in held and type(module).__name__ in ("Linear", "Conv1D")
    }


# ALBERT's head here has as many labels as the model is wide, and looks like an MLP
@pytest.mark.filterwarnings("ignore:sparsify takes 2 MLP blocks and leaves out")
@pytest.mark.parametrize("name", ["vit-classifier", "t5-relu", "gpt2", "phi3", "albert-two-groups"])
def test_each_layer_of_attention_has_noise_of_its_own_size_once(name: str) -> None:
    model, inputs = BY_ID[name].build()
    model, inputs = training(model), doubled(inputs)
    layers = attention_of(model)
    assert len(layers) >= 2
    handle = sparsify(model, WeightNoise(RHO, ("attention",)), inputs=inputs)
    assert all(len(layer._forward_hooks) == 1 for layer in layers.values())
    seen = {key: (entering(layer), leaving(layer)) for key, layer in layers.items()}
    for _ in range(8):
        call(model, inputs)
    for key, layer in layers.items():
        conv1d = type(layer).__name__ == "Conv1D"
        weight = layer.weight.T if conv1d else layer.weight
        noise = []
        for x, output in zip(*seen[key], strict=True):
            size = RHO * weight.square().mean().sqrt() * x.norm(dim=-1, keepdim=True)
            found = ((output - F.linear(x, weight, layer.bias)) / size).detach()
            noise.append(found[x.norm(dim=-1) > 0].flatten())  # dropout leaves some tokens silent
        check_standard_normal(torch.cat(noise))
    handle.remove()
    assert all(len(layer._forward_hooks) == 1 for layer in layers.values())  # that of `leaving`


class SelfAttention(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.value = nn.Linear(8, 8)

    def forward(self, x: Tensor) -> Tensor:
        return x + self.value(x).mean(1, keepdim=True)


def test_two_blocks_beside_one_attention_give_it_noise_once() -> None:
    def mlp() -> nn.Module:
        return nn.Sequential(nn.Linear(8, 32), nn.ReLU(), nn.Linear(32, 8))

    model, x = nn.Sequential(SelfAttention(), mlp(), mlp()), torch.randn(2, 5, 8)
    handle = sparsify(model, EVERYWHERE, inputs=x)
    assert len(model[0].value._forward_hooks) == 1
    assert [row["change"] for row in handle.rows()] == [
        "ρ = 0.05 on up and down and 1 layer of attention", "ρ = 0.05 on up and down"
    ]  # fmt: skip


def test_in_eval_mode_there_is_none_and_copies_and_files_keep_it(tmp_path: Any) -> None:
    model, inputs = built("vit-classifier")
    clean = call(model, inputs).logits
    handle = sparsify(model, Recipe("n", (WeightNoise(RHO, ("attention",)),)), inputs=inputs)
    layers = len(attention_of(model.vit.layers[0]))
    assert handle.rows()[0]["change"] == f"ρ = 0.05 on {layers} layers of attention"
    assert torch.equal(call(model, inputs).logits, clean)
    save(model, tmp_path / "saved")
    again, twin = load(tmp_path / "saved"), copy.deepcopy(model)
    handle.remove()
    assert torch.equal(call(training(model).float(), inputs).logits, clean)
    for noisy in (twin, again):
        assert handle_of(noisy).recipe.modifications == (WeightNoise(RHO, ("attention",)),)
        first, second = (call(noisy.train(), inputs).logits for _ in range(2))
        assert not torch.equal(first, second)
        handle_of(noisy).remove()
        assert not any(layer._forward_hooks for layer in attention_of(noisy).values())


def test_a_noise_for_each_group_of_layers_needs_two_in_the_recipe() -> None:
    model, inputs = built("vit-classifier")
    both = [WeightNoise(0.1), WeightNoise(RHO, ("attention",))]
    rows = sparsify(model, both, inputs=inputs).rows()
    assert len(rows) == 2 * len(model.vit.layers)
    handle_of(model).remove()
    twice = [WeightNoise(RHO, ("attention",)), WeightNoise(RHO, ("attention",))]
    with pytest.raises(ValueError, match="have the noise already"):
        sparsify(model, twice, inputs=inputs)
    assert not any(layer._forward_hooks for layer in attention_of(model).values())


# --- adapters ----------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["vit-classifier", "gpt2", "t5-gated-gelu"])
def test_adapted_layers_have_the_noise_of_the_merged_weights(name: str) -> None:
    """The same draws: with W + scale·B A merged into W the outputs in training are the same."""
    model, inputs = wrapped(name, alpha=8.0)
    model, inputs = training(model), doubled(inputs)
    sparsify(model, EVERYWHERE, inputs=inputs)
    torch.manual_seed(3)
    adapted = _output(call(model, inputs))
    merged = merge_adapter(model).train()
    torch.manual_seed(3)
    expected = _output(call(merged, inputs))
    # the same sums in another order, through a few layers of some hundred terms
    torch.testing.assert_close(adapted, expected, rtol=1e-9, atol=1e-9)
    torch.manual_seed(4)
    assert (_output(call(merged, inputs)) - expected).abs().max() > 1e-3


def _output(output: Any) -> Tensor:
    return output["logits"] if "logits" in output else output["last_hidden_state"]


def test_the_size_is_of_the_effective_weight_not_of_the_frozen_one() -> None:
    model, inputs = wrapped("vit-classifier", alpha=40.0)
    model, inputs = training(model), doubled(inputs)
    sparsify(model, EVERYWHERE, inputs=inputs)
    layer = model.base_model.model.vit.layers[0].attention.q_proj
    w, a, b = (
        part.weight.detach()
        for part in (layer.base_layer, layer.lora_A.default, layer.lora_B.default)
    )
    effective = w + 40.0 / 4 * b @ a
    assert effective.norm() > 2 * w.norm()
    x, y = entering(layer), leaving(layer)
    for _ in range(40):
        call(model, inputs)
    inputs_, outputs = torch.stack(x), torch.stack(y)
    size = RHO * effective.square().mean().sqrt() * inputs_.norm(dim=-1, keepdim=True)
    clean = F.linear(inputs_, effective, layer.base_layer.bias)
    check_standard_normal((outputs - clean) / size)


def test_switched_off_adapters_do_not_count() -> None:
    from actsparse.modify.effective_weight import effective_weight

    model, inputs = wrapped("vit-classifier", alpha=40.0, biases=False)
    (block, *_) = find_mlp_blocks(model, inputs)
    on = effective_weight(block.up)
    with model.disable_adapter():
        assert torch.equal(effective_weight(block.up), block.up.module.base_layer.weight)
    model.merge_adapter()
    torch.testing.assert_close(effective_weight(block.up), on, rtol=0, atol=1e-6)


# --- what is refused ---------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("name", "message"),
    [
        (
            "torch-encoder-relu-pre-batch_first",
            r"MultiheadAttention\) multiplies by in_proj_weight",
        ),
        ("sequential", "no attention .* is beside it"),
    ],
)
def test_what_has_no_layers_for_it_is_refused_by_name(name: str, message: str) -> None:
    model, inputs = BY_ID[name].build()
    with pytest.raises(ValueError, match=f"WeightNoise fits none of the .*{message}"):
        sparsify(model, EVERYWHERE, inputs=inputs)
    sparsify(model, WeightNoise(RHO), inputs=inputs)


@pytest.mark.parametrize("kind", ["dora", "ia3"])
def test_adapters_without_an_effective_weight_are_refused_by_name(kind: str) -> None:
    import peft

    model, inputs = built("vit-classifier")
    target = ATTENTION["vit-classifier"]
    if kind == "dora":
        config: Any = lora_config(model, inputs, r=4, targets=[target])
        config.use_dora = True
    else:
        config = peft.IA3Config(target_modules=[target], feedforward_modules=[])
    model = peft.get_peft_model(model, config)
    message = re.escape(".q_proj': its adapter 'default' (peft.tuners.")
    with pytest.raises(ValueError, match=message):
        sparsify(model, EVERYWHERE, inputs=inputs)
    assert handle_of(model) is None


def test_adapters_that_come_after_it_are_noticed() -> None:
    import peft

    model, inputs = built("vit-classifier")
    config = lora_config(model, inputs, r=4, targets=["q_proj"])
    handle = sparsify(model, WeightNoise(RHO, ("attention",)), inputs=inputs)
    peft.inject_adapter_in_model(config, model)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    with pytest.raises(ValueError, match=r"q_proj' was replaced or wrapped after sparsify"):
        handle.attach(optimizer)


def test_compiled_code_has_it_too() -> None:
    model, inputs = built("vit-classifier")
    compiled = torch.compile(model.train(), backend="eager")
    first, second = (call(compiled, inputs).logits for _ in range(2))
    assert torch.equal(first, second)
    handle = sparsify(compiled, WeightNoise(RHO, ("attention",)), inputs=inputs)
    assert not torch.equal(call(compiled, inputs).logits, call(compiled, inputs).logits)
    handle.remove()
    assert torch.equal(call(compiled, inputs).logits, first)

"""What ``save_pretrained`` writes of a changed model says so, and is read by ``load`` alone."""

from __future__ import annotations

import copy
import json
import pickle
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from transformers import AutoConfig, AutoModelForCausalLM, GPT2Config, GPT2LMHeadModel, GPT2Model

from actsparse import (
    ActivationPenalty,
    LeaveOutMLP,
    NormFloor,
    SwapActivation,
    TopK,
    ZerothBias,
    calibrate_thresholds,
    handle_of,
    load,
    observe,
    prune_dead_units,
    save,
    sparsify,
    thresholds_of,
)
from actsparse.modify.config_note import KEY
from tests.zoo import BY_ID

IDS = torch.randint(1, 40, (2, 12), generator=torch.Generator().manual_seed(0))
BATCH = {"input_ids": IDS}
WORDS = r"a model that actsparse has changed: load this folder with actsparse\.load"
Change = Callable[[GPT2LMHeadModel], object]


def gpt2(function: str = "relu", **options: Any) -> GPT2LMHeadModel:
    torch.manual_seed(0)
    config = GPT2Config(
        n_embd=16, n_layer=2, n_head=2, vocab_size=40, n_positions=16,
        activation_function=function, bos_token_id=0, eos_token_id=0, **options,
    )  # fmt: skip
    return GPT2LMHeadModel(config).eval()


@torch.no_grad()
def logits(model: Any) -> Tensor:
    found: Tensor = model(**BATCH).logits
    return found


def add_thresholds(model: GPT2LMHeadModel) -> None:
    with observe(model, "magnitudes", inputs=BATCH) as seen, torch.no_grad():
        model(**BATCH)
    calibrate_thresholds(model, seen, share=0.05)


def prune(model: GPT2LMHeadModel) -> None:
    sparsify(model, "vanilla", inputs=BATCH)
    with torch.no_grad():
        model.transformer.h[0].mlp.c_fc.bias[:5] = -99
    with observe(model, inputs=BATCH) as seen, torch.no_grad():
        model(**BATCH)
    prune_dead_units(model, seen)


def recipe(*changes: Any) -> Change:
    return lambda model: sparsify(model, changes, inputs=BATCH)


CHANGED: dict[str, Change] = {
    "swap": recipe(SwapActivation()),
    "swap in a ramp": recipe(SwapActivation(mix=10)),
    "top-k": recipe(TopK(0.1)),
    "zeroth bias": recipe(ZerothBias()),
    "no MLP": recipe(LeaveOutMLP()),
    "thresholds": add_thresholds,
    "pruned": prune,
}
PLAIN: dict[str, Change] = {
    "vanilla": recipe(),
    "penalty": recipe(ActivationPenalty()),
    "floor": recipe(NormFloor()),
}


@pytest.mark.parametrize("change", CHANGED.values(), ids=CHANGED)
def test_a_folder_of_a_changed_model_is_refused_by_name_and_loaded_by_load(
    change: Change, tmp_path: Path
) -> None:
    model = gpt2()
    change(model)
    want = logits(model)
    model.save_pretrained(tmp_path)
    for cls in (GPT2LMHeadModel, GPT2Model, AutoModelForCausalLM):
        with pytest.raises(AttributeError, match=WORDS):
            cls.from_pretrained(tmp_path)
    again = load(tmp_path)
    assert torch.equal(logits(again), want)
    assert getattr(again.config, KEY).quant_method == "actsparse"
    again.save_pretrained(tmp_path / "again")
    assert torch.equal(logits(load(tmp_path / "again")), want)


@pytest.mark.parametrize("change", PLAIN.values(), ids=PLAIN)
def test_a_folder_whose_function_is_the_plain_model_s_is_a_plain_one(
    change: Change, tmp_path: Path
) -> None:
    model = gpt2()
    before = model.config.to_dict()
    change(model)
    assert model.config.to_dict() == before
    model.save_pretrained(tmp_path)
    assert torch.equal(logits(GPT2LMHeadModel.from_pretrained(tmp_path)), logits(model))


def test_a_change_that_was_taken_back_leaves_no_note() -> None:
    model = gpt2()
    before = model.config.to_dict()
    handle = sparsify(model, "paper", inputs=BATCH)
    add_thresholds(model)
    found = thresholds_of(model)
    assert found is not None
    found.remove()
    assert KEY in model.config.to_dict()
    handle.remove()
    assert model.config.to_dict() == before
    add_thresholds(model)
    assert KEY in model.config.to_dict()
    found = thresholds_of(model)
    assert found is not None
    found.remove()
    assert model.config.to_dict() == before


def test_the_running_model_and_its_copies_are_as_they_were(tmp_path: Path) -> None:
    model = gpt2()
    plain = model.generate(IDS, max_new_tokens=4, do_sample=False)
    assert plain.shape == (2, 16)
    handle = sparsify(model, SwapActivation(mix=10), inputs=BATCH)  # at step 0 it is the model's
    assert torch.equal(model.generate(IDS, max_new_tokens=4, do_sample=False), plain)
    assert "actsparse" in repr(model.config)
    twin = copy.deepcopy(model)
    handle.load_state_dict({"step": 10, "steps": 10})
    twin.save_pretrained(tmp_path / "twin")
    model.save_pretrained(tmp_path / "model")
    steps = [load(tmp_path / name) for name in ("twin", "model")]
    assert [handle_of(each).step for each in steps] == [0, 10]  # type: ignore[union-attr]
    assert torch.equal(logits(steps[0]), logits(twin))


def test_a_model_built_from_a_copy_of_the_config_is_a_plain_one(tmp_path: Path) -> None:
    model = gpt2()
    sparsify(model, "paper", inputs=BATCH)
    AutoModelForCausalLM.from_config(model.config)  # which the two share from now on
    fresh = AutoModelForCausalLM.from_config(copy.deepcopy(model.config)).eval()
    fresh.save_pretrained(tmp_path)
    assert torch.equal(logits(AutoModelForCausalLM.from_pretrained(tmp_path)), logits(fresh))
    AutoModelForCausalLM.from_config(AutoConfig.from_pretrained(tmp_path))


def test_a_note_goes_along_with_a_pickled_model() -> None:
    model = gpt2()
    sparsify(model, ZerothBias(), inputs=BATCH)
    again = pickle.loads(pickle.dumps(model))
    assert again.config.to_dict()[KEY] == model.config.to_dict()[KEY]


def test_weights_in_several_files_are_read_and_ties_kept(tmp_path: Path) -> None:
    model = gpt2()
    sparsify(model, "paper", inputs=BATCH)
    model.save_pretrained(tmp_path, max_shard_size="3KB")
    assert len([*tmp_path.glob("*.safetensors")]) > 3
    again = load(tmp_path)
    assert torch.equal(logits(again), logits(model))
    assert again.lm_head.weight is again.transformer.wte.weight
    index = tmp_path / "model.safetensors.index.json"
    content = json.loads(index.read_text())
    content["weight_map"]["lm_head.bias"] = "../other.safetensors"
    index.write_text(json.dumps(content))
    with pytest.raises(ValueError, match="which is no file of safetensors beside it"):
        load(tmp_path)
    index.write_text("[]")
    with pytest.raises(ValueError, match="is not an index of weights"):
        load(tmp_path)


def test_a_state_dict_given_to_save_pretrained_is_what_is_loaded(tmp_path: Path) -> None:
    model = gpt2()
    sparsify(model, "paper", inputs=BATCH)
    doubled = {name: 2 * value for name, value in model.state_dict().items()}
    model.save_pretrained(tmp_path, state_dict=doubled)
    again = load(tmp_path)
    assert torch.equal(again.lm_head.weight, 2 * model.lm_head.weight)


@pytest.mark.parametrize(
    "name", ["vit-classifier", "t5-gated-gelu", "neox-parallel", "bert-chunked"]
)
def test_names_that_transformers_keeps_for_files_alone_are_found_again(
    name: str, tmp_path: Path
) -> None:
    model, inputs = BY_ID[name].build()
    sparsify(model, ZerothBias(finetune=True), inputs=inputs)
    model.save_pretrained(tmp_path)
    again = load(tmp_path)
    state = model.state_dict()
    assert all(torch.equal(value, state[key]) for key, value in again.state_dict().items())


def test_dtypes_are_those_of_the_model(tmp_path: Path) -> None:
    model = gpt2().bfloat16()
    model.transformer.ln_f.float()
    sparsify(model, "paper", inputs=BATCH)
    model.save_pretrained(tmp_path)
    again = dict(load(tmp_path).named_parameters())
    assert {n: p.dtype for n, p in again.items()} == {
        n: p.dtype for n, p in model.named_parameters()
    }


class Reader(nn.Module):
    """A model of one's own around one of transformers."""

    def __init__(self) -> None:
        super().__init__()
        self.encoder, self.head = gpt2().transformer, nn.Linear(16, 3)

    def forward(self, input_ids: Tensor) -> Tensor:
        scores: Tensor = self.head(self.encoder(input_ids).last_hidden_state)
        return scores


def test_a_changed_part_saved_on_its_own_is_refused_too(tmp_path: Path) -> None:
    model = Reader()
    sparsify(model, "paper", inputs=BATCH)
    model.encoder.save_pretrained(tmp_path)
    with pytest.raises(AttributeError, match=WORDS):
        GPT2Model.from_pretrained(tmp_path)
    with pytest.raises(ValueError, match=r"load\(path, model=\)"):
        load(tmp_path)


def test_a_foreign_quantisation_keeps_its_place() -> None:
    model = gpt2()
    theirs = {"quant_method": "theirs"}
    model.config.quantization_config = theirs
    handle = sparsify(model, "paper", inputs=BATCH)
    assert model.config.quantization_config is theirs
    handle.remove()
    assert model.config.quantization_config is theirs


# --- parameters that are parts of one buffer -----------------------------------------------------


def flat(model: nn.Module) -> nn.Module:
    buffer = torch.cat([p.detach().flatten() for p in model.parameters()])
    start = 0
    for parameter in model.parameters():
        parameter.data = buffer[start : start + parameter.numel()].view_as(parameter)
        start += parameter.numel()
    return model


def mlp() -> nn.Module:
    return nn.Sequential(nn.LayerNorm(8), nn.Linear(8, 32), nn.ReLU(), nn.Linear(32, 8))


def test_parameters_that_are_views_of_one_buffer_are_saved_and_loaded(tmp_path: Path) -> None:
    model, x = mlp(), torch.randn(3, 5, 8)
    sparsify(model, "paper", inputs=x)
    want = flat(model)(x)
    size = sum(p.numel() for p in model.parameters())
    save(model, tmp_path / "m")
    assert (tmp_path / "m" / "model.safetensors").stat().st_size < 4 * size + 2000
    assert torch.equal(load(tmp_path / "m", mlp())(x), want)
    into = flat(mlp())
    first = next(into.parameters())
    assert torch.equal(load(tmp_path / "m", into)(x), want)
    assert first.untyped_storage().nbytes() > first.nbytes  # still a view


def test_weights_that_lack_a_parameter_or_have_another_do_not_fit(tmp_path: Path) -> None:
    model, x = mlp(), torch.randn(3, 5, 8)
    sparsify(model, "paper", inputs=x)
    save(model, tmp_path / "m")
    bigger = nn.Sequential(*mlp(), nn.Linear(8, 8))
    with pytest.raises(ValueError, match=r"does not fit the model: it lacks 4\.weight, 4\.bias"):
        load(tmp_path / "m", bigger)
    save(model := _with_head(), tmp_path / "h")
    with pytest.raises(ValueError, match=r"it has, as none of it, head\.weight"):
        load(tmp_path / "h", mlp())


def _with_head() -> nn.Module:
    model = mlp()
    sparsify(model, "paper", inputs=torch.randn(3, 5, 8))
    model.add_module("head", nn.Identity())
    model.head.register_buffer("weight", torch.zeros(1))  # type: ignore[union-attr]
    return model

"""LoRA through peft: what is saved comes back, alone or with its base."""

from __future__ import annotations

import copy
import json
from pathlib import Path

import pytest
import torch
import transformers as hf
from safetensors.torch import load_file
from torch import Tensor, nn

from actsparse import DropSmall, find_mlp_blocks, handle_of, load, save, sparsify
from actsparse.modify.adapters import load_adapter, lora_config, save_adapter
from actsparse.modify.drop_small import set_thresholds
from tests.modify.lora_models import (
    ATTENTION,
    MODELS,
    assert_same,
    built,
    half_trained,
    tables,
    three_steps,
    wrapped,
)

peft = pytest.importorskip("peft")

# peft 0.21 of transformers 5.23
pytestmark = pytest.mark.filterwarnings("ignore:`is_gradient_checkpointing` is deprecated")


# --- what peft saves ---------------------------------------------------------------------------


@pytest.mark.parametrize("adapted", ["all-linear", "attention"])
@pytest.mark.parametrize("name", MODELS)
def test_pefts_own_files_hold_zeroth_biases_and_norms_and_bring_them_back(
    name: str, adapted: str, tmp_path: Path
) -> None:
    """So a Trainer's checkpoints of adapters do, and its resuming from them."""
    options = {"targets": ATTENTION[name]} if adapted == "attention" else {}
    model, inputs, handle = half_trained(name, **options)
    model.save_pretrained(tmp_path)
    stored = load_file(tmp_path / "adapter_model.safetensors")
    for layer, d in tables(model).items():
        assert torch.equal(stored[f"{layer}.actsparse.zeroth_bias"], d)
    for block in handle.blocks:
        key = block.norm.name.replace(".modules_to_save.default", "") + ".weight"
        assert torch.equal(stored[key], block.norm.parameter("scale"))
    assert sum("zeroth_bias" in key for key in stored) == len(handle.blocks)
    base, _ = built(name)
    twin = peft.PeftModel.from_pretrained(base, tmp_path, is_trainable=True)
    again = sparsify(twin, "paper-finetune", inputs=inputs)
    with pytest.warns(UserWarning, match="do not say where the recipe's schedules stand"):
        twin.load_adapter(tmp_path, "default", is_trainable=True)
    again.load_state_dict(handle.state_dict())
    assert_same(model, twin.eval(), inputs)


# --- save_adapter and load_adapter ---------------------------------------------------------------


@pytest.mark.parametrize("name", MODELS)
def test_an_adapter_comes_back_bit_for_bit_on_its_base(name: str, tmp_path: Path) -> None:
    model, inputs, _ = half_trained(name)
    assert save_adapter(model, tmp_path / "a") == tmp_path / "a"
    base, _ = built(name)
    twin = load_adapter(base, tmp_path / "a")
    assert not twin.training
    assert_same(model, twin, inputs)
    biggest = max(map(Tensor.numel, load_file(tmp_path / "a" / "actsparse.safetensors").values()))
    assert biggest <= 16 * 16  # positions × d_model: nothing of the base


def test_an_adapter_keeps_lifted_norms_that_pefts_config_leaves_out(tmp_path: Path) -> None:
    model, inputs = built("vit-classifier")
    model = peft.get_peft_model(model, peft.LoraConfig(r=2, target_modules=["fc2", "q_proj"]))
    handle = three_steps(model, sparsify(model, "paper-finetune", inputs=inputs))
    plain = [block.norm.parameter("scale") for block in find_mlp_blocks(*built("vit-classifier"))]
    lifted = [block.norm.parameter("scale") for block in handle.blocks]
    assert not any(torch.equal(a, b) for a, b in zip(plain, lifted, strict=True))
    save_adapter(model, tmp_path / "a")
    assert_same(model, load_adapter(built("vit-classifier")[0], tmp_path / "a"), inputs)


@pytest.mark.parametrize("form", ["gate", "both"])
def test_an_adapter_brings_the_thresholds_of_drop_small(form: str, tmp_path: Path) -> None:
    model, inputs = wrapped("llama")
    handle = sparsify(model, DropSmall(form), inputs=inputs)
    shape = (2, handle.blocks[0].d_hidden) if form == "both" else (handle.blocks[0].d_hidden,)
    set_thresholds(model, {block.name: torch.rand(shape) for block in handle.blocks})
    twin = load_adapter(built("llama")[0], save_adapter(model.eval(), tmp_path / "a"))
    assert_same(model, twin, inputs)


def test_a_loaded_adapter_trains_on_as_the_one_that_was_saved(tmp_path: Path) -> None:
    model, inputs, _ = half_trained("vit-classifier")
    save_adapter(model, tmp_path / "a")
    twin = load_adapter(built("vit-classifier")[0], tmp_path / "a")
    for each in (model, twin):
        three_steps(each, handle_of(each))
    assert handle_of(twin).step == 6
    assert_same(model, twin, inputs)


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_adapter(half_trained("gpt2")[0], tmp_path_factory.mktemp("adapter") / "a")


def test_a_folder_of_adapters_is_replaced_whole_and_others_are_left_alone(tmp_path: Path) -> None:
    model, inputs, handle = half_trained("gpt2")
    save_adapter(model, tmp_path / "a")
    three_steps(model, handle)
    save_adapter(model, tmp_path / "a")
    assert [p.name for p in tmp_path.iterdir()] == ["a"]
    assert_same(model, load_adapter(built("gpt2")[0], tmp_path / "a"), inputs)
    (tmp_path / "thesis.tex").write_text("all of it")
    with pytest.raises(FileExistsError, match=r"thesis\.tex.*a folder of its own"):
        save_adapter(model, tmp_path)


FILES = ["actsparse.json", "actsparse.safetensors", "adapter_config.json",
         "adapter_model.safetensors"]  # fmt: skip


@pytest.mark.parametrize("name", FILES)
@pytest.mark.parametrize("harm", ["missing", "torn"])
def test_a_missing_or_torn_file_of_an_adapter_is_named(
    folder: Path, name: str, harm: str, tmp_path: Path
) -> None:
    for file in folder.iterdir():
        content = file.read_bytes()
        if file.name != name or harm == "torn":
            (tmp_path / file.name).write_bytes(content[:40] if file.name == name else content)
    expected = FileNotFoundError if harm == "missing" else ValueError
    with pytest.raises(expected, match=name):
        load_adapter(built("gpt2")[0], tmp_path)


@pytest.mark.parametrize("change", [{"n_layer": 1}, {"n_embd": 20}, {"n_inner": 48}], ids=str)
def test_a_base_that_does_not_fit_says_so(folder: Path, change: dict[str, int]) -> None:
    config = built("gpt2")[0].config
    config.update(change)
    with pytest.raises(ValueError, match=r"does not fit|has MLP blocks"):
        load_adapter(hf.GPT2LMHeadModel(config), folder)


def test_an_adapter_of_other_zeroth_biases_does_not_fit(folder: Path, tmp_path: Path) -> None:
    for file in folder.iterdir():
        (tmp_path / file.name).write_bytes(file.read_bytes())
    sidecar = json.loads((tmp_path / "actsparse.json").read_text())
    sidecar["recipe"]["modifications"][0]["length"] = 7
    (tmp_path / "actsparse.json").write_text(json.dumps(sidecar))
    with pytest.raises(ValueError, match=r"actsparse\.safetensors does not fit.*zeroth_bias"):
        load_adapter(built("gpt2")[0], tmp_path)


def test_load_says_whose_folder_it_is(folder: Path) -> None:
    with pytest.raises(FileNotFoundError, match="load_adapter"):
        load(folder)


# --- save and load of the whole ------------------------------------------------------------------


@pytest.mark.parametrize("name", MODELS)
def test_a_peft_model_comes_back_whole_from_the_folder_alone(name: str, tmp_path: Path) -> None:
    model, inputs, _ = half_trained(name, keep=["classifier"] if name == "vit-classifier" else [])
    twin = load(save(model, tmp_path / "m"))
    assert type(twin) is type(model)
    assert not twin.training
    first, second = model.state_dict(), twin.state_dict()
    assert list(first) == list(second)
    assert all(torch.equal(value, second[key]) for key, value in first.items())
    assert_same(model, twin, inputs)
    onto, _ = built(name)
    with torch.no_grad():
        for parameter in onto.parameters():
            parameter.add_(1)  # in any state
    assert_same(model, load(tmp_path / "m", model=onto), inputs)


def test_adapters_that_are_merged_into_their_layers_are_not_saved_twice(tmp_path: Path) -> None:
    model, inputs, _ = half_trained("llama")
    model.merge_adapter()
    with pytest.raises(ValueError, match=r"would add adapters twice.*unmerge_adapter"):
        save(model, tmp_path / "m")
    assert not (tmp_path / "m").exists()
    model.unmerge_adapter()
    assert_same(model, load(save(model, tmp_path / "m")), inputs)


def test_zeroth_biases_of_layers_without_adapters_and_half_precision_come_back_whole(
    tmp_path: Path,
) -> None:
    model, inputs, _ = half_trained("llama", dtype=torch.bfloat16, targets="v_proj")
    assert {p.dtype for p in model.parameters()} == {torch.bfloat16}
    assert_same(model, load(save(model, tmp_path / "m")), inputs)


def test_a_model_of_ones_own_with_adapters_comes_back_around_the_plain_one(tmp_path: Path) -> None:
    x = torch.randn(2, 5, 8)
    plain = nn.Sequential(nn.LayerNorm(8), nn.Linear(8, 32), nn.GELU(), nn.Linear(32, 8))
    model = peft.get_peft_model(
        copy.deepcopy(plain), lora_config(plain, x, r=2, targets=["1", "3"])
    )
    three_steps(model, sparsify(model, "paper-finetune", inputs=x))
    save(model, tmp_path / "m")
    with pytest.raises(ValueError, match="model="):
        load(tmp_path / "m")
    assert_same(model, load(tmp_path / "m", model=plain.eval()), x)
    with pytest.raises(ValueError, match="does not fit Linear"):
        load(tmp_path / "m", model=nn.Linear(3, 3))


def test_peft_alone_warns_of_an_adapter_whose_model_was_changed(tmp_path: Path) -> None:
    model, inputs, _ = half_trained("gpt2")
    save_adapter(model, tmp_path / "a")
    base, _ = built("gpt2")
    with pytest.warns(UserWarning, match=r"Unexpected keyword arguments \['actsparse'\]"):
        peft.PeftModel.from_pretrained(base, tmp_path / "a")
    base, _ = built("gpt2")
    assert_same(model, load_adapter(base, tmp_path / "a"), inputs)

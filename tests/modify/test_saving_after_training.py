"""Pruned models and models with thresholds are saved and loaded as any other."""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

from actsparse import SwapActivation, handle_of, load, observe, save, sparsify
from actsparse.blocks import find_mlp_blocks
from actsparse.modify.adapters import save_adapter
from actsparse.modify.thresholds import calibrate_thresholds, thresholds_of
from tests.modify.dead_units import X, kill, pruned, widths
from tests.observe.brute import D, H, Mlp
from tests.zoo import BY_ID, call
from tests.zoo.ready import assert_same, outputs, same


def two() -> nn.Module:
    """Two blocks, of which one has three dead units and the other four."""
    model = nn.Sequential(Mlp("relu"), Mlp("relu")).eval()
    for i, block in enumerate(find_mlp_blocks(model, X)):
        kill(block, slice(2, 5 + i))
    return model


def cut_off(model: nn.Module, inputs: Any, share: float = 0.05) -> Any:
    with observe(model, "magnitudes", inputs=inputs) as seen, torch.no_grad():
        call(model, inputs)
    return calibrate_thresholds(model, seen, share=share)


# --- pruned --------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["gpt2", "t5-relu", "llama", "albert-one-layer-used-four-times"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_a_pruned_model_comes_back_pruned(name: str, dtype: torch.dtype, tmp_path: Path) -> None:
    model, inputs = BY_ID[name].build()
    model.eval().to(dtype)
    handle = sparsify(model, SwapActivation("relu"), inputs=inputs)
    for i, block in enumerate(handle.blocks):
        kill(block, slice(3 + i, 9))
    pruning = pruned(model, inputs)
    after = [row[2] for row in pruning.rows]
    assert len(set(after)) > 1 or len(after) == 1  # no config has a width for each layer
    twin = load(save(model, tmp_path / "m"))
    assert widths(twin, inputs) == after == [block.d_hidden for block in handle_of(twin).blocks]
    assert_same(model, twin, inputs)
    pruning.remove()
    assert widths(load(save(model, tmp_path / "m")), inputs) == [row[1] for row in pruning.rows]


def test_a_model_of_ones_own_is_given_whole_or_as_narrow(tmp_path: Path) -> None:
    model = two()
    whole = copy.deepcopy(model)
    sparsify(model, "vanilla", inputs=X)
    pruned(model, X)
    save(model, tmp_path / "m")
    narrow = load(tmp_path / "m", model=copy.deepcopy(whole))
    handle_of(narrow).remove()
    for plain in (copy.deepcopy(whole), narrow):
        twin = load(tmp_path / "m", model=plain)
        assert twin is plain
        assert widths(twin) == [H - 3, H - 4]
        assert_same(model, twin, X)
    with pytest.raises(ValueError, match=r"has blocks of \[7, 6\] hidden units, .* of \[8, 5\]"):
        load(tmp_path / "m", model=nn.Sequential(Mlp(h=8), Mlp(h=5)))


def test_a_model_that_was_never_sparsified_is_told_how_to_be_saved(tmp_path: Path) -> None:
    model = two()
    pruned(model, X)
    with pytest.raises(ValueError, match=r"sparsify\(model, 'vanilla', inputs=...\) first"):
        save(model, tmp_path / "m")


def test_what_does_not_load_leaves_the_model_whole(tmp_path: Path) -> None:
    model = two()
    plain = nn.Sequential(*copy.deepcopy(model), nn.Linear(D, D))
    sparsify(model, "vanilla", inputs=X)
    pruned(model, X)
    save(model, tmp_path / "m")
    with pytest.raises(ValueError, match="does not fit the model"):
        load(tmp_path / "m", model=plain)
    assert widths(plain) == [H, H]
    assert handle_of(plain) is None


def test_adapters_on_a_pruned_model_come_back(tmp_path: Path) -> None:
    peft = pytest.importorskip("peft")
    base, inputs = BY_ID["gpt2"].build()
    base.eval().bfloat16()
    for i, block in enumerate(find_mlp_blocks(base, inputs)):
        kill(block, slice(3 + i, 9))
    pruned(base, inputs)
    config = peft.LoraConfig(
        r=2, target_modules=["c_fc"], fan_in_fan_out=True, init_lora_weights=False,
        modules_to_save=["ln_2"],
    )  # fmt: skip
    model = peft.get_peft_model(base, config).eval()
    sparsify(model, "vanilla", inputs=inputs)
    twin = load(save(model, tmp_path / "m"))
    assert isinstance(twin, peft.PeftModel)
    assert widths(twin, inputs) == [34, 35]
    assert_same(model, twin, inputs)


# --- with thresholds -----------------------------------------------------------------------------


@pytest.mark.parametrize("recipe", ["vanilla", "jsrelu"])
@pytest.mark.parametrize("name", ["t5-relu", "llama-relu"])
def test_a_model_with_thresholds_comes_back_with_them(
    name: str, recipe: str, tmp_path: Path
) -> None:
    model, inputs = BY_ID[name].build()
    model.eval()
    sparsify(model, "vanilla" if recipe == "vanilla" else SwapActivation(recipe), inputs=inputs)
    plain = outputs(model, inputs)
    handle = cut_off(model, inputs)
    assert all(row["threshold"] > 0 for row in handle.rows())
    assert not same(plain, outputs(model, inputs))
    twin = load(save(model, tmp_path / "m"))
    assert_same(model, twin, inputs)
    again = thresholds_of(twin)
    assert [row["function"] for row in again.rows()] == [row["function"] for row in handle.rows()]
    assert str(again).startswith(f"thresholds in {len(handle.rows())} of")
    again.remove()
    assert thresholds_of(twin) is None
    assert same(plain, outputs(twin, inputs))


def test_pruned_and_with_thresholds(tmp_path: Path) -> None:
    model = two()
    plain = copy.deepcopy(model)
    sparsify(model, "vanilla", inputs=X)
    pruned(model, X)
    cut_off(model, X)
    twin = load(save(model, tmp_path / "m"), model=plain)
    assert_same(model, twin, X)
    assert list(thresholds_of(twin).in_force().values()) == list(
        thresholds_of(model).in_force().values()
    )


def test_thresholds_that_went_with_their_recipe_or_were_removed_are_not_saved(
    tmp_path: Path,
) -> None:
    model = two()
    plain = copy.deepcopy(model)
    recipe = sparsify(model, SwapActivation("jsrelu"), inputs=X)
    cut_off(model, X)
    recipe.remove()
    sparsify(model, "vanilla", inputs=X)
    assert torch.equal(model(X), plain(X))
    twin = load(save(model, tmp_path / "m"), model=copy.deepcopy(plain))
    assert thresholds_of(twin) is None
    thresholds_of(model).remove()
    assert thresholds_of(model) is None


def test_adapters_alone_would_lose_thresholds(tmp_path: Path) -> None:
    peft = pytest.importorskip("peft")
    config = peft.LoraConfig(r=2, target_modules=["up"])
    model = peft.get_peft_model(two(), config).eval()
    sparsify(model, "vanilla", inputs=X)
    cut_off(model, X)
    with pytest.raises(ValueError, match=r"save_adapter\(\) would lose .*use save\(\), or remove"):
        save_adapter(model, tmp_path / "m")
    twin = load(save(model, tmp_path / "n"), model=two())
    assert torch.equal(twin(X), model(X))


def test_thresholds_from_before_adapters_are_not_lost_in_silence(tmp_path: Path) -> None:
    peft = pytest.importorskip("peft")
    base = two()
    cut_off(base, X)
    model = peft.get_peft_model(base, peft.LoraConfig(r=2, target_modules=["up"])).eval()
    sparsify(model, "vanilla", inputs=X)
    with pytest.raises(ValueError, match=r"would lose .*not those that were sparsified"):
        save(model, tmp_path / "m")


def test_a_threshold_where_none_can_be_leaves_the_model_plain(tmp_path: Path) -> None:
    model = nn.Sequential(Mlp("gelu")).eval()
    plain = copy.deepcopy(model)
    sparsify(model, "vanilla", inputs=X)
    file = save(model, tmp_path / "m") / "actsparse.json"
    file.write_text(file.read_text().replace('"thresholds": [\n  0.0', '"thresholds": [\n  0.5'))
    with pytest.raises(ValueError, match="takes no threshold on z: gelu"):
        load(tmp_path / "m", model=plain)
    assert handle_of(plain) is None
    assert thresholds_of(plain) is None

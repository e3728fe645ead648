"""save and load: the same bits come back, and what is broken is said to be broken."""

# ruff: noqa: C408  (a table of keyword arguments reads as one)
from __future__ import annotations

import copy
import json
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers as hf
from safetensors.torch import load_file
from torch import nn

from actsparse import (
    ActivationPenalty,
    Handle,
    NormFloor,
    Recipe,
    SwapActivation,
    WeightNoise,
    ZerothBias,
    handle_of,
    load,
    save,
    sparsify,
)
from actsparse.activations import ACTIVATIONS
from tests.modify.lora_models import three_steps
from tests.zoo import call
from tests.zoo.ready import assert_same, built, tensors

MODEL: dict[str, Any] = {"class": "GPT2LMHeadModel", "config": {}, "dtypes": {}}
RECIPE = Recipe(
    "mine",
    (
        ZerothBias(clip=0.3, finetune=True),
        NormFloor(0.9, uplift=8, shared=True),
        SwapActivation("jsrelu", mix=10),
        WeightNoise(0.2, ("up",)),
        ActivationPenalty("l1", 0.1, ramp=6),
    ),
)


def half_trained(name: str, dtype: torch.dtype = torch.float32) -> tuple[nn.Module, Any, Handle]:
    """A model three steps into a schedule of ten, in eval mode."""
    model, inputs = built(name)
    model.to(dtype)
    handle = sparsify(model, RECIPE, inputs=inputs)
    three_steps(model, handle)
    assert handle.step == 3
    return model, inputs, handle


# --- round trips -------------------------------------------------------------------------------

HF = ["gpt2", "t5-relu", "vit-pooler-relu", "llama", "phi3", "bert-masked-lm", "clip",
      "albert-one-layer-used-four-times"]  # fmt: skip


@pytest.mark.parametrize("name", HF)
def test_a_transformers_model_comes_back_bit_for_bit_from_the_folder_alone(
    name: str, tmp_path: Path
) -> None:
    model, inputs, handle = half_trained(name)
    assert save(model, tmp_path / "m") == tmp_path / "m"
    assert sorted(p.name for p in (tmp_path / "m").iterdir()) == sorted(
        ["actsparse.json", "model.safetensors"]
    )
    twin = load(tmp_path / "m")
    assert type(twin) is type(model)
    assert not twin.training
    assert_same(model, twin, inputs)
    again = handle_of(twin)
    assert again.recipe == handle.recipe
    assert again.state_dict() == handle.state_dict() == {"step": 3, "steps": 10}
    assert str(again) == str(handle)


def test_loading_shows_no_bar_of_transformers_and_leaves_its_switch(
    tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    bars = hf.utils.logging
    before = bars.is_progress_bar_enabled()
    try:
        bars.enable_progress_bar()
        save(half_trained("gpt2")[0], tmp_path / "m")
        capfd.readouterr()
        load(tmp_path / "m")
        assert capfd.readouterr().err == ""
        assert bars.is_progress_bar_enabled()
    finally:
        if not before:
            bars.disable_progress_bar()


@pytest.mark.parametrize("name", ["gpt2", "llama"])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float64], ids=str)
def test_the_dtype_comes_back_too(name: str, dtype: torch.dtype, tmp_path: Path) -> None:
    model, inputs, _ = half_trained(name, dtype)
    twin = load(save(model, tmp_path / "m"))
    assert {p.dtype for p in twin.parameters()} == {dtype}
    # buffers that no state dict holds (rotary frequencies) decide the outputs as well
    assert_same(model, twin, inputs)


def test_norms_kept_in_float32_and_their_zeroth_biases_come_back_so(tmp_path: Path) -> None:
    model, inputs = built("gpt2")
    model.to(torch.bfloat16)
    for module in model.modules():
        if isinstance(module, nn.LayerNorm):
            module.float()
    sparsify(model, ZerothBias(finetune=True), inputs=inputs)
    twin = load(save(model.eval(), tmp_path / "m"))
    assert_same(model, twin, inputs)
    dtypes = {
        name.rpartition(".")[2]: p.dtype for name, p in twin.named_parameters() if "h.0" in name
    }
    assert dtypes["zeroth_bias"] == twin.transformer.h[0].ln_2.weight.dtype == torch.float32
    assert twin.transformer.h[0].mlp.c_fc.weight.dtype == torch.bfloat16


def test_attention_that_was_chosen_comes_back(tmp_path: Path) -> None:
    model, inputs = built("gpt2")
    model.set_attn_implementation("eager")
    sparsify(model, ZerothBias(finetune=True), inputs=inputs)
    twin = load(save(model.eval(), tmp_path / "m"))
    assert twin.config._attn_implementation == "eager"
    assert_same(model, twin, inputs)


OWN = ["sequential-relu-in-place", "swiglu", "nanogpt-inline-gelu", "time-first",
       "torch-encoder-relu-pre-batch_first"]  # fmt: skip


@pytest.mark.parametrize("name", OWN)
def test_a_model_of_ones_own_comes_back_bit_for_bit_given_the_plain_one(
    name: str, tmp_path: Path
) -> None:
    model, inputs, handle = half_trained(name)
    save(model, tmp_path / "m")
    with pytest.raises(ValueError, match="model="):
        load(tmp_path / "m")
    plain, _ = built(name)
    with torch.no_grad():
        for parameter in plain.parameters():
            parameter.add_(1)  # in any state
    twin = load(tmp_path / "m", model=plain.eval())
    assert twin is plain
    assert_same(model, twin, inputs)
    assert handle_of(twin).state_dict() == handle.state_dict()


def test_a_model_of_ones_own_is_asked_for(tmp_path: Path) -> None:
    model = nn.Sequential(nn.Linear(4, 8), nn.ReLU(), nn.Linear(8, 4))
    sparsify(model, "vanilla", inputs=torch.ones(1, 4))
    save(model, tmp_path / "m")
    with pytest.raises(ValueError, match="build the plain model in Python and pass it"):
        load(tmp_path / "m")


def test_a_plain_model_with_norm_biases_may_take_in_one_trained_from_scratch(
    tmp_path: Path,
) -> None:
    x = torch.randn(2, 5, 8)
    model = nn.Sequential(nn.LayerNorm(8), nn.Linear(8, 32), nn.ReLU(), nn.Linear(32, 8))
    plain = copy.deepcopy(model)
    nn.init.constant_(plain[0].bias, 0.5)
    sparsify(model, "paper", inputs=x)
    assert_same(model, load(save(model, tmp_path / "m"), model=plain), x)


def test_tied_weights_are_stored_once_and_tied_again(tmp_path: Path) -> None:
    model, inputs, _ = half_trained("gpt2")
    assert model.lm_head.weight is model.transformer.wte.weight
    save(model, tmp_path / "m")
    stored = load_file(tmp_path / "m" / "model.safetensors")
    assert len({"lm_head.weight", "transformer.wte.weight"} & set(stored)) == 1
    twin = load(tmp_path / "m")
    assert twin.lm_head.weight is twin.transformer.wte.weight
    assert_same(model, twin, inputs)


def test_a_schedule_goes_on_where_it_was(tmp_path: Path) -> None:
    model, inputs, _ = half_trained("vit-pooler-relu")
    save(model, tmp_path / "m")
    twin = load(tmp_path / "m")
    for each in (model, twin):
        optimizer = torch.optim.SGD([p for p in each.parameters() if p.requires_grad], lr=0.1)
        handle_of(each).attach(optimizer, steps=10)
        for _ in range(4):
            optimizer.zero_grad()
            sum(t.square().mean() for t in tensors(call(each, inputs))).backward()
            optimizer.step()
    assert handle_of(twin).step == 7
    assert_same(model, twin, inputs)


def test_a_vanilla_recipe_and_a_compiled_model_are_saved_as_well(tmp_path: Path) -> None:
    model, inputs = built("gpt2")
    sparsify(model, "vanilla", inputs=inputs)
    save(torch.compile(model.eval(), backend="eager"), tmp_path / "m")
    twin = load(tmp_path / "m")
    assert_same(model, twin, inputs)
    assert handle_of(twin).recipe.name == "vanilla"


def test_saving_again_replaces_what_was_saved_and_leaves_nothing_beside_it(tmp_path: Path) -> None:
    model, inputs, _ = half_trained("gpt2")
    save(model, tmp_path / "m")
    with torch.no_grad():
        next(model.parameters()).add_(1)
    save(model, tmp_path / "m")
    assert [p.name for p in tmp_path.iterdir()] == ["m"]
    assert_same(model, load(tmp_path / "m"), inputs)
    (tmp_path / "usual").mkdir()  # with the permissions that any folder has
    assert (tmp_path / "m").stat().st_mode == (tmp_path / "usual").stat().st_mode


def test_a_link_to_a_folder_and_a_relative_path_are_followed(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    model, inputs, _ = half_trained("gpt2")
    save(model, tmp_path / "there")
    (tmp_path / "link").symlink_to(tmp_path / "there", target_is_directory=True)
    save(model, tmp_path / "link")
    assert (tmp_path / "link").is_symlink()
    assert_same(model, load(tmp_path / "link"), inputs)
    (tmp_path / "here").mkdir()
    monkeypatch.chdir(tmp_path / "here")
    save(model, "../deep/er")
    assert_same(model, load(tmp_path / "deep" / "er"), inputs)


# --- what cannot be saved ----------------------------------------------------------------------


def test_a_folder_that_holds_other_files_is_not_replaced(tmp_path: Path) -> None:
    model, _, _ = half_trained("gpt2")
    (tmp_path / "thesis.tex").write_text("all of it")
    with pytest.raises(FileExistsError, match=r"thesis\.tex.*a folder of its own"):
        save(model, tmp_path)
    assert (tmp_path / "thesis.tex").read_text() == "all of it"
    with pytest.raises(FileExistsError, match="is a file"):
        save(model, tmp_path / "thesis.tex")
    assert [p.name for p in tmp_path.iterdir()] == ["thesis.tex"]


# --- what cannot be loaded ---------------------------------------------------------------------


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    return save(half_trained("gpt2")[0], tmp_path / "m")


def test_missing_files_are_named(folder: Path, tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError, match=r"nowhere.actsparse\.json is missing"):
        load(tmp_path / "nowhere")
    (folder / "model.safetensors").unlink()
    with pytest.raises(FileNotFoundError, match=r"model\.safetensors is missing"):
        load(folder)


@pytest.mark.parametrize(
    "text", ["", "{", '{"format": 1', "[]", "null", "{}", '{"format": 1, "recipe": {}}', "\xff"]
)
def test_a_torn_or_foreign_sidecar_says_so(folder: Path, text: str) -> None:
    (folder / "actsparse.json").write_bytes(text.encode("latin1"))
    with pytest.raises(ValueError, match=r"actsparse\.json: (not whole JSON|sidecar)"):
        load(folder)


def rewrite(folder: Path, **changes: Any) -> None:
    file = folder / "actsparse.json"
    file.write_text(json.dumps(json.loads(file.read_text()) | changes))


def made_of(**modification: Any) -> dict[str, Any]:
    return {"name": "x", "modifications": [modification]}


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        (dict(format=99), "format 99; this version reads 1"),
        (dict(recipe=[1]), "sidecar.recipe must be an object"),
        (dict(state=None), "sidecar.state must be an object"),
        (dict(blocks="all"), "sidecar.blocks must be a list"),
        (dict(model=7), "sidecar.model must be an object"),
        (dict(state={"step": 1}), "sidecar.state lacks 'steps'"),
        (dict(recipe={"name": "x"}), "sidecar.recipe lacks 'modifications'"),
        (dict(recipe=made_of(kind="NormFloor")), r"modifications\[0\] lacks 'modification'"),
        (dict(recipe=made_of(modification="Dropconnect")), "unknown modification 'Dropconnect'"),
        (dict(recipe=made_of(modification="FlatnessPenalty")), "unknown modification 'Flatness"),
        (
            dict(recipe=made_of(modification="ActivationPenalty", kind="hoyer_root")),
            "unknown penalty 'hoyer_root'; known: hoyer, l1",
        ),
        (
            dict(recipe=made_of(modification="ActivationPenalty", release=0.5)),
            "unknown field 'release'; known: kind",
        ),
        (dict(recipe=made_of(modification="NormFloor", c=1)), "unknown field 'c'; known: floor"),
        (dict(blocks=["transformer.h.0.mlp.c_fc"], widths=[40]), "does not fit the model"),
        (dict(widths=None), "sidecar.widths must be a list; got None"),
        (dict(widths=[40]), r"widths must be a list of 2, .*got \[40\]"),
        (dict(widths=[40, "wide"]), r"widths\[1\] must be a whole number.*'wide'"),
        (dict(widths=[40, 0]), r"blocks of \[40, 0\] hidden units, GPT2LMHeadModel of \[40, 40\]"),
        (dict(widths=[40, 39]), "does not fit the model"),
        (dict(thresholds=[0.5]), r"thresholds must be a list of 2, .*got \[0.5\]"),
        (dict(thresholds=[0, -0.5]), r"thresholds\[1\] must be a finite number, 0 or more"),
        (dict(blocks=["encoder.0.fc1"]), "MLP blocks"),
        (dict(model=None), "model="),
        (dict(model={}), "sidecar.model lacks 'class'"),
        (dict(model=MODEL | {"class": "Trainer"}), "'Trainer' is not a model class"),
        (dict(model=MODEL | {"class": "os.system"}), "is not a model class"),
        (dict(model=MODEL | {"config": {"n_embd": "wide"}}), "cannot build"),
    ],
    ids=str,
)  # fmt: skip
def test_a_sidecar_that_does_not_make_sense_says_where(
    folder: Path, changes: dict[str, Any], message: str
) -> None:
    rewrite(folder, **changes)
    with pytest.raises(ValueError, match=message):
        load(folder)


def test_weights_of_another_model_do_not_load_and_leave_it_plain(folder: Path) -> None:
    other, _ = built("gpt2")
    other.config.n_inner = 32
    model = type(other)(other.config)
    names = [name for name, _ in model.named_modules()]
    with pytest.raises(ValueError, match="does not fit the model"):
        load(folder, model=model)
    assert handle_of(model) is None
    assert [name for name, _ in model.named_modules()] == names
    other.config.n_inner, other.config.n_embd = 48, 32  # wide enough to be one that was pruned
    model = type(other)(other.config)
    with pytest.raises(ValueError, match="does not fit the model"):
        load(folder, model=model)
    assert model.transformer.h[0].mlp.c_fc.weight.shape == (32, 48)
    other.config.n_layer = 1
    shallow = hf.GPT2LMHeadModel(other.config)
    with pytest.raises(ValueError, match="MLP blocks"):
        load(folder, model=shallow)


def test_a_sparsified_model_is_not_loaded_into(folder: Path) -> None:
    model, _, handle = half_trained("gpt2")
    with pytest.raises(ValueError, match="sparsified already"):
        load(folder, model=model)
    assert handle_of(model) is handle


def test_loading_runs_no_code_from_the_folder(folder: Path) -> None:
    """Everything is JSON and safetensors: a config that asks for remote code gets none."""
    spec = json.loads((folder / "actsparse.json").read_text())["model"]
    spec["config"]["auto_map"] = {"AutoModel": "evil.Model", "AutoConfig": "evil.Config"}
    rewrite(folder, model=spec)
    (folder / "evil.py").write_text("raise SystemExit('ran')")
    assert type(load(folder)).__name__ == "GPT2LMHeadModel"


# --- recipes as JSON ---------------------------------------------------------------------------


@pytest.mark.parametrize(
    "recipe",
    [RECIPE, *(Recipe(name, (SwapActivation(name),)) for name in sorted(ACTIVATIONS)),
     Recipe("both", (WeightNoise(layers=("up", "down")),)), Recipe("none")],
    ids=lambda recipe: recipe.name,
)  # fmt: skip
def test_a_recipe_survives_json(recipe: Recipe) -> None:
    again = Recipe.from_json(json.loads(json.dumps(recipe.to_json())))
    assert again == recipe
    assert hash(again) == hash(recipe)


def test_an_option_that_no_longer_exists_is_read_where_it_was_not_set() -> None:
    """Recipes of 2026 have ``"release": null``."""
    penalty = ActivationPenalty("l1", ramp=0.5)
    values = Recipe("old", (penalty,)).to_json()
    values["modifications"][0]["release"] = None
    assert Recipe.from_json(values) == Recipe("old", (penalty,))
    values["modifications"][0]["kind"] = None  # which exists
    with pytest.raises(ValueError, match="kind=None"):
        Recipe.from_json(values)

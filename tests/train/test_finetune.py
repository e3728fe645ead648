"""Finetuning for sparsity through a run: from a checkpoint, whole or with adapters."""

from __future__ import annotations

import json
import signal
from pathlib import Path
from typing import Any

import pytest
import safetensors.torch
import torch
from torch import Tensor
from typer.testing import CliRunner

from actsparse import handle_of, load
from actsparse.cli.main import app
from actsparse_lab.data import load_digits_splits
from actsparse_lab.engine.interrupt import Interrupted
from actsparse_lab.engine.run import run
from actsparse_lab.engine.start import model_from
from actsparse_lab.engine.tasks import task_of
from actsparse_lab.records import Run, run_path
from actsparse_lab.tasks import run_config

TINY: dict[str, Any] = {"steps": 9, "batch_size": 8, "log_every": 4, "eval_every": 5}
LORA = {"r": 2, "targets": "all-linear", "keep": ["classifier"]}


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> Run:
    """A vanilla run with GELU, a few steps long."""
    out = tmp_path_factory.mktemp("base")
    config = run_config("digits", "vanilla", 0, **TINY, model={"hidden_act": "gelu"})
    return run(config, out)


def start(base: Run) -> str:
    return str(base.path.parent / "weights")


def weights(done: Run) -> dict[str, Tensor]:
    return safetensors.torch.load_file(done.path.parent / "weights" / "model.safetensors")


def test_finetuning_begins_where_training_ended(base: Run, tmp_path: Path) -> None:
    arm = "paper-finetune"
    done = run(run_config("digits_finetune", arm, 0, **TINY, start=start(base)), tmp_path)
    assert base.result is not None
    assert done.result is not None
    same = ("loss", "quality", "inference")
    assert done.result["before"] == {name: base.result[name] for name in same}
    assert done.result["before"]["inference"]["density"] > 0.99  # GELU
    assert done.evals[0]["step"] == 0
    trained = load(done.path.parent / "weights")
    handle = handle_of(trained)
    assert handle is not None
    assert handle.recipe.name == "paper-finetune"
    assert handle.step == TINY["steps"]
    # mixing ended at a third of the steps: ReLU's half plane is silent
    assert done.result["inference"]["density"] < 0.7


def test_plain_finetuning_is_the_control(base: Run, tmp_path: Path) -> None:
    done = run(run_config("digits_finetune", "vanilla", 0, **TINY, start=start(base)), tmp_path)
    before, after = (load(path.parent / "weights").state_dict() for path in (base.path, done.path))
    assert before.keys() == after.keys()
    assert any(not torch.equal(before[name], after[name]) for name in before)
    assert done.result is not None
    assert done.result["inference"]["density"] > 0.99


def test_with_adapters_what_peft_freezes_stays_and_the_rest_learns(
    base: Run, tmp_path: Path
) -> None:
    pytest.importorskip("peft")
    config = run_config(
        "digits_finetune", "paper-finetune", 0, **TINY, start=start(base), lora=LORA
    )
    done = run(config, tmp_path)
    plain, tuned = load(base.path.parent / "weights").state_dict(), weights(done)

    def moved(ending: str) -> set[bool]:
        return {
            not torch.equal(value, plain[name])
            for name, value in ((_plain(each), tuned[each]) for each in tuned)
            if name in plain and name.endswith(ending)
        }

    assert moved("mlp.fc1.weight") == {False}  # frozen
    kept = [name for name in tuned if "modules_to_save" in name]
    assert any("classifier" in name for name in kept)
    assert any("layernorm" in name or "layer_norm" in name for name in kept)
    biases = [value for name, value in tuned.items() if name.endswith("zeroth_bias")]
    assert len(biases) == 2
    assert all(bool(value.ne(0).any()) for value in biases)
    twin = load(done.path.parent / "weights")
    row = load_digits_splits().test[0]["pixel_values"][None]
    assert twin(pixel_values=row).logits.isfinite().all()


def _plain(name: str) -> str:
    return name.removeprefix("base_model.model.").replace(".base_layer", "")


def test_a_stopped_finetuning_with_adapters_goes_on_exactly(base: Run, tmp_path: Path) -> None:
    pytest.importorskip("peft")
    settings = {**TINY, "start": start(base), "lora": LORA, "measures": ("flatness",)}
    config = run_config("digits_finetune", "paper-finetune", 0, **settings)
    whole = run(config, tmp_path / "whole")

    def tell(step: int) -> None:
        if step == 4:
            signal.raise_signal(signal.SIGTERM)

    with pytest.raises(Interrupted):
        run(config, tmp_path / "stopped", on_step=tell)
    done = run(config, tmp_path / "stopped")
    one, two = weights(whole), weights(done)
    assert one.keys() == two.keys()
    assert all(torch.equal(one[name], two[name]) for name in one)
    lines = [
        [
            {key: value for key, value in json.loads(line).items() if key not in ("time", "run_id")}
            for line in each.path.read_text().splitlines()
        ]
        for each in (whole, done)
    ]
    assert lines[0] == lines[1]


def test_a_plain_checkpoint_of_transformers_is_a_start_too(tmp_path: Path) -> None:
    config = run_config("digits", "vanilla", 0)
    task_of("digits").model(config, {"classes": 10}).save_pretrained(tmp_path / "hf")
    settings = {**TINY, "start": str(tmp_path / "hf")}
    done = run(run_config("digits_finetune", "hoyer-finetune", 0, **settings), tmp_path / "out")
    assert done.result is not None
    assert done.result["before"]["quality"] < 0.5


def test_what_cannot_be_started_from_is_said_before_anything_is_written(
    base: Run, tmp_path: Path
) -> None:
    paper = run(run_config("digits", "paper", 0, **TINY), tmp_path / "paper")
    with pytest.raises(ValueError, match="recipe 'paper'; finetuning starts from a plain one"):
        model_from(paper.path.parent / "weights")
    (tmp_path / "empty").mkdir()
    with pytest.raises(ValueError, match=r"empty is no model: it holds neither"):
        model_from(tmp_path / "empty")
    with pytest.raises(ValueError, match="digits_finetune finetunes a checkpoint: say which"):
        run_config("digits_finetune", "vanilla", 0)
    config = run_config("lm_finetune", "vanilla", 0, **TINY, start=start(base))
    with pytest.raises(ValueError, match="does not run on the data of lm_finetune"):
        run(config, tmp_path / "out")
    pytest.importorskip("peft")
    wrong = LORA | {"targets": ["query", "colour"]}
    config = run_config("digits_finetune", "vanilla", 0, **TINY, start=start(base), lora=wrong)
    with pytest.raises(ValueError, match="colour"):
        run(config, tmp_path / "out")
    assert not run_path(tmp_path / "out", "vanilla", 0).exists()


def test_a_model_that_does_not_fit_the_data_is_said_so(base: Run, tmp_path: Path) -> None:
    wide = task_of("digits").model(run_config("digits", "vanilla", 0), {"classes": 10})
    wide.config.num_labels = 12
    wide.classifier = torch.nn.Linear(wide.classifier.in_features, 12)
    wide.save_pretrained(tmp_path / "wide")
    config = run_config("digits_finetune", "vanilla", 0, **TINY, start=str(tmp_path / "wide"))
    with pytest.raises(ValueError, match="tells 12 classes apart, the data have 10"):
        run(config, tmp_path)
    half = (
        task_of("digits")
        .model(run_config("digits", "vanilla", 0), {"classes": 10})
        .to(torch.bfloat16)
    )
    half.save_pretrained(tmp_path / "half")
    assert {each.dtype for each in model_from(tmp_path / "half").parameters()} == {torch.float32}


def test_what_adapters_learnt_is_part_of_the_start(base: Run, tmp_path: Path) -> None:
    pytest.importorskip("peft")
    settings = {**TINY, "start": start(base), "lora": LORA}
    tuned = run(run_config("digits_finetune", "vanilla", 0, **settings), tmp_path)
    model = model_from(tuned.path.parent / "weights")
    assert type(model).__name__ == "BeitForImageClassification"
    assert all(each.requires_grad for each in model.parameters())
    twin = load(tuned.path.parent / "weights")
    rows = torch.stack([load_digits_splits().test[index]["pixel_values"] for index in range(8)])
    with torch.no_grad():
        one, two = (each.eval()(pixel_values=rows).logits for each in (model, twin))
    # merging adds weights before their product instead of products: float32 through some 12 layers
    assert (one - two).abs().max() < 12 * 48 * torch.finfo(torch.float32).eps * two.abs().max()


def test_the_seed_stands_in_the_path_and_the_command_takes_it(base: Run, tmp_path: Path) -> None:
    path = start(base).replace("vanilla-seed0", "vanilla-seed{seed}")
    assert "{seed}" in path
    words = ["train", "--task", "digits_finetune", "--arm", "vanilla", "--set", f"start={path}"]
    words += ["--steps", "3", "--set", "batch_size=8", "--out", str(tmp_path)]
    done = CliRunner().invoke(app, words)
    assert done.exit_code == 0, done.output
    header = json.loads(run_path(tmp_path, "vanilla", 0).read_text().splitlines()[0])
    assert header["config"]["start"] == start(base)
    card = (tmp_path / "runs" / "vanilla-seed0" / "README.md").read_text()
    assert "vanilla-seed0/weights" in card

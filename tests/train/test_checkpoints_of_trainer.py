"""What a Trainer writes of a sparsified model: read back, resumed, and refused as a plain model."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import peft
import pytest
import torch
from torch import Tensor
from transformers import GPT2Config, GPT2LMHeadModel, Trainer, TrainingArguments

from actsparse import Handle, load, load_adapter, lora_config, sparsify
from actsparse.train import SparsityCallback
from tests.modify.test_copies import own

IDS = torch.randint(1, 40, (32, 12), generator=torch.Generator().manual_seed(0))
ROWS = [{"input_ids": row, "labels": row} for row in IDS]
BATCH = {"input_ids": IDS[:2]}


def gpt2() -> GPT2LMHeadModel:
    torch.manual_seed(0)
    config = GPT2Config(
        n_embd=16, n_layer=2, n_head=2, vocab_size=40, n_positions=16,
        bos_token_id=0, eos_token_id=0,
    )  # fmt: skip
    return GPT2LMHeadModel(config)


def trainer(model: Any, out: Path, handle: Handle, steps: int = 6, **options: Any) -> Trainer:
    arguments = TrainingArguments(
        str(out), max_steps=steps, save_steps=2, per_device_train_batch_size=8, report_to=[],
        learning_rate=1e-2, use_cpu=True, disable_tqdm=True, **options,
    )  # fmt: skip
    return Trainer(
        model,
        arguments,
        train_dataset=ROWS,  # type: ignore[arg-type]
        eval_dataset=ROWS,  # type: ignore[arg-type]
        callbacks=[SparsityCallback(handle)],
    )


@torch.no_grad()
def logits(model: Any) -> Tensor:
    found: Tensor = model.eval()(**BATCH).logits
    return found


@pytest.mark.parametrize("recipe", ["best", "paper-finetune", "vanilla"])
def test_every_checkpoint_is_read_by_load(recipe: str, tmp_path: Path) -> None:
    model = gpt2()
    handle = sparsify(model, recipe, inputs=BATCH)
    trainer(model, tmp_path, handle).train()
    assert torch.equal(logits(load(tmp_path / "checkpoint-6")), logits(model))
    early = own(load(tmp_path / "checkpoint-2"))
    assert early.state_dict()["step"] == 2
    assert early.recipe == handle.recipe


def test_what_trainer_saves_at_the_end_is_read_by_load_and_no_plain_model(tmp_path: Path) -> None:
    model = gpt2()
    run = trainer(model, tmp_path / "run", sparsify(model, "paper-finetune", inputs=BATCH))
    run.train()
    run.save_model(str(tmp_path / "final"))
    assert torch.equal(logits(load(tmp_path / "final")), logits(model))
    for folder in (tmp_path / "final", tmp_path / "run" / "checkpoint-6"):
        with pytest.raises(AttributeError, match=r"load this folder with actsparse\.load"):
            GPT2LMHeadModel.from_pretrained(folder)


@pytest.mark.parametrize("again", [False, True])
@pytest.mark.filterwarnings("ignore:the recipe's schedules are at step")
def test_training_resumes_where_its_schedules_stood(again: bool, tmp_path: Path) -> None:
    whole = gpt2()
    handle = sparsify(whole, "paper-finetune", inputs=BATCH)
    run = trainer(whole, tmp_path, handle)
    run.train()
    model = whole if again else gpt2()
    theirs = handle if again else sparsify(model, "paper-finetune", inputs=BATCH)
    want = logits(whole)
    trainer(model, tmp_path, theirs).train(resume_from_checkpoint=str(tmp_path / "checkpoint-2"))
    assert torch.equal(logits(model), want)
    assert theirs.state_dict() == {"step": 6, "steps": 6}


def test_the_best_model_comes_back_with_its_schedules(tmp_path: Path) -> None:
    model = gpt2()
    handle = sparsify(model, "paper-finetune", inputs=BATCH)
    ranks = iter(range(0, -100, -1))  # the first evaluation is the best
    run = trainer(
        model, tmp_path, handle, steps=12, eval_strategy="steps", eval_steps=2,
        load_best_model_at_end=True, metric_for_best_model="rank", greater_is_better=True,
    )  # fmt: skip
    run.compute_metrics = lambda prediction: {"rank": next(ranks)}
    run.train()
    assert handle.step == 2
    logged = [line["eval_loss"] for line in run.state.log_history if "eval_loss" in line]
    assert run.evaluate()["eval_loss"] == pytest.approx(logged[0], abs=1e-7)


def test_a_second_training_goes_on_where_schedules_stand_and_says_so(tmp_path: Path) -> None:
    model = gpt2()
    handle = sparsify(model, "paper-finetune", inputs=BATCH)
    run = trainer(model, tmp_path, handle)
    run.train()
    before = logits(model)
    with pytest.warns(UserWarning, match="are at step 6 .* go on from there, as they are compl"):
        run.train()
    assert handle.state_dict() == {"step": 12, "steps": 6}
    assert not torch.equal(logits(model), before)
    handle.load_state_dict({"step": 3, "steps": 6})
    with pytest.warns(UserWarning, match=r"are at step 3 .* to 9; to begin them again"):
        run.train()
    assert handle.state_dict() == {"step": 9, "steps": 9}
    handle.load_state_dict({"step": 0, "steps": None})
    run.train()
    assert handle.state_dict() == {"step": 6, "steps": 6}


def test_a_model_that_trainer_makes_anew_needs_a_handle_of_its_own(tmp_path: Path) -> None:
    first = gpt2()
    handle = sparsify(first, "paper", inputs=BATCH)
    run = trainer(first, tmp_path, handle)
    run.model_init = lambda: gpt2()
    with pytest.raises(ValueError, match="call sparsify inside model_init"):
        run.train()

    def make() -> GPT2LMHeadModel:
        model = gpt2()
        sparsify(model, "paper", inputs=BATCH)
        return model

    run.model_init = make
    run.train()
    assert own(run.model).step == 6
    assert handle.step == 0


def test_checkpoints_of_an_adapter_are_read_by_load_adapter(tmp_path: Path) -> None:
    base = gpt2()
    model = peft.get_peft_model(base, lora_config(base, BATCH, r=4))
    handle = sparsify(model, "paper-finetune", inputs=BATCH)
    run = trainer(
        model, tmp_path, handle, eval_strategy="steps", eval_steps=2, load_best_model_at_end=True,
        metric_for_best_model="loss", greater_is_better=True,
    )  # fmt: skip
    with pytest.warns(UserWarning, match="do not say where"):
        run.train()  # loads the best adapter, which holds no buffer
    best = Path(run.state.best_model_checkpoint or "")
    assert handle.step == int(best.name.removeprefix("checkpoint-")) < 6
    twin = load_adapter(gpt2(), best)
    assert torch.equal(logits(twin), logits(model))
    assert own(twin).state_dict() == handle.state_dict()


def test_a_recipe_that_no_file_can_hold_does_not_stop_training(tmp_path: Path) -> None:
    from actsparse import SwapActivation
    from actsparse.activations import ActivationFunction, named

    relu = named("relu")
    mine = ActivationFunction("mine", relu.value, relu.derivative)
    model = gpt2()
    handle = sparsify(model, SwapActivation(mine), inputs=BATCH)
    with pytest.warns(UserWarning, match="checkpoints do not carry the recipe: .* of your own"):
        trainer(model, tmp_path, handle, steps=2).train()
    note = json.loads((tmp_path / "checkpoint-2" / "config.json").read_text())
    assert note["quantization_config"]["quant_method"] == "actsparse"
    with pytest.raises(ValueError, match=r"cannot say how its model was changed: .* of your own"):
        load(tmp_path / "checkpoint-2")

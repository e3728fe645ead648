"""Trackers get the curves of density: in training, and of each evaluation."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn
from transformers import GPT2Config, GPT2LMHeadModel, Trainer, TrainerCallback, TrainingArguments
from transformers.integrations import TensorBoardCallback

from actsparse.modify import sparsify
from actsparse.observe import observe
from actsparse.train import SparsityCallback
from actsparse_lab.data import TensorRows
from actsparse_lab.records import RecordWriter, environment


def gpt2() -> GPT2LMHeadModel:
    torch.manual_seed(0)
    config = GPT2Config(
        vocab_size=20, n_positions=8, n_embd=8, n_layer=2, n_head=2, activation_function="relu",
        bos_token_id=1, eos_token_id=1,
    )  # fmt: skip
    return GPT2LMHeadModel(config)


def rows(count: int) -> TensorRows:
    ids = torch.randint(20, (count, 8), generator=torch.Generator().manual_seed(1))
    return TensorRows(input_ids=ids, labels=ids)


class Tracker(TrainerCallback):
    """Stands where Trainer's trackers stand."""

    def __init__(self) -> None:
        self.logs: list[dict[str, Any]] = []

    def on_log(self, args: Any, state: Any, control: Any, logs: Any = None, **kwargs: Any) -> None:
        self.logs.append({**logs, "step": state.global_step})


def trained(
    model: nn.Module, folder: Path, callbacks: list[Any], steps: int = 60, **settings: Any
) -> Trainer:
    """A Trainer that has made so many steps; 0: none yet."""
    arguments = {
        "output_dir": str(folder), "max_steps": steps, "logging_steps": 10,
        "eval_strategy": "steps", "eval_steps": 20, "report_to": "none", "disable_tqdm": True,
        "save_strategy": "no", "per_device_train_batch_size": 4, "learning_rate": 1e-2,
        "dataloader_pin_memory": False,
    } | settings  # fmt: skip
    made = Trainer(
        model,
        TrainingArguments(**arguments),
        train_dataset=rows(32),
        eval_dataset=rows(8),
        callbacks=callbacks,
    )
    if steps:
        made.train()
    return made


def test_tensorboard_shows_the_curves_of_density(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    monkeypatch.setenv("TENSORBOARD_LOGGING_DIR", str(tmp_path / "events"))
    model = gpt2()
    handle = sparsify(model, inputs=dict(rows(2).columns))
    trainer = trained(model, tmp_path, [SparsityCallback(handle)], report_to="tensorboard")
    assert any(isinstance(c, TensorBoardCallback) for c in trainer.callback_handler.callbacks)
    events = EventAccumulator(str(tmp_path / "events")).Reload()
    for name, steps in (
        ("train/density", [10, 20, 30, 40, 50, 60]),
        ("eval/density", [20, 40, 60]),
        ("train/dead_units", [10, 20, 30, 40, 50, 60]),
        ("eval/dead_units", [20, 40, 60]),
    ):
        assert [event.step for event in events.Scalars(name)] == steps, name
    density = [event.value for event in events.Scalars("train/density")]
    assert all(0 < each < 1 for each in density)
    assert len(set(density)) == 6  # each of its own steps, no average of all
    said = [line["density"] for line in trainer.state.log_history if "density" in line]
    assert said == pytest.approx(density)


def test_each_log_is_of_the_steps_since_the_last_also_where_seen_counts_on(tmp_path: Path) -> None:
    model = gpt2()
    handle = sparsify(model, "vanilla", inputs=dict(rows(2).columns))
    tracker = Tracker()
    with observe(model) as seen:
        trained(model, tmp_path, [tracker, SparsityCallback(handle, seen)], steps=20)
        whole = seen.summary("train")
    assert whole is not None
    parts = [each["density"] for each in tracker.logs if "density" in each]
    assert len(parts) == 2
    assert parts[0] != parts[1]
    assert whole["density"] == pytest.approx(sum(parts) / 2)


def test_with_a_record_logs_and_lines_say_the_same(tmp_path: Path) -> None:
    from actsparse_lab.records import read_run

    model = gpt2()
    handle = sparsify(model, "vanilla", inputs=dict(rows(2).columns))
    header = {"task": "t", "arm": "a", "seed": 0, "config": {}, **environment()}
    tracker = Tracker()
    with RecordWriter(tmp_path / "record.jsonl", header) as record, observe(model) as seen:
        trained(model, tmp_path, [tracker, SparsityCallback(handle, seen, record)], steps=20)
    run = read_run(tmp_path / "record.jsonl")
    logged = [each["density"] for each in tracker.logs if "density" in each]
    assert logged == [line["measures"]["density"] for line in run.train]
    (of_evaluation,) = [each["eval_density"] for each in tracker.logs if "eval_density" in each]
    assert [line["measures"]["density"] for line in run.evals] == [of_evaluation]


def test_the_density_of_an_evaluation_can_choose_the_best_checkpoint(tmp_path: Path) -> None:
    model = gpt2()
    handle = sparsify(model, inputs=dict(rows(2).columns))
    trainer = trained(
        model, tmp_path, [SparsityCallback(handle)], steps=40, save_strategy="steps",
        save_steps=20, load_best_model_at_end=True, metric_for_best_model="eval_density",
        greater_is_better=False,
    )  # fmt: skip
    found = [line["eval_density"] for line in trainer.state.log_history if "eval_density" in line]
    assert trainer.state.best_metric == min(found)


def test_what_is_logged_for_trackers_does_not_keep_accelerated_blocks_dense(tmp_path: Path) -> None:
    model = gpt2()
    handle = sparsify(model, "vanilla", inputs=dict(rows(2).columns))
    tracker = Tracker()
    callback = SparsityCallback(handle, accelerate="sparse")
    trained(model, tmp_path, [tracker, callback], steps=10, logging_steps=1)
    assert callback.accelerated is not None
    assert set(callback.accelerated.ran().values()) == {"sparse"}
    assert not any("density" in each for each in tracker.logs)


def test_a_callback_that_is_added_later_comes_before_trackers_too(tmp_path: Path) -> None:
    model = gpt2()
    handle = sparsify(model, "vanilla", inputs=dict(rows(2).columns))
    tracker = Tracker()

    class Later(TrainerCallback):
        def on_log(self, *args: Any, logs: Any = None, **kwargs: Any) -> None:
            assert "loss" not in logs or "density" in logs

    trainer = trained(model, tmp_path, [tracker, Later], steps=0)
    trainer.args.max_steps = 10
    trainer.add_callback(SparsityCallback(handle))
    trainer.train()
    assert any("density" in each for each in tracker.logs)
    assert type(trainer.callback_handler.callbacks[0]).__name__ == "DefaultFlowCallback"


def test_after_training_nothing_is_observed(tmp_path: Path) -> None:
    model = gpt2()
    handle = sparsify(model, "vanilla", inputs=dict(rows(2).columns))
    trainer = trained(model, tmp_path, [SparsityCallback(handle)], steps=10)
    assert "eval_density" not in trainer.evaluate()

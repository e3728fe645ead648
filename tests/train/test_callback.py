"""The callback on a Trainer of one's own: the penalty joins the loss whole, and nothing is lost."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from transformers import (
    BeitConfig,
    BeitForImageClassification,
    GPT2Config,
    GPT2LMHeadModel,
    Trainer,
    TrainingArguments,
)

from actsparse.modify import ActivationPenalty, ZerothBias, sparsify
from actsparse.observe import measure, observe
from actsparse.train import SparsityCallback, TrainingFailed
from actsparse_lab.data import TensorRows
from actsparse_lab.records import RecordWriter, Run, environment, read_run

PENALTY = ActivationPenalty("l1", weight=10.0)


def gpt2() -> GPT2LMHeadModel:
    """Trainer leaves the averaging of its loss to the model: it takes num_items_in_batch."""
    torch.manual_seed(0)
    config = GPT2Config(
        vocab_size=20, n_positions=8, n_embd=8, n_layer=2, n_head=2, activation_function="relu",
        resid_pdrop=0.0, embd_pdrop=0.0, attn_pdrop=0.0, bos_token_id=1, eos_token_id=1,
    )  # fmt: skip
    model = GPT2LMHeadModel(config).double()
    model.loss_type = "ForCausalLM"  # or Trainer counts first bytes, which nothing predicts
    return model


class Plain(nn.Module):
    """Trainer divides its loss by the number of accumulated batches itself."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.body = nn.Sequential(nn.Linear(8, 16), nn.ReLU(), nn.Linear(16, 8)).double()
        self.head = nn.Linear(8, 3).double()

    def forward(self, x: Tensor, labels: Tensor | None = None) -> dict[str, Tensor]:
        logits = self.head(self.body(x) + x)
        if labels is None:
            return {"logits": logits}
        return {"loss": nn.functional.cross_entropy(logits, labels), "logits": logits}


def rows(model: nn.Module, count: int) -> TensorRows:
    generator = torch.Generator().manual_seed(1)
    if isinstance(model, Plain):
        return TensorRows(
            x=torch.randn(count, 8, dtype=torch.float64, generator=generator),
            labels=torch.randint(3, (count,), generator=generator),
        )
    ids = torch.randint(20, (count, 8), generator=generator)
    return TensorRows(input_ids=ids, labels=ids)


def trainer(model: nn.Module, folder: Path, callbacks: list[Any], **settings: Any) -> Trainer:
    arguments = {
        "output_dir": str(folder), "max_steps": 1, "report_to": "none", "disable_tqdm": True,
        "save_strategy": "no", "max_grad_norm": 0.0, "learning_rate": 1.0, "lr_scheduler_type":
        "constant", "train_sampling_strategy": "sequential", "remove_unused_columns": False,
        "dataloader_pin_memory": False, "logging_steps": 1,
    } | settings  # fmt: skip
    optimizer = torch.optim.SGD(model.parameters(), lr=1.0)
    schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: 1.0)
    count = arguments["per_device_train_batch_size"] * settings.get(
        "gradient_accumulation_steps", 1
    )
    return Trainer(
        model,
        TrainingArguments(**arguments),
        train_dataset=rows(model, settings.pop("rows", count)),
        optimizers=(optimizer, schedule),
        callbacks=callbacks,
    )


def step(model: nn.Module, folder: Path, batch: int, accumulate: int) -> dict[str, Tensor]:
    """The weights after one step of SGD with rate 1 on 8 rows."""
    batch_rows = rows(model, batch)
    handle = sparsify(model, PENALTY, inputs=dict(batch_rows.columns))
    trainer(
        model,
        folder,
        [SparsityCallback(handle)],
        per_device_train_batch_size=batch,
        gradient_accumulation_steps=accumulate,
    ).train()
    return {name: value.clone() for name, value in model.state_dict().items()}


@pytest.mark.parametrize("build", [gpt2, Plain])
def test_the_penalty_under_accumulation_gives_the_gradient_of_the_whole_batch(
    build: Any, tmp_path: Path
) -> None:
    start = {name: value.clone() for name, value in build().state_dict().items()}
    whole = step(build(), tmp_path, batch=8, accumulate=1)
    parts = step(build(), tmp_path, batch=2, accumulate=4)
    by_hand = build()
    handle = sparsify(by_hand, PENALTY, inputs=dict(rows(by_hand, 8).columns))
    output = by_hand(**rows(by_hand, 8).columns)
    (output["loss"] + handle.penalty()).backward()
    for name, parameter in by_hand.named_parameters():
        assert parameter.grad is not None
        expected = start[name] - parameter.grad
        torch.testing.assert_close(whole[name], expected, rtol=0, atol=1e-10)
        torch.testing.assert_close(parts[name], expected, rtol=0, atol=1e-10)


@pytest.mark.parametrize("build", [gpt2, Plain])
def test_the_last_step_of_an_epoch_averages_over_the_batches_it_has(
    build: Any, tmp_path: Path
) -> None:
    seen: list[int] = []
    model = build()
    handle = sparsify(model, PENALTY, inputs=dict(rows(model, 2).columns))
    callback = SparsityCallback(handle, on_step=lambda step: seen.append(callback.joined.group))
    engine = trainer(
        model, tmp_path, [callback], per_device_train_batch_size=2,
        gradient_accumulation_steps=3, max_steps=4,
    )  # fmt: skip
    engine.train_dataset = rows(model, 10)  # 5 batches: 3 and 2, and again
    engine.train()
    assert seen == [3, 2, 3, 2]


def test_a_train_line_holds_the_loss_without_the_penalty_and_the_penalty(tmp_path: Path) -> None:
    model = gpt2()
    handle = sparsify(model, PENALTY, inputs=dict(rows(model, 2).columns))
    output = model.train()(**rows(model, 8).columns)
    loss, penalty = output.loss.item(), handle.penalty().item()
    path = tmp_path / "record.jsonl"
    header = {"task": "t", "arm": "a", "seed": 0, "config": {}, **environment()}
    with (
        RecordWriter(path, header) as record,
        observe(model, blocks=handle.blocks) as seen,
    ):
        callback = SparsityCallback(handle, seen, record)
        trainer(
            model, tmp_path, [callback], per_device_train_batch_size=2,
            gradient_accumulation_steps=4,
        ).train()  # fmt: skip
    (line,) = read_run(path).train
    assert line["loss"] == pytest.approx(loss, rel=1e-6)
    assert line["penalty"] == pytest.approx(penalty, rel=1e-6)
    assert line["measures"]["blocks"][0]["tokens"] == 8 * 8


def test_a_penalty_without_a_loss_to_join_is_an_error(tmp_path: Path) -> None:
    model = gpt2()
    handle = sparsify(model, PENALTY, inputs=dict(rows(model, 2).columns))
    engine = trainer(
        model, tmp_path, [SparsityCallback(handle)], per_device_train_batch_size=2,
        label_smoothing_factor=0.1,
    )  # fmt: skip
    with pytest.raises(ValueError, match=r"no loss to join.*label_smoothing_factor"):
        engine.train()


def test_without_a_penalty_label_smoothing_is_none_of_our_business(tmp_path: Path) -> None:
    model = gpt2()
    handle = sparsify(model, "vanilla", inputs=dict(rows(model, 2).columns))
    trainer(
        model, tmp_path, [SparsityCallback(handle)], per_device_train_batch_size=2,
        label_smoothing_factor=0.1,
    ).train()  # fmt: skip


def test_a_nan_stops_before_it_reaches_the_weights(tmp_path: Path) -> None:
    model = Plain()
    data = rows(model, 4)
    handle = sparsify(model, "vanilla", inputs=dict(data.columns))
    data.columns["x"][2:] = torch.nan  # the second batch
    engine = trainer(
        model, tmp_path, [SparsityCallback(handle)], per_device_train_batch_size=2, max_steps=2
    )
    engine.train_dataset = data
    with pytest.raises(TrainingFailed, match="after 1 steps: the loss became nan"):
        engine.train()
    assert all(bool(parameter.isfinite().all()) for parameter in model.parameters())


def test_projections_follow_the_optimizer_inside_accelerate(tmp_path: Path) -> None:
    torch.manual_seed(0)
    config = BeitConfig(
        image_size=4, patch_size=2, num_channels=1, hidden_size=8, num_hidden_layers=1,
        num_attention_heads=2, intermediate_size=16, hidden_act="relu", num_labels=3,
        layer_scale_init_value=0.0, drop_path_rate=0.0,
    )  # fmt: skip
    model = BeitForImageClassification(config)
    pixels, labels = torch.randn(4, 1, 4, 4), torch.randint(3, (4,))
    handle = sparsify(model, "paper", inputs={"pixel_values": pixels})
    engine = trainer(
        model, tmp_path, [SparsityCallback(handle)], per_device_train_batch_size=2, max_steps=3
    )
    engine.train_dataset = TensorRows(pixel_values=pixels, labels=labels)
    engine.train()
    assert handle.step == 3
    norm = handle.blocks[0].norm
    assert norm is not None
    scale = norm.parameter("scale")
    assert scale is not None
    assert scale.min().item() >= 1.0


def test_a_run_resumed_from_a_checkpoint_ends_as_if_it_had_not_stopped(tmp_path: Path) -> None:
    recipe = [ActivationPenalty("l1", weight=10.0, ramp=1.0), ZerothBias(length=8)]
    ends = []
    for checkpoint in (None, str(tmp_path / "checkpoint-2")):
        model = gpt2()
        handle = sparsify(model, recipe, inputs=dict(rows(model, 2).columns))
        engine = trainer(
            model,
            tmp_path,
            [SparsityCallback(handle)],
            per_device_train_batch_size=2,
            max_steps=4,
            save_strategy="steps",
            save_steps=2,
        )
        engine.train_dataset = rows(model, 8)
        engine.train(resume_from_checkpoint=checkpoint)
        assert handle.step == 4
        ends.append(model.state_dict())
    for name, value in ends[0].items():
        torch.testing.assert_close(ends[1][name], value, rtol=0, atol=1e-10)


# --- measures -----------------------------------------------------------------------------------


def beit() -> BeitForImageClassification:
    """Takes num_items_in_batch, and does not heed it."""
    torch.manual_seed(0)
    config = BeitConfig(
        image_size=4, patch_size=2, num_channels=1, hidden_size=8, num_hidden_layers=2,
        num_attention_heads=2, intermediate_size=16, hidden_act="relu", num_labels=3,
        layer_scale_init_value=0.0, drop_path_rate=0.0,
    )  # fmt: skip
    return BeitForImageClassification(config).double()


def pictures() -> TensorRows:
    generator = torch.Generator().manual_seed(1)
    pixels = torch.randn(8, 1, 4, 4, dtype=torch.float64, generator=generator)
    return TensorRows(pixel_values=pixels, labels=torch.randint(3, (8,), generator=generator))


def padded() -> TensorRows:
    """Eight texts of 8 tokens, of which some predict less."""
    ids = rows(gpt2(), 8).columns["input_ids"]
    labels = ids.clone()
    for row in range(8):
        labels[row, 8 - row % 4 :] = -100
    return TensorRows(input_ids=ids, labels=labels)


def observed(model: nn.Module, data: TensorRows, folder: Path, batch: int, **settings: Any) -> Run:
    """The record of SGD on ``data`` with all measures of gradients."""
    path = folder / f"{batch}" / "record.jsonl"
    header = {"task": "t", "arm": "a", "seed": 0, "config": {}, **environment()}
    handle = sparsify(model, "vanilla", inputs={k: v[:2] for k, v in data.columns.items()})
    names = ["density", "flatness", "gradient"]
    with (
        RecordWriter(path, header) as record,
        observe(model, names, blocks=handle.blocks) as seen,
    ):
        callback = SparsityCallback(handle, seen, record, **settings.pop("callback", {}))
        engine = trainer(
            model, folder, [callback], per_device_train_batch_size=batch, **settings
        )  # fmt: skip
        engine.train_dataset = data
        engine.train()
    return read_run(path)


def predict(model: nn.Module, batch: Any) -> tuple[Tensor, Tensor]:
    logits = model(**{key: value for key, value in batch.items() if key != "labels"})["logits"]
    labels = batch["labels"]
    return (logits, labels) if labels.ndim == 1 else (logits[:, :-1], labels[:, 1:])


@pytest.mark.parametrize(
    ("build", "data", "reduction"),
    [
        (gpt2, padded, "sum"),  # Trainer gives it the step's number of items
        (beit, pictures, "sum"),  # to this one too, in vain: over one position all is the same
        (Plain, lambda: rows(Plain(), 8), "mean"),
    ],
)
def test_accumulated_or_not_flatness_is_of_per_sample_losses(
    build: Any, data: Any, reduction: Any, tmp_path: Path
) -> None:
    batch = data().columns
    expected = measure(
        build(), predict, [batch], ["flatness", "gradient"], reduction=reduction,
        inputs={key: value[:2] for key, value in batch.items()},
    ).measures  # fmt: skip
    assert expected is not None
    for size in (8, 4, 2):
        (line,) = observed(
            build(), data(), tmp_path, size, gradient_accumulation_steps=8 // size
        ).train
        found = line["measures"]
        assert found["loss_reduction"] == reduction
        for key in ("flatness", "flatness_down", "gradient_l2", "coefficient", "samples"):
            # Hugging Face takes the cross-entropy of a language model in float32
            assert found[key] == pytest.approx(expected[key], rel=1e-5), (size, key)
        density = found["derivative_density"]
        assert found["density_from_flatness"] == pytest.approx(density, rel=1e-10)


def test_without_measures_of_gradients_no_line_speaks_of_a_loss_reduction(tmp_path: Path) -> None:
    model = Plain()
    handle = sparsify(model, "vanilla", inputs=dict(rows(model, 2).columns))
    header = {"task": "t", "arm": "a", "seed": 0, "config": {}, **environment()}
    with (
        RecordWriter(tmp_path / "record.jsonl", header) as record,
        observe(model, blocks=handle.blocks) as seen,
    ):
        callback = SparsityCallback(handle, seen, record)
        trainer(model, tmp_path, [callback], per_device_train_batch_size=2).train()
    (line,) = read_run(tmp_path / "record.jsonl").train
    assert "loss_reduction" not in line["measures"]


def test_active_measures_come_at_the_start_every_so_often_and_at_the_end(tmp_path: Path) -> None:
    model = Plain()
    batches = [rows(model, 4).columns]

    def active(model: nn.Module) -> Any:
        return measure(model, predict, batches, ["token_copies"], labels="model", probes=2)

    done = observed(
        model, rows(model, 8), tmp_path, 2, max_steps=5,
        callback={"active": active, "active_every": 2, "active_at": (1, 2, 9)},
    )  # fmt: skip
    assert [line["step"] for line in done.measured] == [0, 1, 2, 4, 5]
    assert all(line["curvature"]["token_copies"]["value"] > 0 for line in done.measured)
    assert all(line["how"]["labels"] == "model" for line in done.measured)


def test_a_model_that_cannot_be_measured_has_failed(tmp_path: Path) -> None:
    def active(model: nn.Module) -> Any:
        raise ArithmeticError("the curvature is infinite")

    model = Plain()
    with pytest.raises(TrainingFailed, match="after 0 steps: it cannot be measured: the curv"):
        observed(model, rows(model, 2), tmp_path, 2, callback={"active": active})


def test_the_scale_of_fp16_is_taken_back(tmp_path: Path) -> None:
    """A scaler where Accelerate keeps its own; the losses here are not scaled, so AF is."""
    found = []
    for scale in (1.0, 8.0):
        torch.manual_seed(0)
        model = gpt2()
        handle = sparsify(model, "vanilla", inputs=dict(rows(model, 2).columns))
        with observe(model, "flatness", blocks=handle.blocks) as seen:
            callback = SparsityCallback(handle, seen)

            def as_under_fp16(scale: float = scale, callback: Any = callback) -> None:
                callback.joined.scaler = torch.amp.GradScaler("cpu", init_scale=scale)

            engine = trainer(
                model, tmp_path, [callback], per_device_train_batch_size=4, max_steps=1
            )
            begin = callback.on_train_begin

            def begun(
                *args: Any, begin: Any = begin, set_up: Any = as_under_fp16, **k: Any
            ) -> None:
                begin(*args, **k)
                set_up()

            callback.on_train_begin = begun  # type: ignore[method-assign]
            engine.train()
            summary = seen.summary("train")
            assert summary is not None
            found.append(summary["flatness"])
    assert found[1] == pytest.approx(found[0] / 64, rel=1e-6)

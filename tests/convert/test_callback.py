"""Trainer distils with thresholds in force, by the callback alone."""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import Trainer, TrainingArguments

from actsparse import DropSmall, observe, sparsify
from actsparse.convert import Distillation, DistillationCallback, calibrate
from tests.convert.checkpoints import plain

ROWS = torch.randint(0, 256, (48, 24), generator=torch.Generator().manual_seed(0))


class Rows(torch.utils.data.Dataset):
    def __len__(self) -> int:
        return len(ROWS)

    def __getitem__(self, index: int) -> dict[str, torch.Tensor]:
        labels = ROWS[index].clone()
        labels[:4] = -100
        return {"input_ids": ROWS[index], "labels": labels}


def trained(folder: Path, how: Distillation, **more: Any) -> tuple[Any, Any, list[float]]:
    torch.manual_seed(0)
    teacher = plain("swiglu").eval()
    with torch.no_grad():
        for parameter in teacher.parameters():
            parameter.mul_(3)  # or the blocks hardly matter
    model = copy.deepcopy(teacher)
    sparsify(model, DropSmall(), inputs=ROWS[:1])
    found = calibrate(model, [ROWS[:8]])
    callback = DistillationCallback(found, teacher, how, [ROWS[:8]])
    args = TrainingArguments(
        str(folder), max_steps=30, per_device_train_batch_size=8, learning_rate=1e-3, report_to=[],
        save_strategy="no", logging_steps=1, use_cpu=True, disable_tqdm=True, **more,
    )  # fmt: skip
    trainer = Trainer(model, args, train_dataset=Rows(), callbacks=[callback])
    trainer.train()
    losses = [row["loss"] for row in trainer.state.log_history if "loss" in row]
    return model, teacher, losses


@pytest.mark.parametrize("accumulation", [1, 2])
def test_it_learns_the_teachers_answers_at_the_share(tmp_path: Path, accumulation: int) -> None:
    how = Distillation(share=0.8, tokens=1, start=0.8, ramp=0.0)
    model, teacher, losses = trained(tmp_path, how, gradient_accumulation_steps=accumulation)
    assert 0 < losses[-1] < 0.75 * losses[0]
    with observe(model, inputs=ROWS[:1]) as seen, torch.no_grad():
        own = model.eval()(ROWS).logits[:, 3:-1].log_softmax(-1)
        wanted = teacher(ROWS).logits[:, 3:-1].log_softmax(-1)
    density = seen.summary("inference")["density"]
    assert density == pytest.approx(0.2, abs=0.06)
    kl = (wanted.exp() * (wanted - own)).sum(-1).mean().item()
    assert kl == pytest.approx(losses[-1], rel=0.5)
    assert model(ROWS, labels=ROWS).loss > kl  # its own loss again


def test_the_share_rises_over_trainers_own_steps(tmp_path: Path) -> None:
    put: list[float] = []
    with pytest.MonkeyPatch.context() as patch:
        from actsparse.convert.scores import Calibration

        real = Calibration.put
        patch.setattr(Calibration, "put", lambda c, share: (put.append(share), real(c, share))[1])
        trained(tmp_path, Distillation(share=0.6, tokens=1, start=0.0, ramp=0.5))
    assert put[:31:15] == [0.0, 0.6, 0.6]
    assert put[:16] == sorted(put[:16])


def test_other_losses_and_models_without_labels_are_refused(tmp_path: Path) -> None:
    model = plain("gelu")
    sparsify(model, DropSmall(), inputs=ROWS[:1])
    found = calibrate(model, [ROWS[:1]])
    with pytest.raises(ValueError, match="logits alone"):
        DistillationCallback(found, model, Distillation(share=0.5, tokens=1, loss="text"))
    callback = DistillationCallback(found, model, Distillation(share=0.5, tokens=1))
    with pytest.raises(ValueError, match="needs labels="):
        callback._learn(model.train(), (), {"input_ids": ROWS}, {"logits": ROWS, "loss": None})

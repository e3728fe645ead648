"""A callback with which Hugging Face's Trainer distils a model with thresholds in force."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor, nn
from transformers import TrainerCallback, TrainerControl, TrainerState, TrainingArguments

from actsparse.convert.distillation import Distillation
from actsparse.convert.distillation_loss import divergence
from actsparse.convert.scores import Calibration, calibrate

IGNORED = -100  # the label of positions that count nowhere


class DistillationCallback(TrainerCallback):
    """A callback with which Trainer distils a causal language model on its dense teacher.

    ``Trainer(model, args, callbacks=[DistillationCallback(calibration, teacher, how)], ...)`` is
    enough. Before each step thresholds are set to the share that ``how`` says for it, over all
    steps of the training. In training mode the model's own ``loss`` becomes the mean of KL(teacher
    ‖ student) over the labels that are predicted, in nats. Trainer's optimizer, learning rate and
    checkpoints stay as they are; evaluations have the model's own loss, at the share of then.

    Args:
        calibration: what :func:`actsparse.convert.calibrate` returned of the model.
        teacher: the dense model, on the model's device.
        how: the shares: ``share``, ``start`` and ``ramp``; the rest is Trainer's.
        batches: inputs of the model, on which thresholds are calibrated anew ten times after the
            rise, since activations change in training. None: they stay at the first calibration.

    Raises:
        ValueError: ``how.loss`` is not ``"logits"``.

    >>> from torch import arange
    >>> from transformers import GPT2Config, GPT2LMHeadModel
    >>> from actsparse import DropSmall, sparsify
    >>> config = GPT2Config(vocab_size=8, n_positions=8, n_embd=8, n_layer=1, n_head=1)
    >>> model, teacher = GPT2LMHeadModel(config), GPT2LMHeadModel(config)
    >>> handle = sparsify(model, DropSmall(), inputs=arange(4)[None])
    >>> found = calibrate(model, [arange(8)[None]])
    >>> callback = DistillationCallback(found, teacher, Distillation(share=0.6, tokens=1))
    >>> callback.how.share
    0.6
    >>> callback.close()  # as after training
    """

    def __init__(
        self,
        calibration: Calibration,
        teacher: nn.Module,
        how: Distillation,
        batches: Sequence[Any] | None = None,
    ) -> None:
        if how.loss != "logits":
            raise ValueError(f"how.loss {how.loss!r}: this callback learns from logits alone")
        self.calibration, self.teacher, self.how, self.batches = calibration, teacher, how, batches
        self._hook: Any = None

    def on_train_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        """Put the teacher's loss in the place of the model's."""
        self.close()
        self.how = replace(self.how, tokens=max(1, state.max_steps) * self.how.batch)
        self.teacher.eval()
        self._hook = self.calibration.model.register_forward_hook(self._learn, with_kwargs=True)

    def on_step_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        """Set the thresholds of this step."""
        step = state.global_step
        if self.batches is not None and step and step in self.how.renewals:
            anew = calibrate(self.calibration.model, self.batches, dense=False)
            self.calibration.blocks.update(anew.blocks)
        self.calibration.put(self.how.share_at(step))

    def on_train_end(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        """Leave the thresholds at the share that was aimed at, if all steps were done."""
        self.calibration.put(self.how.share_at(state.global_step))
        self.close()

    def close(self) -> None:
        """Give the model its own loss again."""
        if self._hook is not None:
            self._hook.remove()
            self._hook = None

    def _learn(
        self, model: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], output: Any
    ) -> Any:
        if not model.training:
            return output
        labels = kwargs.get("labels")
        if labels is None or "logits" not in output or output.get("loss") is None:
            raise ValueError(
                "DistillationCallback needs labels= and an output with loss and logits: give a "
                "causal language model of transformers and a collator that makes labels"
            )
        others = {k: v for k, v in kwargs.items() if k not in ("labels", "num_items_in_batch")}
        with torch.no_grad():
            wanted: Tensor = self.teacher(*args, **others).logits
        own: Tensor = output["logits"]
        counts = labels[:, 1:].flatten() != IGNORED
        lost = divergence(own[:, :-1].flatten(0, 1)[counts], wanted[:, :-1].flatten(0, 1)[counts])
        items = kwargs.get("num_items_in_batch")  # of all batches of a step, where Trainer knows
        output["loss"] = lost.sum() / (counts.sum() if items is None else items)
        return output

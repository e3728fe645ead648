"""The built-in tasks: a model by config, its data, and how it is scored."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from transformers import (
    BeitConfig,
    BeitForImageClassification,
    EvalPrediction,
    GPT2Config,
    GPT2LMHeadModel,
    PreTrainedModel,
    T5Config,
    T5ForConditionalGeneration,
)

from actsparse.data import (
    Splits,
    bigram_nats,
    lm_splits,
    load_digits_splits,
    span_corruption_splits,
)
from actsparse.data.text import EOS, FIRST_BYTE, LM_VOCAB_SIZE, PAD, VOCAB_SIZE
from actsparse.train.config import RunConfig

Scores = dict[str, float]


@dataclass(frozen=True)
class Task:
    """What `run` needs to know of a task.

    ``reduce`` makes of a batch's logits what is kept for ``score``, which gives ``loss`` and
    ``quality`` over a whole split. ``predict`` runs a model on a batch and returns what training's
    loss is the cross-entropy of, (logits, targets). ``baselines`` are losses (nats) on the test
    split.
    """

    quality_name: str
    higher_is_better: bool
    model: Callable[[RunConfig], PreTrainedModel]
    splits: Callable[[RunConfig], Splits[Any]]
    reduce: Callable[[Any, Tensor], Tensor]
    score: Callable[[EvalPrediction], Scores]
    predict: Callable[[nn.Module, Any], tuple[Tensor, Tensor]]
    baselines: Callable[[Splits[Any]], Scores] = lambda splits: {}


def task_of(name: str) -> Task:
    """The task of that name; `ValueError` lists the known ones."""
    if name not in TASKS:
        raise ValueError(f"unknown task {name!r}; known: {', '.join(TASKS)}")
    return TASKS[name]


def _predict(model: nn.Module, batch: Any) -> tuple[Tensor, Tensor]:
    return model(**batch).logits, batch["labels"]


def _predict_next(model: nn.Module, batch: Any) -> tuple[Tensor, Tensor]:
    return model(**batch).logits[:, :-1], batch["labels"][:, 1:]


# digits: images to classes


def _vit(config: RunConfig) -> PreTrainedModel:
    return BeitForImageClassification(BeitConfig(num_labels=10, **config.model))


def _class_losses(logits: Any, labels: Tensor) -> Tensor:
    """[B, 2]: nats, and whether the class is right."""
    loss = nn.functional.cross_entropy(logits, labels, reduction="none")
    return torch.stack([loss, (logits.argmax(-1) == labels).to(loss)], dim=1)


def _accuracy(kept: EvalPrediction) -> Scores:
    loss, right = np.asarray(kept.predictions, dtype=np.float64).mean(axis=0)
    return {"loss": float(loss), "quality": float(right)}


# text and lm: bytes, scored in nats and bits for each byte


def _gpt2(config: RunConfig) -> PreTrainedModel:
    ids = {"bos_token_id": EOS, "eos_token_id": EOS, "pad_token_id": PAD}
    model = GPT2LMHeadModel(GPT2Config(vocab_size=LM_VOCAB_SIZE, **ids, **config.model))
    model.loss_type = "ForCausalLM"  # or Trainer averages over first bytes too, never predicted
    return model


def _t5(config: RunConfig) -> PreTrainedModel:
    ids = {"eos_token_id": EOS, "pad_token_id": PAD, "decoder_start_token_id": PAD}
    return T5ForConditionalGeneration(T5Config(vocab_size=VOCAB_SIZE, **ids, **config.model))


def _next_byte_losses(logits: Any, labels: Tensor) -> Tensor:
    """[B, T − 1] nats of each byte but the first."""
    logits = logits[0] if isinstance(logits, tuple) else logits
    return _losses(logits[:, :-1], labels[:, 1:])


def _hidden_byte_losses(logits: Any, labels: Tensor) -> Tensor:
    """[B, L] nats of each hidden byte; NaN at sentinels and eos, which are easy and not text."""
    logits = logits[0] if isinstance(logits, tuple) else logits
    is_byte = (labels >= FIRST_BYTE) & (labels < LM_VOCAB_SIZE)
    return torch.where(is_byte, _losses(logits, labels), math.nan)


def _losses(logits: Tensor, labels: Tensor) -> Tensor:
    loss = nn.functional.cross_entropy(logits.flatten(0, 1), labels.flatten(), reduction="none")
    return torch.where(loss.isnan(), math.inf, loss).view_as(labels)  # NaN means: not scored


def _bits_per_byte(kept: EvalPrediction) -> Scores:
    loss = float(np.nanmean(np.asarray(kept.predictions, dtype=np.float64)))
    return {"loss": loss, "quality": loss / math.log(2)}


def _bigram(splits: Splits[Any]) -> Scores:
    return {"bigram": bigram_nats(splits)["test"]}


TASKS = {
    "digits": Task(
        quality_name="accuracy",
        higher_is_better=True,
        model=_vit,
        splits=lambda config: load_digits_splits(**config.data),
        reduce=_class_losses,
        score=_accuracy,
        predict=_predict,
    ),
    "text": Task(
        quality_name="bits per hidden byte",
        higher_is_better=False,
        model=_t5,
        splits=lambda config: span_corruption_splits(seed=config.seed, **config.data),
        reduce=_hidden_byte_losses,
        score=_bits_per_byte,
        predict=_predict,
        baselines=_bigram,
    ),
    "lm": Task(
        quality_name="bits per byte",
        higher_is_better=False,
        model=_gpt2,
        splits=lambda config: lm_splits(**config.data),
        reduce=_next_byte_losses,
        score=_bits_per_byte,
        predict=_predict_next,
        baselines=_bigram,
    ),
}

"""The tasks: a model by config, its data, and how it is scored."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any, Literal

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
    ViTConfig,
    ViTForImageClassification,
    default_data_collator,
)

from actsparse.modify.foreign_config import check_config
from actsparse.train.loss import SoftCrossEntropy
from actsparse.values import BadValue, Positive, Text, check, checked_arguments, shown
from actsparse_lab.data import (
    CausalRows,
    Corpus,
    Mixed,
    ShardLoader,
    SpanRows,
    Splits,
    Tokenizer,
    bigram_nats,
    corpus,
    decoded_image_splits,
    image_splits,
    lm_splits,
    load_digits_splits,
    load_tokenizer,
    span_corruption_splits,
    text_splits,
)
from actsparse_lab.data.text import EOS, FIRST_BYTE, LM_VOCAB_SIZE, PAD, VOCAB_SIZE
from actsparse_lab.engine.config import RunConfig

Scores = dict[str, float]
Info = dict[str, Any]  # the data's


@dataclass(frozen=True)
class Task:
    """What `run` needs to know of a task.

    ``model`` makes it from a run's config and the description of its data; ``adapt`` fits a model,
    also one that was trained before, to the loss of the task. ``splits`` makes the data; where
    training reads a stream without end ``loader`` does, for a process of a given rank out of so
    many, that takes so many rows at a time; ``collate`` makes a batch of training rows.

    ``reduce`` makes of a batch's logits what is kept for ``score``, which gives ``loss`` and
    ``quality`` over a whole split. ``predict`` runs a model on a batch and returns what training's
    loss is the cross-entropy of, (logits, targets). ``baselines`` are losses (nats) on the test
    split.
    """

    quality_name: str
    higher_is_better: bool
    model: Callable[[RunConfig, Info], PreTrainedModel]
    splits: Callable[[RunConfig], Splits[Any]]
    reduce: Callable[[Any, Tensor], Tensor]
    score: Callable[[EvalPrediction], Scores]
    predict: Callable[[nn.Module, Any], tuple[Tensor, Tensor]]
    baselines: Callable[[Splits[Any]], Scores] = lambda splits: {}
    adapt: Callable[[Any, RunConfig], None] = lambda model, config: None
    loader: Callable[[RunConfig, int, int, int], Any] | None = None
    collate: Callable[[RunConfig, Info], Any] = lambda config, info: default_data_collator


def task_of(name: str) -> Task:
    """The task of that name; `ValueError` lists the known ones."""
    if name not in TASKS:
        raise ValueError(f"unknown task {name!r}; known: {', '.join(TASKS)}")
    return TASKS[name]


def _predict(model: nn.Module, batch: Any) -> tuple[Tensor, Tensor]:
    return model(**batch).logits, batch["labels"]


def _predict_next(model: nn.Module, batch: Any) -> tuple[Tensor, Tensor]:
    return model(**batch).logits[:, :-1], batch["labels"][:, 1:]


# digits; images of folders: pixels to classes


def built(
    model: Callable[[Any], PreTrainedModel], config: type[Any], own: Info, given: dict[str, Any]
) -> PreTrainedModel:
    """A model of random weights, by the class of its config: ``own`` settings and ``given`` ones.

    Raises:
        ValueError: the config knows no such setting, or nothing can be built of its value.
    """
    known = {*config().to_dict(), "attn_implementation"} - set(own)
    if unknown := sorted(set(given) - known):
        names = ", ".join(sorted(known))
        raise BadValue(f"unknown setting {unknown[0]!r} of the model; known: {names}")
    check_config("model", given)
    try:
        return model(config(**own, **given))
    except Exception as error:  # whatever the class does with it
        raise BadValue(f"model={shown(given)}: cannot be built: {error}") from error


def _beit(config: RunConfig, info: Info) -> PreTrainedModel:
    own = {"num_labels": info["classes"]}
    return built(BeitForImageClassification, BeitConfig, own, config.model)


def _vit(config: RunConfig, info: Info) -> PreTrainedModel:
    """A ViT that begins as in the papers' authors' program (torchvision's): MLPs by Xavier, with
    biases of 1e-6, and a head of zeros."""
    own = {"num_labels": info["classes"]}
    model = built(ViTForImageClassification, ViTConfig, own, config.model)
    for name, layer in model.named_modules():
        if isinstance(layer, nn.Linear) and ".mlp." in name:
            nn.init.xavier_uniform_(layer.weight)
            if layer.bias is not None:
                nn.init.normal_(layer.bias, std=1e-6)
    for parameter in model.classifier.parameters():
        nn.init.zeros_(parameter)
    return model


def _soft_labels(model: PreTrainedModel, config: RunConfig) -> None:
    model.loss_function = SoftCrossEntropy(model, config.label_smoothing)


def _image_splits(config: RunConfig) -> Splits[Any]:
    ways = {name: value for name, value in config.data.items() if name not in _MIXING}
    ways |= {"steps": config.steps, "batch": config.batch_size, "seed": config.seed}
    return image_splits(**checked_arguments(image_splits, _from_disk(ways, "path"), "data"))


_MIXING = ("mixup", "cutmix")


def _mixed(config: RunConfig, info: Info) -> Any:
    mixing = {name: value for name, value in config.data.items() if name in _MIXING}
    return Mixed(info["classes"], seed=config.seed, **checked_arguments(Mixed, mixing, "data"))


def _class_losses(logits: Any, labels: Tensor) -> Tensor:
    """[B, 2]: nats, and whether the class is right."""
    loss = nn.functional.cross_entropy(logits, labels, reduction="none")
    return torch.stack([loss, (logits.argmax(-1) == labels).to(loss)], dim=1)


def _accuracy(kept: EvalPrediction) -> Scores:
    loss, right = np.asarray(kept.predictions, dtype=np.float64).mean(axis=0)
    return {"loss": float(loss), "quality": float(right)}


# text and lm: bytes, scored in nats and bits for each byte


def _gpt2(config: RunConfig, info: Info) -> PreTrainedModel:
    eos, pad = info.get("eos_token_id", EOS), info.get("pad_token_id", PAD)
    ids = {"bos_token_id": eos, "eos_token_id": eos, "pad_token_id": pad}
    ids["vocab_size"] = info.get("vocab_size", LM_VOCAB_SIZE)
    return built(GPT2LMHeadModel, GPT2Config, ids, config.model)


def _causal(model: PreTrainedModel, config: RunConfig) -> None:
    model.loss_type = "ForCausalLM"  # or Trainer averages over first bytes too, never predicted


def _t5(config: RunConfig, info: Info) -> PreTrainedModel:
    ids = {"eos_token_id": EOS, "pad_token_id": PAD, "decoder_start_token_id": PAD}
    ids["vocab_size"] = VOCAB_SIZE
    ids |= {name: info[name] for name in ids if name in info}
    return built(T5ForConditionalGeneration, T5Config, ids, config.model)


def _next_byte_losses(logits: Any, labels: Tensor) -> Tensor:
    """[B, T − 1] nats of each byte or token but the first."""
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


# spans and causal: tokens of a tokenizer, from shards on disk


def _read(config: RunConfig) -> tuple[Corpus, Tokenizer, SpanRows | CausalRows]:
    ways = dict(_from_disk(config.data, "shards", "tokenizer"))
    check("data", ways, _SHARDS)
    found = corpus(ways.pop("shards"), ways.pop("validation", None))
    tokenizer, length = load_tokenizer(ways.pop("tokenizer")), ways.pop("length")
    ways = {name: value for name, value in ways.items() if name not in ("rows", "damaged")}
    kind = SpanRows if "mean_span" in ways else CausalRows
    return found, tokenizer, kind(length, **checked_arguments(kind, ways, "data"))


_SHARDS = {
    "shards": str | list[str],
    "tokenizer": Text,
    "length": Positive,
    "rows": Positive,
    "validation?": str | list[str] | None,
    "damaged?": Literal["refuse", "skip"],
}


def _shard_splits(config: RunConfig) -> Splits[Any]:
    damaged = config.data.get("damaged", "refuse")
    name = config.task
    return text_splits(*_read(config), count=config.data["rows"], name=name, damaged=damaged)


def _shard_loader(config: RunConfig, batch: int, rank: int, processes: int) -> ShardLoader:
    return ShardLoader(
        *_read(config),
        batch=batch,
        seed=config.seed,
        rank=rank,
        processes=processes,
        workers=config.workers,
        damaged=config.data.get("damaged", "refuse"),
    )


def _token_losses(logits: Any, labels: Tensor) -> Tensor:
    """[B, L] nats of each target token."""
    return _losses(logits[0] if isinstance(logits, tuple) else logits, labels)


def _nats(kept: EvalPrediction) -> Scores:
    loss = float(np.mean(np.asarray(kept.predictions, dtype=np.float64)))
    return {"loss": loss, "quality": loss}


_SAID_BY = {
    "path": "--data PATH",
    "shards": "--data PATH",
    "tokenizer": "--set data.tokenizer=PATH",
}


def _from_disk(ways: dict[str, Any], *needed: str) -> dict[str, Any]:
    """``ways``, if they say where the data lie.

    Raises:
        ValueError: it does not.
    """
    for name in needed:
        if not ways.get(name):
            raise ValueError(f"this task reads data of yours: say where, {_SAID_BY[name]}")
    return ways


_IMAGES = Task(
    quality_name="accuracy",
    higher_is_better=True,
    model=_vit,
    splits=_image_splits,
    reduce=_class_losses,
    score=_accuracy,
    predict=_predict,
    adapt=_soft_labels,
    collate=_mixed,
)
_DECODED = replace(
    _IMAGES,
    model=_beit,
    splits=lambda config: decoded_image_splits(
        **checked_arguments(image_splits, _from_disk(config.data, "path"), "data")
    ),
    adapt=lambda model, config: None,
    collate=lambda config, info: default_data_collator,
)
_DIGITS = Task(
    quality_name="accuracy",
    higher_is_better=True,
    model=_beit,
    splits=lambda config: load_digits_splits(
        **checked_arguments(load_digits_splits, config.data, "data")
    ),
    reduce=_class_losses,
    score=_accuracy,
    predict=_predict,
)
_TEXT = Task(
    quality_name="bits per hidden byte",
    higher_is_better=False,
    model=_t5,
    splits=lambda config: span_corruption_splits(
        seed=config.seed, **checked_arguments(span_corruption_splits, config.data, "data")
    ),
    reduce=_hidden_byte_losses,
    score=_bits_per_byte,
    predict=_predict,
    baselines=_bigram,
)
_LM = Task(
    quality_name="bits per byte",
    higher_is_better=False,
    model=_gpt2,
    splits=lambda config: lm_splits(**checked_arguments(lm_splits, config.data, "data")),
    reduce=_next_byte_losses,
    score=_bits_per_byte,
    predict=_predict_next,
    baselines=_bigram,
    adapt=_causal,
)
_SPANS = Task(
    quality_name="nats per target token",
    higher_is_better=False,
    model=_t5,
    splits=_shard_splits,
    reduce=_token_losses,
    score=_nats,
    predict=_predict,
    loader=_shard_loader,
)
_CAUSAL = Task(
    quality_name="nats per token",
    higher_is_better=False,
    model=_gpt2,
    splits=_shard_splits,
    reduce=_next_byte_losses,
    score=_nats,
    predict=_predict_next,
    adapt=_causal,
    loader=_shard_loader,
)
TASKS = {
    "digits": _DIGITS,
    "text": _TEXT,
    "lm": _LM,
    "digits_finetune": _DIGITS,
    "lm_finetune": _LM,
    "lm_web": _CAUSAL,
    "cifar10": _DECODED,
    "vit_cifar10": _IMAGES,
    "vit_cifar10_finetune": _IMAGES,
    "vit_imagenet": _IMAGES,
    "vit_imagenet_finetune": _IMAGES,
    "t5_web": _SPANS,
    "t5_c4": _SPANS,
    "t5_c4_finetune": _SPANS,
}

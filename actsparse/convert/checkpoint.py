"""Load a checkpoint, a language model or an encoder, with its tokenizer; write the converted."""

from __future__ import annotations

import json
from pathlib import Path
from shutil import disk_usage
from typing import Any, NamedTuple

import torch

from actsparse import files
from actsparse.blocks.block import unwrap
from actsparse.convert.embeddings import Pooling
from actsparse.convert.text import Encode
from actsparse.extras import needed
from actsparse.modify.foreign_config import model_class
from actsparse.modify.pretrained import pretrained
from actsparse.modify.saving import load
from actsparse.modify.sidecar import (
    SIDECAR,
    check_weights,
    describe,
    read_sidecar,
    write_sidecar,
)
from actsparse.modify.weights import WEIGHTS, disk_refusals, read_weights, weight_files
from actsparse.untrusted import check_regular, read_json
from actsparse.values import BadValue, Count, Share, check

CARD, RECORD = "README.md", "conversion.json"
# what transformers writes of a causal language model and a tokenizer
_OWN = {
    "config.json", "generation_config.json", "model.safetensors", "tokenizer.json",
    "tokenizer_config.json", "special_tokens_map.json", "added_tokens.json", "vocab.json",
    "merges.txt", "tokenizer.model", "chat_template.jinja", SIDECAR, CARD, RECORD,
}  # fmt: skip


def load_checkpoint(path: Path) -> tuple[Any, Any]:
    """Load a causal language model or an encoder and its tokenizer, in float32 and evaluation mode.

    Args:
        path: a folder of Hugging Face (config.json, safetensors, tokenizer), or a ``.gguf`` file,
            whose weights are dequantised.

    Returns:
        The model and the tokenizer.

    Raises:
        ValueError: it cannot be loaded, is neither, has no tokenizer, or the tokenizer has more
            tokens than the model's vocabulary.
    """
    if (path / SIDECAR).is_file():
        raise BadValue(f"{path} was converted already: give the checkpoint that it was made of")
    if path.suffix == ".gguf":
        model, tokenizer = _gguf(path)
    else:
        model, tokenizer = pretrained(path), tokenizer_of(path)
    if not type(model).__name__.endswith(_CAUSAL) and not _encodes(model):
        raise BadValue(
            f"{path} holds a {type(model).__name__}: expected a causal language model, as "
            f"LlamaForCausalLM, or an encoder without a head, as BertModel"
        )
    vocabulary = model.config.get_text_config().vocab_size
    if len(tokenizer) > vocabulary:
        raise BadValue(
            f"{path}: its tokenizer has {len(tokenizer)} tokens, the model {vocabulary}: it is "
            f"another model's"
        )
    return model.eval(), tokenizer


def load_converted(folder: Path) -> tuple[Any, Any]:
    """Load a folder that ``actsparse convert`` wrote: the sparse model and its tokenizer.

    Args:
        folder: what it wrote.

    Returns:
        The model, in evaluation mode and the dtype it was saved in, and the tokenizer.

    Raises:
        ValueError: it is no such folder, or damaged.
    """
    if not (folder / SIDECAR).is_file():
        raise BadValue(f"{folder} has no {SIDECAR}: expected a folder of actsparse convert")
    tokenizer = tokenizer_of(folder)
    return load(folder).eval(), tokenizer


_CAUSAL = ("ForCausalLM", "LMHeadModel")


def _encodes(model: Any) -> bool:
    config = model.config
    both = getattr(config, "is_encoder_decoder", False) or getattr(config, "is_decoder", False)
    headless = type(model).__name__.endswith("Model") and model.get_output_embeddings() is None
    return headless and not both


class Start(NamedTuple):
    """Weights to go on with: parameters by name, their share, and the tokens they were trained on.

    >>> Start({}, 0.5, 10_000).share
    0.5
    """

    weights: dict[str, torch.Tensor]
    share: float
    trained: int


def start_from(folder: Path, model: torch.nn.Module) -> Start:
    """The weights of an earlier conversion, for another one of the same checkpoint to go on with.

    Args:
        folder: what ``actsparse convert`` wrote.
        model: the checkpoint's model.

    Returns:
        The weights, the share that they were chosen at, and the tokens they were trained on.

    Raises:
        FileNotFoundError: a file of it is missing.
        ValueError: it is no conversion, a damaged one, or one of another model.
    """
    if not (folder / RECORD).is_file():
        raise BadValue(f"{folder} has no {RECORD}: expected a folder of actsparse convert")
    check_weights(folder, read_sidecar(folder, WEIGHTS))
    said = read_json(folder / RECORD)
    check(str(folder / RECORD), said, {"choice": dict, "trained_tokens": Count})
    check(f"{folder / RECORD}: choice", said["choice"], {"share": Share})
    held = read_weights(weight_files(folder))
    weights = {}
    for name, parameter in model.named_parameters():
        shape = held[name].shape if name in held else None
        if shape != parameter.shape:
            raise BadValue(
                f"{folder} is no conversion of this checkpoint: {name} has shape "
                f"{None if shape is None else list(shape)} there, {list(parameter.shape)} here"
            )
        weights[name] = held[name]
    return Start(weights, said["choice"]["share"], said["trained_tokens"])


def in_dtype(model: torch.nn.Module, dtype: torch.dtype) -> torch.nn.Module:
    """Cast a model in place as transformers loads it in that dtype.

    Buffers that no state dict holds keep their dtype: rotary frequencies in bfloat16 would turn
    tokens far from the first one to other places.

    Args:
        model: the model.
        dtype: of its parameters and other buffers.

    Returns:
        The model.

    >>> in_dtype(torch.nn.Linear(2, 2), torch.bfloat16).weight.dtype
    torch.bfloat16
    """
    kept = [
        (module._buffers, name, module._buffers[name])
        for module in model.modules()
        for name in module._non_persistent_buffers_set
    ]
    model.to(dtype)
    for buffers, name, values in kept:
        buffers[name] = values
    return model


def pooling_of(folder: Path, model: Any) -> Pooling | None:
    """How the embeddings of an encoder are pooled; None for a causal language model.

    Args:
        folder: the checkpoint's; with the 1_Pooling/config.json of sentence-transformers, if any.
        model: what was loaded from it.

    Returns:
        ``"mean"`` where the folder does not say otherwise.

    Raises:
        ValueError: it asks for another pooling than mean or cls.
    """
    if type(model).__name__.endswith(_CAUSAL):
        return None
    file = folder / "1_Pooling" / "config.json"
    if not file.is_file():
        return "mean"
    asked = [name for name, value in read_json(file).items() if value is True]
    modes = [name for name in asked if name.startswith("pooling_mode_")]
    known: dict[str, Pooling] = {
        "pooling_mode_mean_tokens": "mean",
        "pooling_mode_cls_token": "cls",
    }
    if len(modes) != 1 or modes[0] not in known:
        raise BadValue(
            f"{file} asks for {', '.join(modes) or 'no pooling'}: expected {' or '.join(known)}"
        )
    return known[modes[0]]


def tokenizer_of(folder: Path, **how: Any) -> Any:
    """The tokenizer of a folder.

    Args:
        folder: where its files lie.
        **how: more for ``AutoTokenizer.from_pretrained``.

    Returns:
        The tokenizer of transformers.

    Raises:
        ValueError: there is none, or it cannot be loaded.
    """
    transformers = needed("transformers", "a tokenizer")
    transformers.logging.disable_progress_bar()
    if not how and not any((folder / name).is_file() for name in _OWN if "tokenizer" in name):
        raise BadValue(f"{folder} holds no tokenizer (tokenizer.json, or tokenizer.model)")
    try:
        return transformers.AutoTokenizer.from_pretrained(
            folder, local_files_only=True, trust_remote_code=False, **how
        )
    except Exception as error:  # whatever a stranger's folder does wrong
        raise BadValue(f"cannot load the tokenizer of {folder}: {error}") from error


def encoder(tokenizer: Any) -> Encode:
    """What gives the token ids of a text, without a warning of its length.

    Args:
        tokenizer: of transformers.

    Returns:
        A function from text to ids, without the special tokens that the tokenizer adds.
    """
    return lambda text: tokenizer(text, verbose=False, add_special_tokens=False)["input_ids"]


def around_of(tokenizer: Any, encodes: bool) -> tuple[list[int], list[int]]:
    """The special tokens that a tokenizer begins and ends a text with; each window has them.

    Args:
        tokenizer: of transformers.
        encodes: whether it is an encoder's; a language model's windows end without one.

    Returns:
        The ids before and after.
    """
    plain, whole = encoder(tokenizer)("a"), tokenizer("a", verbose=False)["input_ids"]
    for start in range(len(whole) - len(plain) + 1):
        if whole[start : start + len(plain)] == plain:
            return whole[:start], whole[start + len(plain) :] if encodes else []
    return [], []


def _gguf(path: Path) -> tuple[Any, Any]:
    """The model of a GGUF file, dequantised into a plain one."""
    transformers = needed("transformers", "a GGUF checkpoint")
    needed("gguf", "a GGUF checkpoint")
    check_regular(path)
    transformers.logging.set_verbosity_error()
    transformers.logging.disable_progress_bar()
    where = {"gguf_file": path.name}
    try:
        read = transformers.AutoModelForCausalLM.from_pretrained(
            path.parent, local_files_only=True, trust_remote_code=False, **where
        )
        config = read.config
        if hasattr(config, "quantization_config"):
            del config.quantization_config
        config.dtype = torch.float32
        model = model_class(str(path), type(read).__name__)(config)
        model.load_state_dict({name: value.float() for name, value in read.state_dict().items()})
        model.tie_weights()
    except Exception as error:  # whatever a stranger's file does wrong
        raise BadValue(f"cannot load {path}: {error}") from error
    return model, tokenizer_of(path.parent, **where)


def check_place(folder: Path, source: Path) -> None:
    """Refuse a folder that :func:`write_checkpoint` could not write, before any work is done.

    Args:
        folder: where to write; the folders above it are made.
        source: the checkpoint that is converted, which must stay.

    Raises:
        FileExistsError: it is a file, or holds what no conversion wrote.
        ValueError: it is the source, or in it.
        OSError: the disk refuses.
    """
    target, own = folder.resolve(), source.resolve()
    if target == own or own in target.parents:
        raise BadValue(f"{folder} is the checkpoint {source}, or in it: give another folder")
    _check_replaceable(folder)
    try:
        files.make_folder(target.parent)
        with files.beside(target):
            pass  # a folder can be made here
    except OSError as error:
        raise OSError(files.refusal(folder, error)) from error


def check_space(folder: Path, size: int) -> None:
    """Refuse a disk that has not room for what will be written.

    Args:
        folder: where it will be; the folder above it is there.
        size: about how much, in bytes.

    Raises:
        OSError: there is less.
    """
    free = disk_usage(folder.resolve().parent).free
    if free < size:
        raise OSError(
            f"{folder} and what is kept beside it need about {size / 1e9:.3g} GB, but the disk has "
            f"{free / 1e9:.3g} GB left: free some space or choose another folder"
        )


def _check_replaceable(folder: Path) -> None:
    files.check_free(folder, _OWN)
    if folder.exists() and any(folder.iterdir()) and not (folder / RECORD).is_file():
        raise FileExistsError(
            f"{folder} holds a model that no conversion wrote (it has no {RECORD}): give another "
            f"folder"
        )


def write_checkpoint(
    folder: Path, model: Any, tokenizer: Any, record: dict[str, Any], card: str
) -> None:
    """Write a converted model whole or not at all, as ``actsparse.load`` and people expect it.

    The folder has config, generation config, safetensors, tokenizer and chat template as
    ``save_pretrained`` writes them, the sidecar of ``actsparse.load``, the record and a model card.
    Loaders that do not know actsparse refuse it, by a note in the config.

    Args:
        folder: where to; a folder that this wrote before is replaced.
        model: the model, with its thresholds.
        tokenizer: its tokenizer.
        record: what was done and found, for JSON.
        card: the text of README.md.

    Raises:
        OSError: the folder cannot be written, or holds what no conversion wrote.
    """
    _check_replaceable(folder)
    with files.whole_folder(folder, _OWN) as new:
        with disk_refusals(folder):
            model.save_pretrained(new, max_shard_size="1TB")
        tokenizer.save_pretrained(new)
        text = json.dumps(record, indent=1, allow_nan=False) + "\n"
        (new / RECORD).write_text(text, encoding="utf-8")
        (new / CARD).write_text(card, encoding="utf-8")
        write_sidecar(new, describe(unwrap(model), "convert"))

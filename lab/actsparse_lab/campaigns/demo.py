"""What `actsparse demo` shows of its trained network besides the frontier: the text it fills in."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from actsparse_lab.data.text import EOS, FIRST_BYTE, PAD, SENTINEL_START, VOCAB_SIZE

LIVE = ("vanilla", "vanilla-no-1d-decay", "paper", "best")  # the full form has the controls too
SHOWN = "best"


def readable(ids: Tensor) -> str:
    """Ids [length] of the tasks on text as text; a hidden span, or its answer, follows its number.

    >>> readable(torch.tensor([74, 107, SENTINEL_START, 35, 1, 0]))
    'Hi⟨1⟩!'
    """
    said = []
    for token in ids.tolist():
        if token in (PAD, EOS):
            continue
        number = SENTINEL_START - token + 1
        said.append(chr(token - FIRST_BYTE) if number > VOCAB_SIZE - 258 else f"⟨{number}⟩")
    return "".join(said)


def filled_in(model: Any, batch: Mapping[str, Tensor]) -> list[tuple[str, str]]:
    """Text with hidden spans, and what a T5 fills in, the likeliest byte each time.

    Args:
        model: in eval mode.
        batch: ``input_ids`` and ``labels``, [rows, length].
    """
    with torch.inference_mode():
        written = model.generate(
            batch["input_ids"], do_sample=False, max_new_tokens=batch["labels"].shape[1]
        )
    pairs = zip(batch["input_ids"], written, strict=True)
    return [(readable(given), readable(filled)) for given, filled in pairs]

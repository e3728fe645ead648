"""How many tokens a call's key–value cache holds, whatever the argument is called."""

from __future__ import annotations

import re
from dataclasses import dataclass
from typing import Any

from torch import Tensor

_CACHE_LIKE = re.compile(r"cache|past|mems|(^|_)kv(_|$)|^state$|inference_(params|context)")


@dataclass(frozen=True)
class Past:
    """What stands before a call's tokens: ``length`` of them, an int or a 0-dim tensor.

    ``cut``: of older ones a cache may have let go. ``unread`` names a cache whose length is not
    known, ``torn`` says which caches disagree.
    """

    length: int | Tensor = 0
    cut: bool = False
    unread: str = ""
    torn: str = ""


def past_of(call: dict[str, Any]) -> Past:
    """Read the cache among the arguments of a call, before the layers add to it.

    A cache is what has ``get_seq_length``, or the tuples of older models: layer → (key
    [B, heads, T, D], value).

    >>> import torch
    >>> past_of({"anything": ((torch.zeros(2, 4, 7, 8),) * 2,)}).length
    7
    """
    found: list[tuple[str, Any, int | Tensor]] = []
    unread = ""
    for name, value in call.items():
        if value is None or isinstance(value, bool | int | float | str):
            continue
        length = _length(value)
        if length is None and _cache_like(name, value):
            unread = f"{name}={type(value).__name__}"
        elif length is not None and not any(value is other for _, other, _ in found):
            found.append((name, value, length))
    if not found:
        start = call.get("start_pos")  # of models that keep their cache to themselves
        return Past(start if isinstance(start, int) else 0, unread=unread)
    _, cache, length = found[0]
    if any(isinstance(length, Tensor) or length != other for _, _, other in found[1:]):
        return Past(torn=", ".join(f"{name} of {length} tokens" for name, _, length in found))
    return Past(length, isinstance(cache, tuple | list), unread)


def _length(value: Any) -> int | Tensor | None:
    if callable(getattr(value, "get_seq_length", None)):
        try:
            length = value.get_seq_length()
        except ValueError:  # layers with a state alone; before their first call it holds nothing
            return None if value.has_previous_state() else 0
        # a static cache counts in a tensor, which its layers will add to
        return length.reshape(()).clone() if isinstance(length, Tensor) else int(length)
    if isinstance(value, tuple | list):
        for layer in value:
            key = layer[0] if isinstance(layer, tuple | list) and layer else None
            if isinstance(key, Tensor) and key.dim() == 4:
                return key.shape[-2]
    return None


def _cache_like(name: str, value: Any) -> bool:
    if isinstance(value, Tensor):  # all layers in one; data and positions have fewer axes
        return value.dim() > 3 and bool(_CACHE_LIKE.search(name))
    if isinstance(value, tuple | list | dict) and not value:
        return False
    return bool(_CACHE_LIKE.search(name)) or "cache" in type(value).__name__.lower()

"""Which token is which: positions and padding of the call that is running.

An MLP sees rows of features and cannot know where they stand: with a key–value cache it sees one
token at position t, left padding shifts positions, some models flatten [B, T, D] to [B·T, D]. The
call of the *stack* around it knows: the nearest module that takes token ids or their embeddings
(encoder and decoder apart), else the model itself.
"""

from __future__ import annotations

import inspect
from typing import Any

import torch
from torch import Tensor, nn

_MARKS = ("input_ids", "inputs_embeds", "src_key_padding_mask", "tgt_key_padding_mask")
_PADDING = ("src_key_padding_mask", "tgt_key_padding_mask")  # True or -inf where padded


def tokens_of(path: tuple[nn.Module, ...]) -> Tokens:
    """The :class:`Tokens` of the stack around a block; ``path``: its modules, outermost first."""
    stack = path[0]
    for module in path:
        if set(_MARKS) & set(inspect.signature(module.forward).parameters):
            stack = module
    tokens = stack.__dict__.get("_actsparse_tokens")
    if tokens is None:
        tokens = stack._actsparse_tokens = Tokens(stack, batch_first(path))  # type: ignore[assignment]
    return tokens


def batch_first(path: tuple[nn.Module, ...]) -> bool:
    """False where an ``nn.MultiheadAttention`` beside the block takes [T, B, D]."""
    for module in reversed(path):
        for child in module.children():
            if isinstance(child, nn.MultiheadAttention):
                return child.batch_first
    return True


class Tokens:
    """Positions and padding of one stack's running call; read by sites, written by a hook."""

    def __init__(self, stack: nn.Module, batch_first: bool) -> None:
        self.stack = stack
        self.batch_first = batch_first
        self.users = 0
        self._names = tuple(inspect.signature(stack.forward).parameters)
        self._hook: Any = None
        self._shape: tuple[int, ...] = ()
        self._keep: Tensor | None = None
        self._position_ids: Tensor | None = None
        self._past: int = 0

    def attach(self) -> None:
        """Start to listen; call :meth:`detach` once for each call of this."""
        self.users += 1
        if self._hook is None:
            self._hook = self.stack.register_forward_pre_hook(self._enter, with_kwargs=True)

    def detach(self) -> None:
        """Stop to listen when the last user has gone."""
        self.users -= 1
        if self.users == 0:
            self._hook.remove()
            self._hook = None
            self.stack.__dict__.pop("_actsparse_tokens", None)

    def _enter(self, stack: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        call = dict(zip(self._names, args, strict=False))
        call.update(kwargs)
        first = call.get("input_ids")
        if first is None:
            first = call.get("inputs_embeds")
        if first is None:
            first = next((v for v in call.values() if isinstance(v, Tensor)), None)
        self._shape = () if first is None else tuple(first.shape)
        mask = call.get("attention_mask")
        self._keep = mask != 0 if isinstance(mask, Tensor) and mask.dim() == 2 else None
        for name in _PADDING:
            padding = call.get(name)
            if isinstance(padding, Tensor):
                self._keep = ~padding if padding.dtype == torch.bool else padding == 0
        ids = call.get("position_ids")
        if not isinstance(ids, Tensor):
            ids = call.get("cache_position")
        ids = ids[None] if isinstance(ids, Tensor) and ids.dim() == 1 else ids
        self._position_ids = ids if isinstance(ids, Tensor) and ids.dim() == 2 else None
        self._past = _past_length(call.get("past_key_values"))

    def arrange(self, x: Tensor) -> Tensor:
        """View a stage of the block as [B, T, features].

        Raises:
            ValueError: the shape fits no known layout of tokens.
        """
        if x.dim() == 3:
            return x if self.batch_first else x.transpose(0, 1)
        if x.dim() > 3:
            return x.flatten(1, -2)
        batch, length = (*self._shape, 0, 0)[:2]
        if len(self._shape) in (2, 3) and x.dim() == 2:
            if batch * length == x.shape[0]:
                return x.unflatten(0, (batch, length))
            if len(self._shape) == 2 and batch == x.shape[0]:  # one unbatched sequence [T, D]
                return x[None]
        raise ValueError(
            f"cannot tell tokens apart: the block's input has shape {tuple(x.shape)} and "
            f"{type(self.stack).__name__} was called on shape {self._shape}; expected [B, T, D], "
            f"or [B·T, D] where the model's input is [B, T] or [B, T, D]"
        )

    def restore(self, x: Tensor, like: Tensor) -> Tensor:
        """Undo :meth:`arrange`."""
        if like.dim() == 3:
            return x if self.batch_first else x.transpose(0, 1)
        return x.reshape(like.shape)

    def positions(self, batch: int, length: int) -> Tensor | int:
        """Where the tokens of an arranged [B, T, D] stand: an int p for p, p+1, …, or [B or 1, T].

        ``position_ids`` of the call, else ``cumsum(attention_mask) − 1``, else past + arange.
        """
        ids = self._position_ids
        if ids is not None and ids.shape[1] == length and ids.shape[0] in (1, batch):
            return ids
        if self._keep is not None and self._fits(self._keep, batch, length):
            return (self._keep.cumsum(-1) - 1).clamp(min=0)[:, -length:]
        return self._past

    def keep(self, batch: int, length: int) -> Tensor | None:
        """[B, T], False at padding, or None where nothing is padded."""
        if self._keep is None or not self._fits(self._keep, batch, length):
            return None
        return self._keep[:, -length:]

    @staticmethod
    def _fits(mask: Tensor, batch: int, length: int) -> bool:
        return mask.shape[0] == batch and mask.shape[1] >= length


def _past_length(cache: Any) -> int:
    if cache is None:
        return 0
    if hasattr(cache, "get_seq_length"):
        return int(cache.get_seq_length())
    try:  # the tuples of older models: layer → (key [B, heads, T, D], value)
        return int(cache[0][0].shape[-2])
    except (TypeError, IndexError, AttributeError):
        return 0

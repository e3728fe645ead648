"""Which token is which: positions and padding of the call that is running.

An MLP sees rows of features and cannot know where they stand: with a key–value cache it sees one
token at position t, left padding shifts positions, some models flatten [B, T, D] to [B·T, D]. The
call of the *stack* around it knows: the nearest module that takes token ids, their embeddings or a
picture or sound (encoder and decoder, image and text apart), else the model itself.
"""

from __future__ import annotations

import inspect
from typing import Any, TypeGuard

import torch
from torch import Tensor, nn

_IDS = ("input_ids", "inputs_embeds")  # [B, T] and [B, T, D]
_MARKS = (
    *_IDS, "pixel_values", "input_features", "input_values",
    "src_key_padding_mask", "tgt_key_padding_mask",
)  # fmt: skip
_PADDING = ("src_key_padding_mask", "tgt_key_padding_mask")  # True or -inf where padded


def tokens_of(path: tuple[nn.Module, ...]) -> Tokens:
    """The :class:`Tokens` of the stack around a block; ``path``: its modules, outermost first."""
    stack = path[0]
    for module in path:
        if set(_MARKS) & set(inspect.signature(module.forward).parameters):
            stack = module
    tokens = stack.__dict__.get("_actsparse_tokens")
    if tokens is None:
        tokens = stack._actsparse_tokens = Tokens(stack, batch_first(path), path[0])  # type: ignore[assignment]
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

    def __init__(self, stack: nn.Module, batch_first: bool, root: nn.Module | None = None) -> None:
        self.stack = stack
        self.root = root
        self.batch_first = batch_first
        self.users = 0
        self._repeats = False  # whether a block runs several times in one call of the stack
        self._names = tuple(inspect.signature(stack.forward).parameters)
        self._hooks: list[Any] = []
        self._labels: Tensor | None = None  # of the root's running call
        self._labelled: Tensor | None = None  # [B, T], False where a decoder's token is padding
        self._shape: tuple[int, ...] = ()
        self._keep: Tensor | None = None
        self._position_ids: Tensor | None = None
        self._cache_position: Tensor | None = None
        self._past: int = 0
        self._length: int | None = None  # tokens in the call, where its arguments say so

    def attach(self, calls: int = 1) -> None:
        """Start to listen for a block that runs ``calls`` times in a call of the stack.

        Call :meth:`detach` once for each call of this.
        """
        self.users += 1
        self._repeats |= calls > 1
        if not self._hooks:
            self._hooks.append(self.stack.register_forward_pre_hook(self._enter, with_kwargs=True))
            if self.root is not None and self.root is not self.stack:
                self._hooks.append(
                    self.root.register_forward_pre_hook(self._enter_root, with_kwargs=True)
                )

    def detach(self) -> None:
        """Stop to listen when the last user has gone."""
        self.users -= 1
        if self.users == 0:
            for hook in self._hooks:
                hook.remove()
            self._hooks.clear()
            self.stack.__dict__.pop("_actsparse_tokens", None)

    def _enter_root(self, root: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        labels = kwargs.get("labels")
        self._labels = labels if isinstance(labels, Tensor) and labels.dim() == 2 else None

    def _enter(self, stack: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        call = dict(zip(self._names, args, strict=False))
        call.update(kwargs)
        given = [call[name] for name in _IDS if isinstance(call.get(name), Tensor)]
        first = next((v for v in (*given, *call.values()) if isinstance(v, Tensor)), None)
        self._shape = () if first is None else tuple(first.shape)
        self._length = self._shape[1] if given and len(self._shape) > 1 else None
        mask = call.get("attention_mask")
        self._keep = mask != 0 if isinstance(mask, Tensor) and mask.dim() == 2 else None
        for name in _PADDING:
            padding = call.get(name)
            if isinstance(padding, Tensor):
                keep = ~padding if padding.dtype == torch.bool else padding == 0
                self._keep = keep[None] if keep.dim() == 1 else keep  # one unbatched sequence
        self._position_ids = _rows(call.get("position_ids"))
        self._cache_position = _rows(call.get("cache_position"))
        self._past = _past_length(call.get("past_key_values"))
        # an encoder–decoder pads its labels with -100 and gives its decoder no mask; used once,
        # so that a decoder called by itself later does not meet old labels
        labels, self._labels = self._labels, None
        self._labelled = None
        if labels is not None and call.get("encoder_hidden_states") is not None:
            self._labelled = labels.ne(-100)

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
        if len(self._shape) in (1, 2, 3) and x.dim() == 2:
            if len(self._shape) > 1 and batch * length == x.shape[0]:
                return x.unflatten(0, (batch, length))
            if len(self._shape) < 3 and batch == x.shape[0]:  # unbatched, [T] or [T, D]
                return x[None]
        raise ValueError(
            f"cannot tell tokens apart: the block's input has shape {tuple(x.shape)} and "
            f"{type(self.stack).__name__} was called on shape {self._shape}; expected [B, T, D], "
            f"or [B·T, D] where the model's input is [B, T] or [B, T, D]"
        )

    def samples(self, x: Tensor) -> tuple[Tensor, int]:
        """Which sample each row of a stage [..., features] is of, int64 [...], and their number.

        Windows (Swin) go to their picture. Where the model itself gets rows [N, features], each
        is a sample of one token.

        Raises:
            ValueError: the shape fits no known layout of tokens.
        """
        size = self._shape[0] if self._shape else 0
        if x.dim() == 2 and self._length is None and len(self._shape) == 2 and len(x) == size:
            return torch.arange(size, device=x.device), size
        batch, length = self.arrange(x[..., :1]).shape[:2]
        count = size if self.batch_first and size and batch % size == 0 else batch
        each = torch.arange(batch, device=x.device) // max(batch // max(count, 1), 1)
        rows = each[:, None, None].expand(batch, length, 1)
        return self.restore(rows, like=x[..., :1])[..., 0], count

    def restore(self, x: Tensor, like: Tensor) -> Tensor:
        """Undo :meth:`arrange`."""
        if like.dim() == 3:
            return x if self.batch_first else x.transpose(0, 1)
        return x.reshape(like.shape)

    def positions(self, batch: int, length: int) -> Tensor | int:
        """Where the tokens of an arranged [B, T, D] stand: an int p for p, p+1, …, or [B or 1, T].

        ``position_ids`` of the call, else ``cumsum(attention_mask) − 1``, else ``cache_position``
        (which does not know of padding), else past + arange.

        Raises:
            ValueError: the block sees a part of the call's tokens, nobody knows which.
        """
        if self._repeats and self._length is not None and length < self._length:
            raise ValueError(
                f"the block sees {length} of the {self._length} tokens that "
                f"{type(self.stack).__name__} was called on, so that their positions are unknown; "
                f"let it see all at once (config.chunk_size_feed_forward = 0)"
            )
        if _place(self._position_ids, batch, length):
            return self._position_ids
        if self._keep is not None and self._fits(self._keep, batch, length):
            return (self._keep.cumsum(-1) - 1).clamp(min=0)[:, -length:]
        if _place(self._cache_position, batch, length):
            return self._cache_position
        return self._past

    def reach(self, batch: int, length: int) -> int | None:
        """A number that no position exceeds, known without a look at values; else None."""
        if _place(self._position_ids, batch, length):
            return None
        if self._keep is not None and self._fits(self._keep, batch, length):
            return self._keep.shape[1]
        return None

    def keep(self, batch: int, length: int) -> Tensor | None:
        """[B, T], False at padding, or None where nothing is padded.

        By the call's mask, else, in the decoder of an encoder–decoder, by labels of -100.
        """
        if self._keep is not None and self._fits(self._keep, batch, length):
            return self._keep[:, -length:]
        labelled = self._labelled
        if labelled is not None and labelled.shape == (batch, length):
            return labelled
        return None

    def _fits(self, mask: Tensor, batch: int, length: int) -> bool:
        """Whether ``mask`` is about these tokens: these alone, or these behind those in a cache.

        A wider one may be another tower's, or count the frames of a sound before it was
        shortened.
        """
        width = mask.shape[1]
        return mask.shape[0] == batch and (
            width == length or (width > length and length == self._length)
        )


def _rows(ids: Any) -> Tensor | None:
    """Positions as [B or 1, T]; other shapes (of several axes in space) are no table's rows."""
    if not isinstance(ids, Tensor) or ids.dim() not in (1, 2):
        return None
    return ids[None] if ids.dim() == 1 else ids


def _place(ids: Tensor | None, batch: int, length: int) -> TypeGuard[Tensor]:
    return ids is not None and ids.shape[1] == length and ids.shape[0] in (1, batch)


def _past_length(cache: Any) -> int:
    if cache is None:
        return 0
    if hasattr(cache, "get_seq_length"):
        return int(cache.get_seq_length())
    try:  # the tuples of older models: layer → (key [B, heads, T, D], value)
        return int(cache[0][0].shape[-2])
    except (TypeError, IndexError, AttributeError):
        return 0

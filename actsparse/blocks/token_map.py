"""The positions of the tokens of one call, and which of them are padding."""

from __future__ import annotations

import warnings
from collections.abc import Hashable
from dataclasses import dataclass, field
from typing import TypeGuard

import torch
from torch import Tensor

from actsparse.blocks.cache_length import Past


@dataclass(frozen=True, eq=False)
class TokenMap:
    """What one call of a stack says of its tokens; it outlives the call.

    A mask must fit the tokens that a block sees. Where it does not, :meth:`keep` refuses, unless
    the mask hides nothing: that is looked up on the CPU alone, since elsewhere the look would wait
    for the device, and under ``torch.compile`` it would break the graph.
    """

    stack: str = "the model"  # its class
    shape: tuple[int, ...] = ()  # of the call's ids, embeddings or first tensor
    length: int | None = None  # tokens in the call, where its arguments say so
    batch_first: bool | None = True  # how blocks lay tokens out; None: shapes must tell
    pads: bool = False  # whether the stack may append padding that no mask tells of
    mask: Tensor | None = None  # [B, T] or behind a cache [B, S], False at padding
    square: Tensor | None = None  # [B, heads, T, S], which tokens attend to which
    labelled: Tensor | None = None  # [B, T], False where a decoder's token has no label
    strangers: tuple[tuple[str, Tensor | None], ...] = ()  # other masks, by name; None: no tensor
    position_ids: Tensor | None = None
    cache_position: Tensor | None = None
    past: Past = field(default_factory=Past)
    _runs: dict[Hashable, int] = field(default_factory=dict)  # of those that saw a part

    # -- layouts --------------------------------------------------------------------------------

    def arrange(self, x: Tensor) -> Tensor:
        """View a stage of the block as [B, T, features].

        Raises:
            ValueError: the shape fits no known layout of tokens.
        """
        if x.dim() == 3:
            return x.transpose(0, 1) if self._time_first(x) else x
        if x.dim() > 3:
            return x.flatten(1, -2)
        batch, length = (*self.shape, 0, 0)[:2]
        if len(self.shape) in (1, 2, 3) and x.dim() == 2:
            if len(self.shape) > 1 and batch * length == x.shape[0] and self.batch_first:
                return x.unflatten(0, (batch, length))
            if batch == x.shape[0] and self._is_row:  # unbatched
                return x[None]
        raise ValueError(
            f"cannot tell tokens apart: the block's input has shape {tuple(x.shape)} and "
            f"{self.stack} was called on shape {self.shape}; expected [B, T, D], "
            f"or [B·T, D] where the model's input is [B, T] or [B, T, D]"
        )

    def restore(self, x: Tensor, like: Tensor) -> Tensor:
        """Undo :meth:`arrange`."""
        if like.dim() == 3:
            return x.transpose(0, 1) if self._time_first(like) else x
        return x.reshape(like.shape)

    def samples(self, x: Tensor) -> tuple[Tensor, int]:
        """Which sample each row of a stage [..., features] is of, int64 [...], and their number.

        Windows (Swin) go to their picture. Where the model itself gets rows [N, features], each
        is a sample of one token.

        Raises:
            ValueError: the shape fits no known layout of tokens.
        """
        size = self.shape[0] if self.shape else 0
        if x.dim() == 2 and self._is_row and len(self.shape) == 2 and len(x) == size:
            return torch.arange(size, device=x.device), size
        batch, length = self.arrange(x[..., :1]).shape[:2]
        count = size if self.batch_first and size and batch % size == 0 else batch
        each = torch.arange(batch, device=x.device) // max(batch // max(count, 1), 1)
        rows = each[:, None, None].expand(batch, length, 1)
        return self.restore(rows, like=x[..., :1])[..., 0], count

    @property
    def _is_row(self) -> bool:
        """Whether the call is on [T] or [T, D], or on rows that are not ordered at all."""
        return len(self.shape) == 1 or (len(self.shape) == 2 and self.length is None)

    def _time_first(self, x: Tensor) -> bool:
        """Whether x is [T, B, features], by the call's own [B, T] where that tells."""
        if self.batch_first is False:
            return True
        if len(self.shape) not in (2, 3):
            return False
        batch, length = self.shape[:2]
        if batch != length:
            return tuple(x.shape[:2]) == (length, batch)
        if self.batch_first is None and tuple(x.shape[:2]) == (batch, batch) and batch > 1:
            raise ValueError(
                f"cannot tell batch from time: the block's input has shape {tuple(x.shape)}, and "
                f"{self.stack} was called on as many samples as tokens; find the blocks with "
                f"inputs of another length"
            )
        return False

    # -- positions ------------------------------------------------------------------------------

    def positions(self, batch: int, length: int, of: Hashable = None) -> Tensor | int:
        """Where the tokens of an arranged [B, T, D] stand: an int p for p, p+1, …, or [B or 1, T].

        ``position_ids`` of the call, else ``cumsum(mask) − 1`` of a mask [B, T] that fits, else
        ``cache_position`` (which does not know of padding), else the cache's length + arange. A
        cache whose length cannot be read warns. ``of``: who asks, so that a second part of the
        same call is noticed.

        Raises:
            ValueError: nobody knows, since the block sees the call's tokens part by part, caches
                disagree, or the mask leaves out the tokens in the cache.
        """
        if of is not None and self.length is not None and length < self.length:
            self._count(of, length)
        if _place(self.position_ids, batch, length):
            return self.position_ids
        if self.mask is not None:
            self._check_own(length)
        if self.mask is not None and self._fits(self.mask, batch, length):
            self._check_past(self.mask)
            return (self.mask.cumsum(-1) - 1).clamp(min=0)[:, self._columns(self.mask, length)]
        if _place(self.cache_position, batch, length):
            return self.cache_position
        if self.past.torn:
            raise ValueError(
                f"{self.stack} was called with caches of several lengths ({self.past.torn}), so "
                f"the positions of its tokens are unknown; pass position_ids"
            )
        if self.past.unread:
            warnings.warn(
                f"{self.stack} was called with {self.past.unread}, whose length cannot be read; "
                f"its tokens are taken to be the first. Pass position_ids",
                RuntimeWarning,
                stacklevel=2,
            )
        past = self.past.length
        return past if isinstance(past, int) else self._behind(length, past.device)[None]

    def reach(self, batch: int, length: int) -> int | None:
        """A number that no position exceeds, known without a look at values; else None."""
        if _place(self.position_ids, batch, length):
            return None
        if self.mask is not None and self._fits(self.mask, batch, length):
            return self.mask.shape[1]
        return None

    def _count(self, of: Hashable, length: int) -> None:
        """Notice a block that comes back for more of the call's tokens."""
        if torch.compiler.is_compiling() or torch._C._current_graph_task_id() == -1:
            self._runs[of] = self._runs.get(of, 0) + 1
        if self._runs.get(of, 0) > 1:
            raise ValueError(
                f"the block is called on {length} of the {self.length} tokens of {self.stack} at a "
                f"time, so their positions are unknown; call it on all at once "
                f"(config.chunk_size_feed_forward = 0)"
            )

    def _check_past(self, mask: Tensor) -> None:
        past = self.past.length
        if isinstance(past, int) and past > 0 and mask.shape[1] == self.length:
            raise ValueError(
                f"attention_mask has shape {tuple(mask.shape)}, but {past} tokens in the cache "
                f"come before the {self.length} that {self.stack} was called on; give a mask of "
                f"all of them, or pass position_ids"
            )

    # -- padding --------------------------------------------------------------------------------

    def keep(self, batch: int, length: int) -> Tensor | None:
        """[B, T], False at padding, or None where nothing is padded.

        By the call's mask, [B, T] or one of which token attends to which (a token that may not
        attend to itself is padding); else, in the decoder of an encoder–decoder, by labels of -100.

        Raises:
            ValueError: a mask that may hide something fits other tokens than these.
        """
        self._check_own(length)
        if self.mask is not None and self._fits(self.mask, batch, length):
            return self.mask.expand(batch, -1)[:, self._columns(self.mask, length)]
        if self.square is not None and (itself := self._itself(batch, length)) is not None:
            return itself
        if self.labelled is not None and self.labelled.shape == (batch, length):
            return self.labelled
        self.check_unpadded(f"runs on [B, T] = {(batch, length)}")
        return None

    def unpadded(self, x: Tensor) -> Tensor | None:
        """:meth:`keep` in the layout of a stage [..., features]: [...], or None.

        Raises:
            ValueError: a mask that may hide something fits other tokens than these.
        """
        try:
            arranged = self.arrange(x[..., :1])
        except ValueError:  # whoever packed them knows no padding, if there is none
            self.check_unpadded(f"sees rows of shape {tuple(x.shape)}")
            return None
        keep = self.keep(*arranged.shape[:2])
        if keep is None:
            return None
        return self.restore(keep.unsqueeze(-1), like=x[..., :1]).reshape(x.shape[:-1])

    def check_unpadded(self, what: str) -> None:
        """See that no mask of the call hides anything.

        Raises:
            ValueError: one does, or may; ``what``: the block does that the mask does not fit.
        """
        own = {"attention_mask": self.mask, "attention_mask ": self.square, "labels": self.labelled}
        known = [(name.strip(), mask) for name, mask in own.items() if mask is not None]
        for name, mask in (*known, *self.strangers):
            if mask is None or not _hides_nothing(mask):
                shape = "" if mask is None else f" of shape {tuple(mask.shape)}"
                raise ValueError(
                    f"{self.stack} was called with {name}{shape}, but a block of it {what}, so it "
                    f"is unknown which tokens are padding; say it by observe(mask=...), where "
                    f"lambda b, t: None means no padding, or call the model without padding and "
                    f"without this mask"
                )

    def alike(self, other: TokenMap) -> bool:
        """Whether two calls are the same one, or say the same and hold no tensors."""
        plain = [value for value in vars(self).values() if not isinstance(value, dict)]
        others = [value for value in vars(other).values() if not isinstance(value, dict)]
        return self is other or (
            not any(isinstance(value, Tensor) for value in (*plain, *others))
            and not (self.strangers or other.strangers)
            and not isinstance(self.past.length, Tensor)
            and plain == others
        )

    def _check_own(self, length: int) -> None:
        if self.pads and self.length is not None and length > self.length:
            raise ValueError(
                f"{self.stack} was called on {self.length} tokens and appends padding of its own, "
                f"so its blocks get {length}; call it on {length} (pad_to_multiple_of of a "
                f"tokenizer), with a mask"
            )

    def _itself(self, batch: int, length: int) -> Tensor | None:
        """Which of the tokens attend to themselves, by a mask [B, heads, T or 1, S]."""
        square = self.square
        assert square is not None
        if square.shape[0] == 1 < batch:  # the same for all samples: no padding
            return torch.ones(batch, length, dtype=torch.bool, device=square.device)
        queries, keys = square.shape[-2:]
        if square.shape[0] != batch or not (queries == 1 or queries == length) or keys < length:
            return None
        at = self._columns(square, length)
        row = torch.arange(length, device=square.device) if queries > 1 else 0
        if isinstance(at, slice):
            at = torch.arange(keys, device=square.device)[at]
        return _attends(square[:, 0, row, at])

    # -- a mask's columns -----------------------------------------------------------------------

    def _fits(self, mask: Tensor, batch: int, length: int) -> bool:
        """Whether ``mask`` is about these tokens: these alone, or these behind those in a cache.

        A wider one may be another tower's, or count the frames of a sound before it was
        shortened.
        """
        rows, width = mask.shape
        return (rows == batch or rows == 1) and (
            width == length or (width > length and length == self.length)
        )

    def _columns(self, mask: Tensor, length: int) -> slice | Tensor:
        """Those of the call's own tokens in a mask of them and of the cached ones.

        The last, unless the mask is of a static cache, with room for tokens to come.
        """
        past, width = self.past.length, mask.shape[-1]
        if isinstance(past, Tensor):
            return self._behind(length, mask.device).clamp(max=width - 1)
        if past and not self.past.cut and past + length < width:
            return slice(past, past + length)
        return slice(width - length, width)

    def _behind(self, length: int, device: torch.device) -> Tensor:
        past = self.past.length
        past = past.to(device) if isinstance(past, Tensor) else past
        return past + torch.arange(length, device=device)


def _place(ids: Tensor | None, batch: int, length: int) -> TypeGuard[Tensor]:
    if ids is None or ids.shape[1] != length:
        return False
    return ids.shape[0] == batch or ids.shape[0] == 1  # compilers take no "in" of sizes


def _attends(mask: Tensor) -> Tensor:
    """A mask of attention as bool; a float one is added to scores, and hides by large numbers."""
    return mask > -1e3 if mask.is_floating_point() else mask != 0


def _hides_nothing(mask: Tensor) -> bool:
    """Whether a mask has one value alone, so that whatever it means it tells no tokens apart."""
    if torch.compiler.is_compiling() or mask.device.type != "cpu":
        return False
    return bool((mask == mask.flatten()[:1]).all())

"""Positions and padding of the tokens of the call that is running.

An MLP sees rows of features and cannot know where they stand: with a key–value cache it sees one
token at position t, left padding shifts positions, some models flatten [B, T, D] to [B·T, D]. The
call of the *stack* around it knows: the nearest module that takes token ids, their embeddings or a
picture or sound (encoder and decoder, image and text apart), else the model itself.
"""

from __future__ import annotations

import contextlib
import inspect
import re
import threading
from collections import deque
from dataclasses import replace
from functools import partial
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from actsparse.blocks.cache_length import past_of
from actsparse.blocks.pass_state import on_stack
from actsparse.blocks.token_map import TokenMap

_IDS = ("input_ids", "inputs_embeds")  # [B, T] and [B, T, D]
_PADDING = (  # True or -inf where padded
    "src_key_padding_mask", "tgt_key_padding_mask", "key_padding_mask", "decoder_padding_mask",
)  # fmt: skip
_MARKS = (
    *_IDS, "pixel_values", "grid_thw", "input_features", "input_values", *_PADDING[:2],
)  # fmt: skip
_POSITIONS = ("position_ids", "positions", "input_pos")
# masks of other tokens than a block's, or of which nobody knows what is padding, by their names
_STRANGER = re.compile(r"(?:^|_)(?:masks?|pad|padding|valid|(?:seq)?len(?:gth)?s?)$")
_ELSEWHERE = re.compile(  # which say nothing of the stack's own padding
    r"^(?:encoder|memory|global)_|_encoder_|cross|head_mask|pos(?:ition)?_masks?$"
)
_REMEMBERED = 64  # calls whose layers gradient checkpointing may run again


def tokens_of(path: tuple[nn.Module, ...], batch_first: bool | None = True) -> Tokens:
    """The :class:`Tokens` of the stack around a block.

    ``path``: its modules, outermost first; ``batch_first``: how it lays out its tokens.
    """
    stack = path[0]
    for module in path:
        if set(_MARKS) & set(inspect.signature(module.forward).parameters):
            stack = module
    tokens = stack.__dict__.get("_actsparse_tokens")
    if tokens is None:
        tokens = stack._actsparse_tokens = Tokens(stack, batch_first, path[0])  # type: ignore[assignment]
    elif tokens.nothing.batch_first != batch_first:
        tokens.nothing = replace(tokens.nothing, batch_first=None)
    return tokens


class _Running:
    """Calls that run, innermost last, each with the next number of autograd's nodes."""

    def __init__(self) -> None:
        self.calls: tuple[tuple[TokenMap, int], ...] = ()
        self.labels: tuple[Any, ...] = ()  # of running calls of the root
        self.again: tuple[int, TokenMap] | None = None  # a backward, and whose layers it ran last


class _Local(_Running, threading.local):
    """Those of the thread that asks."""


class _Calls:
    """The calls of one stack that run, and those that gradient checkpointing may come back to."""

    def __init__(self) -> None:
        self.local = _Local()
        self.traced = _Running()  # in a compiled graph: what it writes to a thread's own is lost
        self.tasks: set[int] = set()  # backwards that run layers again
        self.last: TokenMap | None = None
        self.ended: deque[tuple[range, TokenMap]] = deque(maxlen=_REMEMBERED)  # by nodes' numbers

    @property
    def running(self) -> _Running:
        """Where a call that begins or ends is noted."""
        running: _Running = self.traced if torch.compiler.is_compiling() else self.local
        return running

    def __reduce__(self) -> Any:  # a copy of the model makes calls of its own
        return _Calls, ()

    def again(self) -> TokenMap | None:
        """The call whose layers backward now runs a second time; None: there is none.

        Autograd numbers its nodes, by thread: those of a call form a range, and the node that
        asks for a layer's values is among them. In a nested backward it need not be: that is of
        layers that the outer one has just run again.

        Raises:
            RuntimeError: several calls, or one that was too long ago.
        """
        node: Any = torch._C._current_autograd_node()
        if node is None:
            return None
        task, outer = torch._C._current_graph_task_id(), self.local.again
        if outer is not None and outer[0] != task and outer[0] in self.tasks:
            return outer[1]
        number = node._sequence_nr()
        found = [call for numbers, call in self.ended if number in numbers]
        if found and all(call.alike(found[0]) for call in found):
            if task not in self.tasks:
                self.tasks.add(task)
                engine = torch.autograd.Variable._execution_engine
                engine.queue_callback(partial(self.tasks.discard, task))
            self.local.again = task, found[0]
            return found[0]
        if found or (len(self.ended) == _REMEMBERED and number < self.ended[0][0].start):
            raise RuntimeError(
                f"gradient checkpointing repeats an earlier call, but it is unknown which of "
                f"{len(found) or 'more than ' + str(_REMEMBERED)}; call backward more often, and "
                f"in the thread of the forward pass"
            )
        return None


class Tokens:
    """Listens to a stack's calls; :attr:`now` is the :class:`TokenMap` of the running one.

    Each thread has its own, and what comes after a call finds nothing of it, but for gradient
    checkpointing: in backward it runs layers again, which meet the call whose graph they belong
    to. Under ``torch.compile``, which cannot ask whose that is, they meet the last call.
    """

    def __init__(
        self, stack: nn.Module, batch_first: bool | None = True, root: nn.Module | None = None
    ) -> None:
        self.stack = stack
        self.root = root
        self.users = 0
        # Longformer, BigBird, LED and Reformer take a whole number of windows
        pads = any(name.startswith("_pad_to_") for name in dir(type(stack)))
        # outside of calls
        self.nothing = TokenMap(type(stack).__name__, batch_first=batch_first, pads=pads)
        self._names = tuple(inspect.signature(stack.forward).parameters)
        self._hooks: list[Any] = []
        self._calls = _Calls()

    @property
    def now(self) -> TokenMap:
        """What the running call says of its tokens; outside of calls it says nothing."""
        calls = self._calls
        running = calls.local.calls or calls.traced.calls
        if running:
            return running[-1][0]
        call = calls.last if torch.compiler.is_compiling() else calls.again()
        return self.nothing if call is None else call

    def attach(self) -> None:
        """Start to listen; call :meth:`detach` once for each call of this."""
        self.users += 1
        if not self._hooks:
            self._listen(self.stack, self._enter, self._leave)
            if self.root is not None and self.root is not self.stack:
                self._listen(self.root, self._enter_root, self._leave_root)

    def _listen(self, module: nn.Module, enter: Any, leave: Any) -> None:
        self._hooks.append(module.register_forward_pre_hook(enter, with_kwargs=True))
        # also where the call is broken off
        self._hooks.append(module.register_forward_hook(leave, always_call=True))

    def detach(self) -> None:
        """Stop to listen when the last user has gone."""
        self.users -= 1
        if self.users == 0:
            for hook in self._hooks:
                hook.remove()
            self._hooks.clear()
            self.stack.__dict__.pop("_actsparse_tokens", None)

    # -- hooks ----------------------------------------------------------------------------------

    def _enter_root(self, root: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        running = self._calls.running
        running.labels = (*on_stack(root, running.labels), kwargs.get("labels"))

    def _leave_root(self, root: nn.Module, args: tuple[Any, ...], output: Any) -> None:
        running = self._calls.running
        running.labels = running.labels[:-1]

    def _enter(self, stack: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        running = self._calls.running
        labels = self._calls.local.labels or self._calls.traced.labels
        call = dict(zip(self._names, args, strict=False))
        call.update(kwargs)
        read = self._read(call, labels[-1] if labels else None)
        running.calls = (*on_stack(stack, running.calls), (read, _next_number()))
        if not torch.compiler.is_compiling() and torch._C._current_graph_task_id() == -1:
            self._calls.tasks.clear()  # of one that was broken off

    def _leave(self, stack: nn.Module, args: tuple[Any, ...], output: Any) -> None:
        running = self._calls.running
        if not running.calls:  # a hook before ours raised
            return
        call, number = running.calls[-1]
        running.calls = running.calls[:-1]
        if not torch.compiler.is_compiling():
            numbers = range(number, _next_number())
            self._calls.last = None
            if numbers and output is not None and torch.is_grad_enabled():
                self._calls.last = call
                self._calls.ended.append((numbers, call))

    # -- arguments ------------------------------------------------------------------------------

    def _read(self, call: dict[str, Any], labels: Any) -> TokenMap:
        given = [call[name] for name in _IDS if isinstance(call.get(name), Tensor)]
        first = next((v for v in (*given, *call.values()) if isinstance(v, Tensor)), None)
        shape = () if first is None else tuple(first.shape)
        # by [B, T] of ids, under any name, or by [B, T, D]
        ids = first is not None and not first.is_floating_point()
        of_tokens = len(shape) == 2 if ids else bool(given) and len(shape) == 3
        mask, square, unknown = _mask(call.get("attention_mask"), shape)
        for name in _PADDING:
            padding = _numbers(call.get(name))
            if padding is not None:
                keep = ~padding if padding.dtype == torch.bool else padding == 0
                mask = keep[None] if keep.dim() == 1 else keep  # one unbatched sequence
        strangers: list[tuple[str, Tensor | None]] = [("attention_mask", None)] if unknown else []
        read = {"attention_mask", *_PADDING, *_POSITIONS}
        if set(_PADDING) & set(self._names):  # torch's own, which attends by these
            read |= {"mask", "src_mask", "tgt_mask"}
        for name, other in call.items():
            if name in read or not _STRANGER.search(name) or _ELSEWHERE.search(name):
                continue
            other = _numbers(other)
            if other is not None and shape and other.shape[:1] == shape[:1]:
                strangers.append((name, other))
        positions = [_rows(call.get(name)) for name in _POSITIONS]
        labelled = None
        # an encoder–decoder pads its labels with -100 and gives its decoder no mask
        if call.get("encoder_hidden_states") is not None and isinstance(labels, Tensor):
            labelled = labels.ne(-100) if labels.shape == shape[:2] else None
        return TokenMap(
            stack=self.nothing.stack,
            shape=shape,
            length=shape[1] if of_tokens else None,
            batch_first=self.nothing.batch_first,
            pads=self.nothing.pads,
            mask=mask,
            square=square,
            labelled=labelled,
            strangers=tuple(strangers),
            position_ids=next((ids for ids in positions if ids is not None), None),
            cache_position=_rows(call.get("cache_position")),
            past=past_of(call),
        )


def _next_number() -> int:
    """Which number autograd gives to the next node of this thread."""
    return 0 if torch.compiler.is_compiling() else torch._C._autograd._get_sequence_nr()


def _mask(mask: Any, shape: tuple[int, ...]) -> tuple[Tensor | None, Tensor | None, bool]:
    """``attention_mask`` as [B, T], as [B, heads, T, S], or whether it is something else."""
    if isinstance(mask, dict):  # by kind of attention
        mask = next((each for each in mask.values() if each is not None), None)
    if (numbers := _numbers(mask)) is not None:
        mask = numbers
    if mask is None or (isinstance(mask, Tensor) and mask.dim() < 2):
        return None, None, False
    if not isinstance(mask, Tensor) or mask.dim() > 4:
        return None, None, True
    if mask.dim() > 2:
        return None, mask[:, None] if mask.dim() == 3 else mask, False
    if len(shape) > 1 and mask.shape[0] == mask.shape[1] == shape[1] != shape[0]:
        return None, mask[None, None], False  # which token attends to which, in all samples
    return mask != 0, None, False


def _numbers(given: Any) -> Tensor | None:
    """A tensor, or what lists and arrays of numbers hold as one; None: it is neither."""
    if isinstance(given, Tensor):
        return given
    if isinstance(given, list | tuple | np.ndarray) and len(given):
        with contextlib.suppress(TypeError, ValueError, RuntimeError):  # names, tensors, ragged
            return torch.as_tensor(given)
    return None


def _rows(ids: Any) -> Tensor | None:
    """Positions as [B or 1, T]; other shapes (of several axes in space) are no table's rows."""
    ids = _numbers(ids)
    if ids is None or ids.dim() not in (1, 2):
        return None
    return ids[None] if ids.dim() == 1 else ids


def _left_to_python(*hooks: Any) -> None:
    """Keep compilers from making graphs of ``hooks`` alone, as they do of a compiled module's.

    Such a graph would write for all threads. Hooks of modules inside are still traced.
    """
    with contextlib.suppress(AttributeError, ImportError):
        from torch._C._dynamo import eval_frame

        skip = eval_frame._FrameAction.SKIP  # what the hooks call as well
        for hook in hooks:
            strategy = eval_frame._FrameExecStrategy(skip, skip)
            eval_frame.set_code_exec_strategy(hook.__code__, strategy)


_left_to_python(Tokens._enter, Tokens._leave, Tokens._enter_root, Tokens._leave_root)

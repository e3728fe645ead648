"""The step of a model's schedules, in a buffer that is saved and copied with its weights."""

from __future__ import annotations

import itertools
import warnings
import weakref
import zlib
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from actsparse.blocks.block import MLPBlock

BUFFER = "actsparse_progress"  # int64 [3]: steps done, steps of the whole training or 0, a digest


class Clock:
    """Optimizer steps done (``step``) and to be done (``steps``, if known) of a sparsified model.

    With ``kept`` they stand in the buffer ``actsparse_progress`` of ``model`` too. Whoever writes
    it, by ``load_state_dict`` or in place as ``AveragedModel`` does, moves the schedules:
    :meth:`look` reads it, and calls ``moved``.
    """

    def __init__(
        self, model: nn.Module, blocks: Sequence[MLPBlock], moved: Callable[[], None], kept: bool
    ) -> None:
        self.step = 0
        self.steps: int | None = None
        self._model, self._blocks, self._moved, self._kept = model, blocks, moved, kept
        self._read: tuple[Tensor, int] | None = None  # the buffer as it was written or read last
        self._origin: Callable[[], Clock | None] = _nothing
        self._placed = True  # since it was copied
        # Weights may come in several files, of which one says where they stand.
        self._told = self._silent = False
        self._warned: set[str] = set()
        if not kept:
            return
        if BUFFER in model._buffers:
            raise ValueError(f"the model has a buffer {BUFFER!r} already; it is kept for schedules")
        with torch.inference_mode(False):
            buffer = torch.zeros(3, dtype=torch.int64, device=blocks[0].up.weight.device)
        model.register_buffer(BUFFER, buffer)
        self._write()

    def put(self, step: int, steps: int | None) -> None:
        """Let schedules stand there from now on."""
        self.step, self.steps, self._placed = step, steps, True
        self._told = self._silent = False
        self._write()
        self._moved()

    def before_pass(self) -> None:
        """Follow the buffer, and say where loaded weights did not tell."""
        if self._silent:
            self._say(self._unsaid(), stacklevel=5)
        self._told = self._silent = False
        self.look()

    def look(self) -> None:
        """Follow what was written to the buffer since the last time."""
        if not self._kept:
            return
        buffer, origin = self._model._buffers[BUFFER], self._origin()
        assert buffer is not None
        if not _readable(buffer):
            return
        read = self._read
        if read is None or read[0] is not buffer or read[1] != _version(buffer):
            self._follow(buffer, origin)
        if origin is None or self._placed:
            return
        if origin.step > self.step and self._changed():
            self._say(
                f"this copy of a sparsified model has had new weights since it was made, but its "
                f"schedules stand at step {self.step}, the original's at {origin.step}: copy "
                f"buffers too, or handle_of(copy).load_state_dict(handle.state_dict())",
                stacklevel=5,
            )

    def _follow(self, buffer: Tensor, origin: Clock | None) -> None:
        step, steps, digest = buffer.tolist()
        if digest != _digest(step, steps) and origin is not None:
            origin.look()  # the buffer was averaged as if it were a weight
            step, steps = origin.step, origin.steps or 0
        elif digest != _digest(step, steps):
            self._say(
                f"the buffer {BUFFER!r} was averaged or overwritten; schedules stay at step "
                f"{self.step}",
                stacklevel=6,
            )
            step, steps = self.step, self.steps or 0
        if (step, steps or None) != (self.step, self.steps):
            self.step, self.steps, self._placed = step, steps or None, True
            self._moved()
        self._write()

    def unfollowed(self) -> None:
        """An optimizer moves it from now on, no longer the model it was copied from."""
        self._origin = _nothing

    def remove(self) -> None:
        """Take the buffer from the model."""
        if self._kept:
            del self._model._buffers[BUFFER]
        self._kept = False

    def copy_of(self, original: Clock) -> None:
        """Remember the clock that this one was copied from, as averages are made of it."""
        self._origin, self._placed = weakref.ref(original), False

    @property
    def copied(self) -> bool:
        """Whether it is a copy that no optimizer moves, as an average of weights has it."""
        return self._kept and self._origin is not _nothing

    def __getstate__(self) -> dict[str, Any]:
        return {**self.__dict__, "_origin": _nothing}

    def _write(self) -> None:
        if not self._kept:
            return
        buffer, steps = self._model._buffers[BUFFER], self.steps or 0
        assert buffer is not None
        values = torch.tensor([self.step, steps, _digest(self.step, steps)])
        if buffer.is_inference() and not torch.is_inference_mode_enabled():
            buffer = self._model._buffers[BUFFER] = torch.zeros_like(values, device=buffer.device)
        if not _readable(buffer):
            return
        buffer.copy_(values)
        self._read = buffer, _version(buffer)

    def _changed(self) -> bool:
        """Whether the weights of a copy, whose versions began at 0, were written to."""
        weights = [block.up.weight for block in self._blocks]
        return any(not w.is_inference() and w._version > 0 for w in weights)

    def before_load(
        self, module: nn.Module, state: dict[str, Any], prefix: str, *hook: Any
    ) -> None:
        """A hook of ``load_state_dict``: say where weights do not tell where they stand."""
        if not self._kept:
            return
        if prefix + BUFFER in state:
            self._told = self._placed = True
            self._silent = False
            return
        self.look()
        buffer = self._model._buffers[BUFFER]
        assert buffer is not None
        state[prefix + BUFFER] = buffer.clone()  # a copy of the dict; a strict load is content
        ups = [f"{prefix}{block.up.name}." for block in self._blocks]
        loaded = [any(name.startswith(up) for name in state) for up in ups]
        if all(loaded):
            self._say(self._unsaid(), stacklevel=5)
        elif any(loaded):
            self._silent = not self._told

    def _unsaid(self) -> str:
        return (
            f"the weights that were loaded do not say where the recipe's schedules stand; they "
            f"stay at step {self.step}: handle.attach(optimizer, steps=..., start=N) tells"
        )

    def _say(self, message: str, stacklevel: int) -> None:
        if message not in self._warned:
            self._warned.add(message)
            warnings.warn(message, stacklevel=stacklevel)


_unique = itertools.count(1)


def _nothing() -> None:
    return None


def _readable(buffer: Tensor) -> bool:
    """Whether it has values now: not on meta, in a fake mode or under vmap."""
    wrapped = torch._C._functorch.is_functorch_wrapped_tensor(buffer)
    return type(buffer) is Tensor and not buffer.is_meta and not wrapped


def _version(tensor: Tensor) -> int:
    """How often a tensor was written to; where that is not counted, no number twice."""
    return -next(_unique) if tensor.is_inference() else tensor._version


def _digest(step: int, steps: int) -> int:
    """A number that shows whether the two were averaged with others.

    >>> _digest(3, 30) == (_digest(2, 30) + _digest(4, 30)) // 2
    False
    """
    return zlib.crc32(f"{step}/{steps}".encode())

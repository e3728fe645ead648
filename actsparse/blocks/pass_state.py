"""What one pass through a block keeps, in its own thread, until the pass ends."""

from __future__ import annotations

import contextlib
import sys
import threading
from collections.abc import Iterator
from types import FrameType
from typing import Any, Self

import torch
from torch import Tensor, nn

from actsparse.blocks.stages import AtOnce, Plan


def on_stack(module: nn.Module, calls: tuple[Any, ...]) -> tuple[Any, ...]:
    """Those of a module's calls that still run where one more begins.

    A keyboard interrupt ends calls without their hooks, so that Python's own stack must tell.
    """
    if not calls or torch.compiler.is_compiling():
        return calls
    return calls[: running_calls(module) - 1]


def running_calls(module: nn.Module) -> int:
    """How many calls of a module run in this thread, one inside another, by Python's stack."""
    code, running = nn.Module._call_impl.__code__, 0
    frame: FrameType | None = sys._getframe()
    while frame is not None:
        running += frame.f_code is code and frame.f_locals.get("self") is module
        frame = frame.f_back
    return running


class Running:
    """One pass through a block, from the input of up to the output of down."""

    __slots__ = (
        "at_once", "changed", "detours", "entered", "expects_phi", "first", "ghost", "kept", "plan",
        "x",
    )  # fmt: skip

    def __init__(self) -> None:
        self.x: Tensor | None = None  # as it came; None where no pass runs
        self.changed: Tensor | None = None  # as the transforms left it
        self.entered: list[nn.Module] = []  # gate and up, as they are called
        self.kept: dict[str, Tensor] = {}
        self.plan: Plan | None = None
        self.detours = False  # whether an executor runs this pass in the layers' place
        self.expects_phi = False  # whether the next activation call is this block's
        self.at_once: AtOnce | None = None  # how the layers run this pass, without a plan
        self.ghost: Any = None  # what stands for its hidden layer, where that is not computed
        self.first: object = None  # the layer that asked whether they may


class OfThread(threading.local):
    """What each thread has of its own; copies and pickles of a model begin with nothing.

    Compiled code keeps what it does to a list in here, but loses what it assigns to an attribute.
    """

    def __deepcopy__(self, memo: dict[int, Any]) -> Self:
        return type(self)()

    def __reduce__(self) -> tuple[type[Self], tuple[()]]:
        return type(self), ()


class Passes(OfThread):
    """The running pass of one block.

    Each call of the module around the block has a frame of its own. So a call inside another one
    does not meet what that one keeps, and what an aborted call kept goes with its frame. The
    lowest frame serves layers that are called outside of that module.
    """

    def __init__(self) -> None:
        self.frames = [Running()]

    @property
    def now(self) -> Running:
        """The running pass of this thread."""
        return self.frames[-1]

    def begin(self) -> Running:
        """A pass begins in the present frame, or has ended: what was kept there is forgotten."""
        self.frames[-1] = Running()
        return self.frames[-1]

    def enter(self) -> None:
        """The module around the block is called."""
        self.frames.append(Running())

    def leave(self, module: nn.Module) -> None:
        """That call has ended, or an error ended it."""
        if len(self.frames) > 1:  # hooks may have come in the middle of a call
            self.frames.pop()
        # a keyboard interrupt ends calls without hooks; their frames would take another block's φ
        if len(self.frames) > 1 and not torch.compiler.is_compiling():
            del self.frames[running_calls(module) :]


class _Sleep(threading.local):
    depth = 0


_sleep = _Sleep()


@contextlib.contextmanager
def sites_asleep() -> Iterator[None]:
    """Inside, models that this thread runs behave as if nothing were attached; no tap is called."""
    _sleep.depth += 1
    try:
        yield
    finally:
        _sleep.depth -= 1


def asleep() -> bool:
    """Whether this thread is inside :func:`sites_asleep`."""
    return _sleep.depth > 0


def unreadable() -> str | None:
    """Why stages of a pass cannot be read now, or None: their values do not exist yet."""
    if torch.compiler.is_compiling():
        return None
    if torch._C._are_functorch_transforms_active():
        return "inside torch.func transforms (vmap, grad, jvp)"
    return "while torch.jit traces" if torch.jit.is_tracing() else None

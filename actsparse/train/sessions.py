"""What observes the blocks during a training, and what is read from it."""

from __future__ import annotations

from typing import Any

from torch import Tensor, nn

from actsparse.modify import Handle
from actsparse.observe import Seen, observe
from actsparse.observe.registry import Phase
from actsparse.train.processes import together

Summary = dict[str, Any] | None


class Sessions:
    """The sessions of a training: ``seen``, the user's, and two of its own.

    ``tail`` sees the last fifth of the steps. ``window`` counts density from one log to the next,
    where ``seen`` is not read out at each log.
    """

    def __init__(self, seen: Seen | None) -> None:
        self.seen = seen
        self.tail: Seen | None = None
        self.window: Seen | None = None

    def begin(self, model: nn.Module, handle: Handle, *, keeps: bool, dense: bool) -> None:
        """A training begins; ``keeps``: some process keeps a record, ``dense``: all blocks run so.

        What is for the logs alone does not make blocks run dense.
        """
        self.tail = None
        if self.seen is not None and keeps:
            self.seen.whole = True  # it is reset at each log
        read = keeps and self.seen is not None and "density" in self.seen.measures
        if not read and (self.seen is not None or dense):
            self.window = _observed(model, handle)

    def begin_tail(self, model: nn.Module, handle: Handle) -> None:
        """The last steps begin, if they have not."""
        if self.seen is not None and self.tail is None:
            self.tail = _observed(model, handle)

    def watch(self, on: bool) -> None:
        """Let them watch again, or get out of the sparse kernels' way."""
        for session in (self.seen, self.tail, self.window):
            if session is not None:
                session.open() if on else session.close()

    def forget_inference(self) -> None:
        """Passes in evaluation mode were not the model's evaluation."""
        for session in (self.seen, self.window):
            if session is not None:
                session.reset("inference")

    def read(self, phase: Phase, keeps: bool) -> tuple[Summary, Summary]:
        """What ``seen`` has seen, and the measures for the logs, since the last time.

        Where a process ``keeps`` a record, ``seen`` is of all processes and starts anew.
        """
        found = None
        if self.seen is not None:
            found = _since_last(self.seen, phase) if keeps else None
        if self.window is not None:
            return found, _since_last(self.window, phase)
        return found, found if keeps else None

    def end(self) -> None:
        """Close those that are not the user's."""
        if self.tail is not None:
            self.tail.close()
        if self.window is not None:
            self.window.close()
            self.window = None

    def tensors(self) -> dict[str, Tensor]:
        """What a checkpoint keeps of them."""
        return {
            f"{name}/{key}": tensor
            for name, session in (("seen", self.seen), ("tail", self.tail))
            if session is not None
            for key, tensor in session.state_dict().items()
        }

    def load(self, tensors: dict[str, Tensor], model: nn.Module, handle: Handle) -> None:
        """Go on from `tensors`."""
        counted: dict[str, dict[str, Tensor]] = {"seen": {}, "tail": {}}
        for key, tensor in tensors.items():
            name, _, rest = key.partition("/")
            counted[name][rest] = tensor
        if counted["tail"]:
            self.tail = _observed(model, handle)
            self.tail.load_state_dict(counted["tail"])
        if self.seen is not None:
            self.seen.load_state_dict(counted["seen"])


def _observed(model: nn.Module, handle: Handle) -> Seen:
    session = observe(model, blocks=handle.blocks)
    session.whole = True
    return session


def _since_last(session: Seen, phase: Phase) -> Summary:
    if together():
        session.pool(phase)
    found = session.summary(phase)
    session.reset(phase)
    return found

"""How the layers of a block run at once, in calls on an x of a known shape, without a plan."""

from __future__ import annotations

from typing import Any

from torch import Size, Tensor, nn
from torch.compiler import is_compiling

from actsparse.blocks.block import MLPBlock
from actsparse.blocks.pass_state import Passes, asleep
from actsparse.blocks.replace_forward import Detour
from actsparse.blocks.stages import AtOnce

SHAPES = 256  # more of x are met anew


class Ways:
    """The ways of one block; ``passes`` are its own."""

    def __init__(self, passes: Passes) -> None:
        self._passes = passes
        self._ways: dict[Size, AtOnce] = {}

    def __getstate__(self) -> dict[str, Any]:
        """Copies and pickles of a model keep none: a way knows the weights of this one."""
        return {"_passes": self._passes, "_ways": {}}

    def clear(self) -> None:
        """Keep none."""
        self._ways.clear()

    def keep(self, x: Tensor | None, way: AtOnce | None) -> None:
        """Run the layers by ``way`` on tensors like x; ``x`` None: keep none."""
        if x is None or len(self._ways) >= SHAPES:
            self._ways.clear()
        if x is not None and way is not None:
            self._ways[x.shape] = way

    def whole(self, x: Any) -> Tensor | None:
        """y of the whole block on x, if it runs at once and skips its layers."""
        way = self._ways.get(x.shape) if isinstance(x, Tensor) else None
        return None if way is None else way.whole(x)

    def of(self, layer: object, x: Tensor) -> AtOnce | None:
        """How up or gate runs at once, if so: the first of them decides for the pass."""
        now = self._passes.frames[-1]
        if now.plan is not None:  # gate has asked for one, or a pass was broken off
            return None
        if now.at_once is None or now.first is layer or now.changed is not x:
            way = self._ways.get(x.shape)
            now.at_once = None
            if way is None or not way.takes(x):
                return None
            if way.skips:
                now = self._passes.begin()
                now.detours = True
            now.at_once, now.first, now.changed = way, layer, x
        return now.at_once


class Whole(Detour):
    """The forward of a module that computes one block alone: y at once, or by its own forward.

    ``framed``: its own forward runs in a frame, see :class:`Passes`.
    """

    def __init__(self, module: nn.Module, ways: Ways, passes: Passes, framed: bool) -> None:
        self.ways, self.passes, self.framed = ways, passes, framed
        super().__init__(module, self._run)

    def _run(self, _: Detour, x: Any) -> Any:
        if not is_compiling() and not asleep() and (y := self.ways.whole(x)) is not None:
            return y
        return self.original(x)

    def original(self, *args: Any, **kwargs: Any) -> Any:
        """The module's own forward."""
        if not self.framed:
            return super().original(*args, **kwargs)
        self.passes.enter()
        try:
            return super().original(*args, **kwargs)
        finally:
            self.passes.leave(self.module)


def executed_alone(block: MLPBlock, follows: bool, executed: bool) -> bool:
    """Whether a block with an executor, where tokens are followed or not, needs no hooks.

    torch's encoder has a fast path past its layers, which only hooks keep it from.
    """
    encoders = nn.TransformerEncoder | nn.TransformerEncoderLayer
    return executed and not follows and not any(isinstance(m, encoders) for m in block.path)

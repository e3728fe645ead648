"""Notices that a session averages over a training, whose beginning is seldom meant."""

from __future__ import annotations

import warnings
from collections.abc import Iterable

from actsparse.blocks.block import MLPBlock

UPDATES = 200  # in-place changes of one parameter; an optimizer's step makes one to three


class Averages:
    """The weights of blocks since counting began."""

    def __init__(self, blocks: Iterable[MLPBlock]) -> None:
        self._blocks = list(blocks)
        self._said = False
        self.begin()

    def begin(self) -> None:
        """Counting begins."""
        self._began = self._updates()

    def notice(self) -> None:
        """Warn, once, if the weights have changed much since."""
        if not self._said and self._updates() - self._began >= UPDATES:
            self._said = True
            warnings.warn(
                "what was seen in training is an average since observe(), over hundreds of changes "
                "of the weights; for the density now call seen.reset('train') after each reading, "
                "or set seen.whole = True if the whole is meant",
                stacklevel=3,
            )

    def _updates(self) -> int:
        """How often the parameter that changed most was written to."""
        ups = (p for block in self._blocks for p in block.up.module.parameters())
        return max((0 if p.is_inference() else p._version for p in ups), default=0)

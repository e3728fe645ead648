"""What a modification is: a config that attaches itself to blocks, one by one."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from torch import Tensor

from actsparse.blocks.block import MLPBlock
from actsparse.blocks.site import Site
from actsparse.modify.schedule import Ramp
from actsparse.values import check_fields


class NotApplicable(Exception):
    """A modification cannot be made at a block; the message says why."""


@dataclass(frozen=True)
class Progress:
    """Where training stands: optimizer steps done, and how many there will be, if known."""

    step: int
    steps: int | None


class Attached:
    """One modification at one block, until :meth:`remove`."""

    def __init__(self, site: Site, note: str) -> None:
        self.site = site
        self.note = note

    def update(self, progress: Progress) -> None:
        """Follow a schedule; called wherever training moves on or back, between passes or
        at the start of one."""

    def settle(self) -> None:
        """Do what must follow between passes: let the site hook what is needed from now on."""

    def prepare(self, progress: Progress) -> None:
        """Bring parameters back to where they are allowed, before each optimizer step."""

    def project(self, progress: Progress) -> None:
        """Bring parameters back to where they are allowed, after each optimizer step."""

    def penalty(self) -> Tensor | None:
        """The last forward pass's share of the loss, or None."""
        return None

    def forget(self) -> None:
        """Drop what an earlier forward pass has left; called before each in training."""

    @property
    def unclaimed(self) -> bool:
        """Whether the last training pass has a share of the loss that nobody asked for."""
        return False

    def remove(self) -> None:
        """Detach; the block computes as before."""
        self.site.release()


@dataclass(frozen=True)
class Modification:
    """Base of the configs; the annotations of its fields say what they must be.

    ``order``: projections of lower order run first. ``changes_function``: in evaluation the block
    computes something else with it, whatever its parameters.
    """

    order: ClassVar[int] = 0
    changes_function: ClassVar[bool] = False

    def __post_init__(self) -> None:
        check_fields(self, form=type(self).__name__ + "({}={})")

    def ramps(self) -> list[Ramp]:
        """The schedules this modification follows."""
        return []

    def apply(self, block: MLPBlock) -> Attached:
        """Attach to one block.

        Raises:
            NotApplicable: the block has no place for it, and why.
            ValueError: the block's state contradicts it (a norm bias that is not zero).
        """
        raise NotImplementedError

"""The base classes of modifications: options, and what is attached to one block."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import ClassVar

from torch import Tensor

from actsparse.blocks.block import Layer, MLPBlock
from actsparse.blocks.site import Site
from actsparse.modify.schedule import Ramp
from actsparse.values import check_fields


class NotApplicable(Exception):
    """A modification cannot be made at a block; the message says why.

    ``sparsify`` leaves such a block alone and lists it, unless the modification fits no block.

    >>> raise NotApplicable("no norm feeds its up layer")
    Traceback (most recent call last):
    ...
    actsparse.modify.modification.NotApplicable: no norm feeds its up layer
    """


@dataclass(frozen=True)
class Progress:
    """Where training stands: optimizer steps done, and how many there will be, if known."""

    step: int
    steps: int | None


class Attached:
    """One modification at one block, until :meth:`remove`.

    ``elsewhere`` are the layers outside of the block that it changes.
    """

    elsewhere: Sequence[Layer] = ()

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
    """Base class of all modifications: dataclasses of options that attach themselves to blocks.

    The annotations of the fields say which values are allowed; a wrong one is a ``ValueError``. A
    subclass may set two class attributes. ``order``: after each optimizer step projections of lower
    order run first. ``changes_function``: in evaluation the block computes something else with this
    modification, whatever its parameters are.

    >>> from actsparse.modify import Modification, NormFloor
    >>> isinstance(NormFloor(), Modification), NormFloor().ramps()
    (True, [])
    """

    order: ClassVar[int] = 0
    changes_function: ClassVar[bool] = False

    def __post_init__(self) -> None:
        check_fields(self, form=type(self).__name__ + "({}={})")

    def ramps(self) -> list[Ramp]:
        """The schedules that this modification follows during training.

        Returns:
            A ramp for each schedule; none by default.
        """
        return []

    def apply(self, block: MLPBlock) -> Attached:
        """Attach this modification to one block; ``sparsify`` calls it for each block.

        Args:
            block: the block.

        Returns:
            What was attached: it follows schedules, projects parameters and can be removed.

        Raises:
            NotApplicable: the block has no place for it, and why.
            ValueError: the block's state contradicts it (a norm bias that is not zero).

        >>> import torch
        >>> from actsparse import LeaveOutMLP, find_mlp_blocks
        >>> up, down = torch.nn.Linear(8, 32), torch.nn.Linear(32, 8)
        >>> mlp = torch.nn.Sequential(up, torch.nn.ReLU(), down)
        >>> (block,) = find_mlp_blocks(mlp, torch.ones(2, 8))
        >>> LeaveOutMLP().apply(block).note
        'output replaced by zero'
        """
        raise NotImplementedError

"""Norm floor (restricted LayerNorm): the scale of the norm before the MLP stays at least f."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import torch
from typing_extensions import override

from actsparse.blocks.block import MLPBlock, Norm
from actsparse.blocks.site import Site, site_of
from actsparse.modify.modification import Attached, Modification, NotApplicable, Progress
from actsparse.modify.schedule import Over, Ramp, ramp_note
from actsparse.values import Above0

LIFT = 3  # times the median scale of a trained RMSNorm


@dataclass(frozen=True)
class NormFloor(Modification):
    """Keep the scale of the norm before each MLP at or above ``floor`` (restricted LayerNorm).

    After every optimizer step the norm's effective scale s is raised to the floor f. ``s = w + o``,
    where o = 1 if the norm multiplies by ``1 + w`` (Gemma), else 0:

        from scratch: ``s ← max(s, f)``
        in finetuning: ``s ← sgn(s)·max(|s|, f·ramp)``, ``sgn(0) = +1``

    A larger input norm is one of the factors that lower density. Source: arXiv 2309.03004,
    restricted LayerNorm; 2605.25612.

    Trained RMSNorm models often have scales far below 1 (language models 0.1 to 0.3), and lifting
    them to 1 destroys the model. In finetuning a floor of more than 3 times the median scale of an
    RMSNorm is refused.

    Args:
        floor: f, above 0.
        uplift: for finetuning: over how many optimizer steps (int), or over which fraction of all
            steps (float up to 1), the ramp rises from 0 to 1. None: from scratch.
        shared: allow it also where the norm feeds something else (attention, the residual stream),
            which the floor changes too. Without it such a block is left alone.
        before: raise the scale before each step instead of after it, as the papers' authors'
            program does (cdgyp/sparsity at ae2ff7b). A step can then leave it below the floor.

    Raises:
        ValueError: the floor is far above the scales of a trained RMSNorm.

    >>> import torch
    >>> from actsparse import sparsify
    >>> mlp = torch.nn.Sequential(
    ...     torch.nn.LayerNorm(8), torch.nn.Linear(8, 32), torch.nn.ReLU(), torch.nn.Linear(32, 8)
    ... )
    >>> print(sparsify(mlp, NormFloor(uplift=0.5), inputs=torch.randn(2, 8)))
    NormFloor: 1 MLP block of Sequential
      NormFloor          (root): 0.weight ≥ 1, over 50% of the steps
    """

    order: ClassVar[int] = 0

    floor: Above0 = 1.0
    uplift: Over | None = None
    shared: bool = False
    before: bool = False

    @override
    def ramps(self) -> list[Ramp]:
        return [] if self.uplift is None else [Ramp(self.uplift)]

    @override
    def apply(self, block: MLPBlock) -> Attached:
        norm = block.norm
        if norm is None:
            raise NotApplicable("no norm feeds its up layer")
        if norm.scale is None:
            raise NotApplicable(f"{norm.name} has no scale")
        if block.norm_feeds and not self.shared:
            others = ", ".join(block.norm_feeds)
            raise NotApplicable(
                f"{norm.name} also feeds {others}, which the floor would change; "
                f"NormFloor(shared=True) allows it"
            )
        if self.uplift is not None and norm.bias is None:
            self._check_lift(block, norm)
        note = f"{norm.name}.{norm.scale} ≥ {self.floor:g}{ramp_note(self.ramps())}"
        return _Floored(site_of(block), note, self, norm)

    def _check_lift(self, block: MLPBlock, norm: Norm) -> None:
        weight = norm.parameter("scale")
        assert weight is not None
        scale = float((weight.detach().float() + norm.offset).abs().median())
        if self.floor > LIFT * scale:
            times = self.floor / max(scale, 1e-9)
            raise ValueError(
                f"block {block.name!r}: NormFloor(floor={self.floor:g}) would lift the scale of "
                f"{norm.name}, an RMSNorm of median {scale:.2g}, {times:.3g} times, "
                f"which destroys a trained model; give a floor of at most "
                f"{LIFT * scale:.2g}, or leave the floor out"
            )


class _Floored(Attached):
    def __init__(self, site: Site, note: str, config: NormFloor, norm: Norm) -> None:
        super().__init__(site, note)
        self.config, self.norm = config, norm

    @override
    def prepare(self, progress: Progress) -> None:
        if self.config.before:
            self._raise(progress)

    @override
    def project(self, progress: Progress) -> None:
        if not self.config.before:
            self._raise(progress)

    @torch.no_grad()
    def _raise(self, progress: Progress) -> None:
        weight = self.norm.parameter("scale")
        assert weight is not None
        floor, offset = self.config.floor, self.norm.offset
        if self.config.uplift is None:
            weight.clamp_(min=floor - offset)
            return
        for ramp in self.config.ramps():
            floor *= ramp.value(progress.step, progress.steps)
        # as exact as the norm itself, which adds its offset in float32 at least
        scale = weight.to(torch.promote_types(weight.dtype, torch.float32)) + offset
        raised = torch.full_like(scale, floor)
        raised = torch.where(scale < 0, -raised, raised) - offset
        # what is high enough stays as it is: adding the offset and taking it away again rounds
        weight.copy_(torch.where(scale.abs() < floor, raised.to(weight.dtype), weight))

"""Occupancy: the share of pre-activations near φ′ = 0 and near φ = 0, under a shifted S-shape.

Under ``φ(z) = s(z − dx) + dy``, ``s(z) = r(z−h)² − r(−z−h)²``, r = ReLU, the derivative is zero on
``[dx − h, dx + h]``. The activation is zero at the root of ``s(z − dx) = −dy``,

``dx + h + √(−dy)`` for dy < 0, ``dx − h − √dy`` for dy > 0.

Occupancy is the share of tokens × units whose z lies in an interval of length 2h, ends included:
``zero_derivative`` (P₀) in ``[dx − h, dx + h]``, ``zero_activation`` (P_a) in that centred at the
root. For dy = 0 the zeros of φ are that plateau itself, and the two are one number; while
``√|dy| ≤ h`` the intervals have a part in common. NaN lies in neither. If P₀ rises more than P_a in
training, what is sought is a zero derivative (Peng et al. 2023, arXiv 2309.03004, and Peng et al.
2026, arXiv 2605.25612, the manipulation experiments). Gated blocks: z is the gate's.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any, ClassVar

import torch
from torch import Tensor
from typing_extensions import override

from actsparse.activations import SShape, s_shape_of
from actsparse.blocks.site import Site
from actsparse.observe import MEASURES
from actsparse.observe.unit_counts import Counts

_CHUNK = 512  # rows that stay in a CPU's cache with their temporaries: 2 to 3 times as fast

Interval = tuple[float, float]


def intervals(shape: SShape) -> tuple[Interval, Interval]:
    """Where φ′ = 0, and as much z around the root of φ; both [low, high] of length 2h.

    >>> intervals(SShape(dx=1.0, dy=-4.0, half_width=1.5))
    ((-0.5, 2.5), (3.0, 6.0))
    """
    dx, dy, h = shape
    root = dx + math.copysign(h + math.sqrt(abs(dy)), -dy) if dy else dx
    return (dx - h, dx + h), (root - h, root + h)


class Occupancy(Counts):
    """How many pre-activations of one block lie in each interval, in one phase: exact integers.

    The state is three int64 tensors [] on the block's device: ``zero_derivative`` and
    ``zero_activation``, how many z of all tokens × units, and ``tokens``. Ends of intervals are
    float64, and z is compared in float64 whatever its dtype.
    """

    columns: ClassVar[dict[str, tuple[str, Callable[[Any], str]]]] = {
        "z where φ′ = 0": ("zero_derivative", lambda share: f"{share:.2%}"),
        "z around φ = 0": ("zero_activation", lambda share: f"{share:.2%}"),
    }

    counters: ClassVar[dict[str, bool]] = {
        "zero_derivative": False, "zero_activation": False, "tokens": False,
    }  # fmt: skip
    zero_derivative: Tensor
    zero_activation: Tensor

    @staticmethod
    def stages(site: Site) -> tuple[str, ...]:
        """z, whatever the φ."""
        return ("z",)

    def update(self, site: Site, stages: dict[str, Tensor], keep: Tensor | None) -> None:
        """Count one pass. ``keep`` [B, T] is False at tokens to leave out; None: none.

        Raises:
            ValueError: the φ in force is no S-shape.
        """
        shape = s_shape_of(site.function) if site.function else None
        if shape is None:
            raise ValueError(
                f"occupancy is of S-shapes, but φ of block {site.block.name!r} is "
                f"{site.function or 'mixed, or has no name'}: put one there, as with "
                f"SwapActivation(to='s_shape(dx=1.6, dy=-1.6)'), or leave the block out of blocks="
            )
        z = stages["z"]
        self.follow(z.device)
        rows = z.reshape(-1, z.shape[-1])
        if keep is None:
            kept = torch.ones_like(rows[:, :1], dtype=torch.bool)
        else:
            kept = site.tokens.restore(keep.unsqueeze(-1), like=z[..., :1]).reshape(-1, 1)
        self.tokens.add_(kept.sum())
        # compilers and GPUs are better off with one piece
        whole = z.device.type != "cpu" or torch.compiler.is_compiling()
        size = max(len(rows), 1) if whole else _CHUNK
        for start in range(0, len(rows), size):
            part, counted = rows[start : start + size].double(), kept[start : start + size]
            counters = (self.zero_derivative, self.zero_activation)
            for counter, (low, high) in zip(counters, intervals(shape), strict=True):
                counter.add_(((low <= part) & (part <= high) & counted).count_nonzero())

    @staticmethod
    @override
    def shares(parts: list[Any]) -> dict[str, Any]:
        """Pooled over all units and tokens."""
        of = sum(part.units * int(part.tokens) for part in parts)
        return {
            "zero_derivative": sum(int(part.zero_derivative) for part in parts) / of,
            "zero_activation": sum(int(part.zero_activation) for part in parts) / of,
        }


MEASURES["occupancy"] = Occupancy

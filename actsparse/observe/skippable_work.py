"""How many multiplications of a model's MLPs can be skipped because of exact zeros."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from typing import Any

from actsparse.blocks.block import MLPBlock


def skippable(
    summary: dict[str, Any], blocks: Iterable[MLPBlock] | Mapping[str, MLPBlock]
) -> dict[str, float]:
    """The share of the MLPs' multiplications that exact zeros of a and of φ′(z) make needless.

    Every matrix product of a block takes ``tokens·D·H`` multiplications, so blocks weigh by
    ``tokens·D·H·(number of products)``. Only products with a zero are left out, so results stay
    exact. The rest of the model, and elementwise products (φ ⊙ u), do not count.

    *Ungated*, 2 products forward and 4 backward. With d = density, s = derivative density:

    ====================  =======================================  ==========
    ``z = xUᵀ``           all needed, to know where the zeros are  0
    ``y = aVᵀ``           columns of V where a ≠ 0                 1 − d
    ``dV = g_yᵀa``        where a ≠ 0                              1 − d
    ``g_a = g_yV``        needed for ``g_z = g_a ⊙ φ′(z)`` only    1 − s
    ``dx = g_zU``         where g_z ≠ 0, so φ′(z) ≠ 0              1 − s
    ``dU = g_zᵀx``        the same                                 1 − s
    ====================  =======================================  ==========

    ``f = (1 − d)/2`` and ``b = ((1 − d) + 3·(1 − s))/4`` (Peng et al. 2026, arXiv 2605.25612, for
    the backward pass).

    *Gated*, ``a = φ(z) ⊙ u`` with ``z = xGᵀ``, ``u = xUᵀ``: 3 forward and 6 backward. With
    ``g_z = g_a ⊙ u ⊙ φ′(z)``, ``g_u = g_a ⊙ φ(z)``, and p the share of φ(z) ≠ 0:

    ====================  =======================================  ==========
    ``z = xGᵀ``           all needed                               0
    ``u = xUᵀ``           a is 0 for any u where φ(z) = 0          1 − p
    ``y = aVᵀ``           where a ≠ 0                              1 − d
    ``dV = g_yᵀa``        where a ≠ 0                              1 − d
    ``g_a = g_yV``        needed where φ(z) ≠ 0 or φ′(z) ≠ 0       1 − p
    ``dx += g_zG``        where φ′(z) ≠ 0                          1 − s
    ``dG = g_zᵀx``        the same                                 1 − s
    ``dx += g_uU``        where φ(z) ≠ 0                           1 − p
    ``dU = g_uᵀx``        the same                                 1 − p
    ====================  =======================================  ==========

    ``f = ((1 − p) + (1 − d))/3`` and ``b = ((1 − d) + 3·(1 − p) + 2·(1 − s))/6``. The "or" above is
    p: φ′ is 0 wherever φ is 0 on an interval, so φ′(z) ≠ 0 implies φ(z) ≠ 0 except at single
    points. p is not counted. It is taken as ``max(d, s)``: that is s where φ and φ′ share their
    zeros (ReLU, JSReLU), and d where they do not, because u is hardly ever exactly 0.

    Args:
        summary: what :meth:`Seen.summary` returns.
        blocks: the blocks in it; others may be among them.

    Returns:
        ``{"forward": f, "backward": b}``, shares from 0 to 1.

    Raises:
        ValueError: ``summary`` is None, or holds a block that ``blocks`` lacks.

    >>> import torch
    >>> from actsparse.blocks import find_mlp_blocks
    >>> mlp = torch.nn.Sequential(torch.nn.Linear(8, 32), torch.nn.ReLU(), torch.nn.Linear(32, 8))
    >>> blocks = find_mlp_blocks(mlp, torch.randn(2, 8))
    >>> row = {"block": blocks[0].name, "tokens": 2, "density": 0.25, "derivative_density": 0.5}
    >>> skippable({"blocks": [row]}, blocks)
    {'forward': 0.375, 'backward': 0.5625}
    """
    skipped = {"forward": 0.0, "backward": 0.0}
    all_of = {"forward": 0, "backward": 0}
    for size, products in _tables(summary, blocks):
        for way, shares in products.items():
            skipped[way] += size * sum(shares.values())
            all_of[way] += size * len(shares)
    return {way: skipped[way] / all_of[way] if all_of[way] else 0.0 for way in skipped}


def skippable_products(
    summary: dict[str, Any], blocks: Iterable[MLPBlock] | Mapping[str, MLPBlock]
) -> dict[str, float]:
    """The share of needless multiplications in each matrix product of :func:`skippable`.

    Blocks weigh by ``tokens·D·H``. If all blocks are gated, or none is, the shares of
    :func:`skippable` are the means of these.

    Args:
        summary: what :meth:`Seen.summary` returns.
        blocks: the blocks in it; others may be among them.

    Returns:
        By product, a share from 0 to 1, over all blocks that have the product. Names and order are
        those of the tables of :func:`skippable`.

    Raises:
        ValueError: ``summary`` is None, or holds a block that ``blocks`` lacks.

    >>> import torch
    >>> from actsparse.blocks import find_mlp_blocks
    >>> mlp = torch.nn.Sequential(torch.nn.Linear(8, 32), torch.nn.ReLU(), torch.nn.Linear(32, 8))
    >>> blocks = find_mlp_blocks(mlp, torch.randn(2, 8))
    >>> row = {"block": blocks[0].name, "tokens": 2, "density": 0.25, "derivative_density": 0.5}
    >>> skippable_products({"blocks": [row]}, blocks)
    {'z = xUᵀ': 0.0, 'y = aVᵀ': 0.75, 'dV = g_yᵀa': 0.75, 'g_a = g_yV': 0.5, 'dx = g_zU': 0.5,
     'dU = g_zᵀx': 0.5}
    """
    skipped: dict[str, float] = {}
    all_of: dict[str, int] = {}
    for size, products in _tables(summary, blocks):
        for shares in products.values():
            for name, share in shares.items():
                skipped[name] = skipped.get(name, 0.0) + size * share
                all_of[name] = all_of.get(name, 0) + size
    return {name: skipped[name] / all_of[name] if all_of[name] else 0.0 for name in skipped}


def _tables(
    summary: dict[str, Any], blocks: Iterable[MLPBlock] | Mapping[str, MLPBlock]
) -> Iterator[tuple[int, dict[str, dict[str, float]]]]:
    """Of each block the multiplications of one product, and way → product → the share of zeros."""
    if summary is None:
        raise ValueError("no summary: no pass of that phase was seen")
    known: dict[str, MLPBlock] = {}
    for block in blocks.values() if isinstance(blocks, Mapping) else blocks:
        known |= {block.name: block, block.up.name: block}  # rows are called by either
    for row in summary["blocks"]:
        if row["block"] not in known:
            names = ", ".join(known) or "none"
            raise ValueError(f"block {row['block']!r} of the summary is not in blocks: {names}")
        block = known[row["block"]]
        d, s = 1 - row["density"], 1 - row["derivative_density"]
        table = _gated(d, s) if block.gated else _ungated(d, s)
        yield block.d_model * block.d_hidden * row["tokens"], table


def _ungated(d: float, s: float) -> dict[str, dict[str, float]]:
    """By the shares d of a = 0 and s of φ′(z) = 0."""
    return {
        "forward": {"z = xUᵀ": 0.0, "y = aVᵀ": d},
        "backward": {"dV = g_yᵀa": d, "g_a = g_yV": s, "dx = g_zU": s, "dU = g_zᵀx": s},
    }


def _gated(d: float, s: float) -> dict[str, dict[str, float]]:
    """The same; p is the share of φ(z) = 0."""
    p = min(d, s)
    return {
        "forward": {"z = xGᵀ": 0.0, "u = xUᵀ": p, "y = aVᵀ": d},
        "backward": {
            "dV = g_yᵀa": d,
            "g_a = g_yV": p,
            "dx += g_zG": s,
            "dG = g_zᵀx": s,
            "dx += g_uU": p,
            "dU = g_uᵀx": p,
        },
    }

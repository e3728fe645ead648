"""Calibrate: how large the activations of a dense model are, and which thresholds drop a share."""

from __future__ import annotations

import copy
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch import Tensor, nn

from actsparse.activations import named
from actsparse.blocks.block import MLPBlock
from actsparse.blocks.site import Site, site_of
from actsparse.modify.drop_small import dropping_blocks, set_thresholds
from actsparse.observe.magnitudes import bins_of, ends

ROWS = 256  # tokens of a pass whose scores are counted, evenly spread: counting takes long
Form = Literal["gate", "product", "both"]
PAIRS = 2048  # entries of a pass whose two scores are kept, for the form "both"
# Of the form "both": so much is dropped by the product alone, which costs little. Beyond it the
# gate drops its part of the rest. Found on SmolLM2, docs/lab-log.md, 2026-12-01.
PRODUCT_FIRST = 0.4


@dataclass
class BlockScores:
    """The scores of one block: how many of its activations are how large.

    The score of unit h is ``|φ(z_h)|·s_h``, s_h the root mean square of u_h (1 in blocks without a
    gate), or ``|φ(z_h)·u_h|`` for the form "product". So one number for a block drops what matters
    least, although each unit has a threshold of its own: ``t_h = τ / s_h``. The form "both" has
    both scores.
    """

    scale: Tensor  # s [H], float32
    counts: Tensor  # scores in each bin of actsparse.observe.magnitudes, int64
    pairs: Tensor | None = None  # of "both": scores of the gate, rising, and of products [2, N]

    def threshold(self, share: float) -> Tensor:
        """Thresholds that drop a share of all activations that were seen: [H], of "both" [2, H]."""
        if self.pairs is not None:
            return self._thresholds(self.pairs[0], self.pairs[1], share)
        total = int(self.counts.sum())
        below = self.counts.cumsum(0)
        last = int(torch.searchsorted(below, share * total))  # the first bin that reaches it
        if share <= 0 or total == 0:
            return torch.zeros_like(self.scale)
        tau = float(ends()[min(last, len(ends()) - 1)])
        return self._of_units(tau)

    def _thresholds(self, gate: Tensor, product: Tensor, share: float) -> Tensor:
        by_gate = round(gate_share(share) * len(gate))
        left, more = product[by_gate:], round(share * len(gate)) - by_gate
        first = float(gate[by_gate - 1]) if by_gate else 0.0
        second = float(left.kthvalue(more).values) if more > 0 else 0.0
        return torch.stack([self._of_units(first), torch.full_like(self.scale, second)])

    def _of_units(self, tau: float) -> Tensor:
        return tau / self.scale.clamp(min=1e-12)


def gate_share(share: float) -> float:
    """The share that the gate drops where gate and product drop ``share`` together.

    >>> gate_share(0.4), round(gate_share(0.7), 3)
    (0.0, 0.5)
    """
    return max(0.0, share - PRODUCT_FIRST) / (1 - PRODUCT_FIRST)


class Calibration:
    """What :func:`calibrate` has seen of each block; it sets the thresholds of shares.

    Args:
        model: the model.
        blocks: what was seen, by the name of the block.

    >>> from actsparse import DropSmall, observe, sparsify
    >>> mlp = nn.Sequential(nn.Linear(8, 32), nn.SiLU(), nn.Linear(32, 8)).eval()
    >>> x = torch.randn(256, 8)
    >>> handle = sparsify(mlp, DropSmall(), inputs=x)
    >>> found = calibrate(mlp, [x])
    >>> found.put(0.7)
    >>> with observe(mlp, inputs=x) as seen:
    ...     y = mlp(x)
    >>> 0.25 < seen.summary("inference")["density"] < 0.35
    True
    """

    def __init__(self, model: nn.Module, blocks: Mapping[str, BlockScores]) -> None:
        self.model, self.blocks = model, dict(blocks)

    def copy(self) -> Calibration:
        """Another one of the same model, which changes by itself.

        Returns:
            The copy.
        """
        return Calibration(self.model, copy.deepcopy(self.blocks))

    def put(self, share: float | Mapping[str, float]) -> None:
        """Set the thresholds that drop a share of the activations that were seen.

        Args:
            share: from 0 to 1, of each block, or by the name of the block.

        Raises:
            ValueError: a share is not from 0 to 1.
        """
        shares = dict.fromkeys(self.blocks, share) if isinstance(share, int | float) else share
        for name, value in shares.items():
            if not 0 <= value <= 1:
                raise ValueError(f"share of block {name!r} is {value!r}: expected 0 to 1")
        set_thresholds(
            self.model, {name: self.blocks[name].threshold(each) for name, each in shares.items()}
        )


def calibrate(
    model: nn.Module,
    batches: Sequence[Any],
    run: Callable[[nn.Module, Any], object] | None = None,
    dense: bool = True,
    by_unit: bool = True,
) -> Calibration:
    """See how large the activations are, of all blocks that :class:`actsparse.DropSmall` is in.

    The model runs twice on the batches, in evaluation mode: once for the scale of each unit, once
    for the histogram of scores. Some thousand tokens are enough.

    Args:
        model: the model that ``sparsify`` got.
        batches: inputs; the same objects are used twice.
        run: runs the model on one of them; None: ``model(batch)``, or ``model(**batch)``.
        dense: take thresholds away first, and leave them away; else they stay in force.
        by_unit: weigh the units of the form "gate" by the scales of u; else all units of a block
            have one threshold.

    Returns:
        The calibration; ``put`` sets thresholds.

    Raises:
        ValueError: no block drops small activations, or a score is not finite.
    """
    blocks = dropping_blocks(model)
    if not blocks:
        raise ValueError("no block drops small activations: sparsify(model, DropSmall()) first")
    if dense:
        cuts = {block.name: site_of(block).cut for block in blocks}
        set_thresholds(model, {n: torch.zeros_like(c.threshold) for n, c in cuts.items() if c})
    scores = {block.name: _Scores(block, by_unit) for block in blocks}
    mode = model.training
    model.eval()
    try:
        for second in (False, True):
            sites = [site_of(block) for block in blocks]
            for each, site in zip(scores.values(), sites, strict=True):
                tap = each.tally if second else each.measure
                site.tap(tap, each.stages)
            try:
                with torch.no_grad():
                    for batch in batches:
                        _run(model, batch) if run is None else run(model, batch)
            finally:
                for each, site in zip(scores.values(), sites, strict=True):
                    site.release(each.tally, each.measure)
            for each in scores.values():
                each.finish()
    finally:
        model.train(mode)
    return Calibration(model, {name: each.result() for name, each in scores.items()})


def _run(model: nn.Module, batch: Any) -> None:
    model(**batch) if isinstance(batch, Mapping) else model(batch)


class _Scores:
    def __init__(self, block: MLPBlock, by_unit: bool) -> None:
        cut = site_of(block).cut
        assert cut is not None
        self.name, self.cut, self.gated = block.name, cut, block.gated
        self.both = cut.form == "both"
        self.weighs = by_unit and block.gated and not cut.product
        self.stages = ("z", "u") if block.gated else ("z",)
        device = cut.threshold.device
        self.squares = torch.zeros(block.d_hidden, dtype=torch.float64, device=device)
        self.rows = 0
        self.scale = torch.ones(block.d_hidden, device=device)
        self.counts = torch.zeros(len(ends()) + 1, dtype=torch.int64, device=device)
        self.pairs: list[Tensor] = []
        self.generator = torch.Generator().manual_seed(0)

    def measure(self, site: Site, stages: dict[str, Tensor]) -> None:
        if self.weighs:
            self.squares += stages["u"].double().square().flatten(0, -2).sum(0)
            self.rows += stages["u"].shape[:-1].numel()

    def finish(self) -> None:
        if self.rows:
            self.scale = (self.squares / self.rows).sqrt().float()

    def tally(self, site: Site, stages: dict[str, Tensor]) -> None:
        rows = {name: stages[name].flatten(0, -2) for name in self.stages}
        few = slice(None, None, max(1, len(rows["z"]) // ROWS))
        size = named(self.cut.function).value(rows["z"][few]).abs()
        score = size * (rows["u"][few].abs() if self.cut.product else self.scale)
        if not bool(score.isfinite().all()):
            raise ValueError(f"block {self.name!r}: its activations are not finite on this data")
        self.counts += torch.bincount(bins_of(score).flatten(), minlength=len(self.counts))
        if self.both:
            drawn = torch.randint(score.numel(), (PAIRS,), generator=self.generator)
            products = size * rows["u"][few].abs()
            self.pairs.append(torch.stack([score.flatten()[drawn], products.flatten()[drawn]]))

    def result(self) -> BlockScores:
        if not self.pairs:
            return BlockScores(self.scale, self.counts)
        pairs = torch.cat(self.pairs, 1).float()
        return BlockScores(self.scale, self.counts, pairs[:, pairs[0].argsort()])

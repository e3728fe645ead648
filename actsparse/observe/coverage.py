"""Covering: how far weight noise in training covers what an attack on the inputs does inside.

Weight noise of size ρ (:class:`actsparse.WeightNoise`) adds to each of the H outputs of a linear
layer W a draw of standard deviation ``ρ·rms(W)·‖x_t‖``. As a vector it is about √H times as long.
An attack moves the layer's input x_t by δ_t, and so its output by W δ_t. The ratio

    ``r_t = ‖W δ_t‖ / (ρ·rms(W)·‖x_t‖·√H)``

is at most 1 where noise in training was as large as what the attack does (after Peng et al. 2023,
arXiv 2309.03004). H is the number of the layer's own outputs: for down that is d_model. W δ_t is
the change of the layer's output, with adapters. rms(W) is that of the base weight, as for the
noise.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable
from contextlib import ExitStack
from typing import Any, Literal, get_args

import torch
from torch import Tensor, nn

from actsparse.blocks.block import Layer, MLPBlock
from actsparse.blocks.pass_state import sites_asleep
from actsparse.blocks.resolve import blocks_of
from actsparse.blocks.site import Site, site_of
from actsparse.blocks.trace import undisturbed
from actsparse.observe.gradient_measure import Weighing
from actsparse.observe.registry import Mask, Watch

Filter = Literal["rows", "columns"]
_QUANTILES = (50, 90, 99)  # percent


def covering(
    model: nn.Module,
    predict: Callable[[nn.Module, Any], Any],
    pairs: Iterable[tuple[Any, Any]],
    *,
    rho: float = 0.1,
    filtered: Filter | None = None,
    share: float = 0.95,
    inputs: Any = None,
    blocks: Iterable[MLPBlock] | None = None,
    mask: Mask | None = None,
) -> list[dict[str, Any]]:
    """Compare the effect of an attack with weight noise, in every layer of the MLP blocks.

    The module's docstring defines the ratio r_t. It takes two passes for each pair, in eval mode,
    that leave no trace.

    Args:
        model: any model, modified or not.
        predict: ``predict(model, batch)`` runs the model; what it returns is not read.
        pairs: batches, each with its adversarial twin (:func:`actsparse.observe.perturb`) of the
            same shapes.
        rho: ρ of the weight noise, above 0.
        filtered: count only that part of the change which the clean input X [T, D] of a sample has
            room for: ``"rows"`` projects the change of the output on X's leading left singular
            vectors (over tokens), ``"columns"`` the change δ of the input on the right ones (over
            features). None: all of it.
        share: of ``Σ s²`` that the leading singular values s of X hold, as few as will do.
        inputs, blocks, mask: as for :func:`actsparse.observe`; padding is left out.

    Returns:
        A row for each ``block`` and ``layer`` (``"up"``, ``"gate"``, ``"down"``), over all tokens
        of all batches: the number of ``tokens``; ``covered``, the share of tokens with r_t ≤ 1;
        ``r50``, ``r90``, ``r99``, the least number that so many percent of the r_t do not exceed.
        r_t is 0 where the attack changes nothing, else infinite where x_t is zero. None stands for
        what is not finite.

    Raises:
        ValueError: ρ is not positive and finite; another filter, or a share that is not above 0 and
            at most 1; there is no pair, or no MLP block; the two batches
            of a pair run through a block in different shapes.

    >>> mlp = nn.Sequential(nn.Linear(8, 32), nn.ReLU(), nn.Linear(32, 8))
    >>> x = torch.randn(64, 8)
    >>> rows = covering(mlp, lambda model, x: model(x), [(x, x + 0.01)], rho=0.1, inputs=x)
    >>> [(row["layer"], row["tokens"], row["covered"]) for row in rows]
    [('up', 64, 1.0), ('down', 64, 1.0)]
    """
    if not 0 < rho < math.inf:
        raise ValueError(f"rho={rho!r}: expected a finite number > 0, the size of the weight noise")
    check_filter(filtered, share)
    found = blocks_of(model, inputs, blocks, "covering")
    changes = [_Changes(block, rho, mask, filtered, share) for block in found]
    with (
        undisturbed(model),
        torch.inference_mode(False),
        torch.no_grad(),
        ExitStack() as stack,
    ):
        for change in changes:
            site = site_of(change.block)
            stack.callback(site.release, change.see)
            site.tap(change.see, "xzudy")
        for clean, adversarial in pairs:
            for change in changes:
                change.attacked = False
            predict(model, clean)
            for change in changes:
                change.attacked = True
            predict(model, adversarial)
            for change in changes:
                change.compare(len(change.clean) == 0)
    names = [change.block.name for change in changes]
    rows = []
    for change in changes:
        name = change.block.name
        label = name if name and names.count(name) == 1 else change.block.up.name
        rows += [{"block": label, **row} for row in change.rows()]
    return rows


def check_filter(filtered: Any, share: Any) -> None:
    """`ValueError` for another filter, or a share that is not above 0 and at most 1."""
    if filtered not in (None, *get_args(Filter)):
        raise ValueError(f"filtered={filtered!r}: expected 'rows', 'columns' or None")
    if not (isinstance(share, int | float) and 0 < share <= 1):
        raise ValueError(f"share={share!r}: expected a number above 0, at most 1")


class _Changes:
    """What an attack changes at one block."""

    def __init__(
        self, block: MLPBlock, rho: float, mask: Mask | None, filtered: Filter | None, share: float
    ) -> None:
        self.block, self.rho, self.filtered, self.share = block, rho, filtered, share
        self.keep = Watch(block, {}, mask, Weighing(), always=True).keep
        self.clean: list[dict[str, Tensor]] = []  # a pass's calls, until their twins come
        self.attacked = False
        up = (block.up, "x", "u" if block.gated else "z")
        self.layers: dict[str, tuple[Layer, str, str]] = {"up": up}
        if block.gate is not None:
            self.layers["gate"] = (block.gate, "x", "z")
        self.layers["down"] = (block.down, "d", "y")
        self.ratios: dict[str, list[Tensor]] = {name: [] for name in self.layers}

    def see(self, site: Site, stages: dict[str, Tensor]) -> None:
        """Keep a clean call; compare it with its twin's."""
        if not self.attacked:
            # copies, as what follows may work in place
            self.clean.append({stage: value.clone() for stage, value in stages.items()})
            return
        self.compare(bool(self.clean) and self.clean[0]["x"].shape == stages["x"].shape)
        before = self.clean.pop(0)
        keep = self.keep(site, stages["x"])
        for name, (layer, entry, leaving) in self.layers.items():
            x, was, now = before[entry], before[leaving], stages[leaving]
            change = now.to(_wide(was)) - was.to(_wide(was))
            if self.filtered is not None:
                change = self.part(site, layer, x, stages[entry] - x, was, change, keep)
            ratio = self.ratio(layer, x, change)
            if keep is not None:
                rows = site.tokens.restore(keep.unsqueeze(-1), like=ratio)
                ratio = ratio[rows.reshape(ratio.shape)]
            self.ratios[name].append(ratio.flatten())

    def part(
        self,
        site: Site,
        layer: Layer,
        x: Tensor,
        delta: Tensor,
        was: Tensor,
        change: Tensor,
        keep: Tensor | None,
    ) -> Tensor:
        """What the filter leaves of a layer's change [..., H]; ``delta`` is that of its input."""
        rows = site.tokens.arrange(x).to(_wide(x))
        if keep is not None:
            rows = rows * keep.unsqueeze(-1)
        left, sizes, right = torch.linalg.svd(rows, full_matrices=False)
        energy = sizes.square()
        before = energy.cumsum(-1) - energy  # that of the singular values in front of each
        leading = (before < self.share * energy.sum(-1, keepdim=True)).to(rows).unsqueeze(-2)
        if self.filtered == "rows":
            own = site.tokens.arrange(change)
            return site.tokens.restore((left * leading) @ (left.mT @ own), like=change)
        own = site.tokens.arrange(delta).to(_wide(x))
        own = (own @ right.mT * leading) @ right
        moved = x + site.tokens.restore(own, like=x).to(x.dtype)
        with sites_asleep():
            return layer.module(moved).to(change) - was.to(change)

    def ratio(self, layer: Layer, x: Tensor, change: Tensor) -> Tensor:
        """r_t [..., 1], float64."""
        weight = layer.weight.detach()
        rms = _norm(weight.flatten()) / weight.numel() ** 0.5
        moved = _norm(change)
        noise = self.rho * rms * _norm(x) * len(weight) ** 0.5
        return torch.where(moved == 0, 0.0, moved / noise)

    def compare(self, alike: bool) -> None:
        """Refuse twins that are not ``alike``."""
        if not alike:
            raise ValueError(
                f"the two batches of a pair run through block {self.block.name!r} in different "
                f"shapes; the second must be the first with other values (perturb makes it)"
            )

    def rows(self) -> list[dict[str, Any]]:
        """One for each layer."""
        rows: list[dict[str, Any]] = []
        for name, parts in self.ratios.items():
            ratios = torch.cat(parts).sort().values if parts else torch.empty(0)
            if not len(ratios):
                raise ValueError(
                    f"block {self.block.name!r} got no token; give at least one pair of batches, "
                    f"and a mask that leaves some tokens"
                )
            row = {"layer": name, "tokens": len(ratios)}
            rows.append(row | {"covered": float((ratios <= 1).double().mean())})
            for percent in _QUANTILES:
                value = float(ratios[-(-percent * len(ratios) // 100) - 1])
                rows[-1][f"r{percent}"] = value if math.isfinite(value) else None
        return rows


def _wide(x: Tensor) -> torch.dtype:
    return torch.promote_types(x.dtype, torch.float32)


def _norm(x: Tensor) -> Tensor:
    return torch.linalg.vector_norm(x, dim=-1, keepdim=True, dtype=torch.float64)

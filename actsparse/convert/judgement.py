"""Judge a model with thresholds: loss against the dense one, agreement, density, bytes read."""

from __future__ import annotations

import contextlib
from collections.abc import Callable
from dataclasses import asdict, dataclass
from typing import Any

import torch
from torch import Tensor, nn

from actsparse.activations import named
from actsparse.blocks.block import MLPBlock
from actsparse.blocks.site import Site, site_of
from actsparse.blocks.stages import drops
from actsparse.convert.embeddings import Pooling, document_distances
from actsparse.convert.losses import document_losses
from actsparse.convert.text import Windows
from actsparse.modify.drop_small import dropping_blocks
from actsparse.observe import observe

DRAWS = 2000  # of the bootstrap over documents


@dataclass(frozen=True)
class Judgement:
    """What one text says of a model.

    Losses are in nats for each token; of encoders, the cosine distance of an embedding to the dense
    model's, and 0 for the dense model. ``density`` is the share of activations that are not zero,
    ``bytes_read`` the share of the blocks' weight bytes that one token needs, both by block and
    altogether. What needs the dense model is None without it.

    Args:
        text: what the text is called.
        documents: how many documents it has.
        tokens: how many tokens were predicted.
        loss: of the model.
        dense_loss: of the dense model.
        excess: loss above the dense one's, over all tokens.
        interval: the 95 % interval of ``excess``, by a bootstrap over documents.
        agreement: the share of positions where both models find the same token most likely; of
            encoders, of windows whose nearest neighbour is the same.
        density: of all blocks together.
        bytes_read: of all blocks together.
        blocks: a row for each block: ``block``, ``density``, ``bytes_read``.
        pooling: of an encoder's embeddings; None for language models.

    >>> Judgement("x", 1, 9, 3.0, None, None, None, None, 0.5, 2 / 3, ()).perplexity
    20.085536923187668
    """

    text: str
    documents: int
    tokens: int
    loss: float
    dense_loss: float | None
    excess: float | None
    interval: tuple[float, float] | None
    agreement: float | None
    density: float
    bytes_read: float
    blocks: tuple[dict[str, Any], ...]
    pooling: Pooling | None = None

    @property
    def perplexity(self) -> float | None:
        """``exp(loss)``; None for encoders."""
        if self.pooling is not None:
            return None
        return float(torch.tensor(self.loss, dtype=torch.float64).exp())

    def to_json(self) -> dict[str, Any]:
        """Plain values for JSON.

        Returns:
            All fields by name, and ``perplexity``.
        """
        return {**asdict(self), "perplexity": self.perplexity}


def judge(
    model: nn.Module,
    windows: Windows,
    text: str,
    dense: nn.Module | None = None,
    progress: Callable[[int], None] | None = None,
    pooling: Pooling | None = None,
) -> tuple[Judgement, Tensor | None]:
    """Judge a model that :class:`actsparse.DropSmall` is attached to.

    Args:
        model: the model, in evaluation mode.
        windows: the text.
        text: what to call it.
        dense: the model before conversion.
        progress: called with the number of tokens that each pass has read.
        pooling: of an encoder's embeddings, see :func:`document_distances`; None: it is a causal
            language model.

    Returns:
        The judgement; and, with ``dense``, the excess of each document in nats for each token.

    Raises:
        ValueError: no block drops small activations; a loss is not finite; an encoder without the
            dense one.
    """
    blocks = dropping_blocks(model)
    if not blocks:
        raise ValueError("no block drops small activations: nothing to judge")
    passed = [Passed(block) for block in blocks]
    with observe(model, blocks=blocks) as seen, contextlib.ExitStack() as taps:
        for counted in passed:
            counted.begin(taps)
        if pooling is None:
            models = [model] if dense is None else [model, dense]
            losses = document_losses(models, windows, progress)
        elif dense is None:
            raise ValueError("embeddings are judged beside the dense model's: give it too")
        else:
            losses = document_distances(model, dense, windows, pooling, progress)
        found = seen.summary("inference")
    assert found is not None
    sums, counts = losses.sums, losses.counts
    rows = []
    for row, block, counted in zip(found["blocks"], blocks, passed, strict=True):
        read = bytes_read(row["density"], block.gated, counted.share(row["density"]))
        rows.append({"block": block.name, "density": row["density"], "bytes_read": read})
    excess = interval = agreement = dense_loss = each = None
    if dense is not None:
        more = sums[0] - sums[1]
        dense_loss = float(sums[1].sum() / counts.sum())
        excess = float(more.sum() / counts.sum())
        interval, agreement, each = excess_interval(more, counts), losses.same, more / counts
    sizes = [block.d_hidden for block in blocks]
    judgement = Judgement(
        text,
        windows.documents,
        windows.tokens,
        float(sums[0].sum() / counts.sum()),
        dense_loss,
        excess,
        interval,
        agreement,
        found["density"],
        sum(row["bytes_read"] * n for row, n in zip(rows, sizes, strict=True)) / sum(sizes),
        tuple(rows),
        pooling,
    )
    return judgement, each


def check_same(model: nn.Module, dense: nn.Module) -> None:
    """Refuse a dense model that a converted one cannot have been made of.

    Args:
        model: the converted model.
        dense: the model to compare it with.

    Raises:
        ValueError: their parameters differ in name or shape.
    """
    own, other = ({n: p.shape for n, p in each.named_parameters()} for each in (model, dense))
    if differ := sorted(name for name in own | other if own.get(name) != other.get(name)):
        raise ValueError(
            f"the dense model is not what this one was made of: {differ[0]} has shape "
            f"{list(other.get(differ[0], ()))} there, {list(own.get(differ[0], ()))} here"
        )


def bytes_read(density: float, gated: bool, passed: float) -> float:
    """The share of a block's weight bytes that a token needs, at a density of activations.

    Args:
        density: d, the share of activations that are not zero.
        gated: whether the block has a gate.
        passed: p, the share of units whose row of up is read: d where the gate decides alone, 1
            for thresholds on the product.

    Returns:
        ``1/3 + p/3 + d/3``, and ``1/2 + d/2`` without a gate.

    >>> bytes_read(0.25, True, 0.25), bytes_read(0.25, True, 1), bytes_read(0.25, False, 0.25)
    (0.5, 0.75, 0.625)
    """
    return (1 + passed + density) / 3 if gated else (1 + density) / 2


class Passed:
    """Counts the units of one block that pass the gate's threshold, where there is another one."""

    def __init__(self, block: MLPBlock) -> None:
        self.site = site_of(block)
        self.passed = self.seen = 0

    def begin(self, taps: contextlib.ExitStack) -> None:
        """Count until ``taps`` is closed."""
        cut = self.site.cut
        if cut is not None and cut.form == "both":
            self.site.tap(self.count, ("z",))
            taps.callback(self.site.release, self.count)

    def count(self, site: Site, stages: dict[str, Tensor]) -> None:
        """One pass through the block."""
        cut = site.cut
        assert cut is not None
        dropped = drops(named(cut.function).value(stages["z"]), cut.threshold[0])
        self.passed += dropped.numel() - int(dropped.sum())
        self.seen += dropped.numel()

    def share(self, density: float) -> float:
        """The share of units whose row of up is read, at a density of activations."""
        cut = self.site.cut
        if cut is not None and cut.product:
            return 1.0
        return self.passed / self.seen if self.seen else density


def excess_interval(excess: Tensor, counts: Tensor) -> tuple[float, float] | None:
    """The 95 % interval of Σ excess / Σ counts, by a bootstrap over documents.

    Args:
        excess: of each document, over all its tokens [documents].
        counts: of its tokens [documents].

    Returns:
        Its ends; None for one document.
    """
    if len(excess) < 2:
        return None
    generator = torch.Generator().manual_seed(0)
    drawn = torch.randint(len(excess), (DRAWS, len(excess)), generator=generator)
    means = excess[drawn].sum(1) / counts[drawn].sum(1)
    low, high = means.quantile(torch.tensor([0.025, 0.975], dtype=means.dtype)).tolist()
    return low, high

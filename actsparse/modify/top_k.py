"""Top-k: only the largest activations of each token are kept."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Annotated, ClassVar, Literal

import torch
from torch import Tensor
from typing_extensions import override

from actsparse.activations import named
from actsparse.blocks.block import MLPBlock
from actsparse.blocks.site import Site, no_product, site_of
from actsparse.modify.modification import Attached, Modification, NotApplicable, Progress
from actsparse.modify.schedule import Over, Ramp, ramp_note
from actsparse.values import Rule


@dataclass(frozen=True)
class TopK(Modification):
    """Keep the ``⌈k·H⌉`` largest ``|φ(z)|`` of each token and set the others to zero.

        ``a_th = φ(z_th) · 1[|φ(z_th)| is among the ⌈k·H⌉ largest of token t]``

    It works in training and in evaluation, so k bounds the density of every token. Of equal values
    enough are kept to make up the number. Only what is kept has a gradient. In gated blocks the
    choice depends on φ(z_gate) alone, unless ``by="product"`` ranks ``|φ(z)·u|``. φ under top-k
    has no name, so its blocks run by their own layers under :func:`actsparse.accelerate`.

    Source: Li et al. 2022 (arXiv 2210.06313), the Top-k Transformer, on ReLU.

    Args:
        k: which share of the units is kept, in (0, 1].
        to: the name of the φ to use; None: the block's own. A block has one replacement of φ, so
            TopK cannot be combined with :class:`SwapActivation`.
        ramp: over how many optimizer steps (int), or over which fraction of all steps (float up to
            1), the share falls linearly from 1 to k. None: it is k from the start.
        by: what is ranked in gated blocks: ``"gate"``, |φ(z)|, or ``"product"``, |φ(z)·u|.

    Raises:
        ValueError: ``k`` is not in (0, 1], or ``to`` is no activation's name.

    >>> from actsparse import sparsify
    >>> mlp = torch.nn.Sequential(torch.nn.Linear(8, 40), torch.nn.ReLU(), torch.nn.Linear(40, 8))
    >>> x = torch.randn(3, 8)
    >>> handle = sparsify(mlp, TopK(0.05), inputs=x)
    >>> mlp[1](mlp[0](x)).count_nonzero(-1)  # ⌈0.05 · 40⌉
    tensor([2, 2, 2])
    """

    changes_function: ClassVar[bool] = True

    k: Annotated[float, Rule("a share of the units, in (0, 1]", lambda k: 0 < k <= 1)] = 0.05
    to: str | None = None
    ramp: Over | None = None
    by: Literal["gate", "product"] = "gate"

    @override
    def __post_init__(self) -> None:
        super().__post_init__()
        if self.to is not None:
            named(self.to)

    @override
    def ramps(self) -> list[Ramp]:
        return [] if self.ramp is None else [Ramp(self.ramp)]

    @override
    def apply(self, block: MLPBlock) -> Attached:
        site = site_of(block)
        product = self.by == "product" and block.gated
        if product and (reason := no_product(block)) is not None:
            raise NotApplicable(f"{reason}: take by='gate'")
        phi = LargestActivations(block, self.to, kept(self.k, block.d_hidden), product)
        try:
            site.replace_activation(phi)
        except ValueError as error:
            site.release()
            raise NotApplicable(str(error)) from None
        of = f"{self.to or block.activation.function or 'its own φ'}"
        note = f"{kept(self.k, block.d_hidden)} of {block.d_hidden} units of a token, {of}"
        return _TopK(site, f"{note}{ramp_note(self.ramps())}", self, phi)


def kept(k: float, units: int) -> int:
    """``⌈k·units⌉``, blind to the rounding of k; never 0.

    >>> kept(0.05, 3072), kept(0.07, 100)  # 0.07 · 100 is 7.000000000000001 in floating point
    (154, 7)
    """
    return math.ceil(k * units * (1 - 1e-12))


class LargestActivations:
    """φ(z) where it is among the ``count`` largest of its row, else 0; ``to``: the φ, by name."""

    function = None  # no name: it is no function of one number

    def __init__(self, block: MLPBlock, to: str | None, last: int, product: bool) -> None:
        self.block, self.last = block, last
        self.mask_product = self._keep if product else None
        self.to = None if to is None else named(to)
        self.done = False  # whether count has come down to ``last``
        with torch.inference_mode(False):
            # a tensor, so that compiled code does not recompile at every step
            self.count = torch.tensor(block.d_hidden)

    def __call__(self, z: Tensor, own: Callable[[Tensor], Tensor]) -> Tensor:
        """[..., H]; NaN counts as large."""
        a = own(z) if self.to is None else self.to.value(z)
        return self._keep(a) if self.mask_product is None else a

    def _keep(self, a: Tensor) -> Tensor:
        return torch.where(self._largest(a), a, 0)

    def derivative(self, z: Tensor, own: Callable[[Tensor], Tensor]) -> Tensor:
        """φ′(z) where φ(z) is kept, else 0: [..., H]."""
        slope = own(z) if self.to is None else self.to.derivative(z)
        if self.mask_product is not None:
            return slope
        with torch.no_grad():
            a = self._own_value(z) if self.to is None else self.to.value(z)
            return torch.where(self._largest(a), slope, 0)

    def _own_value(self, z: Tensor) -> Tensor:
        activation = self.block.activation
        if activation.function is not None:
            return named(activation.function).value(z)
        assert activation.call is not None  # else it would have no derivative
        return activation.call(z.clone())

    def _largest(self, a: Tensor) -> Tensor:
        size = a.detach().abs()
        nothing = torch.zeros_like(a, dtype=torch.bool)
        if self.done:
            return nothing.scatter(-1, size.topk(self.last, sorted=False).indices, True)
        order = size.argsort(-1, descending=True)
        among = torch.arange(a.shape[-1], device=a.device) < self.count.to(a.device)
        return nothing.scatter(-1, order, among.expand_as(order))


class _TopK(Attached):
    def __init__(self, site: Site, note: str, config: TopK, phi: LargestActivations) -> None:
        super().__init__(site, note)
        self.config, self.phi = config, phi
        self.update(Progress(0, None))

    @override
    def update(self, progress: Progress) -> None:
        share = self.config.k
        for ramp in self.config.ramps():
            share += (1 - share) * (1 - ramp.value(progress.step, progress.steps))
        count = kept(share, self.site.block.d_hidden)
        self.phi.count.fill_(count)
        self.phi.done = count == self.phi.last

    @override
    def remove(self) -> None:
        self.site.release(self.phi)

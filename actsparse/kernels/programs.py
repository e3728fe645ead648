"""The programs by which a block can run, each from the same weights: one place that calls them."""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple, Self

import torch
from torch import Tensor

from actsparse.activations import named
from actsparse.blocks.block import MLPBlock
from actsparse.blocks.site import Site
from actsparse.blocks.stages import NORMS, Cut, OnNorms, token_norm
from actsparse.kernels import backends, dense
from actsparse.kernels.cut import infer_cut
from actsparse.kernels.forms import FEW, form_of
from actsparse.kernels.mlp import infer, sparse_mlp
from actsparse.kernels.prepared import Prepared, prepare

DENSE = ("dense", "onednn", "packed")  # the block's own layers, and other programs for all products


class Weights(NamedTuple):
    """The weights of a block, as :func:`sparse_mlp` takes them."""

    up: Tensor
    bias: Tensor | None
    down: Tensor
    down_bias: Tensor | None
    gate: Tensor | None = None
    gate_bias: Tensor | None = None

    @classmethod
    def of(cls, block: MLPBlock) -> Self:
        """Those that the block's layers have now."""
        gate = block.gate
        up, down = block.up.tensors(), block.down.tensors()
        return cls(*up, *down) if gate is None else cls(*up, *down, *gate.tensors())

    @property
    def nbytes(self) -> int:
        """The memory of the matrices."""
        return sum(t.nbytes for t in (self.up, self.down, self.gate) if t is not None)

    def to(self, dtype: torch.dtype) -> Self:
        """The same in ``dtype``, with gradients."""
        return type(self)._make(None if t is None else t.to(dtype) for t in self)

    def prepare(self) -> Prepared:
        """Copies for calls without gradients."""
        return prepare(self.down, self.up, self.gate)


def function_at(site: Site) -> str | Cut | None:
    """What the kernels need to know of the φ in force; None if it has no name and is no cut."""
    cut = site.cut
    return site.function if cut is None else cut


def parts_of(function: str | Cut) -> tuple[str, Tensor | None, bool]:
    """The name of φ, its thresholds, and whether they are of the product."""
    return function if isinstance(function, Cut) else (function, None, False)


def run(
    program: str,
    x: Tensor,
    weights: Weights,
    function: str | Cut,
    *,
    between: Callable[[Tensor], Tensor] | None = None,
    prepared: Prepared | None = None,
    on_active: Callable[[int], None] | None = None,
    on_norms: OnNorms | None = None,
) -> Tensor:
    """y of a block by ``program``, any but its own layers; arguments as for :func:`sparse_mlp`."""
    if (
        program not in DENSE
        and prepared is not None
        and on_active is None
        and on_norms is None
        and between is None
        and not torch.is_grad_enabled()
    ):
        y = infer_at_once(x, weights, function, program == "screened", prepared)
        if y is not None:
            return y
    if torch.is_autocast_enabled(x.device.type):  # the operands are cast already
        with torch.autocast(x.device.type, enabled=False):
            return run(
                program, x, weights, function, between=between, prepared=prepared,
                on_active=on_active, on_norms=on_norms,
            )  # fmt: skip
    name, threshold, product = parts_of(function)
    if threshold is not None and threshold.dtype.itemsize < 4:  # of a model in bfloat16
        threshold = threshold.float()
    if program not in DENSE:
        return sparse_mlp(
            x, *weights[:4], activation=name, gate=weights.gate, gate_bias=weights.gate_bias,
            screen=program == "screened", between=between, threshold=threshold, product=product,
            prepared=prepared, on_active=on_active, on_norms=on_norms,
        )  # fmt: skip

    def look(hidden: Tensor) -> None:
        if on_active is not None:
            on_active(int(torch.count_nonzero(hidden)))
        if on_norms is not None:
            norms = {name: token_norm(hidden, order) for name, order in NORMS.items()}
            on_norms({name: n.view(*x.shape[:-1], 1) for name, n in norms.items()})

    copies = prepared
    if copies is None and program == "packed" and not torch.compiler.is_compiling():
        copies = weights.prepare()  # which compiled code cannot, and would at each call
    return dense.dense_mlp(
        x, *weights[:4], activation=name, gate=weights.gate, gate_bias=weights.gate_bias,
        threshold=threshold, of_product=product, between=between, on_hidden=look,
        weights=copies.packed if program == "packed" and copies is not None else None,
    )  # fmt: skip


def infer_at_once(
    x: Tensor, weights: Weights, function: str | Cut, screen: bool, prepared: Prepared
) -> Tensor | None:
    """What ``sparse_mlp`` gives without gradients, in 6 µs less; None where it is to be asked."""
    up, bias, down, down_bias, gate, gate_bias = weights
    if not backends.native(x, up):
        return None
    first: tuple[Tensor, Tensor | None, Tensor | None, Tensor | None] = up, bias, None, None
    if gate is not None:
        first = gate, gate_bias, up, bias
    try:
        if isinstance(function, Cut):
            name, threshold, product = function
            return infer_cut(x, *first, down, down_bias, named(name), threshold, product, prepared)
        form = form_of(function)
        if form is None or form.act is None:
            return None
        return infer(x, *first, down, down_bias, form, screen, prepared)
    except RuntimeError:  # it names what does not fit
        return None


def known(x: Tensor, function: str | Cut, training: bool) -> list[str]:
    """The programs that there are for such a call, beside the block's own layers."""
    names = []
    if x.is_cpu and dense.has_onednn():
        names += ["onednn"] if x.dtype is torch.float32 else []
        names += [] if training else ["packed"]
    names.append("sparse")
    few = x.shape[:-1].numel() <= FEW
    # a GPU screens when it decodes
    silent = isinstance(function, str) and form_of(function) is not None
    if silent and (x.is_cpu or (not training and few)):
        names.append("screened")
    return names


def copies(program: str, weights: Weights, tokens: int) -> dict[str, int]:
    """Bytes of each copy of weights that ``program`` keeps for calls of so many tokens."""
    first, second = (weights.up, None) if weights.gate is None else (weights.gate, weights.up)
    sizes = {"first": first.nbytes, "second": 0 if second is None else second.nbytes}
    sizes["down"] = weights.down.nbytes
    if program == "packed":
        return {f"{name}, packed": size for name, size in sizes.items()}
    if program not in ("sparse", "screened"):
        return {}
    held = {"down, panels": sizes["down"]}
    wanted = {"first": first if program == "screened" else None, "second": second}
    for name, t in wanted.items():  # as Prepared.matrix
        if t is not None and (tokens > FEW or not t.is_contiguous()):
            held[f"{name}, panels"] = sizes[name]
    if program == "screened":
        held["codes"] = first.numel()
    return held

"""Copies of weights in the layouts that programs read fastest, for weights that do not change."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from torch import Tensor

from actsparse.kernels import backends, checks, dense, ops
from actsparse.kernels.forms import FEW


class Prepared:
    """Copies of weights for :func:`sparse_mlp` that need not be made at each call.

    :func:`prepare` makes one; what a call needs is copied when the first such call comes.

    Args:
        down: the weight of down [D, H].
        first: the matrix that says which units are active [H, D]: gate in gated blocks, else up.
        second: up in gated blocks.

    >>> import torch
    >>> prepare(torch.ones(2, 3)).bytes()
    0
    """

    def __init__(self, down: Tensor, first: Tensor | None, second: Tensor | None) -> None:
        given = {"down": down, "first": first, "second": second}
        self._weights = {name: t.detach() for name, t in given.items() if t is not None}
        self._made: dict[str, Any] = {}
        self._found: dict[tuple[bool, bool], tuple[Any, ...]] = {}

    def __getstate__(self) -> dict[str, Any]:
        """Copies and pickles of a model make theirs anew: oneDNN's cannot be copied."""
        return {"_weights": self._weights, "_made": {}, "_found": {}}

    @property
    def gated(self) -> bool:
        """Whether it was made of a gated block's weights."""
        return "second" in self._weights

    def rows(self) -> Tensor:
        """downᵀ [H, D] by rows, or in panels for the compiled kernels."""
        return self._copy("down", panels=backends.native(self._weights["down"]))

    def matrix(self, name: str, tokens: int) -> Tensor | None:
        """``first`` or ``second`` as calls of so many tokens read it."""
        if name not in self._weights:
            return None
        weight = self._weights[name]
        few = tokens <= FEW and weight.is_contiguous()
        return self._copy(name, panels=not few and backends.native(weight))

    def packed(self, name: str, tokens: int) -> Tensor:
        """``first``, ``second`` or ``down`` in oneDNN's layout, for dense products."""
        return self._keep(f"{name}, packed", lambda: dense.packed(self._weights[name], tokens))

    def codes(self) -> tuple[Tensor, ...]:
        """What the screen needs of ``first``; empty where nothing can be screened."""
        first = self._weights.get("first")
        if first is not None and backends.on_gpu(first):
            from actsparse.kernels import triton_decode

            return self._keep("codes", lambda: triton_decode.quantise(self._copy("first", False)))
        if first is None or not backends.screens(first):
            return ()
        return self._keep("codes", lambda: tuple(ops.quantise(laid(first))))

    def for_inference(self, few: bool, screen: bool) -> tuple[Any, ...]:
        """``first``, its codes, ``second`` and downᵀ, as the compiled kernels read them."""
        found = self._found.get((few, screen))
        if found is None:
            codes = self.codes() if screen else ()
            tokens = FEW if few else FEW + 1
            first = self.matrix("first", tokens) if codes else None
            found = first, codes, self.matrix("second", tokens), self.rows()
            self._found[few, screen] = found
        return found

    def bytes(self) -> int:
        """The memory of all copies."""
        own = [t.data_ptr() for t in self._weights.values()]
        flat = [
            t for made in self._made.values() for t in (made if type(made) is tuple else (made,))
        ]
        return sum(
            t.numel() * t.element_size() for t in flat if t.is_mkldnn or t.data_ptr() not in own
        )

    def _copy(self, name: str, panels: bool) -> Tensor:
        weight = self._weights[name].t() if name == "down" else self._weights[name]
        if panels:
            return self._keep(f"{name}, panels", lambda: ops.panels(laid(weight)))
        return self._keep(name, weight.contiguous)

    def _keep(self, key: str, make: Callable[[], Any]) -> Any:
        if key not in self._made:
            self._made[key] = make()
        return self._made[key]


def prepare(down: Tensor, up: Tensor | None = None, gate: Tensor | None = None) -> Prepared:
    """Copy weights into the layout that :func:`sparse_mlp` reads fastest.

    The copies have the values that the weights have when they are made: prepare again when a
    weight has changed.

    Args:
        down: the weight of down [D, H].
        up: the weight of up [H, D].
        gate: the weight of gate in gated blocks [H, D].

    Returns:
        The copies, for ``sparse_mlp(..., prepared=...)``.

    >>> import torch
    >>> prepare(torch.ones(2, 3), torch.ones(3, 2)).gated
    False
    """
    return Prepared(down, up, None) if gate is None else Prepared(down, gate, up)


def laid(weight: Tensor) -> Tensor:
    """weight with its rows or its columns contiguous: itself, or a copy."""
    fits = weight.is_contiguous() or weight.t().is_contiguous()
    return weight if fits else weight.contiguous()


def fingerprint(weight: Tensor, second: Tensor | None = None, third: Tensor | None = None) -> int:
    """A number that changes when the entries of weights [H, D] do: from 16 of each.

    On a GPU reading them would stop the host at every token: 0.
    """
    if weight.is_cuda:
        return 0
    if backends.native(weight, second, third):
        return backends.compiled().fingerprint(weight, second, third)
    entries: list[float] = []
    for t in (weight, second, third):
        if t is not None:
            checks.sizes_of("weight", t)
            entries += t.detach().reshape(-1)[:: t.numel() // 16 + 1].tolist()
    return hash(tuple(entries))

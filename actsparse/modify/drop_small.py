"""Drop small activations: each unit keeps a value only where it is above the unit's threshold."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import partial
from typing import Any, ClassVar, Literal

import torch
from torch import Tensor, nn
from torch.utils.hooks import RemovableHandle
from typing_extensions import override

from actsparse.activations import named
from actsparse.blocks.block import Blocks, MLPBlock, unwrap
from actsparse.blocks.resolve import HANDLE
from actsparse.blocks.site import Site, no_product, site_of
from actsparse.blocks.stages import Cut, drops, keep_above
from actsparse.modify.modification import Attached, Modification, NotApplicable

BUFFER = "activation_threshold"  # on the up module


@dataclass(frozen=True)
class DropSmall(Modification):
    """Set an activation to zero where its magnitude is not above a threshold of its unit.

    There are three forms. With thresholds t [H] and a = φ(z), or a = φ(z) ⊙ u in gated blocks:

    - ``"gate"``: ``a_h`` where ``|φ(z_h)| > t_h``, else 0. The unit's rows of up and its column of
      down need not be read (CATS: Lee et al. 2024, arXiv 2404.08763, with one threshold a block).
    - ``"product"``: ``a_h`` where ``|a_h| > t_h``, else 0. Only the column of down need not be
      read (TEAL: Liu et al. 2024, arXiv 2408.14690).
    - ``"both"``: ``a_h`` where ``|φ(z_h)| > t_h`` and ``|a_h| > t′_h``, else 0. The first spares
      rows of up, the second columns of down.

    In blocks without a gate all are the same. Any φ that has a name will do: SiLU and GELU keep
    both signs. NaN is kept. The mask is a constant for gradients: what is dropped has none.

    Thresholds are a buffer of the up layer, ``activation_threshold`` [H], saved with the weights;
    of the form "both" they are [2, H], those of ``|φ(z)|`` first.
    They are 0 at first, which changes nothing; :func:`actsparse.convert.calibrate` finds others,
    and :func:`set_thresholds` sets them.

    Args:
        form: ``"gate"``, ``"product"`` or ``"both"``.

    Raises:
        ValueError: ``form`` is none of these.

    >>> from actsparse import sparsify
    >>> mlp = nn.Sequential(nn.Linear(8, 32), nn.GELU(), nn.Linear(32, 8))
    >>> handle = sparsify(mlp, DropSmall(), inputs=torch.randn(2, 8))
    >>> set_thresholds(mlp, {handle.blocks[0].name: torch.full((32,), 0.1)})
    >>> bool((mlp[1](mlp[0](torch.randn(64, 8))) == 0).any())
    True
    """

    changes_function: ClassVar[bool] = True

    form: Literal["gate", "product", "both"] = "gate"

    @override
    def apply(self, block: MLPBlock) -> Attached:
        form = self.form if block.gated else "gate"
        function = block.activation.function
        if function is None:
            raise NotApplicable("its φ is not known by name")
        if form != "gate" and (reason := no_product(block)) is not None:
            raise NotApplicable(f"{reason}: take form='gate', or leave it out")
        up = block.up.module
        if BUFFER in up._buffers:
            raise ValueError(f"block {block.name!r} drops small activations already")
        site = site_of(block)
        phi = LargeAlone(block, function, form)
        try:
            site.replace_activation(phi)
        except ValueError as error:
            site.release()
            raise NotApplicable(str(error)) from None
        shape = (2, block.d_hidden) if form == "both" else (block.d_hidden,)
        up.register_buffer(BUFFER, torch.zeros(shape, device=block.up.weight.device))
        note = f"{function} where {_KEPT[form]}, a threshold for each unit"
        says = up.register_state_dict_post_hook(partial(_say_form, form))
        checks = up.register_load_state_dict_pre_hook(partial(_check_form, form))
        return _Dropping(site, note, phi, (says, checks))


_KEPT = {
    "gate": "|φ(z)| > t",
    "product": "|φ(z)·u| > t",
    "both": "|φ(z)| > t and |φ(z)·u| > t′",
}


def _say_form(form: str, up: nn.Module, state: Any, prefix: str, metadata: dict[str, Any]) -> None:
    metadata[BUFFER] = form


def _check_form(
    form: str, up: nn.Module, state: Any, prefix: str, metadata: dict[str, Any], *rest: Any
) -> None:
    """Refuse thresholds of another form, which have the same shape; files say no form."""
    other, errors = metadata.get(BUFFER, form), rest[-1]
    if other != form:
        errors.append(f"{prefix}{BUFFER}: thresholds of DropSmall({other!r}), here of {form!r}.")


class LargeAlone:
    """φ(z) where it is above its unit's threshold; what masks products comes before down."""

    function = None  # no name: it has a number for each unit

    def __init__(self, block: MLPBlock, function: str, form: str) -> None:
        self.block, self.own_function, self.form = block, function, form
        self.mask_product = None if form == "gate" else self._keep_products

    @property
    def cut(self) -> Cut:
        """What decides which activations are kept."""
        threshold = self.block.up.module._buffers[BUFFER]
        assert threshold is not None
        return Cut(self.own_function, threshold, self.form == "product")

    def __call__(self, z: Tensor, own: Callable[[Tensor], Tensor]) -> Tensor:
        """[..., H]."""
        a, (threshold, _) = own(z), self.cut.sides
        return a if threshold is None else keep_above(a, threshold)

    def _keep_products(self, a: Tensor) -> Tensor:
        _, threshold = self.cut.sides
        assert threshold is not None
        return keep_above(a, threshold)

    def derivative(self, z: Tensor, own: Callable[[Tensor], Tensor]) -> Tensor:
        """φ′(z) where φ(z) is kept, else 0: [..., H]."""
        slope, cut = own(z), self.cut
        threshold, _ = cut.sides
        if threshold is None:
            return slope
        return slope.masked_fill(drops(named(cut.function).value(z), threshold), 0)


class _Dropping(Attached):
    def __init__(
        self, site: Site, note: str, phi: LargeAlone, hooks: tuple[RemovableHandle, ...]
    ) -> None:
        super().__init__(site, note)
        self.phi, self.hooks = phi, hooks

    @override
    def remove(self) -> None:
        self.site.release(self.phi)
        for hook in self.hooks:
            hook.remove()
        self.site.block.up.module._buffers.pop(BUFFER, None)


def set_thresholds(model: nn.Module, thresholds: Mapping[str, Tensor]) -> None:
    """Set the thresholds of blocks that :class:`DropSmall` is attached to.

    Args:
        model: the model that ``sparsify`` got.
        thresholds: t [H] of |φ(z)| or |φ(z)·u|, at least 0, by the name of the block; of the form
            "both" [2, H].

    Raises:
        ValueError: the model has no such block, or values of another shape, or below 0.

    >>> from actsparse import sparsify
    >>> mlp = nn.Sequential(nn.Linear(8, 32), nn.SiLU(), nn.Linear(32, 8))
    >>> handle = sparsify(mlp, DropSmall(), inputs=torch.randn(2, 8))
    >>> set_thresholds(mlp, {handle.blocks[0].name: torch.full((32,), 0.1)})
    >>> mlp[0].activation_threshold.shape
    torch.Size([32])
    """
    known = {block.name: block for block in dropping_blocks(model)}
    for name, values in thresholds.items():
        if name not in known:
            raise ValueError(
                f"no block {name!r} drops small activations; known: {', '.join(known) or 'none'}"
            )
        held = known[name].up.module._buffers[BUFFER]
        assert held is not None
        if values.shape != held.shape or not bool((values >= 0).all()):
            raise ValueError(
                f"thresholds of block {name!r}: shape {list(values.shape)}, least "
                f"{float(values.min()) if values.numel() else None}; expected numbers ≥ 0 of shape "
                f"{list(held.shape)}"
            )
    for name, values in thresholds.items():
        buffer = known[name].up.module._buffers[BUFFER]
        assert buffer is not None
        with torch.no_grad():
            buffer.copy_(values)


def dropping_blocks(model: nn.Module) -> Blocks:
    """The blocks of a model that :class:`DropSmall` is attached to; none where there is no handle.

    Args:
        model: any model.

    Returns:
        The blocks, in order of execution.

    >>> dropping_blocks(nn.Linear(2, 2))
    []
    """
    handle = unwrap(model).__dict__.get(HANDLE)
    if handle is None:
        return Blocks()
    own = [block for block in handle.blocks if BUFFER in block.up.module._buffers]
    return Blocks(own, inputs=handle.blocks.inputs)

"""Cut hidden units that were never active out of the weights; the layers stay dense."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from actsparse.blocks.block import Layer, MLPBlock, on_meta, unwrap
from actsparse.blocks.sharding import sharded
from actsparse.blocks.site import site_at
from actsparse.modify.config_note import note_changes
from actsparse.modify.drop_small import BUFFER
from actsparse.modify.handle import handle_of
from actsparse.modify.observed_blocks import Seen, seen_blocks
from actsparse.modify.swap_activation import MixedActivation
from actsparse.modify.zeroth_bias import CHILD

# layout → the names of a layer's widths, (out, in); weights of Conv1D are [in, out]
_WIDTHS = {"Linear": ("out_features", "in_features"), "Conv1D": ("nf", "nx")}
_DENSE = "_actsparse_dense_width"  # kept on up: what tells a pruned block from one made narrow


def prune_dead_units(
    model: nn.Module, seen: Seen, *, blocks: Iterable[MLPBlock] | None = None
) -> Pruned:
    """Cut the hidden units that were never active out of a model's MLPs, in place.

    A unit h is dead on some data if ``a_th = 0``, exactly, for each of its tokens t. Its row of up
    (and gate) and its column of down then change nothing:

        ``y_t = Σ_h a_th V_:h + b′ = Σ_{h alive} a_th V_:h + b′``

    Outputs on these tokens stay as they were, up to the rounding of shorter sums. **On other data a
    unit that was inactive may be active, and is missing then.** Padding that ``observe`` left out
    is other data, too. So is training mode, with its dropout and noise: units are counted in
    evaluation mode. A unit is dead with the weights and φ that were observed. If a threshold or a
    swap was removed since, it may be active again; that is not checked.

    If all units of a block are dead, its first is left, because at width 0 means over units would
    be 0/0. What ``sparsify`` and ``accelerate`` attached stays and works on. Layers get new
    parameters: make another optimizer, because one made before holds the old ones. ``save`` keeps
    the widths.

    Args:
        model: the model.
        seen: what ``observe(model, "density")`` returned, after passes in evaluation mode over the
            data that matters. It is closed, because its counts include the units that are gone.
            Close other sessions yourself.
        blocks: which of ``seen.blocks`` to prune; None: all.

    Returns:
        The handle. Print it for the units of each block; ``remove()`` restores the dense layers.

    Raises:
        ValueError: a block that was not observed with ``"density"`` or that no token passed in
            evaluation mode; and, with the reason for each, blocks with dead units that cannot be
            cut: layers of peft, tied to or shared with others, quantised, sharded (FSDP) or fused,
            a norm over hidden units, top-k. The model is untouched then.

    >>> from actsparse import observe
    >>> mlp = nn.Sequential(nn.Linear(8, 32), nn.ReLU(), nn.Linear(32, 8)).eval()
    >>> _ = nn.init.constant_(mlp[0].bias[:5], -99.0)
    >>> x = torch.randn(1000, 8)  # all other units are active on some of these
    >>> with observe(mlp, inputs=x) as seen:
    ...     y = mlp(x)
    >>> pruned = prune_dead_units(mlp, seen)
    >>> print(pruned)
    5 of 32 hidden units pruned, 85 parameters
      0: 32 → 27 units
    >>> torch.allclose(mlp(x), y, atol=1e-5)
    True
    >>> pruned.remove()
    >>> mlp[0]
    Linear(in_features=8, out_features=32, bias=True)
    """
    chosen = seen_blocks(model, seen, blocks, "prune_dead_units")
    kept = {}
    for name, block in chosen.items():
        active = seen.part(name, "inference", "density").active
        if len(active) != block.d_hidden:
            raise ValueError(
                f"block {name!r} has {block.d_hidden} hidden units, but {len(active)} were seen: "
                f"it was pruned since; observe it again"
            )
        alive = active != 0
        alive[0] |= not bool(alive.any())
        kept[name] = alive.nonzero().flatten()
    pruned = cut(model, chosen, kept, [*seen.blocks.values()])
    seen.close()
    return pruned


def cut(
    model: nn.Module,
    blocks: Mapping[str, MLPBlock],
    kept: Mapping[str, Tensor],
    others: Iterable[MLPBlock] = (),
) -> Pruned:
    """Keep of each block, by name, the hidden units whose numbers are in ``kept`` [H′], int64.

    ``others`` are further objects that may describe the same blocks and follow their width.

    Raises:
        ValueError: blocks that cannot be cut, with the reason for each.
    """
    root = unwrap(model)
    handle = handle_of(root)
    known = [*blocks.values(), *others, *(handle.blocks if handle else ())]
    shorter = {name: b for name, b in blocks.items() if len(kept[name]) < b.d_hidden}
    owners = _owners(root)
    reasons = {name: _unfit(root, block, known, owners) for name, block in shorter.items()}
    if any(reasons.values()):
        said = "; ".join(f"{name}: {why}" for name, why in reasons.items() if why)
        raise ValueError(f"blocks whose hidden units cannot be cut: {said}")
    rows = [(name, block.d_hidden, len(kept[name])) for name, block in blocks.items()]
    cuts, followers = [], []
    for name, block in shorter.items():
        same = [each for each in known + _attached(block) if each.up.module is block.up.module]
        followers += [(each, block.d_hidden) for each in {id(each): each for each in same}.values()]
        for layer in (block.up, block.gate):
            if layer is not None:
                cuts += _outputs(layer, kept[name])
        cuts.append(_Cut.of(block.down, "weight", _across(block.down, 1), kept[name]))
    for piece in cuts:
        piece.apply()
    for each, _ in followers:
        each.d_hidden = each.down.weight.shape[1]
    for name, width, _ in rows:
        if name in shorter:
            shorter[name].up.module.__dict__.setdefault(_DENSE, width)
    note_changes(root)
    return Pruned(root, rows, cuts, followers)


def pruned_layers(root: nn.Module) -> dict[str, nn.Module]:
    """By name the up layers of a model whose outputs were pruned."""
    return {name: part for name, part in root.named_modules() if _DENSE in part.__dict__}


def _across(layer: Layer, of_linear: int) -> int:
    """The dimension of a layer's weight that is ``of_linear`` in nn.Linear."""
    return 1 - of_linear if layer.layout == "Conv1D" else of_linear


def _outputs(layer: Layer, kept: Tensor) -> list[_Cut]:
    cuts = [_Cut.of(layer, "weight", _across(layer, 0), kept)]
    return cuts if layer.bias is None else [*cuts, _Cut.of(layer, "bias", 0, kept)]


@dataclass
class _Cut:
    """One parameter of a layer: as it was, and what was kept of it along ``dim``."""

    layer: Layer
    name: str
    dim: int
    kept: Tensor
    dense: nn.Parameter
    size: torch.Size

    @classmethod
    def of(cls, layer: Layer, name: str, dim: int, kept: Tensor) -> _Cut:
        dense = layer.module._parameters[name]
        assert dense is not None
        size = torch.Size(len(kept) if i == dim else n for i, n in enumerate(dense.shape))
        return cls(layer, name, dim, kept, dense, size)

    def apply(self) -> None:
        values = self.dense.detach().index_select(self.dim, self.kept.to(self.dense.device))
        self._put(nn.Parameter(values, self.dense.requires_grad))

    def check(self) -> None:
        now = self.layer.module._parameters.get(self.name)
        if now is None or now.shape != self.size:
            raise ValueError(
                f"{self.layer.name}.{self.name} no longer has the shape {list(self.size)} that "
                f"pruning gave it: first undo what changed it since (a later pruning, peft)"
            )

    @torch.no_grad()
    def undo(self) -> None:
        now = self.layer.module._parameters[self.name]
        assert now is not None
        self.dense.data = self.dense.data.to(now)  # where the model has moved since
        self.dense.data.index_copy_(self.dim, self.kept.to(now.device), now.detach())
        self.dense.requires_grad_(now.requires_grad)
        self._put(self.dense)

    def _put(self, parameter: nn.Parameter) -> None:
        self.layer.module._parameters[self.name] = parameter
        if self.name == "weight":
            out = self.dim == _across(self.layer, 0)
            width = _WIDTHS[self.layer.layout][0 if out else 1]
            setattr(self.layer.module, width, parameter.shape[self.dim])


class Pruned:
    """The handle that :func:`prune_dead_units` returns: print it for the units of each block.

    Its attribute ``parameters`` is the number of parameters that were cut out.

    Args:
        root: the model, without wrappers.
        rows: of each block its name, and its hidden units before and after.
        cuts: the parameters that were cut.
        followers: other objects that describe the same blocks, with the width they had.

    >>> from actsparse import observe
    >>> mlp = nn.Sequential(nn.Linear(8, 32), nn.ReLU(), nn.Linear(32, 8)).eval()
    >>> _ = nn.init.constant_(mlp[0].bias[:5], -99.0)
    >>> with observe(mlp, inputs=torch.randn(2, 8)) as seen:
    ...     _ = mlp(torch.randn(1000, 8))
    >>> pruned = prune_dead_units(mlp, seen)
    >>> pruned.rows, pruned.parameters
    ([('0', 32, 27)], 85)
    >>> pruned.remove()
    """

    def __init__(
        self,
        root: nn.Module,
        rows: list[tuple[str, int, int]],
        cuts: list[_Cut],
        followers: list[tuple[MLPBlock, int]],
    ) -> None:
        self.rows = rows
        self._root = root
        self._cuts = cuts
        self._followers = followers
        self.parameters = sum(each.dense.numel() - each.size.numel() for each in cuts)

    def remove(self) -> None:
        """Restore the dense layers; calling it twice does no harm.

        Units that were kept have the values that training has given them since; pruned units have
        those they had.

        Raises:
            ValueError: the shape of a layer was changed since; nothing is restored then.
        """
        for piece in self._cuts:
            piece.check()
        for piece in self._cuts:
            piece.undo()
        handle = handle_of(self._root)
        for block, width in self._followers:
            up = block.up.module
            # and what came after the pruning
            for each in [block, *_attached(block), *(handle.blocks if handle else ())]:
                if each.up.module is up:
                    each.d_hidden = width
            if up.__dict__.get(_DENSE) == width:
                del up.__dict__[_DENSE]
        self._cuts, self._followers = [], []
        note_changes(self._root)

    def __str__(self) -> str:
        before, after = sum(row[1] for row in self.rows), sum(row[2] for row in self.rows)
        head = f"{before - after} of {before} hidden units pruned, {self.parameters:,} parameters"
        lines = [f"  {name}: {old} → {new} units" for name, old, new in self.rows]
        return "\n".join([head, *lines])


def _attached(block: MLPBlock) -> list[MLPBlock]:
    """The objects by which what is attached knows a block."""
    site = site_at(block)
    if site is None:
        return []
    executor = getattr(site.executor, "block", None)
    return [site.block] if executor is None else [site.block, executor]


def _owners(root: nn.Module) -> dict[int, list[str]]:
    """By the id of a parameter the names it goes by, one for each module that holds it."""
    owners: dict[int, list[str]] = {}
    for path, module in root.named_modules():
        for name, parameter in module._parameters.items():
            if parameter is not None:
                owners.setdefault(id(parameter), []).append(f"{path}.{name}" if path else name)
    return owners


def _unfit(
    root: nn.Module, block: MLPBlock, known: list[MLPBlock], owners: dict[int, list[str]]
) -> str | None:
    """Why a block's hidden units cannot be cut, or None."""
    fsdp = any(type(module).__name__ == "FullyShardedDataParallel" for module in root.modules())
    if fsdp or sharded(root.modules()):
        return "the model is sharded (FSDP); prune before sharding"
    if any(part.kind == "norm" for part in block.between):
        return "a norm over its hidden units stands before down, which counts dead ones too"
    if BUFFER in block.up.module._buffers:
        return "its units have thresholds (DropSmall), which pruning would not cut; prune before"
    phi = getattr(site_at(block), "phi", None)
    if phi is not None and not isinstance(phi, MixedActivation):
        return "a unit's activation depends on the others (TopK), and on how many there are"
    layers = [layer for layer in (block.up, block.gate, block.down) if layer is not None]
    for layer in layers:
        if layer.rows is not None:
            return f"{layer.name} computes more than {layer}, and who calls it splits its output"
        if (reason := _unfit_layer(layer)) is not None:
            return f"{layer.name} {reason}"
        for parameter in (p for p in layer.module._parameters.values() if p is not None):
            names = owners.get(id(parameter))
            if names is None:
                return f"{layer.name} was replaced since the block was found"
            if len(names) > 1:
                return f"tied parameters: {' and '.join(names)}"
        for other in known:
            theirs = {part.module for part in (other.up, other.gate, other.down) if part}
            if layer.module in theirs and other.up.module is not block.up.module:
                return f"{layer.name} is shared with block {other.name or other.up.name!r}"
    return None


def _unfit_layer(layer: Layer) -> str | None:
    module = layer.module
    if (reason := on_meta(module)) is not None:
        return f"cannot be cut: {reason}"
    if hasattr(module, "base_layer"):
        return "has adapters (peft); merge them first, or prune before wrapping"
    weight = module._parameters.get("weight")
    if weight is None or type(weight) is not nn.Parameter or type(weight.data) is not Tensor:
        return f"has no plain weight ({type(module).__name__}: quantised or parametrised?)"
    extra = {*module._parameters, *module._buffers, *module._modules} - {"weight", "bias", CHILD}
    if extra or not weight.is_floating_point():
        what = f"holds {', '.join(sorted(extra))}" if extra else f"has a weight of {weight.dtype}"
        return f"{what} ({type(module).__name__}: quantised?)"
    out, into = (getattr(module, width, None) for width in _WIDTHS[layer.layout])
    if weight.shape != ((out, into) if layer.layout == "Linear" else (into, out)):
        return f"has a weight of shape {list(weight.shape)}, but widths {into} → {out}"
    return None

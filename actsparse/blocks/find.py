"""Find the MLP blocks of any model by data flow, in one forward pass.

A block is a pair of linear layers, up and down, joined by a pointwise nonlinearity (and, where it
is gated, a product with a second layer's output), whose result has the width that went in. No
table of architectures: names and classes play no part.
"""

from __future__ import annotations

import threading
from dataclasses import dataclass, field
from typing import Any

from torch import nn

from actsparse.activations import identify, works_in_place
from actsparse.blocks.autograd_graph import (
    ADDS,
    DROPS,
    MIXES,
    MOVES,
    MULTIPLIES,
    SCALES,
    back,
    chain,
    common,
    common_parent,
    consumers,
    inside,
    origins,
    other_readers,
    residual_sum,
    root,
    root_width,
    upstream,
)
from actsparse.blocks.batch_axis import lay_out
from actsparse.blocks.block import (
    Activation,
    Between,
    Blocks,
    Layer,
    MLPBlock,
    base_layer,
    on_meta,
    unwrap,
)
from actsparse.blocks.example_inputs import describe_inputs
from actsparse.blocks.refused import ALONE, NoMLPFound, Refused, told
from actsparse.blocks.replaced_modules import Standing
from actsparse.blocks.trace import Node, Trace, check_traceable, is_linear, trace, undisturbed
from actsparse.blocks.unreached import unreached


def find_mlp_blocks(model: nn.Module, inputs: Any) -> Blocks:
    """Find the MLP blocks of a model by running it once on ``inputs``.

    The pass has no side effects: modes, random state, buffers, gradients and hooks stay as they
    were (:func:`actsparse.blocks.trace.undisturbed` names the exceptions). Another thread may
    evaluate the model meanwhile, but must not train it or attach anything to it.

    Args:
        model: any model; classes and names play no part.
        inputs: what the model runs on: a tensor, a tuple of arguments or a dict for
            ``model(**inputs)``.

    Returns:
        The blocks in order of execution. Their ``refused`` lists, with reasons, what cannot be
        handled (batched experts, …) and what looks like a block but did not run on ``inputs``.

    Raises:
        NoMLPFound: there is no block that can be handled; the message lists what was seen.
        TypeError: ``inputs`` is none of the three kinds.
        ValueError: the model is a TorchScript model, or has layers that are not initialised yet
            (lazy) or that hold no values (on 'meta') where the pass needs them.

    >>> import torch
    >>> mlp = nn.Sequential(nn.Linear(8, 32), nn.ReLU(), nn.Linear(32, 8))
    >>> (block,) = find_mlp_blocks(mlp, torch.randn(2, 8))
    >>> block.up.name, block.activation.function, block.down.name, block.d_hidden
    ('0', 'relu', '2', 32)
    """
    model = unwrap(model)
    check_traceable(model)
    with _ONE_AT_A_TIME, undisturbed(model):  # naming an activation runs it, too
        try:
            traced = trace(model, inputs)
        except RuntimeError as error:
            if (reason := on_meta(model)) is None:
                raise
            raise ValueError(f"{type(model).__name__} does not run: {reason}") from error
        return lay_out(model, inputs, _Finder(traced, describe_inputs(inputs)).blocks())


_ONE_AT_A_TIME = threading.RLock()  # two would take each other's modes for the model's own


@dataclass(eq=False)
class _Found:
    block: MLPBlock
    residual: bool


@dataclass(eq=False)
class _Refusal(Exception):
    reason: str


@dataclass
class _Cone:
    """The operations between down's input and the linear layers it comes from."""

    nodes: list[Node] = field(default_factory=list)
    layers: list[Node] = field(default_factory=list)


class _Finder:
    def __init__(self, traced: Trace, inputs: Any) -> None:
        self.trace = traced
        self.inputs = inputs
        self.refused: dict[str, str] = {}
        self.seen: list[str] = []

    def blocks(self) -> Blocks:
        found: dict[tuple[str, ...], _Found] = {}
        downs: set[str] = set()
        for node in self.trace.nodes:
            if node.kind == "experts":
                owner = node.name.rpartition(".")[0] or node.name
                self.refused[owner] = (
                    f"batched experts: parameter {node.name!r} holds the weights of several "
                    f"experts, and each sees a routed part of the tokens"
                )
            if node.kind != "linear" or not node.inputs:
                continue
            try:
                match = self._match(node)
            except _Refusal as refusal:
                self.refused[node.name] = refusal.reason
                continue
            if match is None:
                continue
            block = match.block
            key = (block.up.name, block.down.name)
            if key in found:
                found[key].block.calls += 1
            elif block.up.name not in downs:
                downs.add(block.down.name)
                found[key] = match
        # A head or pooler may look like a block, but adds nothing to a stream of tokens.
        alone = []
        if any(item.residual for item in found.values()):
            for item in [i for i in found.values() if not i.residual]:
                block = item.block
                alone.append(Refused(block.name or f"{block.up.name} → {block.down.name}", ALONE))
                del found[(block.up.name, block.down.name)]
        for item in found.values():  # found in one call, refused in another
            for layer in (item.block.up, item.block.gate, item.block.down):
                self.refused.pop(layer.name if layer else "", None)
        for item in found.values():
            item.block.standing = Standing(item.block)
        refused = [Refused(name, reason) for name, reason in self.refused.items()] + alone
        refused += unreached(self.trace, (item.block for item in found.values()))
        if not found:
            raise NoMLPFound(self._nothing(refused), refused)
        return Blocks((item.block for item in found.values()), refused, self.inputs)

    def _nothing(self, refused: list[Refused]) -> str:
        linears = [n for n in self.trace.nodes if n.kind == "linear"]
        lines = [
            "no MLP block found: expected a linear layer (d_model → d_hidden), a pointwise "
            "nonlinearity and a linear layer back to d_model."
        ]
        lines += [f"  refused {line}" for line in told(refused)[:8]]
        lines += [f"  seen: {text}" for text in self.seen[:8]]
        if not linears:
            lines.append("  the forward pass called no linear layer at all")
        elif not refused and not self.seen:
            names = ", ".join(n.name for n in linears[:8])
            lines.append(
                f"  linear layers seen: {names}; none is fed by another one "
                f"through a pointwise nonlinearity"
            )
        return "\n".join(lines)

    # -- one candidate --------------------------------------------------------------------------

    def _match(self, down: Node) -> _Found | None:
        cone = self._cone(down.inputs[0])
        if cone is None or not cone.layers:
            return None
        gating = self._gating(cone)
        act_nodes = [n for n in cone.nodes if self._is_nonlinear(n, gating)]
        if not act_nodes:
            return None
        branches = self._branches(cone, gating, act_nodes)
        if branches is None:
            return None
        up, gate, branch = branches
        if gate is not None and gate[0] is not up[0] and root(gate[0]) is not root(up[0]):
            return None
        d_model = root_width(up[0])
        if down.width != d_model:
            self.seen.append(
                f"{up[0].name} → {act_nodes[0].name} → {down.name}: "
                f"{d_model} features go in, {down.width} come out"
            )
            return None
        for node in (up[0], down, *([gate[0]] if gate else [])):
            if node.module is None:
                raise _Refusal(
                    f"the product with parameter {node.name!r} is a function call, not a module "
                    f"that hooks can reach; make it an nn.Linear"
                )
        hidden = up[1][2] if up[1] else up[0].width
        if hidden != root_width(down):
            return None  # other rows of a fused layer than those seen here
        name = common_parent(up[0].name, down.name)
        activation = self._activation(branch, up[0], gate[0] if gate else None, down)
        between = self._between(cone, gating, act_nodes)
        norm_node = self._norm_before(up[0])
        position, feeds, residual = self._surroundings(up, gate, down, norm_node)
        if not residual and any(self._is_nonlinear(n, None) for n in consumers(down)):
            self.seen.append(f"{up[0].name} → {down.name}: a nonlinearity follows")
            return None
        return _Found(
            MLPBlock(
                name=name,
                norm=norm_node.norm if norm_node else None,
                up=_layer(*up),
                gate=_layer(*gate) if gate else None,
                activation=activation,
                between=between,
                down=_layer(down, None),
                d_model=d_model,
                d_hidden=hidden,
                norm_position=position if norm_node else "none",  # type: ignore[arg-type]
                norm_feeds=feeds,
                input_shape=up[0].inputs[0].shape,
                path=tuple(self.trace.modules[part] for part in up[0].path[:-1]),
                around=len(common(up[0].path[:-1], down.path[:-1])),
                hidden_feeds=other_readers([*cone.layers, *cone.nodes], down, activation),
                same_input=gate is None or gate[0].inputs[0] is up[0].inputs[0],
            ),
            residual,
        )

    def _cone(self, start: Node) -> _Cone | None:
        cone, queue, seen = _Cone(), [start], set()
        while queue:
            node = queue.pop()
            if id(node) in seen or node.kind == "parameter":
                continue
            seen.add(id(node))
            if node.kind == "linear":
                cone.layers.append(node)
                continue
            if node.kind in ("source", "experts") or node.name in MIXES:
                return None
            if node.kind == "op" and node.name not in MOVES:
                widest = max((n.shape for n in node.inputs), key=len, default=())
                if node.name != "glu" and widest and node.shape and widest[-1] != node.shape[-1]:
                    return None
            cone.nodes.append(node)
            queue.extend(node.inputs)
        return cone

    def _gating(self, cone: _Cone) -> Node | None:
        """The product of two branches that come from different layers or rows."""
        products = []
        for node in cone.nodes:
            data = [n for n in node.inputs if n.kind != "parameter"]
            if node.kind == "op" and node.name in MULTIPLIES and len(data) == 2:
                first, second = (origins(n) for n in data)
                if first and second and not first & second:
                    products.append(node)
        return products[0] if len(products) == 1 else None

    def _is_nonlinear(self, node: Node, gating: Node | None) -> bool:
        if node is gating or node.kind != "op" or node.name in MOVES | DROPS:
            return False
        linear = node.name in ADDS or (node.name in SCALES and node.scalar)
        return not linear or self._in_activation_module(node)

    def _in_activation_module(self, node: Node) -> bool:
        """Inside a module that holds no linear layer, so that scaling belongs to a formula."""
        owner = self.trace.modules.get(node.path[-1]) if node.path else None
        return owner is not None and not any(is_linear(m) for m in owner.modules())

    def _branches(
        self, cone: _Cone, gating: Node | None, act_nodes: list[Node]
    ) -> tuple[Any, Any, list[Node]] | None:
        if gating is None:
            sources = set().union(*(origins(n) for n in act_nodes))
            if len(cone.layers) != 1 or len(sources) != 1:
                return None  # a stream that several layers write to
            if any(n.name == "glu" for n in act_nodes):
                raise _Refusal("F.glu hides the gate inside one call; write act(gate) * up instead")
            return (cone.layers[0], next(iter(sources))[1]), None, act_nodes
        data = [n for n in gating.inputs if n.kind != "parameter"]
        sides = []
        for operand in data:
            side = upstream(operand)
            sides.append([n for n in act_nodes if id(n) in side])
        active = [bool(side) for side in sides]
        if active == [True, True]:
            raise _Refusal("both factors of its gated product pass through a nonlinearity")
        if active == [False, False]:
            raise _Refusal("the nonlinearity stands behind the gated product")
        which = active.index(True)
        gates, ups = origins(data[which]), origins(data[1 - which])
        if len(gates) != 1 or len(ups) != 1:
            return None
        return next(iter(ups)), next(iter(gates)), sides[which]

    def _activation(self, nodes: list[Node], up: Node, gate: Node | None, down: Node) -> Activation:
        nodes = sorted(nodes, key=self.trace.nodes.index)
        held = [n.name for n in (up, gate, down) if n is not None]
        path = common(*(n.path for n in nodes))
        owner_name = path[-1]
        module = self.trace.modules[owner_name]
        if not any(inside(owner_name, name) for name in held):
            in_place = works_in_place(module)
            return Activation(owner_name, identify(module), module, module, in_place=in_place)
        call = chain(nodes)
        steps = tuple(call.steps) if call else ()
        function = identify(call) if call else None
        label = f"{nodes[-1].name}()"
        for key, value in vars(module).items():  # a function kept as an attribute has its name
            if callable(value) and function is not None and identify(value) == function:
                label = key
        return Activation(
            f"{owner_name}.{label}" if owner_name else label,
            function,
            call,
            owner=module,
            steps=steps,
            in_place=works_in_place(call),
        )

    def _between(
        self, cone: _Cone, gating: Node | None, act_nodes: list[Node]
    ) -> tuple[Between, ...]:
        order = {id(n): i for i, n in enumerate(self.trace.nodes)}
        after = order[id(gating)] if gating else max(order[id(n)] for n in act_nodes)
        parts: dict[str, Between] = {}
        for node in sorted(cone.nodes, key=lambda n: order[id(n)]):
            if node.kind != "norm" and node.name not in DROPS:
                continue
            if order[id(node)] < after:
                raise _Refusal(f"{node.name} stands between its up layer and its activation")
            if node.kind == "norm":
                parts[node.name] = Between(node.name, "norm", node.module)
                continue
            module = self.trace.modules[node.path[-1]]
            is_module = not any(is_linear(m) for m in module.modules())
            name = node.path[-1] if is_module else "dropout()"
            parts[name] = Between(name, "dropout", module if is_module else None)
        return tuple(parts.values())

    # -- around the block -----------------------------------------------------------------------

    @staticmethod
    def _norm_before(up: Node) -> Node | None:
        node = root(up)
        return node if node.kind == "norm" else None

    def _surroundings(
        self, up: Any, gate: Any, down: Node, norm: Node | None
    ) -> tuple[str, tuple[str, ...], bool]:
        own = {up[0].name} | ({gate[0].name} if gate else set())  # by name: a pass may call twice
        sum_node, partner = residual_sum(down)
        position = "pre"
        feeds: dict[str, None] = {}
        if norm is not None:
            if sum_node is not None and partner is not None and norm in back(partner):
                position = "post"
            for user in consumers(norm):
                if user.name in own:
                    continue
                if user is sum_node or user.name in ADDS:
                    feeds["residual"] = None
                elif user.kind in ("linear", "experts"):
                    name = user.name if user.module is not None else user.name.rpartition(".")[0]
                    feeds[name] = None
                else:
                    feeds[user.path[-1] if user.path else user.name] = None
        return position, tuple(feeds), sum_node is not None


def _layer(node: Node, window: Any) -> Layer:
    assert node.module is not None
    layout = "Conv1D" if type(base_layer(node.module)).__name__ == "Conv1D" else "Linear"
    rows = None
    if window is not None:
        start, step, size = window
        rows = slice(start, start + size) if step == 1 else slice(start, start + step * size, step)
    return Layer(node.name, node.module, layout, rows)  # type: ignore[arg-type]

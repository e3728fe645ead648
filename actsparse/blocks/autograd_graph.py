"""Walk the graph of a forward pass, by kinds of operation."""

from __future__ import annotations

import itertools
from collections.abc import Iterable
from typing import Any

from torch import Tensor

from actsparse.blocks.block import Activation
from actsparse.blocks.trace import FrozenCall, Node, Window

# Operations that move or cast values without computing: looked through everywhere.
MOVES = {
    "view", "reshape", "transpose", "permute", "contiguous", "flatten", "unflatten", "squeeze",
    "unsqueeze", "to", "type", "type_as", "float", "half", "bfloat16", "chunk", "split",
    "tensor_split", "__getitem__", "getitem", "narrow", "unbind", "clone", "view_as",
    "reshape_as", "expand", "swapaxes", "movedim", "detach", "select", "identity", "__get__",
    "rearrange", "requires_grad_",
}  # fmt: skip
DROPS = {"dropout", "dropout_", "alpha_dropout", "feature_alpha_dropout", "native_dropout"}
# Operations between tokens: no MLP block has one between up and down.
MIXES = {
    "matmul", "__matmul__", "__rmatmul__", "mm", "bmm", "addmm", "baddbmm", "einsum", "linear",
    "bilinear", "softmax", "log_softmax", "scaled_dot_product_attention",
    "multi_head_attention_forward", "cumsum", "cumprod", "sum", "mean", "cat", "concat", "stack",
    "embedding", "index_select", "gather", "roll", "flip", "sort", "topk", "pad", "interpolate",
    "scatter", "conv1d", "conv2d", "conv3d", "batch_norm", "max_pool1d", "max_pool2d", "avg_pool2d",
    "adaptive_avg_pool2d", "unfold", "fold", "flex_attention", "index_add_", "index_copy_",
    "one_hot",
}  # fmt: skip
MULTIPLIES = {"mul", "__mul__", "__rmul__", "mul_", "__imul__", "multiply"}
ADDS = {"add", "__add__", "__radd__", "add_", "__iadd__"}
SCALES = MULTIPLIES | {"div", "__truediv__", "div_", "true_divide"}


def passes(node: Node) -> bool:
    """Whether an operation only moves, casts or drops values."""
    return node.kind == "op" and (node.name in MOVES or node.name in DROPS)


def first_data(node: Node) -> Node | None:
    """The first input that is no parameter."""
    return next((n for n in node.inputs if n.kind != "parameter"), None)


def back(node: Node) -> list[Node]:
    """The node and those it only moves or drops values of."""
    chain = [node]
    while passes(node) and (before := first_data(node)) is not None:
        chain.append(node := before)
    return chain


def root(linear: Node) -> Node:
    """What computed a linear layer's input."""
    return back(linear.inputs[0])[-1]


def root_width(linear: Node) -> int:
    """The number of features that enter a linear layer."""
    shape = linear.inputs[0].shape
    return shape[-1] if shape else 0


def consumers(node: Node) -> Iterable[Node]:
    """What uses a tensor, looked for behind moves and dropouts."""
    for user in node.users:
        if passes(user):
            yield from consumers(user)
        else:
            yield user


def upstream(start: Node) -> set[int]:
    """The ids of the nodes a tensor is made of, down to the next linear layers."""
    seen: set[int] = set()
    queue = [start]
    while queue:
        node = queue.pop()
        if id(node) not in seen:
            seen.add(id(node))
            if node.kind != "linear":
                queue.extend(node.inputs)
    return seen


def origins(start: Node) -> set[tuple[Node, Any]]:
    """The layers, each with the window of its rows, that a tensor inside a cone comes from."""
    found: set[tuple[Node, Any]] = set()
    queue: list[tuple[Node, Any]] = [(start, None)]
    while queue:
        node, window = queue.pop()
        if node.kind == "linear":
            found.add((node, window))
        elif node.kind != "parameter":
            queue.extend((n, _within(node.window, window)) for n in node.inputs)
    return found


def _within(outer: Window | None, inner: Window | None) -> Window | None:
    """The part ``inner`` of the part ``outer`` of a layer's rows."""
    if outer is None or inner is None:
        return outer or inner
    start, step, _ = outer
    return (start + inner[0] * step, inner[1] * step, inner[2])


def residual_sum(down: Node) -> tuple[Node | None, Node | None]:
    """The first sum of a block's output with something it is not made of, and that partner."""
    seen = {id(down)}
    queue = [down]
    while queue:
        node = queue.pop(0)
        for user in node.users:
            if id(user) in seen or user.kind == "linear":
                continue
            data = [n for n in user.inputs if n.kind != "parameter"]
            if user.name in ADDS and len(data) == 2:
                partner = data[0] if data[1] is node else data[1]
                if not made_of(partner, down):
                    return user, partner
            same_shape = user.shape[-1:] == down.shape[-1:]
            if same_shape and user.name not in MIXES:
                seen.add(id(user))
                queue.append(user)
    return None, None


def made_of(node: Node, source: Node) -> bool:
    """Whether ``node`` is ``source`` moved, dropped, normed or scaled."""
    while node is not source:
        before = first_data(node)
        if before is None or not (passes(node) or node.kind == "norm" or node.scalar):
            return False
        node = before
    return True


class Chain:
    """Functions of one tensor applied one after the other, like ``relu(z).square()``."""

    def __init__(self, calls: list[FrozenCall]) -> None:
        self.calls = calls

    @property
    def steps(self) -> list[Any]:
        """The functions, in order."""
        return [call.function for call in self.calls]

    def __call__(self, z: Tensor) -> Tensor:
        """The last one's value."""
        for call in self.calls:
            z = call(z)
        return z


def chain(nodes: list[Node]) -> Chain | None:
    """The calls of operations that follow one another, as one function; None where they do not."""
    calls = [n.call for n in nodes if n.call is not None]
    linked = all(b.inputs == [a] for a, b in itertools.pairwise(nodes))
    return Chain(calls) if linked and len(calls) == len(nodes) else None


def other_readers(hidden: list[Node], down: Node, activation: Activation) -> tuple[str, ...]:
    """What reads ``hidden``, all between up and down, beside down and the activation, by name.

    Of a fused layer all rows count: the ghost of an executor stands for the whole of its output.
    """
    within = {id(node) for node in hidden}
    readers = (u for n in hidden for u in n.users)
    others = (u for u in readers if u is not down and id(u) not in within)
    if type(activation.module).__module__.split(".")[0] in ("torch", "transformers"):
        others = (u for u in others if activation.name not in u.path)
    return tuple(dict.fromkeys(".".join((*u.path[-1:], u.name)).strip(".") for u in others))


def common(*paths: tuple[str, ...]) -> tuple[str, ...]:
    """What paths begin with together."""
    shortest = min(len(p) for p in paths)
    depth = next((i for i in range(shortest) if len({p[i] for p in paths}) > 1), shortest)
    return paths[0][:depth]


def common_parent(first: str, second: str) -> str:
    """The name of the smallest module that holds both."""
    return ".".join(common(tuple(first.split(".")[:-1]), tuple(second.split(".")[:-1])))


def inside(module_name: str, name: str) -> bool:
    """Whether ``name`` is the module called ``module_name`` or a part of it."""
    return module_name == "" or name == module_name or name.startswith(module_name + ".")

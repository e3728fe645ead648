"""One forward pass as a graph: which operation made which tensor out of which.

A ``TorchFunctionMode`` sees every operation, forward hooks see the modules around it. Linear
layers and norms count as one node each, whatever happens inside them (LoRA, quantisation).
"""

from __future__ import annotations

import contextlib
import threading
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.parameter import is_lazy
from torch.overrides import TorchFunctionMode
from torch.utils.weak import WeakIdKeyDictionary

from actsparse.blocks.block import Norm
from actsparse.blocks.example_inputs import copied, run_forward, tensors_in
from actsparse.blocks.norm import inspect_norm
from actsparse.blocks.pass_state import sites_asleep

Window = tuple[int, int, int]  # start, step, size along the last axis


@dataclass(eq=False)
class Node:
    """One operation, module or source tensor of the pass.

    ``kind``: ``linear`` (a layer, or a product with a 2-D parameter when ``module`` is None),
    ``experts`` (a product with a slice of a 3-D parameter), ``norm``, ``op``, ``parameter``,
    ``source`` (an input or a tensor of unknown origin). ``path`` holds the names of the modules
    whose forward was running, outermost first. ``window``: the part of its input's last axis.
    """

    kind: str
    name: str
    inputs: list[Node] = field(default_factory=list)
    users: list[Node] = field(default_factory=list)
    path: tuple[str, ...] = ()
    module: nn.Module | None = None
    norm: Norm | None = None
    shape: tuple[int, ...] = ()
    width: int = 0  # a linear's number of outputs
    window: Window | None = None
    call: FrozenCall | None = None
    scalar: bool = False  # an op on one tensor and numbers or parameters only


class FrozenCall:
    """A function of one tensor with its other arguments fixed; unlike a closure it deep-copies."""

    def __init__(
        self, function: Callable[..., Any], args: tuple[Any, ...], kwargs: dict[str, Any]
    ) -> None:
        self.function, self.args, self.kwargs = function, args, kwargs

    def __call__(self, z: Tensor) -> Tensor:
        """The function's value."""
        return self.function(z, *self.args, **self.kwargs)


@dataclass
class Trace:
    """The nodes of a pass in order of execution, the modules, and the names of those that ran.

    A module has run where it was called, or where an operation outside took one of its parameters.
    """

    nodes: list[Node]
    modules: dict[str, nn.Module]
    ran: set[str]


def is_linear(module: nn.Module) -> bool:
    """A layer that maps the last axis linearly, by its interface: ours or a stranger's."""
    if type(module).__name__ == "Conv1D" and hasattr(module, "nf"):
        return True
    sizes = getattr(module, "in_features", None), getattr(module, "out_features", None)
    return all(isinstance(size, int) for size in sizes)


def check_traceable(model: nn.Module) -> None:
    """Refuse what cannot be recorded, before anything is touched.

    Raises:
        ValueError: a parameter that is not initialised yet (lazy), or a TorchScript model.
    """
    for name, tensor in (*model.named_parameters(), *model.named_buffers()):
        if is_lazy(tensor):
            raise ValueError(f"{name!r} is not initialised yet: run the model once, then find")
    if isinstance(model, torch.jit.ScriptModule):
        raise ValueError("the model is TorchScript, which takes no hooks; give the eager model")


def trace(model: nn.Module, inputs: Any) -> Trace:
    """Run ``model`` once on ``inputs`` without gradients and record its graph.

    Call it inside :func:`undisturbed`, so that nothing of the model changes. What other threads run
    meanwhile is not recorded.
    """
    recorder = _Recorder(model)
    with sites_asleep(), torch.no_grad(), _uncompiled(model), recorder.hooked(), recorder:
        run_forward(model, copied(inputs))
    return Trace(recorder.nodes, recorder.modules, recorder.ran)


def _uncompiled(model: nn.Module) -> contextlib.AbstractContextManager[Any]:
    """Compiled parts run as written: compilers would compile the recorder, too, and keep that."""
    for module in model.modules():
        if hasattr(module, "_orig_mod") or module._compiled_call_impl is not None:
            return torch.compiler.set_stance("force_eager")
    return contextlib.nullcontext()


class _Recorder(TorchFunctionMode):
    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.modules = dict(model.named_modules())
        self.names = {id(module): name for name, module in self.modules.items()}
        self.nodes: list[Node] = []
        self.ran: set[str] = set()
        self.stack: list[str] = []
        self.opaque = 0
        self.thread = threading.get_ident()
        self.norms = {id(m): inspect_norm(name, m) for name, m in self.modules.items()}
        self.made_by: WeakIdKeyDictionary = WeakIdKeyDictionary()
        self.holders: dict[str, list[str]] = {}  # parameter → modules; tied ones have several
        for name, parameter in model.named_parameters(remove_duplicate=False):
            node = self.made_by.setdefault(
                parameter, Node("parameter", name, shape=tuple(parameter.shape))
            )
            self.holders.setdefault(node.name, []).append(name.rpartition(".")[0])

    @contextlib.contextmanager
    def hooked(self) -> Iterator[None]:
        handles = []
        try:
            for module in self.modules.values():
                if isinstance(module, torch.jit.ScriptModule):  # takes no hooks
                    continue
                handles.append(module.register_forward_pre_hook(self._enter, with_kwargs=True))
                handles.append(
                    module.register_forward_hook(self._leave, with_kwargs=True, always_call=True)
                )
            yield
        finally:
            for handle in handles:
                handle.remove()

    def _enter(self, module: nn.Module, args: Any, kwargs: Any) -> None:
        if threading.get_ident() != self.thread:
            return
        name = self.names[id(module)]
        self.ran.add(name)
        self.stack.append(name)
        if self.opaque or is_linear(module) or self.norms[id(module)] is not None:
            self.opaque += 1

    def _leave(self, module: nn.Module, args: Any, kwargs: Any, output: Any) -> None:
        if threading.get_ident() != self.thread or self.stack[-1:] != [self.names[id(module)]]:
            return
        self.stack.pop()
        if self.opaque:
            self.opaque -= 1
            if self.opaque:
                return
        tensors = tensors_in((args, kwargs))
        norm, linear = self.norms[id(module)], is_linear(module)
        if not (norm or linear):
            # operations that no function mode sees (custom autograd functions, scripts): take the
            # module as one operation
            unseen = isinstance(output, Tensor) and output not in self.made_by
            if not unseen:
                return
        if not isinstance(output, Tensor):
            return
        kind = "linear" if linear else "norm" if norm else "op"
        self._add(
            Node(
                kind,
                self.names[id(module)],
                [self._node(t) for t in tensors],
                path=(*self.stack, self.names[id(module)]),
                module=module,
                norm=norm,
                shape=tuple(output.shape),
                width=output.shape[-1] if output.dim() else 0,
                scalar=len(tensors) == 1,
            ),
            output,
        )

    def __torch_function__(
        self, func: Any, types: Any, args: Any = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        kwargs = kwargs or {}
        if self.opaque:
            return func(*args, **kwargs)
        inputs = [(t, self._node(t)) for t in tensors_in((args, kwargs))]
        for _, node in inputs:
            if node.kind == "parameter":
                self.ran.update(self.holders.get(node.name, ()))
        result = func(*args, **kwargs)
        name = getattr(func, "__name__", str(func))
        outputs = [result] if isinstance(result, Tensor) else result
        if inputs and isinstance(outputs, tuple | list):
            for output in outputs:
                if isinstance(output, Tensor):
                    self._record(name, func, args, kwargs, inputs, output)
        return result

    def _record(
        self,
        name: str,
        func: Any,
        args: Any,
        kwargs: dict[str, Any],
        inputs: list[tuple[Tensor, Node]],
        output: Tensor,
    ) -> None:
        nodes = [node for _, node in inputs]
        weights = [n for n in nodes if n.kind == "parameter"]
        data = [(t, n) for t, n in inputs if n.kind != "parameter"]
        if not data:  # a view or cast of parameters is still the parameter
            self.made_by[output] = weights[0]
            return
        node = Node("op", name, nodes, path=tuple(self.stack), shape=tuple(output.shape))
        product = name in _PRODUCTS and [len(w.shape) for w in weights]
        if product and 2 in product:
            node.kind, node.width = "linear", output.shape[-1] if output.dim() else 0
            node.name = next(w.name for w in weights if len(w.shape) == 2)
        elif product and 3 in product:
            node.kind = "experts"
            node.name = next(w.name for w in weights if len(w.shape) == 3)
        node.scalar = len(data) == 1
        if node.scalar:
            node.window = _window(data[0][0], output)
        if len(inputs) == 1 and args and args[0] is inputs[0][0]:
            node.call = FrozenCall(func, tuple(args[1:]), kwargs)
        self._add(node, output)

    def _node(self, tensor: Tensor) -> Node:
        node = self.made_by.get(tensor)
        if node is None:
            kind, name = "source", "input"
            if isinstance(tensor, nn.Parameter):  # put in its place for this call: offloading
                kind, name = "parameter", self._name_of(tensor)
            node = self.made_by[tensor] = Node(kind, name, shape=tuple(tensor.shape))
        return node

    def _name_of(self, parameter: nn.Parameter) -> str:
        owner = self.stack[-1] if self.stack else ""
        held = self.modules[owner]._parameters.items()
        name = next((name for name, value in held if value is parameter), "parameter")
        return f"{owner}.{name}" if owner else name

    def _add(self, node: Node, output: Tensor) -> None:
        for source in node.inputs:
            source.users.append(node)
        self.nodes.append(node)
        self.made_by[output] = node


_PRODUCTS = {
    "linear", "matmul", "mm", "addmm", "bmm", "baddbmm", "einsum", "__matmul__", "__rmatmul__",
    "_grouped_mm", "grouped_mm",
}  # fmt: skip


def _window(source: Tensor, output: Tensor) -> Window | None:
    """Which part of the last axis a view keeps, read off its strides."""
    if not source.dim() or not output.dim() or output.shape[-1] >= source.shape[-1]:
        return None
    if source.untyped_storage().data_ptr() != output.untyped_storage().data_ptr():
        return None
    stride = source.stride(-1)
    if output.shape[:-1] != source.shape[:-1] or not stride or output.numel() == 0:
        return None
    start = (output.storage_offset() - source.storage_offset()) // stride
    step = output.stride(-1) // stride if output.shape[-1] > 1 else 1
    return (int(start), int(step), output.shape[-1])


@contextlib.contextmanager
def undisturbed(model: nn.Module) -> Iterator[None]:
    """Eval mode inside; modes, buffers, attributes and random state as before afterwards.

    Attributes that a forward adds stay, and so does what it writes into lists and the like. Another
    thread may evaluate the model meanwhile, not train it: it would find it in eval mode. What other
    threads draw from torch's global generators meanwhile is drawn again afterwards.
    """
    modes = [(module, module.training) for module in model.modules()]
    eager = [m for m, _ in modes if not isinstance(m, torch.jit.ScriptModule)]
    held = [(module, dict(vars(module)), dict(module._buffers)) for module in eager]
    values = [(b, b.detach().clone()) for b in model.buffers() if not b.is_meta]
    devices = sorted({p.device.index or 0 for p in model.parameters() if p.device.type == "cuda"})
    with torch.random.fork_rng(devices=devices):
        try:
            for module, _ in modes:  # not model.eval(): a user's override may do more
                module.training = False
            yield
        finally:
            for module, training in modes:
                module.training = training
            for module, attributes, buffers in held:
                module._buffers.update(buffers)  # a forward may have put others in their place
                _restore(module, attributes)
            for buffer, value in values:
                if buffer.shape != value.shape:  # observers of quantisation grow in place
                    buffer.data = value
                elif not torch.equal(buffer, value):
                    with torch.no_grad(), torch.inference_mode(buffer.is_inference()):
                        buffer.copy_(value)


def _restore(module: nn.Module, attributes: dict[str, Any]) -> None:
    """Set back what a forward has set anew, so that it fits the buffers (a cache's length)."""
    if type(module).__name__ == "FullyShardedDataParallel":  # sets itself up in its first pass
        return
    now = vars(module)
    for name, value in attributes.items():
        ours = name == "forward" or name.startswith("_actsparse")  # another thread may attach
        if not ours and name in now and now[name] is not value:
            now[name] = value

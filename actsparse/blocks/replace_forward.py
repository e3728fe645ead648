"""Replace the forward of a module instance: of an activation or a layer.

A replacement is shared by all sites of one module, and is undone by ``remove``.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, Protocol

import torch
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode
from torch.utils._device import DeviceContext

from actsparse.blocks.block import MLPBlock

# a replica has a copy of what stands on the instance, so that a detour cannot tell it apart
IN_A_REPLICA = (
    "block {!r} runs in a replica of nn.DataParallel, which shares hooks with the model but not "
    "its weights; use DistributedDataParallel, or one device"
)


class User(Protocol):
    """Who exchanges an activation: the wiring of a site."""

    block: MLPBlock

    def takes_phi(self, z: Any) -> bool:
        """Whether a call of the activation on z is this block's."""

    def compute_phi(self, z: Tensor, original: Callable[[Tensor], Tensor]) -> Tensor:
        """φ(z) as replaced, or the model's own."""


class Exchange:
    """A module's ``forward``, exchanged on the instance until :meth:`restore`."""

    def __init__(self, module: nn.Module) -> None:
        self.module = module
        self.own = module.__dict__.get("forward")  # an override someone else has set

    def original(self, *args: Any, **kwargs: Any) -> Any:
        """The forward that the module had. Looked up, since a pickle would find the exchanged."""
        if self.own is not None:
            return self.own(*args, **kwargs)
        return type(self.module).forward(self.module, *args, **kwargs)

    def restore(self) -> None:
        """Put back the forward that the module had, unless someone has wrapped this one."""
        if getattr(self.module.__dict__.get("forward"), "__self__", None) is not self:
            return
        if self.own is None:
            self.module.__dict__.pop("forward", None)
        else:
            self.module.forward = self.own


class Replacement(Exchange):
    """An activation module's forward, exchanged while sites ask for it."""

    def __init__(self, module: nn.Module) -> None:
        super().__init__(module)
        self.users: list[User] = []

    @classmethod
    def at(cls, module: nn.Module, user: User) -> _Release:
        """Exchange the module's forward for ``user``, beside others that did so."""
        held = getattr(module.__dict__.get("forward"), "__self__", None)
        replacement = held if isinstance(held, cls) else cls(module)
        replacement.users.append(user)
        module.forward = replacement.run
        return _Release(replacement, user)

    def run(self, z: Tensor) -> Tensor:
        """The forward in force: the φ of the block whose turn it is, else the module's own."""
        for user in self.users:
            if user.takes_phi(z):
                return user.compute_phi(z, self.original)
        return self.original(z)

    def remove(self, user: User) -> None:
        """Leave; the last one to leave puts the module's own forward back."""
        self.users.remove(user)
        if not self.users:
            self.restore()


class Interception(Replacement):
    """The forward of a module that calls its activation as a function: run under a mode."""

    def run(self, *args: Any, **kwargs: Any) -> Any:
        """The module's own forward, its activation calls caught."""
        with _CatchActivation(self.users):
            return self.original(*args, **kwargs)


class _CatchActivation(TorchFunctionMode):
    def __init__(self, users: list[User]) -> None:
        super().__init__()
        self.users = users
        self.user: User | None = None
        self.step = 0

    def __torch_function__(
        self, func: Any, types: Any, args: Any = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        kwargs = kwargs or {}
        if self.user is not None:  # the later operations of an activation already computed
            steps = self.user.block.activation.steps
            if func == steps[self.step]:
                self.step += 1
                if self.step == len(steps):
                    self.user = None
                return args[0]
        for user in self.users:
            steps = user.block.activation.steps
            if args and func == steps[0] and user.takes_phi(args[0]):
                call = user.block.activation.call
                assert call is not None
                self.user, self.step = (user, 1) if len(steps) > 1 else (None, 0)
                return user.compute_phi(args[0], call)
        return func(*args, **kwargs)


def foreign_mode() -> bool:
    """Whether operations run under a mode of somebody's, which sees or changes them."""
    functions, dispatches = torch._C._len_torch_function_stack, torch._C._len_torch_dispatch_stack
    if not functions() and not dispatches():
        return False
    modes = map(torch._C._get_function_stack_at, range(functions()))
    return dispatches() > 0 or any(
        not isinstance(mode, _CatchActivation | DeviceContext) for mode in modes
    )


class Detour(Exchange):
    """A layer's forward, exchanged while an executor may run in its place."""

    def __init__(self, module: nn.Module, run: Callable[[Detour, Tensor], Any]) -> None:
        super().__init__(module)
        self.run = run
        module.forward = self.forward

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        """As the site decides; called otherwise than with one tensor the layer runs itself."""
        if len(args) != 1 or kwargs:
            return self.original(*args, **kwargs)
        return self.run(self, args[0])

    def remove(self) -> None:
        """Put the module's own forward back."""
        self.restore()


class Refusing:
    """Methods of a module that raise an error, with the reason, while something hangs on it."""

    def __init__(self, module: nn.Module, why: str, *names: str) -> None:
        self.module, self.why, self.names = module, why, names
        for name in names:
            module.__dict__[name] = self.refuse

    def refuse(self, *_: Any, **__: Any) -> None:
        """In the place of each."""
        raise RuntimeError(self.why)

    def remove(self) -> None:
        """Allow them again."""
        for name in self.names:
            self.module.__dict__.pop(name, None)


class _Release:
    def __init__(self, replacement: Replacement, user: User) -> None:
        self.replacement, self.user = replacement, user

    def remove(self) -> None:
        self.replacement.remove(self.user)


class NoNestedTensors:
    """``nn.TransformerEncoder`` packs padded batches for its fast path; hooks need them whole."""

    def __init__(self, encoder: nn.TransformerEncoder) -> None:
        self.encoder = encoder
        count = encoder.__dict__.setdefault("_actsparse_nested", [encoder.use_nested_tensor, 0])
        count[1] += 1
        encoder.use_nested_tensor = False

    def remove(self) -> None:
        """Allow it again, once nobody else forbids it."""
        count = self.encoder.__dict__["_actsparse_nested"]
        count[1] -= 1
        if count[1] == 0:
            self.encoder.use_nested_tensor = count[0]
            del self.encoder.__dict__["_actsparse_nested"]

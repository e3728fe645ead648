"""How a block's activation is exchanged, whether it is a module or a call inside a forward.

These act on the instance only, are shared by the sites that meet at one module, and are undone by
``remove``.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING, Any, Protocol

from torch import Tensor, nn
from torch.overrides import TorchFunctionMode

if TYPE_CHECKING:
    from actsparse.blocks.site import Site


class Replacement:
    """An activation module's own ``forward``, exchanged on the instance while sites ask for it."""

    def __init__(self, module: nn.Module) -> None:
        self.module = module
        self.own = module.__dict__.get("forward")  # an override someone else has set
        self.original = module.forward
        self.sites: list[Site] = []

    @classmethod
    def at(cls, module: nn.Module, site: Site) -> _Release:
        """Exchange the module's forward for ``site``, beside other sites that did so."""
        held = getattr(module.__dict__.get("forward"), "__self__", None)
        replacement = held if isinstance(held, cls) else cls(module)
        replacement.sites.append(site)
        module.forward = replacement.run
        return _Release(replacement, site)

    def run(self, z: Tensor) -> Tensor:
        """The forward in force: the φ of the site whose turn it is, else the module's own."""
        for site in self.sites:
            if site.takes_phi():
                return site.compute_phi(z, self.original)
        return self.original(z)

    def remove(self, site: Site) -> None:
        """Leave; the last site to leave puts the module's own forward back."""
        self.sites.remove(site)
        if self.sites:
            return
        if self.own is None:
            del self.module.__dict__["forward"]
        else:
            self.module.forward = self.own


class Interception(Replacement):
    """The forward of a module that calls its activation as a function: run under a mode."""

    def run(self, *args: Any, **kwargs: Any) -> Any:
        """The module's own forward, its activation calls caught."""
        with _CatchActivation(self.sites):
            return self.original(*args, **kwargs)


class _CatchActivation(TorchFunctionMode):
    def __init__(self, sites: list[Site]) -> None:
        super().__init__()
        self.sites = sites
        self.site: Site | None = None
        self.step = 0

    def __torch_function__(
        self, func: Any, types: Any, args: Any = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        kwargs = kwargs or {}
        if self.site is not None:  # the later operations of an activation already computed
            steps = self.site.block.activation.steps
            if func == steps[self.step]:
                self.step += 1
                if self.step == len(steps):
                    self.site = None
                return args[0]
        for site in self.sites:
            steps = site.block.activation.steps
            if site.takes_phi() and func == steps[0]:
                call = site.block.activation.call
                assert call is not None
                self.site, self.step = (site, 1) if len(steps) > 1 else (None, 0)
                return site.compute_phi(args[0], call)
        return func(*args, **kwargs)


OnNorms = Callable[[dict[str, Tensor]], None]


class Executor(Protocol):
    """Computes a block's y from x in one go, with the same numbers as its layers."""

    def takes(self, site: Any, x: Tensor) -> bool:
        """Whether it runs this call; else the block's own layers do."""

    def __call__(self, site: Any, x: Tensor, on_norms: OnNorms | None) -> Tensor:
        """y [..., D_out] of x [..., D].

        ``on_norms``, if any, is to be called with ``l1`` and ``l2`` as the stages of these names.
        """

    def passed(self, site: Any, d: Tensor) -> None:
        """The layers ran instead, and down's input was d [..., H]."""


class Detour:
    """A layer's forward, exchanged on the instance, while an executor may run in its place."""

    def __init__(self, module: nn.Module, run: Callable[[Callable[..., Any], Tensor], Any]) -> None:
        self.module, self.run = module, run
        self.own = module.__dict__.get("forward")  # an override someone else has set
        self.original = module.forward
        module.forward = self.forward

    def forward(self, x: Tensor, *args: Any, **kwargs: Any) -> Any:
        """As the site decides; with arguments of its own the layer runs itself."""
        if args or kwargs:
            return self.original(x, *args, **kwargs)
        return self.run(self.original, x)

    def remove(self) -> None:
        """Put the module's own forward back."""
        if self.own is None:
            del self.module.__dict__["forward"]
        else:
            self.module.forward = self.own


class _Release:
    def __init__(self, replacement: Replacement, site: Site) -> None:
        self.replacement, self.site = replacement, site

    def remove(self) -> None:
        self.replacement.remove(self.site)


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

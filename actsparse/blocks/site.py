"""The one seam: a site attaches to a block and exposes its stages x → z → a → y.

Modifications set transforms of x, z, y and of φ; observers set taps. A site hooks only what is
asked of it, and nothing is wrapped or renamed: when the last one is gone, the model is as it was.

Stages, as tensors in the model's own layout:

- ``x``: input of up (and gate), after transforms
- ``z``: pre-activation (of the gate, in gated blocks)
- ``u``: output of up in gated blocks
- ``a``: φ(z), in gated blocks φ(z) ⊙ u, before any dropout
- ``y``: output of down
"""

from __future__ import annotations

import sys
from collections.abc import Callable, Sequence
from typing import Any, Protocol

import torch
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode

from actsparse.activations import derivative_of
from actsparse.blocks.block import Layer, MLPBlock
from actsparse.blocks.tokens import Tokens, tokens_of

InputTransform = Callable[["Site", Tensor], Tensor]
OutputTransform = Callable[["Site", Tensor, Tensor, Layer], Tensor]  # site, output, input, layer
Tap = Callable[["Site", dict[str, Tensor]], None]


class Phi(Protocol):
    """What replaces a block's activation; ``own`` is the model's own φ, or its derivative."""

    @property
    def function(self) -> str | None:
        """Its name in actsparse.activations, None while it has none."""

    def __call__(self, z: Tensor, own: Callable[[Tensor], Tensor], /) -> Tensor:
        """φ(z), any shape."""

    def derivative(self, z: Tensor, own: Callable[[Tensor], Tensor], /) -> Tensor:
        """φ′(z), any shape."""


def site_of(block: MLPBlock) -> Site:
    """The site of a block: the one attached already, else a new one."""
    site = block.up.module.__dict__.get("_actsparse_site")
    if site is None:
        site = block.up.module._actsparse_site = Site(block)  # type: ignore[assignment]
    return site


class Site:
    """What is attached to one block. Plain data and bound methods, so that models deep-copy."""

    def __init__(self, block: MLPBlock) -> None:
        self.block = block
        self._inputs: list[InputTransform] = []
        self._layers: list[OutputTransform] = []
        self._outputs: list[OutputTransform] = []
        self._phi: Phi | None = None
        self._taps: list[tuple[Tap, frozenset[str]]] = []
        self._hooks: list[Any] = []
        self._wanted: frozenset[str] = frozenset()
        self._tokens: Tokens | None = None
        self._kept: dict[str, Tensor] = {}
        self._entered: tuple[Tensor, Tensor, nn.Module] | None = None
        self._expects_phi = False

    # -- what others ask for --------------------------------------------------------------------

    @property
    def tokens(self) -> Tokens:
        """Positions and padding of the running call."""
        if self._tokens is None:
            raise RuntimeError(f"site {self.block.name!r} is not attached")
        return self._tokens

    @property
    def recomputing(self) -> bool:
        """Whether gradient checkpointing runs this forward a second time, inside backward."""
        if torch.compiler.is_compiling():
            return False
        return torch._C._current_graph_task_id() != -1

    @property
    def function(self) -> str | None:
        """The name of the φ in force, None if it has none."""
        return self.block.activation.function if self._phi is None else self._phi.function

    def derivative(self, z: Tensor) -> Tensor:
        """φ′(z) of the φ in force, any shape."""
        own = derivative_of(self.block.activation.call, self.block.activation.function)
        return own(z) if self._phi is None else self._phi.derivative(z, own)

    def transform_input(self, transform: InputTransform) -> None:
        """Replace x by ``transform(site, x)``, at up's and gate's input only."""
        self._inputs.append(transform)
        self._rewire()

    def transform_layers(self, transform: OutputTransform) -> None:
        """Replace the outputs of up and gate by ``transform(site, output, x, layer)``."""
        self._layers.append(transform)
        self._rewire()

    def transform_output(self, transform: OutputTransform) -> None:
        """Replace y by ``transform(site, y, down's input, layer)``."""
        self._outputs.append(transform)
        self._rewire()

    def replace_activation(self, phi: Phi) -> None:
        """Compute a (or the gate's factor) as ``phi(z, own)``.

        Raises:
            ValueError: another replacement is set, or no hook can reach the activation.
        """
        activation = self.block.activation
        if self._phi is not None:
            raise ValueError(f"block {self.block.name!r} has its activation replaced already")
        if activation.module is None and not activation.steps:
            raise ValueError(
                f"the activation of block {self.block.name!r} is computed inside "
                f"{type(activation.owner).__name__}.forward by operations that cannot be "
                f"exchanged one for one; call an activation module there"
            )
        self._phi = phi
        self._rewire()

    def tap(self, tap: Tap, stages: Sequence[str]) -> None:
        """Call ``tap(site, {stage: tensor})`` once in each pass through the block."""
        unknown = set(stages) - set("xzuay")
        if unknown:
            raise ValueError(f"unknown stages {sorted(unknown)}; known: x, z, u, a, y")
        if not self.block.gated:
            stages = [stage for stage in stages if stage != "u"]
        self._taps.append((tap, frozenset(stages)))
        self._rewire()

    def release(self, *what: Any) -> None:
        """Take back transforms, replacements and taps; the rest stays attached."""
        self._inputs = [item for item in self._inputs if item not in what]
        self._layers = [item for item in self._layers if item not in what]
        self._outputs = [item for item in self._outputs if item not in what]
        self._taps = [item for item in self._taps if item[0] not in what]
        if self._phi in what:
            self._phi = None
        self._rewire()

    # -- attaching ------------------------------------------------------------------------------

    def _rewire(self) -> None:
        self._detach()
        self._wanted = frozenset().union(*(stages for _, stages in self._taps))
        if not (self._inputs or self._layers or self._outputs or self._taps or self._phi):
            self.block.up.module.__dict__.pop("_actsparse_site", None)
        else:
            self._attach()
        if "torch._dynamo" in sys.modules:  # compiled code does not notice new hooks by itself
            torch._dynamo.reset()

    def _attach(self) -> None:
        block, add = self.block, self._hooks.append
        self._tokens = tokens_of(block.path)
        self._tokens.attach()
        if self._inputs or "x" in self._wanted:
            for layer in self._entries():
                add(layer.module.register_forward_pre_hook(self._on_input))
        inside = bool(self._phi) or bool(self._wanted & {"z", "u", "a"})
        if inside or self._layers:
            for layer in self._entries():
                add(layer.module.register_forward_hook(self._on_layer))
        activation = block.activation
        if activation.module is not None:
            if self._phi is not None:
                add(_Replacement.at(activation.module, self))
            elif "a" in self._wanted:
                add(activation.module.register_forward_hook(self._on_activation))
        elif self._phi is not None or ("a" in self._wanted and block.between):
            assert activation.owner is not None
            add(_Interception.at(activation.owner, self))
        if inside:
            add(block.down.module.register_forward_pre_hook(self._on_down_input))
        if self._outputs or self._taps:
            add(block.down.module.register_forward_hook(self._on_down))
        for module in block.path:
            if isinstance(module, nn.TransformerEncoder):
                add(_NoNestedTensors(module))  # its eval fast path would pass all hooks by

    def _detach(self) -> None:
        for hook in self._hooks:
            hook.remove()
        self._hooks.clear()
        if self._tokens is not None:
            self._tokens.detach()
            self._tokens = None

    def _entries(self) -> list[Layer]:
        """The layers that x enters, each module once."""
        block = self.block
        if block.gate is None or block.gate.module is block.up.module:
            return [Layer(block.up.name, block.up.module, block.up.layout)]
        return [block.gate, block.up]

    # -- what the hooks do ----------------------------------------------------------------------

    def _on_input(self, module: nn.Module, args: tuple[Any, ...]) -> Any:
        if not args:
            raise TypeError(f"{self.block.name}: up must be called with its input as an argument")
        x, *rest = args
        entered = self._entered
        # gate and up get the same x: transform it once, but never serve a stale one
        if entered is not None and entered[0] is x and entered[2] is not module:
            new, self._entered = entered[1], None
        else:
            new = x
            for transform in self._inputs:
                new = transform(self, new)
            self._entered = (x, new, module) if len(self._entries()) == 2 else None
        if "x" in self._wanted:
            self._kept["x"] = new
        return (new, *rest)

    def _on_layer(self, module: nn.Module, args: tuple[Any, ...], output: Tensor) -> Tensor:
        block = self.block
        for layer in self._entries():
            if layer.module is module:
                for transform in self._layers:
                    output = transform(self, output, args[0], layer)
        source = block.pre_activation
        if source.module is module:
            self._expects_phi = True
            if "z" in self._wanted:
                self._kept["z"] = source.select(output)
        if block.gate is not None and block.up.module is module and self._wanted & {"u", "a"}:
            self._kept["u"] = block.up.select(output)
        return output

    def takes_phi(self) -> bool:
        """Whether the next activation call is this block's; asked by replacements."""
        return self._expects_phi

    def compute_phi(self, z: Tensor, original: Callable[[Tensor], Tensor]) -> Tensor:
        """φ(z) as replaced, or the model's own."""
        self._expects_phi = False
        a = original(z) if self._phi is None else self._phi(z, original)
        if "a" in self._wanted:
            self._kept["a"] = a
        return a

    def _on_activation(self, module: nn.Module, args: tuple[Any, ...], output: Tensor) -> None:
        if self._expects_phi:  # else called elsewhere, or kept already by compute_phi
            self._expects_phi = False
            self._kept["a"] = output

    def _on_down_input(self, module: nn.Module, args: tuple[Any, ...]) -> None:
        if self._expects_phi and self._phi is not None:
            raise RuntimeError(
                f"block {self.block.name!r} ran without calling its activation "
                f"{self.block.activation.name!r}, so the replacement had no effect"
            )
        self._expects_phi = False
        if "a" not in self._wanted:
            return
        if self.block.gated and self.block.between:
            self._kept["a"] = self._kept["a"] * self._kept["u"]
        elif self.block.gated or "a" not in self._kept:
            self._kept["a"] = args[0]

    def _on_down(self, module: nn.Module, args: tuple[Any, ...], output: Tensor) -> Tensor:
        for transform in self._outputs:
            output = transform(self, output, args[0], self.block.down)
        kept = {**self._kept, "y": output} if "y" in self._wanted else dict(self._kept)
        self._kept.clear()
        for tap, stages in self._taps:
            tap(self, {stage: kept[stage] for stage in stages})
        return output


class _Replacement:
    """An activation module's own ``forward``, exchanged on the instance while sites ask for it."""

    def __init__(self, module: nn.Module) -> None:
        self.module = module
        self.own = module.__dict__.get("forward")  # an override someone else has set
        self.original = module.forward
        self.sites: list[Site] = []

    @classmethod
    def at(cls, module: nn.Module, site: Site) -> _Release:
        held = getattr(module.__dict__.get("forward"), "__self__", None)
        replacement = held if isinstance(held, cls) else cls(module)
        replacement.sites.append(site)
        module.forward = replacement.run
        return _Release(replacement, site)

    def run(self, z: Tensor) -> Tensor:
        for site in self.sites:
            if site.takes_phi():
                return site.compute_phi(z, self.original)
        return self.original(z)

    def remove(self, site: Site) -> None:
        self.sites.remove(site)
        if self.sites:
            return
        if self.own is None:
            del self.module.__dict__["forward"]
        else:
            self.module.forward = self.own


class _Interception(_Replacement):
    """The forward of a module that calls its activation as a function: run under a mode."""

    def run(self, *args: Any, **kwargs: Any) -> Any:
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


class _Release:
    def __init__(self, replacement: _Replacement, site: Site) -> None:
        self.replacement, self.site = replacement, site

    def remove(self) -> None:
        self.replacement.remove(self.site)


class _NoNestedTensors:
    """``nn.TransformerEncoder`` packs padded batches for its fast path; hooks need them whole."""

    def __init__(self, encoder: nn.TransformerEncoder) -> None:
        self.encoder = encoder
        count = encoder.__dict__.setdefault("_actsparse_nested", [encoder.use_nested_tensor, 0])
        count[1] += 1
        encoder.use_nested_tensor = False

    def remove(self) -> None:
        count = self.encoder.__dict__["_actsparse_nested"]
        count[1] -= 1
        if count[1] == 0:
            self.encoder.use_nested_tensor = count[0]
            del self.encoder.__dict__["_actsparse_nested"]

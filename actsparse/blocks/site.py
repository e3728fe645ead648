"""The one seam: a site attaches to a block and exposes its stages x → z → a → y.

Modifications set transforms of x, z, y and of φ; observers set taps. A site hooks only what is
asked of it, and nothing is wrapped or renamed: when the last one is gone, the model is as it was.

Stages, as tensors in the model's own layout:

- ``x``: input of up (and gate), after transforms
- ``z``: pre-activation (of the gate, in gated blocks)
- ``u``: output of up in gated blocks
- ``a``: φ(z), in gated blocks φ(z) ⊙ u, before any dropout
- ``d``: input of down: a, after a dropout or norm where there is one
- ``y``: output of down

Gradients can be read at ``z``, ``u``, ``y`` and at ``f``, φ's output φ(z).
"""

from __future__ import annotations

import contextlib
import sys
from collections.abc import Callable, Iterator, Sequence
from typing import Any, Protocol

import torch
from torch import Tensor, nn

from actsparse.activations import derivative_of
from actsparse.blocks.block import Layer, MLPBlock
from actsparse.blocks.exchange import (
    Interception,
    NoNestedTensors,
    Replacement,
)
from actsparse.blocks.reading import Reading, read_gradient
from actsparse.blocks.tokens import Tokens, tokens_of

InputTransform = Callable[["Site", Tensor], Tensor]
OutputTransform = Callable[["Site", Tensor, Tensor, Layer], Tensor]  # site, output, input, layer
Tap = Callable[["Site", dict[str, Tensor]], None]
Stages = Sequence[str] | Callable[["Site"], Sequence[str]]
GradientTap = Callable[["Site", Tensor, dict[str, Tensor]], Reading | None]


class Phi(Protocol):
    """What replaces a block's activation; ``own`` is the model's own φ, or its derivative."""

    @property
    def function(self) -> str | None:
        """Its name in actsparse.activations, None while it has none."""

    def __call__(self, z: Tensor, own: Callable[[Tensor], Tensor], /) -> Tensor:
        """φ(z), any shape."""

    def derivative(self, z: Tensor, own: Callable[[Tensor], Tensor], /) -> Tensor:
        """φ′(z), any shape."""


_KNOWN_AT = {"z": "x", "u": "x", "f": "xz", "y": "d"}  # place → stages
_asleep: list[bool] = []  # not empty while the finder looks at a model


@contextlib.contextmanager
def sites_asleep() -> Iterator[None]:
    """Inside, models run as if nothing were attached, and no tap is called."""
    _asleep.append(True)
    try:
        yield
    finally:
        _asleep.pop()


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
        self._taps: list[tuple[Tap, Stages]] = []
        self._served: list[tuple[Tap, frozenset[str]]] = []
        self._gradient_taps: list[tuple[GradientTap, str, Stages]] = []
        self._readers: dict[str, list[tuple[GradientTap, frozenset[str]]]] = {}
        self._hooks: list[Any] = []
        self._wanted: frozenset[str] = frozenset()  # by taps, and by readers below
        self._tokens: Tokens | None = None
        self._kept: dict[str, Tensor] = {}
        self._entered: tuple[Tensor, Tensor, nn.Module] | None = None
        self._expects_phi = False
        self._in_place = False

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

    @property
    def modified(self) -> bool:
        """Whether something attached changes what the block computes (taps only read)."""
        return bool(self._inputs or self._layers or self._outputs or self._phi)

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

    def tap(self, tap: Tap, stages: Stages) -> None:
        """Call ``tap(site, {stage: tensor})`` once in each pass through the block.

        ``stages`` may be a function of the site, asked anew whenever something is attached or
        released: what a measure needs can depend on the φ in force.

        Raises:
            ValueError: unknown stages.
        """
        self._stages(stages)
        self._taps.append((tap, stages))
        self._rewire()

    def tap_gradient(self, tap: GradientTap, place: str, stages: Stages = ()) -> None:
        """Read the gradient at ``place``: z, u, f or y.

        In each pass that builds a graph ``tap(site, output, {stage: tensor})`` is asked, at that
        place and with the stages that are known there (x; at f also z; at y d), for a
        :class:`Reading`, or None to leave the pass alone. At u of ungated blocks nothing is read.

        Raises:
            ValueError: unknown place or stages.
        """
        if place not in _KNOWN_AT:
            raise ValueError(f"unknown place {place!r}; known: {', '.join(_KNOWN_AT)}")
        late = self._stages(stages) - set(_KNOWN_AT[place])
        if late:
            raise ValueError(f"stages {sorted(late)} are not known yet at {place!r}")
        self._gradient_taps.append((tap, place, stages))
        self._rewire()

    def _stages(self, stages: Stages) -> frozenset[str]:
        names = set(stages(self) if callable(stages) else stages)
        if names - set("xzuady"):
            unknown = sorted(names - set("xzuady"))
            raise ValueError(f"unknown stages {unknown}; known: x, z, u, a, d, y")
        return frozenset(names if self.block.gated else names - {"u"})

    def refresh(self) -> None:
        """Ask taps anew which stages they need; call it where the φ in force has changed."""
        self._rewire()

    def release(self, *what: Any) -> None:
        """Take back transforms, replacements and taps; the rest stays attached."""
        self._inputs = [item for item in self._inputs if item not in what]
        self._layers = [item for item in self._layers if item not in what]
        self._outputs = [item for item in self._outputs if item not in what]
        self._taps = [item for item in self._taps if item[0] not in what]
        self._gradient_taps = [item for item in self._gradient_taps if item[0] not in what]
        if self._phi in what:
            self._phi = None
        self._rewire()

    # -- attaching ------------------------------------------------------------------------------

    def _rewire(self) -> None:
        self._detach()
        self._served = [(tap, self._stages(stages)) for tap, stages in self._taps]
        self._readers = {}
        for read, place, wants in self._gradient_taps:
            if place != "u" or self.block.gated:
                self._readers.setdefault(place, []).append((read, self._stages(wants)))
        readers = [reader for at in self._readers.values() for reader in at]
        self._wanted = frozenset().union(*(stages for _, stages in [*self._served, *readers]))
        if not (self.modified or self._taps or self._gradient_taps):
            self.block.up.module.__dict__.pop("_actsparse_site", None)
        else:
            self._attach()
        if "torch._dynamo" in sys.modules:  # compiled code does not notice new hooks by itself
            torch._dynamo.reset()

    def _attach(self) -> None:
        block, add = self.block, self._hooks.append
        self._tokens = tokens_of(block.path)
        self._tokens.attach(block.calls)
        if self._inputs or "x" in self._wanted:
            for layer in self._entries():
                add(layer.module.register_forward_pre_hook(self._on_input))
        inside = bool(
            self._phi or self._wanted & {"z", "u", "a"} or self._readers.keys() & {"z", "u", "f"}
        )
        self._in_place = inside and block.activation.in_place
        if inside or self._layers:
            for layer in self._entries():
                add(layer.module.register_forward_hook(self._on_layer))
        activation = block.activation
        if activation.module is not None:
            if self._phi is not None:
                add(Replacement.at(activation.module, self))
            elif "a" in self._wanted or "f" in self._readers:
                add(activation.module.register_forward_hook(self._on_activation))
        elif self._phi or (
            activation.steps and ("f" in self._readers or ("a" in self._wanted and block.between))
        ):
            assert activation.owner is not None
            add(Interception.at(activation.owner, self))
        late = [stages for _, stages in self._served if "y" in stages]
        if inside or len(late) < len(self._served):
            add(block.down.module.register_forward_pre_hook(self._on_down_input))
        if self._outputs or late or "y" in self._readers:
            add(block.down.module.register_forward_hook(self._on_down))
        for module in block.path:
            if isinstance(module, nn.TransformerEncoder):
                add(NoNestedTensors(module))  # its eval fast path would pass all hooks by

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
        if _asleep:
            return None
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
        if _asleep:
            return output
        block = self.block
        for layer in self._entries():
            if layer.module is module:
                for transform in self._layers:
                    output = transform(self, output, args[0], layer)
        source = block.pre_activation
        if source.module is module:
            self._expects_phi = True
            output = self._read("z", output, source)
        if block.gate is not None and block.up.module is module:
            output = self._read("u", output, block.up)
            if self._wanted & {"u", "a"}:
                self._kept["u"] = block.up.select(output)
        if source.module is module and self._in_place:
            self._kept["z"] = source.select(output)
            return output.clone()
        if source.module is module and "z" in self._wanted:
            self._kept["z"] = source.select(output)
        return output

    def takes_phi(self) -> bool:
        """Whether the next activation call is this block's; asked by replacements."""
        return self._expects_phi and not _asleep

    def compute_phi(self, z: Tensor, original: Callable[[Tensor], Tensor]) -> Tensor:
        """φ(z) as replaced, or the model's own."""
        self._expects_phi = False
        if self._phi is None:
            a = original(z)
        elif self._in_place:  # a mixture needs z a second time
            a = self._phi(z, lambda z: original(z.clone()))
        else:
            a = self._phi(z, original)
        return self._take_activation(a, z)

    def _on_activation(self, module: nn.Module, args: tuple[Any, ...], output: Tensor) -> Tensor:
        if self.takes_phi():  # else called elsewhere, or kept already by compute_phi
            self._expects_phi = False
            return self._take_activation(output, args[0])
        return output

    def _take_activation(self, f: Tensor, z: Tensor) -> Tensor:
        if "z" in self._wanted and not self._in_place:
            self._kept["z"] = z  # a bias may have joined up's output
        between = self.block.between
        # what follows may work in place: a dropout that says so or is a function, or `a *= u`
        overwritten = self.block.gated or any(
            part.module is None or getattr(part.module, "inplace", False) for part in between
        )
        f = self._read("f", f)
        if "a" in self._wanted and (between or not self.block.gated):
            self._kept["a"] = f.clone() if overwritten else f
        return f

    def _on_down_input(self, module: nn.Module, args: tuple[Any, ...]) -> None:
        if _asleep:
            return
        if self._expects_phi and self._phi is not None:
            raise RuntimeError(
                f"block {self.block.name!r} ran without calling its activation "
                f"{self.block.activation.name!r}, so the replacement had no effect; "
                f"were its layers called one by one, outside the block's forward?"
            )
        self._expects_phi = False
        kept = {"a": args[0], **self._kept, "d": args[0]}
        if self.block.gated and "a" in self._wanted:
            kept["a"] = kept["a"] * kept["u"] if self.block.between else args[0]
        self._kept.clear()  # checkpointing breaks off its second pass inside down
        if any("y" in stages for _, stages in self._served):
            self._kept.update(kept)
        self._serve(kept)

    def _on_down(self, module: nn.Module, args: tuple[Any, ...], output: Tensor) -> Tensor:
        if _asleep:
            return output
        for transform in self._outputs:
            output = transform(self, output, args[0], self.block.down)
        kept = {**self._kept, "d": args[0]}
        self._kept.clear()
        output = self._read("y", output, self.block.down, d=args[0])
        self._serve({**kept, "y": output})
        return output

    def _serve(self, kept: dict[str, Tensor]) -> None:
        """Call the taps that want y where it is known, the others before down runs."""
        for tap, stages in self._served:
            if ("y" in stages) == ("y" in kept):
                tap(self, {stage: kept[stage] for stage in stages})

    def _read(
        self, place: str, output: Tensor, layer: Layer | None = None, **known: Tensor
    ) -> Tensor:
        """``output``, with what is to be read of its gradient."""
        if place not in self._readers or not torch.is_grad_enabled():
            return output
        rows, known = None if layer is None else layer.rows, {**self._kept, **known}
        for tap, stages in self._readers[place]:
            stage = output if rows is None else output[..., rows]
            reading = tap(self, stage, {name: known[name] for name in stages})
            if reading is not None:
                output = read_gradient(output, reading, rows)
        return output

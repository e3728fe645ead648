"""The one seam: a site attaches to a block and exposes its stages x → z → a → y.

Modifications set transforms of x, z, y and of φ; observers set taps. A site hooks only what is
asked of it, and nothing is wrapped or renamed: when the last one is gone, the model is as it was.

Stages, as tensors in the model's own layout:

- ``x``: input of up (and gate), after transforms
- ``z``: pre-activation (of the gate, in gated blocks)
- ``u``: output of up in gated blocks
- ``a``: φ(z), in gated blocks φ(z) ⊙ u, before any dropout
- ``l1``, ``l2``: norms of each token's a over its units, ‖a‖₁ and ‖a‖₂, [..., 1]
- ``d``: input of down: a, after a dropout or norm where there is one
- ``y``: output of down

Gradients can be read at ``z``, ``u``, ``y`` and at ``f``, φ's output φ(z).
"""

from __future__ import annotations

import sys
from typing import Any

import torch
from torch import Tensor, nn

from actsparse.activations import derivative_of
from actsparse.blocks.block import MLPBlock
from actsparse.blocks.exchange import (
    Detour,
    Executor,
    Interception,
    NoNestedTensors,
    Replacement,
)
from actsparse.blocks.passage import (
    NORMS,
    GradientTap,
    InputTransform,
    OutputTransform,
    Passage,
    Phi,
    Stages,
    Tap,
)
from actsparse.blocks.tokens import tokens_of

_STAGES = ("x", "z", "u", "a", *NORMS, "d", "y")
_KNOWN_AT = {"z": "x", "u": "x", "f": "xz", "y": "d"}  # place → stages


def site_of(block: MLPBlock) -> Site:
    """The site of a block: the one attached already, else a new one."""
    site = block.up.module.__dict__.get("_actsparse_site")
    if site is None:
        site = block.up.module._actsparse_site = Site(block)  # type: ignore[assignment]
    return site


def no_executor(block: MLPBlock) -> str | None:
    """Why no executor can run a block in its layers' place, or None."""
    if block.activation.module is None and not block.activation.steps:
        return "its activation is computed by operations that form no chain of calls"
    if any(part.module is None or part.kind == "norm" for part in block.between):
        return "more than a dropout module stands between φ and down"
    return None


class Site(Passage):
    """What is attached to one block. Plain data and bound methods, so that models deep-copy."""

    # -- what others ask for --------------------------------------------------------------------

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

    def execute(self, executor: Executor) -> None:
        """Let ``executor`` compute y from x, wherever nothing attached needs what lies between;
        norms of a it knows as well.

        The layers are still called, for their hooks, and pass on an empty tensor.

        Raises:
            ValueError: another executor is set, or the block cannot be run so.
        """
        block = self.block
        if self._executor is not None:
            raise ValueError(f"block {block.name!r} has an executor already")
        if (reason := no_executor(block)) is not None:
            raise ValueError(f"block {block.name!r} cannot have an executor: {reason}")
        self._executor = executor
        self._rewire()

    def tap(self, tap: Tap, stages: Stages, in_training: bool = False) -> None:
        """Call ``tap(site, {stage: tensor})`` once in each pass through the block.

        ``stages`` may be a function of the site, asked anew whenever something is attached or
        released: what a measure needs can depend on the φ in force. ``in_training``: not while the
        block is in evaluation mode. Where x, y and norms are enough an executor may run.

        Raises:
            ValueError: unknown stages.
        """
        self._stages(stages)
        self._taps.append((tap, stages))
        if in_training:
            self._in_training.append(tap)
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
        if unknown := sorted(names - set(_STAGES)):
            raise ValueError(f"unknown stages {unknown}; known: {', '.join(_STAGES)}")
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
        self._in_training = [tap for tap in self._in_training if tap not in what]
        self._gradient_taps = [item for item in self._gradient_taps if item[0] not in what]
        if self._phi in what:
            self._phi = None
        if self._executor in what:
            self._executor = None
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
        for training in (True, False):
            calls = [at for tap, at in self._served if training or tap not in self._in_training]
            self._asked[training] = frozenset().union(*calls, *(at for _, at in readers))
        self._wanted = self._asked[True]
        if self._wanted & NORMS.keys():
            self._wanted |= {"a"}
        if not (self.modified or self._taps or self._gradient_taps or self._executor):
            self.block.up.module.__dict__.pop("_actsparse_site", None)
        else:
            self._attach()
        if "torch._dynamo" in sys.modules:  # compiled code does not notice new hooks by itself
            torch._dynamo.reset()

    def _attach(self) -> None:
        block, add = self.block, self._hooks.append
        if self.modified or self._taps or self._gradient_taps:
            self._tokens = tokens_of(block.path, block.batch_first)
            self._tokens.attach()
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
            if self._phi is not None or self._executor is not None:
                add(Replacement.at(activation.module, self))
            elif "a" in self._wanted or "f" in self._readers:
                add(activation.module.register_forward_hook(self._on_activation))
        elif (
            self._phi
            or self._executor
            or (
                activation.steps
                and ("f" in self._readers or ("a" in self._wanted and block.between))
            )
        ):
            assert activation.owner is not None
            add(Interception.at(activation.owner, self))
        late = [stages for _, stages in self._served if "y" in stages]
        if inside or len(late) < len(self._served):  # an executor alone needs no hook here
            add(block.down.module.register_forward_pre_hook(self._on_down_input))
        if self._outputs or late or "y" in self._readers:
            add(block.down.module.register_forward_hook(self._on_down))
        if self._executor is not None:
            for layer in self._entries():
                add(Detour(layer.module, self._enter))
            for part in block.between:
                assert part.module is not None
                add(Detour(part.module, self._pass))
            add(Detour(block.down.module, self._leave))
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

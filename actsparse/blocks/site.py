"""A site: the interface by which everything attaches to a block and reads its stages.

Modifications set transforms of x, z, y and of φ; observers set taps. The site keeps these requests,
its wiring (:mod:`actsparse.blocks.hooks`) serves them. Nothing is wrapped or renamed: when the last
request is gone, the model is as it was.

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

from typing import Any

import torch
from torch import Tensor

from actsparse.activations import derivative_of
from actsparse.blocks.block import MLPBlock
from actsparse.blocks.hooks import Wiring
from actsparse.blocks.stages import (
    KNOWN_AT,
    NORMS,
    STAGES,
    AtOnce,
    Cut,
    Executor,
    GradientTap,
    InputTransform,
    OutputTransform,
    Phi,
    Stages,
    Tap,
)
from actsparse.blocks.token_map import TokenMap

_HIDDEN = frozenset("zuad")
_PLACE = "_actsparse_site"  # on the up module


def site_at(block: MLPBlock) -> Site | None:
    """The site attached to a block, None if nothing is."""
    return block.up.module.__dict__.get(_PLACE)


def site_of(block: MLPBlock) -> Site:
    """The site of a block: the one attached already, else a new one."""
    site = site_at(block)
    if site is None:
        site = block.up.module.__dict__[_PLACE] = Site(block)
    return site


def function_of(block: MLPBlock) -> str | None:
    """The name of the φ in force at a block; None while it is mixed, or unknown."""
    site = site_at(block)
    return block.activation.function if site is None else site.function


def no_executor(block: MLPBlock) -> str | None:
    """Why no executor can run a block in its layers' place, or None."""
    if block.activation.module is None and not block.activation.steps:
        return "its activation is computed by operations that form no chain of calls"
    if any(part.module is None or part.kind == "norm" for part in block.between):
        return "more than a dropout module stands between φ and down"
    return None if block.same_input else "gate and up do not get the same tensor"


def no_product(block: MLPBlock) -> str | None:
    """Why what enters down is not the product φ(z) ⊙ u of a gated block, to be masked; or None."""
    if block.between or not block.same_input:
        return "something stands between the product and down"
    return None


class Site:
    """What is asked of one block. Plain data and bound methods, so that models deep-copy."""

    def __init__(self, block: MLPBlock) -> None:
        self.block = block
        self.inputs: list[InputTransform] = []
        self.layers: list[OutputTransform] = []
        self.outputs: list[OutputTransform] = []
        self.phi: Phi | None = None
        self.executor: Executor | None = None
        self.readers: dict[str, list[tuple[GradientTap, frozenset[str]]]] = {}
        self.wanted: frozenset[str] = frozenset()  # the stages that hooks keep
        self.in_place = False  # whether φ overwrites a z that is kept
        self._taps: list[tuple[Tap, Stages]] = []
        self._in_training: list[Tap] = []  # those that are called in training mode alone
        self._gradient_taps: list[tuple[GradientTap, str, Stages]] = []
        # in training? → taps with their stages, and all stages together
        self._served: dict[bool, list[tuple[Tap, frozenset[str]]]] = {True: [], False: []}
        self._asked = {True: frozenset[str](), False: frozenset[str]()}
        self._wiring = Wiring(self)

    # -- how it stands --------------------------------------------------------------------------

    @property
    def tokens(self) -> TokenMap:
        """Positions and padding of the running call."""
        if self._wiring.tokens is None:
            raise RuntimeError(f"site {self.block.name!r} is not attached")
        return self._wiring.tokens.now

    @property
    def served(self) -> list[tuple[Tap, frozenset[str]]]:
        """The taps to call in the block's present mode, each with its stages."""
        return self._served[self.block.up.module.training]

    @property
    def asked(self) -> frozenset[str]:
        """The stages that are read in the block's present mode."""
        return self._asked[self.block.up.module.training]

    @property
    def wants_norms(self) -> bool:
        """Whether a tap reads norms of a in the block's present mode."""
        return not self.asked.isdisjoint(NORMS)

    @property
    def needs_layers(self) -> bool:
        """Whether something attached changes or reads what lies between x and y."""
        inside = self.layers or self.outputs or self.readers
        return bool(inside or not self.asked.isdisjoint(_HIDDEN))

    @property
    def follows(self) -> bool:
        """Whether something attached may ask for the running call's tokens."""
        changes = self.inputs or self.layers or self.outputs
        return bool(changes or self._taps or self._gradient_taps)

    @property
    def used(self) -> bool:
        """Whether anything is attached."""
        return self.follows or self.phi is not None or self.executor is not None

    @property
    def recomputing(self) -> bool:
        """Whether gradient checkpointing runs this forward a second time, inside backward."""
        if torch.compiler.is_compiling():
            return False
        return torch._C._current_graph_task_id() != -1

    @property
    def function(self) -> str | None:
        """The name of the φ in force, None if it has none."""
        return self.block.activation.function if self.phi is None else self.phi.function

    @property
    def cut(self) -> Cut | None:
        """Which activations are kept, where each unit has a threshold of its own."""
        return getattr(self.phi, "cut", None)

    @property
    def modified(self) -> bool:
        """Whether something attached changes what the block computes (taps only read)."""
        return bool(self.inputs or self.layers or self.outputs or self.phi)

    def derivative(self, z: Tensor) -> Tensor:
        """φ′(z) of the φ in force, any shape."""
        own = derivative_of(self.block.activation.call, self.block.activation.function)
        return own(z) if self.phi is None else self.phi.derivative(z, own)

    def transform_input(self, transform: InputTransform) -> None:
        """Replace x by ``transform(site, x)``, at up's and gate's input only."""
        self.inputs.append(transform)
        self.refresh()

    def transform_layers(self, transform: OutputTransform) -> None:
        """Replace the outputs of up and gate by ``transform(site, output, x, layer)``."""
        self.layers.append(transform)
        self.refresh()

    def transform_output(self, transform: OutputTransform) -> None:
        """Replace y by ``transform(site, y, down's input, layer)``."""
        self.outputs.append(transform)
        self.refresh()

    def replace_activation(self, phi: Phi) -> None:
        """Compute a (or the gate's factor) as ``phi(z, own)``.

        Raises:
            ValueError: another replacement is set, or no hook can reach the activation.
        """
        activation = self.block.activation
        if self.phi is not None:
            raise ValueError(f"block {self.block.name!r} has its activation replaced already")
        if activation.module is None and not activation.steps:
            raise ValueError(
                f"the activation of block {self.block.name!r} is computed inside "
                f"{type(activation.owner).__name__}.forward by operations that cannot be "
                f"exchanged one for one; call an activation module there"
            )
        self.phi = phi
        self.refresh()

    def execute(self, executor: Executor) -> None:
        """Let ``executor`` compute y from x, wherever nothing attached needs what lies between;
        norms of a it knows as well.

        The layers are still called, and pass on a tensor of NaN that has no memory.

        Raises:
            ValueError: another executor is set, or the block cannot be run so.
        """
        block = self.block
        if self.executor is not None:
            raise ValueError(
                f"block {block.name!r} is accelerated already, perhaps by this cell of a "
                f"notebook: call remove() of the handle that accelerate returned first"
            )
        if (reason := no_executor(block)) is not None:
            raise ValueError(f"block {block.name!r} cannot have an executor: {reason}")
        self.executor = executor
        self.refresh()

    def at_once(self, x: Tensor | None, way: AtOnce | None = None) -> None:
        """Let the layers run by ``way`` in calls on an x of this shape, while nothing is attached.

        ``x`` None: in no calls.
        """
        self._wiring.ways.keep(x, way if self._wiring.alone else None)

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
        self.refresh()

    def tap_gradient(self, tap: GradientTap, place: str, stages: Stages = ()) -> None:
        """Read the gradient at ``place``: z, u, f or y.

        In each pass that builds a graph ``tap(site, output, {stage: tensor})`` is asked, at that
        place and with the stages that are known there (x; at f also z; at y d), for a
        :class:`Reading`, or None to leave the pass alone. At u of ungated blocks nothing is read.

        Raises:
            ValueError: unknown place or stages.
        """
        if place not in KNOWN_AT:
            raise ValueError(f"unknown place {place!r}; known: {', '.join(KNOWN_AT)}")
        late = self._stages(stages) - set(KNOWN_AT[place])
        if late:
            raise ValueError(f"stages {sorted(late)} are not known yet at {place!r}")
        self._gradient_taps.append((tap, place, stages))
        self.refresh()

    def _stages(self, stages: Stages) -> frozenset[str]:
        names = set(stages(self) if callable(stages) else stages)
        if unknown := sorted(names - set(STAGES)):
            raise ValueError(f"unknown stages {unknown}; known: {', '.join(STAGES)}")
        return frozenset(names if self.block.gated else names - {"u"})

    def refresh(self) -> None:
        """Ask taps anew which stages they need; call it where the φ in force has changed."""
        served = [(tap, self._stages(stages)) for tap, stages in self._taps]
        self.readers = {}
        for read, place, wants in self._gradient_taps:
            if place != "u" or self.block.gated:
                self.readers.setdefault(place, []).append((read, self._stages(wants)))
        late = [stages for at in self.readers.values() for _, stages in at]
        for training in (True, False):
            taps = [each for each in served if training or each[0] not in self._in_training]
            self._served[training] = taps
            self._asked[training] = frozenset().union(*(stages for _, stages in taps), *late)
        wanted = self._asked[True]
        self.wanted = wanted | {"a"} if wanted & NORMS.keys() else wanted
        inside = self.phi or self.wanted & {"z", "u", "a"} or self.readers.keys() & {"z", "u", "f"}
        self.in_place = bool(inside) and self.block.activation.in_place
        self._wiring.fit()
        if not self.used:
            self.block.up.module.__dict__.pop(_PLACE, None)

    def release(self, *what: Any) -> None:
        """Take back transforms, replacements and taps; the rest stays attached."""
        self.inputs = [item for item in self.inputs if item not in what]
        self.layers = [item for item in self.layers if item not in what]
        self.outputs = [item for item in self.outputs if item not in what]
        self._taps = [item for item in self._taps if item[0] not in what]
        self._in_training = [tap for tap in self._in_training if tap not in what]
        self._gradient_taps = [item for item in self._gradient_taps if item[0] not in what]
        if self.phi in what:
            self.phi = None
        if self.executor in what:
            self.executor = None
        self.refresh()

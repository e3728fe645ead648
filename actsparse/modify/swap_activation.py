"""Swap the activation: replace φ by another one, at once or by mixing."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Annotated, ClassVar

import torch
from torch import Tensor
from typing_extensions import override

from actsparse.activations import ActivationFunction, known_as, named
from actsparse.blocks.block import MLPBlock
from actsparse.blocks.site import Site, site_of
from actsparse.modify.modification import Attached, Modification, NotApplicable, Progress
from actsparse.modify.schedule import Over, Ramp, ramp_note
from actsparse.values import Rule


@dataclass(frozen=True)
class SwapActivation(Modification):
    """Replace the activation φ of each block (of gate, in gated blocks) by another one.

    In finetuning it is mixed in, ``(1−k)·φ_old + k·φ_new``, k from 0 to 1 (arXiv 2309.03004,
    finetuning for sparsity).

    Args:
        to: the new φ: a name (:func:`actsparse.activations.named`) or an
            :class:`actsparse.activations.ActivationFunction`.
        mix: over how many optimizer steps (int), or over which fraction of all steps (float up to
            1), k rises from 0 to 1. None: φ is replaced at once.

    >>> from actsparse import sparsify
    >>> mlp = torch.nn.Sequential(torch.nn.Linear(8, 32), torch.nn.GELU(), torch.nn.Linear(32, 8))
    >>> print(sparsify(mlp, SwapActivation("jsrelu"), inputs=torch.randn(2, 8)))
    SwapActivation: 1 MLP block of Sequential
      SwapActivation     (root): gelu → jsrelu
    """

    changes_function: ClassVar[bool] = True

    to: Annotated[
        str | ActivationFunction,
        Rule("a name, or an ActivationFunction, which brings its derivative", lambda to: True),
    ] = "jsrelu"
    mix: Over | None = None

    @override
    def __post_init__(self) -> None:
        super().__post_init__()
        if isinstance(self.to, str):
            named(self.to)

    @override
    def ramps(self) -> list[Ramp]:
        return [] if self.mix is None else [Ramp(self.mix)]

    @override
    def apply(self, block: MLPBlock) -> Attached:
        new = named(self.to) if isinstance(self.to, str) else self.to
        site = site_of(block)
        phi = MixedActivation(new, mixed=self.mix is None)
        try:
            site.replace_activation(phi)
        except ValueError as error:
            site.release()
            raise NotApplicable(str(error)) from None
        return _Swapped(
            site,
            f"{block.activation.function or 'its own'} → {new.name}{ramp_note(self.ramps())}",
            self,
            phi,
        )


class MixedActivation:
    """``(1−k)·own + k·new``; only ``new`` once k has reached 1."""

    def __init__(self, new: ActivationFunction, mixed: bool) -> None:
        self.new = new
        self.done = mixed
        with torch.inference_mode(False):
            # a tensor, so that compiled code does not recompile at every step
            self.k = torch.tensor(1.0 if mixed else 0.0)

    @property
    def function(self) -> str | None:
        """The name of φ; None while it is a mixture, and of a function of your own, whatever it
        is called."""
        return self.new.name if self.done and known_as(self.new.name) is self.new else None

    def __call__(self, z: Tensor, own: Callable[[Tensor], Tensor]) -> Tensor:
        """The mixture, any shape."""
        if self.done:
            return self.new.value(z)
        return torch.lerp(own(z), self.new.value(z), self.k.to(z))

    def derivative(self, z: Tensor, own: Callable[[Tensor], Tensor]) -> Tensor:
        """Its derivative, any shape."""
        if self.done:
            return self.new.derivative(z)
        return torch.lerp(own(z), self.new.derivative(z), self.k.to(z))


class _Swapped(Attached):
    def __init__(self, site: Site, note: str, config: SwapActivation, phi: MixedActivation) -> None:
        super().__init__(site, note)
        self.config, self.phi = config, phi
        self.named = phi.done  # whether φ is to have its name: mixing has ended

    @override
    def update(self, progress: Progress) -> None:
        for ramp in self.config.ramps():
            k = ramp.value(progress.step, progress.steps)
            self.phi.k.fill_(k)
            self.named = k >= 1.0
            self.phi.done &= self.named  # its name comes between passes

    @override
    def settle(self) -> None:
        if self.phi.done != self.named:
            self.phi.done = self.named
            self.site.refresh()

    @override
    def remove(self) -> None:
        self.site.release(self.phi)

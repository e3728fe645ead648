"""What happens at a site while its block runs: the hooks, and what they hand on to whom."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator, Sequence
from typing import Any, Protocol

import torch
from torch import Tensor, nn

from actsparse.blocks.block import Layer, MLPBlock
from actsparse.blocks.exchange import Executor
from actsparse.blocks.reading import Reading, read_gradient
from actsparse.blocks.token_map import TokenMap
from actsparse.blocks.tokens import Tokens

# the first argument is the Site
InputTransform = Callable[[Any, Tensor], Tensor]
OutputTransform = Callable[[Any, Tensor, Tensor, Layer], Tensor]  # site, output, input, layer
Tap = Callable[[Any, dict[str, Tensor]], None]
Stages = Sequence[str] | Callable[[Any], Sequence[str]]
GradientTap = Callable[[Any, Tensor, dict[str, Tensor]], Reading | None]

NORMS = {"l1": 1, "l2": 2}  # stages that are norms of a's rows


class Phi(Protocol):
    """What replaces a block's activation; ``own`` is the model's own φ, or its derivative."""

    @property
    def function(self) -> str | None:
        """Its name in actsparse.activations, None while it has none."""

    def __call__(self, z: Tensor, own: Callable[[Tensor], Tensor], /) -> Tensor:
        """φ(z), any shape."""

    def derivative(self, z: Tensor, own: Callable[[Tensor], Tensor], /) -> Tensor:
        """φ′(z), any shape."""


_asleep: list[bool] = []  # not empty while the finder looks at a model


@contextlib.contextmanager
def sites_asleep() -> Iterator[None]:
    """Inside, models run as if nothing were attached, and no tap is called."""
    _asleep.append(True)
    try:
        yield
    finally:
        _asleep.pop()


def token_norm(a: Tensor, order: int) -> Tensor:
    """The norm of each token's a over its units, in float32 at least: [..., H] → [..., 1].

    >>> token_norm(torch.tensor([[3.0, -4.0]]), 2)
    tensor([[5.]])
    """
    dtype = torch.promote_types(a.dtype, torch.float32)  # a sum of squares overflows float16
    return torch.linalg.vector_norm(a, order, dim=-1, keepdim=True, dtype=dtype)


class Passage:
    """One block's hooks and what they know of the running pass."""

    def __init__(self, block: MLPBlock) -> None:
        self.block = block
        self._inputs: list[InputTransform] = []
        self._layers: list[OutputTransform] = []
        self._outputs: list[OutputTransform] = []
        self._phi: Phi | None = None
        self._taps: list[tuple[Tap, Stages]] = []
        self._served: list[tuple[Tap, frozenset[str]]] = []
        self._in_training: list[Tap] = []  # those that are called in training mode alone
        self._gradient_taps: list[tuple[GradientTap, str, Stages]] = []
        self._readers: dict[str, list[tuple[GradientTap, frozenset[str]]]] = {}
        self._hooks: list[Any] = []
        self._asked = {True: frozenset[str](), False: frozenset[str]()}  # in training? → stages
        self._wanted: frozenset[str] = frozenset()  # what hooks keep for these
        self._tokens: Tokens | None = None
        self._kept: dict[str, Tensor] = {}
        self._executor: Executor | None = None
        self._detour: Tensor | None = None  # x, while the executor runs in the layers' place
        self._entered: tuple[Tensor, Tensor, nn.Module] | None = None
        self._expects_phi = False
        self._in_place = False

    @property
    def tokens(self) -> TokenMap:
        """Positions and padding of the running call."""
        if self._tokens is None:
            raise RuntimeError(f"site {self.block.name!r} is not attached")
        return self._tokens.now

    @property
    def wants_norms(self) -> bool:
        """Whether a tap reads norms of a in the block's present mode."""
        asked = self._asked[self.block.up.module.training]
        return any(name in asked for name in NORMS)

    def _entries(self) -> list[Layer]:
        """The layers that x enters, each module once."""
        block = self.block
        if block.gate is None or block.gate.module is block.up.module:
            return [Layer(block.up.name, block.up.module, block.up.layout)]
        return [block.gate, block.up]

    # -- the layers' hooks ----------------------------------------------------------------------

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
        if source.module is module and self._in_place and self._detour is None:
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
        if self._detour is not None:
            return z
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
        if self._detour is not None:  # the executor knows more
            return
        kept = {"a": args[0], **self._kept, "d": args[0]}
        asked = self._asked[self.block.up.module.training]
        norms = [name for name in NORMS if name in asked]
        if self.block.gated and ("a" in asked or norms):
            kept["a"] = kept["a"] * kept["u"] if self.block.between else args[0]
        for norm in norms:
            kept[norm] = token_norm(kept["a"], NORMS[norm])
        self._kept.clear()  # checkpointing breaks off its second pass inside down
        self._hand_on(kept)

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

    def _hand_on(self, kept: dict[str, Tensor]) -> None:
        """Serve what is known before y, and keep it for those who want y too."""
        if any("y" in stages for _, stages in self._served):
            self._kept.update(kept)
        self._serve(kept)

    def _serve(self, kept: dict[str, Tensor]) -> None:
        """Call the taps that want y where it is known, the others before down runs."""
        for tap, stages in self._served:
            if tap in self._in_training and not self.block.up.module.training:
                continue
            if ("y" in stages) == ("y" in kept):
                tap(self, {stage: kept[stage] for stage in stages})

    # -- an executor in the layers' place -------------------------------------------------------

    def _enter(self, original: Callable[[Tensor], Tensor], x: Tensor) -> Tensor:
        """Of up and gate: an empty tensor if the executor takes this call."""
        assert self._executor is not None
        if self._detour is not x:  # not the gate's call behind up's; or one broken off is forgotten
            asked = self._asked[self.block.up.module.training]
            changed = self._layers or self._outputs or self._readers
            free = not (changed or asked & set("zuad"))
            runs = not _asleep and free and self._executor.takes(self, x)
            self._detour = x if runs else None
            if runs:
                self._expects_phi = True
        if self._detour is None:
            return original(x)
        return x.new_zeros(1).expand(*x.shape[:-1], self.block.up.width)

    def _pass(self, original: Callable[[Tensor], Tensor], a: Tensor) -> Tensor:
        return original(a) if self._detour is None else a

    def _leave(self, original: Callable[[Tensor], Tensor], d: Tensor) -> Tensor:
        assert self._executor is not None
        x, self._detour = self._detour, None
        if x is not None:
            self._expects_phi = False
            kept = dict(self._kept)
            self._kept.clear()  # checkpointing may break off its second pass here
            y = self._executor(self, x, kept.update if self.wants_norms else None)
            self._hand_on(kept)
            return y
        if not _asleep:
            self._executor.passed(self, d)
        return original(d)

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

"""The hooks of a block: where a site is wired, and what its hooks do while the block runs.

All hooks that a reader may ever need are put on at once and ask the site anew in each pass. So
something that is attached later works in compiled code too, whose guards see what hooks read but
not that there are new ones. An executor that nothing but a φ was ever attached beside needs none of
them: layers without hooks are called 4 µs faster each, which is a part of a token's time.
"""

from __future__ import annotations

import sys
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn
from torch.compiler import is_compiling

from actsparse.blocks.block import Layer, MLPBlock
from actsparse.blocks.computes_only import computing_only
from actsparse.blocks.pass_state import Passes, Running, asleep, unreadable
from actsparse.blocks.placeholder import Ghosts, check_ghost, is_ghost
from actsparse.blocks.read_gradients import read_gradient
from actsparse.blocks.replace_forward import (
    IN_A_REPLICA,
    Detour,
    Interception,
    NoNestedTensors,
    Refusing,
    Replacement,
)  # fmt: skip
from actsparse.blocks.stages import NORMS, token_norm
from actsparse.blocks.tokens import Tokens, tokens_of
from actsparse.blocks.ways import Ways, Whole, executed_alone

Way = Callable[[Detour, Tensor], Tensor]


class Wiring:
    """The hooks of one site. Bound methods and plain data, so that models deep-copy.

    ``site`` is the :class:`actsparse.blocks.site.Site` that makes this, and knows this module.
    """

    def __init__(self, site: Any) -> None:
        self.site = site
        self.block: MLPBlock = site.block
        self.passes = Passes()
        self._ghosts = Ghosts(self.block.name)
        self.tokens: Tokens | None = None
        self._hooks: list[Any] = []
        self._shape: tuple[bool, ...] = ()
        self.alone = False  # an executor stands here without hooks
        self.ways = Ways(self.passes)

    # -- attaching ------------------------------------------------------------------------------

    def fit(self) -> None:
        """Attach what the site's requests need; all goes when there are none."""
        site, activation = self.site, self.block.activation
        exchanged = site.phi is not None or site.executor is not None
        caught = activation.module is None and bool(
            exchanged
            or (
                activation.steps
                and ("f" in site.readers or ("a" in site.wanted and self.block.between))
            )
        )
        phi, executed = site.phi is not None, site.executor is not None
        # once somebody has followed the tokens we go on: a hook that comes and goes costs compiling
        goes_on = self.tokens is not None and self._shape[-1] == executed
        follows = site.follows or (site.used and goes_on)
        shape = (site.used, phi, follows, exchanged, caught, executed)
        if shape == self._shape:
            return
        self.detach()
        self._shape = shape
        self.alone = executed_alone(self.block, follows, executed)
        if self.alone:
            add = self._hooks.append
            # a pass that is broken off must not leave the next φ, whose ever, to it
            if (whole := computing_only(self.block)) is not None:
                add(Whole(whole, self.ways, self.passes, framed=phi))
            elif phi:
                self._attach_around()
            self._attach_executor(self._enter_alone, self._leave_alone)
            why = IN_A_REPLICA.format(self.block.name)
            add(Refusing(self.block.up.module, why, "_replicate_for_data_parallel"))
            self._attach_activation(exchanged, caught)
        elif site.used:
            self._attach(*shape[2:])
        if "torch._dynamo" in sys.modules:  # compiled code does not notice new hooks by itself
            torch._dynamo.reset()

    def _attach(self, follows: bool, exchanged: bool, caught: bool, executed: bool) -> None:
        block, add, down = self.block, self._hooks.append, self.block.down.module
        if follows:
            self.tokens = tokens_of(block.path, block.batch_first)
            self.tokens.attach()
        self._attach_around()
        for layer in self.entries():
            add(layer.module.register_forward_pre_hook(self._on_input))
            add(layer.module.register_forward_hook(self._on_layer))
        self._attach_activation(exchanged, caught)
        add(down.register_forward_pre_hook(self._on_down_input))
        add(down.register_forward_hook(self._on_down))
        if executed:
            self._attach_executor(self._enter, self._leave)
        for module in block.path:
            if isinstance(module, nn.TransformerEncoder):
                add(NoNestedTensors(module))  # its eval fast path would pass all hooks by

    def _attach_around(self) -> None:
        if self.block.around:
            around = self.block.path[self.block.around - 1]
            self._hooks.append(around.register_forward_pre_hook(self._on_call))
            self._hooks.append(around.register_forward_hook(self._on_return, always_call=True))

    def _attach_activation(self, exchanged: bool, caught: bool) -> None:
        activation, add = self.block.activation, self._hooks.append
        if activation.module is not None:
            if exchanged:
                add(Replacement.at(activation.module, self))
            else:
                add(activation.module.register_forward_hook(self._on_activation))
        elif caught:
            assert activation.owner is not None
            add(Interception.at(activation.owner, self))

    def _attach_executor(self, enter: Way, leave: Way) -> None:
        for layer in self.entries():
            self._hooks.append(Detour(layer.module, enter))
        for part in self.block.between:
            assert part.module is not None
            self._hooks.append(Detour(part.module, self._pass))
        self._hooks.append(Detour(self.block.down.module, leave))

    def detach(self) -> None:
        """Take all hooks off again."""
        for hook in self._hooks:
            hook.remove()
        self._hooks.clear()
        self.ways.clear()
        self._shape = ()
        if self.tokens is not None:
            self.tokens.detach()
            self.tokens = None

    def entries(self) -> list[Layer]:
        """The layers that x enters, each module once."""
        block = self.block
        if block.gate is None or block.gate.module is block.up.module:
            return [Layer(block.up.name, block.up.module, block.up.layout)]
        return [block.gate, block.up]

    # -- the layers' hooks ----------------------------------------------------------------------

    # Tensors without names: the compiler looks at what has one, and warns of its gradient.
    def _on_call(self, *_: Any) -> None:
        self.passes.enter()

    def _on_return(self, module: nn.Module, *_: Any) -> None:
        self.passes.leave(module)

    def _on_input(self, module: nn.Module, args: tuple[Any, ...]) -> Any:
        if asleep():
            return None
        if module.__dict__.get("_is_replica"):
            raise RuntimeError(IN_A_REPLICA.format(self.block.name))
        if not args:
            raise TypeError(f"{self.block.name}: up must be called with its input as an argument")
        x, *rest = args
        now = self.passes.now
        if now.x is None or module in now.entered:
            now = self.passes.begin()
        if now.x is not x:  # gate and up get the same x: transform it once
            now.x = now.changed = x
            for transform in self.site.inputs:
                now.changed = transform(self.site, now.changed)
            if "x" in self.site.wanted:
                now.kept["x"] = now.changed
        now.entered.append(module)
        return (now.changed, *rest)

    def _on_layer(self, module: nn.Module, args: tuple[Any, ...], output: Tensor) -> Tensor:
        if asleep():
            return output
        site, block, now = self.site, self.block, self.passes.now
        if site.layers:
            for layer in self.entries():
                if layer.module is module:
                    for transform in site.layers:
                        output = transform(site, output, args[0], layer)
        source = block.pre_activation
        if source.module is module:
            now.expects_phi = True
            output = self._read("z", output, source)
        if block.gate is not None and block.up.module is module:
            output = self._read("u", output, block.up)
            if site.wanted & {"u", "a"}:
                now.kept["u"] = block.up.select(output)
        if source.module is module and site.in_place and not now.detours:
            now.kept["z"] = source.select(output)
            return output.clone()
        if source.module is module and "z" in site.wanted:
            now.kept["z"] = source.select(output)
        return output

    def takes_phi(self, z: Any) -> bool:
        """Whether a call of the activation on z is this block's; asked by exchanged activations."""
        now = self.passes.frames[-1]  # perhaps of a pass that was broken off, if z is no ghost
        return now.expects_phi and not asleep() and (not now.detours or is_ghost(z, now))

    def compute_phi(self, z: Tensor, original: Callable[[Tensor], Tensor]) -> Tensor:
        """φ(z) as replaced, or the model's own."""
        now, phi = self.passes.now, self.site.phi
        now.expects_phi = False
        if now.detours:
            return z
        if phi is None:
            a = original(z)
        elif self.site.in_place:  # a mixture needs z a second time
            a = phi(z, lambda z: original(z.clone()))
        else:
            a = phi(z, original)
        return self._take_activation(a, z)

    def _on_activation(self, module: nn.Module, args: tuple[Any, ...], output: Tensor) -> Tensor:
        if self.takes_phi(args[0]):  # else called elsewhere
            self.passes.now.expects_phi = False
            return self._take_activation(output, args[0])
        return output

    def _take_activation(self, f: Tensor, z: Tensor) -> Tensor:
        site, now = self.site, self.passes.now
        if "z" in site.wanted and not site.in_place:
            now.kept["z"] = z  # a bias may have joined up's output
        between = self.block.between
        # what follows may work in place: a dropout that says so or is a function, or `a *= u`
        overwritten = self.block.gated or any(
            part.module is None or getattr(part.module, "inplace", False) for part in between
        )
        f = self._read("f", f)
        if "a" in site.wanted and (between or not self.block.gated):
            now.kept["a"] = f.clone() if overwritten else f
        return f

    def _on_down_input(self, module: nn.Module, args: tuple[Any, ...]) -> Any:
        if asleep():
            return None
        now = self.passes.now
        d = self._after_phi(args[0], now)
        if now.detours:  # the executor knows more
            return None
        kept = {"a": d, **now.kept, "d": d}
        asked = self.site.asked
        norms = [name for name in NORMS if name in asked]
        if self.block.gated and ("a" in asked or norms):
            kept["a"] = kept["a"] * kept["u"] if self.block.between else d
        for norm in norms:
            kept[norm] = token_norm(kept["a"], NORMS[norm])
        now.kept = {}  # checkpointing breaks off its second pass inside down
        self._hand_on(kept)
        return None if d is args[0] else (d, *args[1:])

    def _after_phi(self, d: Tensor, now: Running) -> Tensor:
        """Down's input, once φ was called: a φ may have to mask the product of gated blocks."""
        phi, missing, now.expects_phi = self.site.phi, now.expects_phi, False
        if missing and (phi is not None or now.detours):
            raise RuntimeError(
                f"block {self.block.name!r} ran without calling its activation "
                f"{self.block.activation.name!r}, so what was attached had no effect; was the "
                f"activation replaced since, or were the layers called one by one?"
            )
        mask = None if now.detours else getattr(phi, "mask_product", None)
        return d if mask is None else mask(d)

    def _on_down(self, module: nn.Module, args: tuple[Any, ...], output: Tensor) -> Tensor:
        if asleep():
            return output
        for transform in self.site.outputs:
            output = transform(self.site, output, args[0], self.block.down)
        kept = {**self.passes.now.kept, "d": args[0]}
        output = self._read("y", output, self.block.down, d=args[0])
        self.passes.begin()
        self._serve({**kept, "y": output})
        return output

    def _hand_on(self, kept: dict[str, Tensor]) -> None:
        """Serve what is known before y, and keep it for those who want y too."""
        if any("y" in stages for _, stages in self.site.served):
            self.passes.now.kept.update(kept)
        self._serve(kept)

    def _serve(self, kept: dict[str, Tensor]) -> None:
        """Call the taps that want y where it is known, the others before down runs."""
        for tap, stages in self.site.served:
            if ("y" in stages) == ("y" in kept):
                if stages and (why := unreadable()) is not None:
                    raise RuntimeError(
                        f"block {self.block.name!r} is observed or has a penalty, but its "
                        f"activations cannot be read {why}; close or remove that first"
                    )
                tap(self.site, {stage: kept[stage] for stage in stages})

    # -- an executor in the layers' place -------------------------------------------------------

    def _enter(self, layer: Detour, x: Tensor) -> Tensor:
        """Of up and gate: a tensor of NaN, without memory, if the executor takes this call."""
        now, executor = self.passes.now, self.site.executor
        if asleep() or executor is None:
            return layer.original(x)
        if now.plan is None:
            now.plan = executor.plan(self.site, x)
            now.detours = now.plan.runs
        if not now.detours:
            return layer.original(x)
        if now.changed is not x:
            raise RuntimeError(
                f"block {self.block.name!r}: hooks change the input of its layers, so it cannot "
                f"run sparse; call accelerate after attaching them"
            )
        width = self.block.up.width
        if is_compiling():
            return x.new_full((1,), float("nan")).expand(*x.shape[:-1], width)
        return self._ghosts.like(x, width, now)

    def _enter_alone(self, layer: Detour, x: Tensor) -> Tensor:
        """What :meth:`_on_input`, :meth:`_enter` and :meth:`_on_layer` do, without hooks."""
        if asleep() or self.site.executor is None:
            return layer.original(x)
        module, now = layer.module, self.passes.frames[-1]
        if not is_compiling() and (way := self.ways.of(layer, x)) is not None:
            now, width = self.passes.frames[-1], self.block.up.width
            output = self._ghosts.like(x, width, now) if way.skips else way.product(layer, x)
        else:
            if now.x is not x or module in now.entered:
                now = self.passes.begin()
                now.x = now.changed = x
            now.entered.append(module)
            output = self._enter(layer, x)
        if module is self.block.pre_activation.module:
            now.expects_phi = now.detours or self.site.phi is not None
        return output

    def _pass(self, part: Detour, a: Tensor) -> Tensor:
        return a if is_ghost(a, self.passes.now) else part.original(a)

    def _leave(self, down: Detour, d: Tensor) -> Tensor:
        now = self.passes.now
        if now.plan is None or asleep():
            return down.original(d)
        plan, now.plan, now.detours = now.plan, None, False  # dropouts run themselves again
        if not plan.runs:
            plan.passed(d)
            return down.original(d)
        check_ghost(d, self.block, now)
        assert now.changed is not None
        kept, now.kept = now.kept, {}  # checkpointing may break off its second pass here
        y = plan(self.site, now.changed, kept.update if self.site.wants_norms else None)
        self._hand_on(kept)
        return y

    def _leave_alone(self, down: Detour, d: Tensor) -> Tensor:
        """What :meth:`_on_down_input`, :meth:`_leave` and :meth:`_on_down` do, without hooks."""
        if asleep():
            return down.original(d)
        now = self.passes.frames[-1]
        way, now.at_once = now.at_once, None
        if way is not None and not is_compiling():
            d, now.detours, x = self._after_phi(d, now), False, now.changed
            now.changed = None  # or the frame would keep the memory until the next pass
            if way.skips:
                check_ghost(d, self.block, now)
            return way.product(down, d if x is None or not way.skips else x)
        d, plan, x = self._after_phi(d, now), now.plan, now.changed
        if plan is None or x is None:
            return down.original(d)
        self.passes.begin()
        if not plan.runs:
            plan.passed(d)
            return down.original(d)
        check_ghost(d, self.block, now)
        return plan(self.site, x, None)

    def _read(
        self, place: str, output: Tensor, layer: Layer | None = None, **known: Tensor
    ) -> Tensor:
        """``output``, with what is to be read of its gradient."""
        readers = self.site.readers
        if place not in readers or not torch.is_grad_enabled():
            return output
        rows, known = None if layer is None else layer.rows, {**self.passes.now.kept, **known}
        for tap, stages in readers[place]:
            stage = output if rows is None else output[..., rows]
            reading = tap(self.site, stage, {name: known[name] for name in stages})
            if reading is not None:
                output = read_gradient(output, reading, rows)
        return output

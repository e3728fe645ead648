"""The optimizers whose steps a handle follows: an outer one, and those it steps through."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import Any

from torch import nn
from torch.optim import Optimizer

from actsparse.blocks.block import MLPBlock
from actsparse.blocks.sharding import sharded


class Following:
    """Optimizers of one training. ``begins()`` is called before each step that one of them makes,
    ``stepped(new)`` after it; ``new``: it begins a step of the training, rather than belonging to
    the last one.

    SAM and opacus step through an optimizer that they keep, others through several. A step of the
    training begins when one steps that has stepped already.
    """

    def __init__(
        self,
        optimizers: Iterable[Optimizer],
        begins: Callable[[], None],
        stepped: Callable[[bool], None],
    ) -> None:
        self.optimizers = list(optimizers)
        self._begins = begins
        self._stepped = stepped
        self._done: set[int] = set()  # who has stepped in this step of the training
        self._joined: list[tuple[Optimizer, dict[str, Any], nn.Parameter]] = []
        self._begun: set[int] = set()
        self.running = False  # a step, which may call the model several times
        self._hooks = [
            hook
            for each in self.optimizers
            for hook in (
                each.register_step_pre_hook(self._before),
                each.register_step_post_hook(self._after),
            )
        ]

    def _before(self, optimizer: Optimizer, *hook: Any) -> None:
        self._begun.add(id(optimizer))
        self.running = True
        self._begins()

    def _after(self, optimizer: Optimizer, *hook: Any) -> None:
        self.running = False
        # GradScaler calls a fused optimizer even where it skips the step, and tells it so
        overflow = getattr(optimizer, "found_inf", None)
        if overflow is not None and bool(overflow):
            return
        own = id(optimizer)
        begun = own in self._begun  # else its class's step has called super().step(), hooks and all
        self._begun.discard(own)
        new = begun and (not self._done or own in self._done)
        self._done = {own} if new else self._done | {own}
        self._stepped(new)

    def join(self, parameter: nn.Parameter, name: str, beside: Iterable[nn.Parameter]) -> None:
        """Let them train a parameter that they do not know yet, as those ``beside`` it."""
        groups = [(each, group) for each in self.optimizers for group in each.param_groups]
        known = {id(p): (each, group) for each, group in reversed(groups) for p in group["params"]}
        if id(parameter) in known or not parameter.requires_grad:
            return
        optimizer, group = next((known[id(p)] for p in beside if id(p) in known), groups[0])
        group["params"].append(parameter)
        self._joined.append((optimizer, group, parameter))
        if "param_names" in group:
            group["param_names"].append(name)

    def leave(self) -> bool:
        """Stop following; whether anything that joined the optimizers stays."""
        for hook in self._hooks:
            hook.remove()
        self._hooks.clear()
        return bool(self._joined)

    def remove(self) -> None:
        """Stop following, and take back what joined."""
        self.leave()
        for optimizer, group, parameter in self._joined:
            places = [i for i, p in enumerate(group["params"]) if p is parameter]
            for key in ("params", "param_names"):
                if places and key in group:
                    del group[key][places[0]]
            optimizer.state.pop(parameter, None)
        self._joined.clear()


class Changes:
    """Counts training passes before which the trained weights of blocks had changed."""

    def __init__(self, blocks: Iterable[MLPBlock]) -> None:
        self._blocks = list(blocks)
        self._seen: int | None = None
        self._count = 0

    def count(self) -> int:
        """How many there were by now, this pass included, since the last that were explained."""
        before, self._seen = self._seen, self._written()
        self._count += before is not None and self._seen != before
        return self._count

    def explained(self) -> None:
        """A step made the last ones."""
        self._count, self._seen = 0, self._written()

    def _written(self) -> int:
        parts = [part for b in self._blocks for part in (b.up, b.down, b.norm) if part]
        trained = (p for part in parts for p in part.module.parameters() if p.requires_grad)
        return sum(0 if p.is_inference() else p._version for p in trained)


def optimizers_of(model: nn.Module, optimizer: Optimizer) -> list[Optimizer]:
    """``optimizer`` and those in it that train parameters of ``model``, the inner ones first.

    Raises:
        ValueError: none of them does.
    """
    shards = sharded(model.modules())
    for module in shards:  # what an evaluation has left gathered is no optimizer's parameter
        module.reshard()
    found = optimizers_in(optimizer, {id(p) for p in model.parameters()})
    if not found and shards:
        raise ValueError(
            "the optimizer holds no parameter of the model: fully_shard has replaced them "
            "since; make the optimizer after fully_shard, then attach it"
        )
    if not found:
        raise ValueError(
            f"{type(optimizer).__name__} holds no parameter of the model that was sparsified; "
            f"is it for a copy, or was the model made again since?"
        )
    return found


def optimizers_in(optimizer: Optimizer, parameters: set[int]) -> list[Optimizer]:
    """Those that train any of ``parameters`` (ids) and tell of their steps, the inner ones first.

    >>> import torch
    >>> weight = torch.zeros(2, requires_grad=True)
    >>> outer, inner = torch.optim.SGD([weight]), torch.optim.SGD([weight])
    >>> outer.base_optimizer = inner
    >>> optimizers_in(outer, {id(weight)}) == [inner, outer]
    True
    """
    found: dict[int, Optimizer] = {}

    def look(value: Any) -> None:
        if not isinstance(value, Optimizer) or id(value) in seen:
            return
        seen.add(id(value))
        for part in list(vars(value).values()):
            parts = part.values() if isinstance(part, dict) else part
            for each in parts if isinstance(part, dict | list | tuple) else [part]:
                look(each)
        held = {id(p) for group in value.param_groups for p in group["params"]}
        # a wrapper that is no whole Optimizer (accelerate's, opacus') runs no step hooks
        if "_optimizer_step_post_hooks" in vars(value) and not held.isdisjoint(parameters):
            found[id(value)] = value

    seen: set[int] = set()
    look(optimizer)
    return list(found.values())

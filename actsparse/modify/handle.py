"""What ``sparsify`` returns: everything attached to a model, to follow, print and take back."""

from __future__ import annotations

import re
import warnings
from typing import Any

import torch
from torch import Tensor, nn

from actsparse.blocks.block import Blocks, told
from actsparse.blocks.sharding import sharded
from actsparse.modify.modification import Attached, Modification, Progress
from actsparse.modify.recipe import Recipe
from actsparse.modify.zeroth_bias import CHILD

_ATTRIBUTE = "_actsparse_handle"


class Handle:
    """The modifications of one model; ``print`` it to see what changed and what did not, and why.

    ``blocks`` are the model's MLP blocks, ``step`` the optimizer steps followed so far.
    """

    def __init__(self, model: nn.Module, recipe: Recipe, blocks: Blocks) -> None:
        self.model = model
        self.recipe = recipe
        self.blocks = blocks
        self.step = 0
        self.steps: int | None = None
        self._warned: set[str] = set()  # once is enough
        self._asked = False  # whether penalty() was called since the last step
        self._attached: list[tuple[Modification, Attached]] = []
        self._left_alone: list[tuple[str, str, str]] = []  # modification, block, reason
        self._hooks: list[Any] = []
        self._joined: list[tuple[torch.optim.Optimizer, dict[str, Any], nn.Parameter]] = []

    def add(self, modification: Modification, attached: Attached) -> None:
        """Take over something that ``sparsify`` attached."""
        self._attached.append((modification, attached))

    def leave_alone(self, modification: str, block: str, reason: str) -> None:
        """Note why a modification was not made at a block."""
        self._left_alone.append((modification, block, reason))

    # -- during training ------------------------------------------------------------------------

    def attach(self, optimizer: torch.optim.Optimizer, steps: int | None = None) -> None:
        """Follow an optimizer: after each of its real steps schedules move and parameters are
        projected. Right under accumulation, GradScaler's skipped steps, DDP and FSDP2, for which
        the order is ``sparsify``, ``fully_shard``, optimizer, ``attach``.

        ``steps`` is the number of optimizer steps of the whole training, needed by schedules given
        as fractions; None keeps the number known from before. Zeroth biases that the optimizer does
        not know yet join the group of their block's up layer. One optimizer is followed at a time:
        call it again after loading a checkpoint or with another one.

        Raises:
            TypeError: not a torch optimizer; Accelerate's wrapper of one is taken too.
            ValueError: a schedule is a fraction of the steps and ``steps`` is missing, a layer was
                wrapped (peft) after ``sparsify``, or the optimizer holds nothing of a model that
                was sharded after it was made.
        """
        if not isinstance(optimizer, torch.optim.Optimizer):
            raise TypeError(f"expected a torch.optim.Optimizer, got {type(optimizer).__name__}")
        inner = getattr(optimizer, "optimizer", None)  # accelerate's wrapper runs no step hooks
        if isinstance(inner, torch.optim.Optimizer):
            optimizer = inner
        if steps is not None and steps < 1:
            raise ValueError(f"steps={steps!r}: expected the number of optimizer steps, at least 1")
        steps = self.steps if steps is None else steps
        for block in self.blocks:
            if self.model.get_submodule(block.up.name) is not block.up.module:
                raise ValueError(
                    f"layer {block.up.name!r} was exchanged or wrapped after sparsify (by peft?), "
                    f"so its modifications miss a part of it; wrap first, then sparsify"
                )
        for modification, _ in self._attached:
            for ramp in modification.ramps():  # fail now rather than after the first step
                ramp.value(max(1, self.step), steps)
        self.steps = steps
        for _, attached in self._attached:
            attached.update(Progress(self.step, steps))
        self._join(optimizer)
        for hook in self._hooks:
            hook.remove()
        self._hooks = [optimizer.register_step_post_hook(self._after_step)]

    def _join(self, optimizer: torch.optim.Optimizer) -> None:
        shards = sharded(self.model.modules())
        for module in shards:  # what an evaluation has left gathered is no optimizer's parameter
            module.reshard()
        known = {id(p): group for group in optimizer.param_groups for p in group["params"]}
        names = {id(p): name for name, p in self.model.named_parameters()}
        if shards and known.keys().isdisjoint(names):
            raise ValueError(
                "the optimizer holds no parameter of the model: fully_shard has exchanged them "
                "since; make the optimizer after fully_shard, then attach it"
            )
        for block in self.blocks:
            table = block.up.module._modules.get(CHILD)
            for parameter in table.parameters() if table is not None else ():
                if id(parameter) in known or not parameter.requires_grad:
                    continue
                group = next(
                    (known[id(p)] for p in block.up.module.parameters() if id(p) in known),
                    optimizer.param_groups[0],
                )
                group["params"].append(parameter)
                self._joined.append((optimizer, group, parameter))
                if "param_names" in group:
                    group["param_names"].append(names[id(parameter)])

    def _after_step(self, optimizer: torch.optim.Optimizer, *hook: Any) -> None:
        # GradScaler calls a fused optimizer even where it skips the step, and tells it so
        overflow = getattr(optimizer, "found_inf", None)
        if overflow is not None and bool(overflow):
            return
        unclaimed = [config for config, attached in self._attached if attached.unclaimed]
        if unclaimed and not self._asked:
            given = "loss" if any(config.needs_loss for config in unclaimed) else ""
            self._warn_once(
                f"recipe {self.recipe.name!r} has a penalty that this step's loss lacked: "
                f"loss = loss + handle.penalty({given}), before backward",
                stacklevel=4,
            )
        self._asked = False
        self.step += 1
        progress = Progress(self.step, self.steps)
        for _, change in sorted(self._attached, key=lambda pair: pair[0].order):
            change.update(progress)
            change.project(progress)

    def _warn_once(self, message: str, stacklevel: int) -> None:
        if message not in self._warned:
            self._warned.add(message)
            warnings.warn(message, stacklevel=stacklevel)

    def penalty(self, loss: Tensor | None = None) -> Tensor:
        """What the penalties add to the loss of the last forward pass, a 0-dim tensor.

        ``loss = loss + handle.penalty(loss)``; zero without penalties or outside training mode.
        Each call takes the values of one forward pass. ``loss``, a mean over the batch's samples,
        is needed by penalties on its gradients (``FlatnessPenalty``) alone. Warns, once, where
        schedules stand still in training since no optimizer is attached.

        Raises:
            ValueError: a penalty needs the loss, which is missing, not 0-dim or without a graph.
        """
        self._asked = True
        if not self._hooks and any(block.up.module.training for block in self.blocks):
            moving = [type(config).__name__ for config, _ in self._attached if config.ramps()]
            if moving:
                self._warn_once(
                    f"schedules stand still ({', '.join(dict.fromkeys(moving))}): "
                    f"handle.attach(optimizer, steps=...)",
                    stacklevel=3,
                )
        self._differentiate(loss)
        sums: dict[int, list[Tensor]] = {}
        for modification, attached in self._attached:
            value = attached.penalty()
            if value is not None:
                sums.setdefault(id(modification), []).append(value)
        if not sums:
            return torch.zeros((), device=next(self.model.parameters()).device)
        home = next(iter(sums.values()))[0].device
        means = [torch.stack([v.to(home) for v in values]).mean() for values in sums.values()]
        return torch.stack(means).sum()

    def _differentiate(self, loss: Tensor | None) -> None:
        """Give the loss's gradients, of one backward pass, to the penalties that need them."""
        asked = [
            (modification, attached, stages)
            for modification, attached in self._attached
            if (stages := attached.differentiated())
        ]
        if not asked:
            return
        name = type(asked[0][0]).__name__
        if loss is None:
            raise ValueError(
                f"{name} needs the loss: handle.penalty(loss), the loss of the last forward pass, "
                f"a mean over its samples; in training by the callback the model itself must "
                f"return one (called with labels)"
            )
        if loss.dim() or not loss.requires_grad:
            raise ValueError(
                f"{name} needs a loss with a graph, of no dimensions; got {loss.dim()} dimensions, "
                f"requires_grad={loss.requires_grad}"
            )
        for _, attached, stages in asked:
            if not all(stage.requires_grad for stage in stages):
                raise RuntimeError(
                    f"{name} at block {attached.site.block.name!r}: the forward kept no gradient "
                    f"of z (reentrant gradient checkpointing? use use_reentrant=False; or nothing "
                    f"up to there is trained)"
                )
        gradients = iter(
            torch.autograd.grad(
                loss,
                [stage for _, _, stages in asked for stage in stages],
                create_graph=True,
                allow_unused=True,
            )
        )
        for _, attached, stages in asked:
            attached.gradients = [next(gradients) for _ in stages]

    def state_dict(self) -> dict[str, Any]:
        """Where the schedules stand; parameters are in the model's own state dict."""
        return {"step": self.step, "steps": self.steps}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Go on where :meth:`state_dict` was taken.

        Raises:
            ValueError: ``state`` is not a handle's.
        """
        if set(state) != {"step", "steps"}:
            raise ValueError(f"not a handle's state: keys {sorted(state)}, expected step and steps")
        self.step, self.steps = int(state["step"]), state["steps"]
        for _, attached in self._attached:
            attached.update(Progress(self.step, self.steps))

    def remove(self) -> None:
        """Take everything back: the model computes, and its state dict reads, as without it.

        Parameters keep the values that training gave them.
        """
        for hook in self._hooks:
            hook.remove()
        self._hooks.clear()
        for optimizer, group, parameter in self._joined:
            places = [i for i, p in enumerate(group["params"]) if p is parameter]
            for key in ("params", "param_names"):
                if places and key in group:
                    del group[key][places[0]]
            optimizer.state.pop(parameter, None)
        self._joined.clear()
        for _, attached in reversed(self._attached):
            attached.remove()
        self._attached.clear()
        if self.model.__dict__.get(_ATTRIBUTE) is self:
            del self.model.__dict__[_ATTRIBUTE]

    # -- for the eye ----------------------------------------------------------------------------

    def rows(self) -> list[dict[str, str]]:
        """One row for each modification and block: ``modification``, ``block``, ``change`` or
        ``left_alone`` with the reason."""
        rows = [
            {
                "modification": type(modification).__name__,
                "block": attached.site.block.name,
                "change": attached.note,
            }
            for modification, attached in self._attached
        ]
        rows += [
            {"modification": modification, "block": block, "left_alone": reason}
            for modification, block, reason in self._left_alone
        ]
        return rows

    def __str__(self) -> str:
        count, model = len(self.blocks), type(self.model).__name__
        lines = [f"{self.recipe.name}: {count} MLP block{'s' * (count != 1)} of {model}"]
        for key, label in (("change", ""), ("left_alone", "left alone: ")):
            alike: dict[tuple[str, str], list[str]] = {}
            for row in self.rows():
                if key in row:
                    text = _alike(row[key])
                    alike.setdefault((row["modification"], text), []).append(
                        row["block"] or "(root)"
                    )
            for (modification, text), blocks in alike.items():
                where = blocks[0] if len(blocks) == 1 else f"{blocks[0]} … {blocks[-1]}"
                lines.append(f"  {modification:<18} {where}: {label}{text}")
        lines += [f"  refused {line}" for line in told(self.blocks.refused)]
        return "\n".join(lines)


def _alike(text: str) -> str:
    """The text without the numbers of layers, so that it is the same in every layer.

    >>> _alike("h.0.ln.weight, weight 0.5")
    'h.*.ln.weight, weight 0.5'
    """
    decimal, layer = r"(?<![\w.])\d+\.\d+(?![\w.])", r"\.\d+\b"
    return re.sub(f"({decimal})|{layer}", lambda found: found[1] or ".*", text)


def handle_of(model: nn.Module) -> Handle | None:
    """The handle attached to a model, if it has been sparsified."""
    return model.__dict__.get(_ATTRIBUTE)


def keep_handle(model: nn.Module, handle: Handle) -> None:
    """Note the handle on its model, so that ``save`` and ``observe`` find it."""
    model.__dict__[_ATTRIBUTE] = handle

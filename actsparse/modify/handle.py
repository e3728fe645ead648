"""What ``sparsify`` returns: everything attached to a model, to follow, print and take back."""

from __future__ import annotations

import copy
import re
import warnings
from typing import Any

import torch
from torch import Tensor, nn

from actsparse.blocks.block import Blocks, told
from actsparse.blocks.resolve import HANDLE
from actsparse.blocks.running import running_calls
from actsparse.blocks.sharding import sharded
from actsparse.modify.config_note import note_changes
from actsparse.modify.followed_optimizers import Changes, Following, optimizers_in
from actsparse.modify.modification import Attached, Modification, Progress
from actsparse.modify.recipe import Recipe
from actsparse.modify.step_buffer import Clock
from actsparse.modify.zeroth_bias import CHILD


class Handle:
    """The modifications of one model; ``print`` it to see what changed and what did not, and why.

    ``blocks`` are the model's MLP blocks, ``step`` the optimizer steps followed so far.
    """

    def __init__(self, model: nn.Module, recipe: Recipe, blocks: Blocks) -> None:
        self.model = model
        self.recipe = recipe
        self.blocks = blocks
        self._warned: set[str] = set()  # once is enough
        self._asked = False  # whether penalty() was called since the last step
        self._attached: list[tuple[Modification, Attached]] = []
        self._left_alone: list[tuple[str, str, str]] = []  # modification, block, reason
        moving = any(modification.ramps() for modification in recipe.modifications)
        self._clock = Clock(model, blocks, self._move, moving)
        self._following: Following | None = None
        self._followed: list[Following] = []  # before, kept to take back what joined
        self._changes = Changes(blocks)
        self._hooks: list[Any] = []
        if recipe.modifications:
            self._hooks = [
                model.register_forward_pre_hook(self._before_pass),
                model.register_load_state_dict_pre_hook(self._clock.before_load),
                model.register_load_state_dict_post_hook(self.look),
                model.register_state_dict_pre_hook(self.look),
            ]

    @property
    def step(self) -> int:
        """Optimizer steps followed so far."""
        return self._clock.step

    @property
    def steps(self) -> int | None:
        """Optimizer steps of the whole training, where known."""
        return self._clock.steps

    @property
    def has_schedules(self) -> bool:
        """Whether the recipe moves with training."""
        return any(modification.ramps() for modification, _ in self._attached)

    @property
    def changes_function(self) -> bool:
        """Whether the model computes something else in evaluation than without the recipe."""
        return any(modification.changes_function for modification, _ in self._attached)

    def add(self, modification: Modification, attached: Attached) -> None:
        """Take over something that ``sparsify`` attached."""
        self._attached.append((modification, attached))

    def leave_alone(self, modification: str, block: str, reason: str) -> None:
        """Note why a modification was not made at a block."""
        self._left_alone.append((modification, block, reason))

    # -- during training ------------------------------------------------------------------------

    def attach(
        self, optimizer: torch.optim.Optimizer, steps: int | None = None, start: int | None = None
    ) -> None:
        """Follow an optimizer: after each of its real steps schedules move and parameters are
        projected. Right under accumulation, GradScaler's skipped steps, DDP and FSDP2, for which
        the order is ``sparsify``, ``fully_shard``, optimizer, ``attach``; and where an optimizer
        steps through others that it keeps, as SAM does.

        ``steps`` is the number of optimizer steps of the whole training, needed by schedules given
        as fractions; None keeps the number known from before. ``start`` is the number of steps
        done before, where the weights do not say: None keeps ``handle.step``. Zeroth biases that
        the optimizer does not know yet join the group of their block's up layer. One optimizer is
        followed at a time: call it again with another one.

        Raises:
            TypeError: not a torch optimizer; Accelerate's wrapper of one is taken too.
            ValueError: a schedule is a fraction of the steps and ``steps`` is missing, a layer was
                wrapped (peft) after ``sparsify``, the optimizer holds nothing of the model, or
                ``start`` is negative.
        """
        if not isinstance(optimizer, torch.optim.Optimizer):
            raise TypeError(f"expected a torch.optim.Optimizer, got {type(optimizer).__name__}")
        if steps is not None and steps < 1:
            raise ValueError(f"steps={steps!r}: expected the number of optimizer steps, at least 1")
        if start is not None and start < 0:
            raise ValueError(f"start={start!r}: expected the number of steps done, 0 or more")
        self.look()
        steps = self.steps if steps is None else steps
        start = self.step if start is None else start
        for block in self.blocks:
            if self.model.get_submodule(block.up.name) is not block.up.module:
                raise ValueError(
                    f"layer {block.up.name!r} was exchanged or wrapped after sparsify (by peft?), "
                    f"so its modifications miss a part of it; wrap first, then sparsify"
                )
        for modification, _ in self._attached:
            for ramp in modification.ramps():  # fail now rather than after the first step
                ramp.value(max(1, start), steps)
        optimizers = self._optimizers(optimizer)
        self._clock.unfollowed()
        self._put(start, steps)
        if self._following is not None and self._following.leave():
            self._followed.append(self._following)
        self._following = Following(optimizers, self._before_step, self._after_step)
        self._changes.explained()
        names = {id(p): name for name, p in self.model.named_parameters()}
        for block in self.blocks:
            table = block.up.module._modules.get(CHILD)
            for parameter in table.parameters() if table is not None else ():
                beside = block.up.module.parameters()
                self._following.join(parameter, names[id(parameter)], beside)

    def _optimizers(self, optimizer: torch.optim.Optimizer) -> list[torch.optim.Optimizer]:
        shards = sharded(self.model.modules())
        for module in shards:  # what an evaluation has left gathered is no optimizer's parameter
            module.reshard()
        found = optimizers_in(optimizer, {id(p) for p in self.model.parameters()})
        if not found and shards:
            raise ValueError(
                "the optimizer holds no parameter of the model: fully_shard has exchanged them "
                "since; make the optimizer after fully_shard, then attach it"
            )
        if not found:
            raise ValueError(
                f"{type(optimizer).__name__} holds no parameter of the model that was sparsified; "
                f"is it of a copy, or was the model made anew since?"
            )
        return found

    def _before_step(self) -> None:
        for change in self._in_order():
            change.prepare(Progress(self.step, self.steps))

    def _after_step(self, new: bool) -> None:
        self._clock.look()
        if new:
            self._say_unclaimed("this step's", stacklevel=6)
            self._asked = False
            self._put(self.step + 1, self.steps)
        for change in self._in_order():
            change.forget()
            change.project(Progress(self.step, self.steps))
        self._changes.explained()

    def _in_order(self) -> list[Attached]:
        return [change for _, change in sorted(self._attached, key=lambda pair: pair[0].order)]

    def _put(self, step: int, steps: int | None) -> None:
        self._clock.put(step, steps)
        self.look()

    def _move(self) -> None:
        for _, attached in self._attached:
            attached.update(Progress(self.step, self.steps))

    def look(self, *hook: Any) -> None:
        """Follow what the model's buffer says; between passes, as sites take up new hooks."""
        self._clock.look()
        for _, attached in self._attached:
            attached.settle()

    def _say_unclaimed(self, whose: str, stacklevel: int) -> None:
        if not self._asked and any(attached.unclaimed for _, attached in self._attached):
            self._warn_once(
                f"recipe {self.recipe.name!r} has a penalty that {whose} loss lacked: "
                "loss = loss + handle.penalty(), before backward",
                stacklevel,
            )

    # -- before each pass -----------------------------------------------------------------------

    def _before_pass(self, *hook: Any) -> None:
        compiling = torch.compiler.is_compiling()
        if not self.model.training:
            if not compiling:
                self._clock.before_pass()
            elif self._clock.copied:  # nobody tells compiled code that an average has moved
                torch.compiler.disable(self._clock.before_pass)()
            return
        if not compiling:
            if torch._C._current_graph_task_id() != -1:  # recomputed inside backward
                return
            self._notice_steps()
            if any(each.unclaimed for _, each in self._attached) and running_calls(self.model) > 1:
                return  # a pass inside another one is a part of that
        for _, attached in self._attached:
            attached.forget()

    def _notice_steps(self) -> None:
        """Warn where weights change from pass to pass and no step is seen."""
        if not torch.is_grad_enabled() or (self._following and self._following.running):
            return
        if self._changes.count() < 3:
            return
        self._say_unclaimed("the", stacklevel=6)
        waiting = [
            type(config).__name__
            for config, attached in self._attached
            if config.ramps() or type(attached).project is not Attached.project
        ]
        if waiting:
            why = (
                "handle.attach(optimizer, steps=...)"
                if self._following is None
                else "the optimizer that was attached makes no step; attach the one that does"
            )
            self._warn_once(
                f"weights change in training, but no optimizer step is seen, so "
                f"{', '.join(dict.fromkeys(waiting))} stood still: {why}",
                stacklevel=5,
            )

    def _warn_once(self, message: str, stacklevel: int) -> None:
        if message not in self._warned:
            self._warned.add(message)
            warnings.warn(message, stacklevel=stacklevel)

    def penalty(self) -> Tensor:
        """What the penalties add to the loss of the last forward pass, a 0-dim tensor.

        ``loss = loss + handle.penalty()``; zero without penalties or outside training mode.
        Each call takes the values of one forward pass. Warns, once, where schedules stand still in
        training since no optimizer is attached.
        """
        self._asked = True
        self.look()
        if self._following is None and any(block.up.module.training for block in self.blocks):
            moving = [type(config).__name__ for config, _ in self._attached if config.ramps()]
            if moving:
                self._warn_once(
                    f"schedules stand still ({', '.join(dict.fromkeys(moving))}): "
                    f"handle.attach(optimizer, steps=...)",
                    stacklevel=3,
                )
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

    def state_dict(self) -> dict[str, Any]:
        """Where the schedules stand; parameters are in the model's own state dict."""
        self.look()
        return {"step": self.step, "steps": self.steps}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Go on where :meth:`state_dict` was taken.

        Raises:
            ValueError: ``state`` is not a handle's.
        """
        if set(state) != {"step", "steps"}:
            raise ValueError(f"not a handle's state: keys {sorted(state)}, expected step and steps")
        self._put(int(state["step"]), state["steps"])

    def remove(self) -> None:
        """Take everything back: the model computes, and its state dict reads, as without it.

        Parameters keep the values that training gave them.
        """
        for following in (*self._followed, self._following):
            if following is not None:
                following.remove()
        self._following = None
        self._followed.clear()
        for hook in self._hooks:
            hook.remove()
        self._hooks.clear()
        self._clock.remove()
        for _, attached in reversed(self._attached):
            attached.remove()
        self._attached.clear()
        if self.model.__dict__.get(HANDLE) is self:
            del self.model.__dict__[HANDLE]
            note_changes(self.model)

    def __getstate__(self) -> dict[str, Any]:
        # copies follow no optimizer
        return {**self.__dict__, "_following": None, "_followed": []}

    def __deepcopy__(self, memo: dict[int, Any]) -> Handle:
        twin = memo[id(self)] = Handle.__new__(Handle)
        twin.__dict__.update(copy.deepcopy(self.__getstate__(), memo))
        twin._clock.copy_of(self._clock)
        return twin

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
    handle: Handle | None = model.__dict__.get(HANDLE)
    if handle is not None:
        handle.look()
    return handle


def keep_handle(model: nn.Module, handle: Handle) -> None:
    """Note the handle on its model, so that ``save`` and ``observe`` find it."""
    model.__dict__[HANDLE] = handle

"""``Handle``, what ``sparsify`` returns: all that is attached to a model, to follow and remove."""

from __future__ import annotations

import copy
from typing import Any

import torch
from torch import Tensor, nn

from actsparse.blocks.block import Blocks
from actsparse.blocks.pass_state import running_calls
from actsparse.blocks.resolve import HANDLE
from actsparse.modify.config_note import note_changes
from actsparse.modify.followed_optimizers import Changes, Following, optimizers_of
from actsparse.modify.forgotten import Forgotten
from actsparse.modify.modification import Attached, Modification, Progress
from actsparse.modify.print_handle import html_of, repr_of, text_of
from actsparse.modify.recipe import Recipe
from actsparse.modify.step_buffer import Clock
from actsparse.modify.zeroth_bias import CHILD


class Handle:
    """All modifications of one model; print it to see what changed, what did not, and why.

    :func:`actsparse.sparsify` makes it, and :func:`actsparse.handle_of` finds it later.

    Args:
        model: the model, without wrappers.
        recipe: its recipe.
        blocks: its MLP blocks.

    >>> from actsparse import sparsify
    >>> mlp = nn.Sequential(nn.LayerNorm(8), nn.Linear(8, 32), nn.ReLU(), nn.Linear(32, 8))
    >>> x = torch.randn(2, 5, 8)
    >>> handle = sparsify(mlp, inputs=x)  # the recipe "best"
    >>> handle.rows()[0]["change"]
    'relu → jsrelu'
    >>> optimizer = torch.optim.SGD(mlp.parameters(), lr=0.1)
    >>> handle.attach(optimizer, steps=100)
    >>> loss = mlp(x).square().mean() + handle.penalty()
    >>> loss.backward()
    >>> optimizer.step()
    >>> handle.step, handle.state_dict()
    (1, {'step': 1, 'steps': 100})
    >>> handle.load_state_dict({"step": 0, "steps": 100})
    >>> handle.remove()
    """

    def __init__(self, model: nn.Module, recipe: Recipe, blocks: Blocks) -> None:
        self.model = model
        self.recipe = recipe
        self.blocks = blocks
        self._forgotten = Forgotten(recipe.name)
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
        """The number of optimizer steps followed so far."""
        return self._clock.step

    @property
    def steps(self) -> int | None:
        """The number of optimizer steps of the whole training; None if unknown."""
        return self._clock.steps

    @property
    def has_schedules(self) -> bool:
        """Whether anything in the recipe changes with the number of steps."""
        return any(modification.ramps() for modification, _ in self._attached)

    @property
    def changes_function(self) -> bool:
        """Whether in evaluation the model computes something else than without the recipe."""
        return any(modification.changes_function for modification, _ in self._attached)

    def add(self, modification: Modification, attached: Attached) -> None:
        """Add what a modification has attached to a block; ``sparsify`` calls it.

        Args:
            modification: the modification.
            attached: what its ``apply`` returned.
        """
        self._attached.append((modification, attached))

    def hold(self, held: Any) -> None:
        """Keep what :meth:`remove` is to remove with the rest; ``sparsify`` calls it.

        Args:
            held: anything with a ``remove()``.
        """
        self._hooks.append(held)

    def leave_alone(self, modification: str, block: str, reason: str) -> None:
        """Note why a modification was not made at a block; ``sparsify`` calls it.

        Args:
            modification: the name of the modification's class.
            block: the name of the block.
            reason: why not.
        """
        self._left_alone.append((modification, block, reason))

    # -- during training ------------------------------------------------------------------------

    def attach(
        self, optimizer: torch.optim.Optimizer, steps: int | None = None, start: int | None = None
    ) -> None:
        """Follow an optimizer: move schedules and project parameters after each of its steps.

        Only real steps count: not the small batches of accumulation, nor the steps that GradScaler
        skips. It also works where one optimizer steps through others that it holds, as SAM does.
        With DDP and FSDP2 the order is ``sparsify``, ``fully_shard``, optimizer, ``attach``.

        Zeroth biases that the optimizer does not hold yet join the group of their block's up layer.
        One optimizer is followed at a time; call it again to follow another one.

        Args:
            optimizer: the optimizer of the model's parameters.
            steps: the number of optimizer steps of the whole training. Schedules that are given as
                fractions need it. None keeps the number known from before.
            start: the number of steps done before, where the weights do not say it. None keeps
                ``handle.step``.

        Raises:
            TypeError: not a torch optimizer (Accelerate's wrapper of one is accepted).
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
        layers = [block.up for block in self.blocks]
        layers += [layer for _, attached in self._attached for layer in attached.elsewhere]
        for layer in layers:
            if self.model.get_submodule(layer.name) is not layer.module:
                raise ValueError(
                    f"layer {layer.name!r} was replaced or wrapped after sparsify (by peft?), "
                    f"so its modifications miss a part of it; wrap first, then sparsify"
                )
        for modification, _ in self._attached:
            for ramp in modification.ramps():  # fail now rather than after the first step
                ramp.value(max(1, start), steps)
        optimizers = optimizers_of(self.model, optimizer)
        self._clock.unfollowed()
        self._put(start, steps)
        self._forgotten.began(start)
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

    def _before_step(self) -> None:
        for change in self._in_order():
            change.prepare(Progress(self.step, self.steps))

    def _after_step(self, new: bool) -> None:
        self._clock.look()
        if new:
            self._forgotten.penalty(self._in_order(), "this step's", stacklevel=6)
            self._forgotten.asked = False
            self._put(self.step + 1, self.steps)
            if self.has_schedules:
                self._forgotten.more(self.step, self.steps)
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
        """Take the step from the model's buffer, which loading or averaging may have changed.

        Call it between passes only, because hooks may change.

        Args:
            *hook: ignored, so that it can serve as a hook.
        """
        self._clock.look()
        for _, attached in self._attached:
            attached.settle()

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
        self._forgotten.penalty(self._in_order(), "the", stacklevel=6)
        waiting = (
            config
            for config, attached in self._attached
            if config.ramps() or type(attached).project is not Attached.project
        )
        self._forgotten.steps(waiting, following=self._following is not None)

    def penalty(self) -> Tensor:
        """The penalty of the last forward pass, to be added to its loss.

        ``loss = loss + handle.penalty()``. Each call takes the values of one forward pass. It
        warns, once, if no optimizer is attached although a schedule waits for one.

        Returns:
            A tensor without dimensions; zero without penalties or outside training mode.
        """
        self._forgotten.asked = True
        self.look()
        if self._following is None and any(block.up.module.training for block in self.blocks):
            self._forgotten.attaching(config for config, _ in self._attached)
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
        """The number of steps done and of all steps; parameters are in the model's own state dict.

        Returns:
            Plain values for JSON: ``step`` and ``steps``.
        """
        self.look()
        return {"step": self.step, "steps": self.steps}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Go on from where :meth:`state_dict` was called.

        Args:
            state: what it returned.

        Raises:
            ValueError: ``state`` is not a handle's.
        """
        if set(state) != {"step", "steps"}:
            raise ValueError(f"not a handle's state: keys {sorted(state)}, expected step and steps")
        self._put(int(state["step"]), state["steps"])

    def remove(self) -> None:
        """Remove everything: the model computes as before, and its state dict has its old keys.

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
        """One row for each modification and each block.

        Returns:
            ``modification``, ``block``, and either ``change`` or, with the reason, ``left_alone``.
        """
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
        return text_of(self.recipe.name, self.model, self.blocks, self.rows())

    def __repr__(self) -> str:
        return repr_of(self)

    def _repr_html_(self) -> str:
        return html_of(self)


def handle_of(model: nn.Module) -> Handle | None:
    """The handle of a model that was sparsified, or None.

    Args:
        model: the model that ``sparsify`` got, without wrappers.

    Returns:
        The handle, or None if the model is not sparsified.

    >>> handle_of(nn.Linear(2, 2)) is None
    True
    """
    handle: Handle | None = model.__dict__.get(HANDLE)
    if handle is not None:
        handle.look()
    return handle


def keep_handle(model: nn.Module, handle: Handle) -> None:
    """Note the handle on its model, so that ``save`` and ``observe`` find it."""
    model.__dict__[HANDLE] = handle

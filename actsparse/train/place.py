"""Which handle a training belongs to, and at which step its schedules begin."""

from __future__ import annotations

import warnings

from torch import nn
from transformers import TrainerState

from actsparse.blocks.block import unwrap
from actsparse.modify import Handle, handle_of


def handle_in(model: nn.Module, handle: Handle) -> Handle:
    """``handle``, or the handle of the ``model`` that ``model_init`` has made anew.

    Raises:
        ValueError: it is of another model, and this one has none.
    """
    inside = set(model.modules())
    if all(block.up.module in inside for block in handle.blocks):
        return handle
    own = handle_of(unwrap(model))
    if own is None:
        raise ValueError(
            "the callback's handle belongs to another model than the one that is trained (does "
            "model_init make a new one?): call sparsify inside model_init, and its handle is used"
        )
    return own


def place_of(handle: Handle, state: TrainerState) -> tuple[int, int]:
    """The step where schedules begin, and how many steps they span."""
    done, known = handle.step, handle.steps
    moves = handle.has_schedules and done > 0
    if state.global_step:  # resumed; a step that GradScaler skipped is none of the handle's
        return (done, known or state.max_steps) if moves else (state.global_step, state.max_steps)
    if not moves:
        return 0, state.max_steps
    complete = known is not None and done >= known
    steps = known if known is not None and complete else done + state.max_steps
    warnings.warn(
        f"the recipe's schedules are at step {done} of an earlier training and go on from there, "
        f"{'as they are complete' if complete else f'to {steps}'}; to begin them again call "
        f"handle.load_state_dict({{'step': 0, 'steps': None}}) before",
        stacklevel=5,
    )
    return done, steps

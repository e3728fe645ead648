"""``sparsify``: attach the modifications of a recipe to a model."""

from __future__ import annotations

import sys
from collections.abc import Sequence
from typing import Any

import torch
from torch import nn

from actsparse.blocks.block import Blocks, MLPBlock, on_meta, unwrap
from actsparse.blocks.replace_forward import Refusing
from actsparse.blocks.resolve import found_with
from actsparse.blocks.site import site_at
from actsparse.modify.config_note import note_changes
from actsparse.modify.handle import Handle, handle_of, keep_handle
from actsparse.modify.modification import Modification, NotApplicable
from actsparse.modify.recipe import RecipeLike, as_recipe
from actsparse.modify.thresholds import thresholds_of
from actsparse.modify.zeroth_bias import CHILD


def sparsify(
    model: nn.Module,
    recipe: RecipeLike = "best",
    *,
    inputs: Any = None,
    blocks: Blocks | Sequence[MLPBlock] | None = None,
    optimizer: torch.optim.Optimizer | None = None,
    steps: int | None = None,
) -> Handle:
    """Modify a model in place so that fewer of its MLP neurons are active.

    Modifications attach to the model's own modules. Nothing is wrapped or renamed, so a checkpoint
    of the plain model still loads (with ``strict=False``: only zeroth biases are missing). A recipe
    with schedules adds a buffer, ``actsparse_progress``, which holds the number of steps done.

    The default recipe, ``"best"``, is for training from scratch. It needs three things:

    - its penalty in the loss, ``loss = loss + handle.penalty()`` (the Trainer's callback adds it);
    - an optimizer and the number of steps, for the ramp of the penalty: here, or by
      ``handle.attach(optimizer, steps=...)``;
    - weight decay that spares norms and biases (:func:`decay_groups`).

    With peft, wrap first (:func:`actsparse.modify.adapters.lora_config`), then sparsify. The
    ``PeftModel`` then saves zeroth biases with its adapters.

    Args:
        model: the model, not yet wrapped in DDP. ``torch.compile`` may come before or after.
        recipe: the name of a recipe (:func:`actsparse.modify.recipe_named`), a :class:`Recipe`, a
            modification or a list of modifications.
        inputs: what the model runs on, to find its MLP blocks: a tensor, a tuple, or a dict for
            ``model(**inputs)``. Blocks that they do not reach (experts, another tower) stay as they
            are, with a warning.
        blocks: the blocks to modify, instead of ``inputs``.
        optimizer: follow this optimizer at once, as :meth:`Handle.attach` does.
        steps: the number of its steps in the whole training. Schedules that are given as fractions
            need it.

    Returns:
        The handle. Print it, ``attach`` an optimizer, ``remove`` everything again.

    Raises:
        TypeError: ``model`` is no module, or ``recipe`` none of the above.
        ValueError: unknown recipe; no block; blocks of another model; a modification that fits no
            block at all; a model that is sparsified already, has thresholds, is wrapped in DDP or
            has weights on 'meta' (offloaded, or not loaded); ``steps`` without ``optimizer``, or
            missing where a schedule needs it. The model is untouched then.

    >>> mlp = nn.Sequential(nn.LayerNorm(8), nn.Linear(8, 32), nn.ReLU(), nn.Linear(32, 8))
    >>> handle = sparsify(mlp, "paper", inputs=torch.randn(2, 5, 8))
    >>> print(handle)
    paper: 1 MLP block of Sequential
      ZerothBias         (root): 5 positions (the length seen in inputs), 0.bias frozen
      NormFloor          (root): 0.weight ≥ 1
      SwapActivation     (root): relu → jsrelu
    >>> handle.remove()
    """
    if not isinstance(model, nn.Module):
        raise TypeError(f"sparsify takes a torch.nn.Module, got {type(model).__name__}")
    recipe = as_recipe(recipe)
    if isinstance(model, nn.parallel.DistributedDataParallel | nn.DataParallel):
        raise ValueError(
            f"the model is wrapped in {type(model).__name__}, which would not see new parameters; "
            f"sparsify it before wrapping"
        )
    if steps is not None and optimizer is None:
        raise ValueError(f"steps={steps!r} needs optimizer=; or give steps to handle.attach later")
    root = unwrap(model)
    for name, module in root.named_modules():
        existing = handle_of(module)
        if existing is not None:
            where = f"model.get_submodule({name!r})" if name else "model"
            raise ValueError(
                f"{f'its part {name!r}' if name else 'the model'} is sparsified already (recipe "
                f"{existing.recipe.name!r}), perhaps by this cell of a notebook; call "
                f"actsparse.handle_of({where}).remove() first"
            )
    if blocks is None:
        if inputs is None:
            raise ValueError("sparsify needs inputs=, on which the model runs, or blocks=")
        blocks = found_with(root, inputs, "sparsify")
    blocks = blocks if isinstance(blocks, Blocks) else Blocks(blocks)
    _check_blocks(root, blocks)
    handle = Handle(root, recipe, blocks)
    try:
        for modification in recipe.modifications:
            _apply(handle, modification)
        if is_peft_model(root):
            _keep_with_adapter(root, blocks)
            tuner: Any = root.base_model
            names = [name for name in _UNLOADS if hasattr(type(tuner), name)]
            handle.hold(Refusing(tuner, _UNLOADING, *names))
        if optimizer is not None:
            handle.attach(optimizer, steps)
    except BaseException:
        handle.remove()
        raise
    keep_handle(root, handle)
    note_changes(root)
    return handle


def is_peft_model(model: nn.Module) -> bool:
    """Whether ``model`` is a ``PeftModel``; peft is not imported for that."""
    peft = sys.modules.get("peft")
    return peft is not None and isinstance(model, peft.PeftModel)


def _keep_with_adapter(model: Any, blocks: Blocks) -> None:
    """Let ``save_pretrained`` keep the zeroth biases.

    peft saves what its own layers hold, so a table on a layer with an adapter is saved as it is
    (since peft 0.21); any other is wrapped as its ``modules_to_save`` are.
    """
    import peft
    from peft.utils import ModulesToSaveWrapper

    adapter = model.active_adapter
    saved = peft.get_peft_model_state_dict(model, adapter_name=adapter, save_embedding_layers=False)
    for block in blocks:
        table = block.up.module._modules.get(CHILD)
        if table is None or f"{block.up.name}.{CHILD}.zeroth_bias" in saved:
            continue
        block.up.module._modules[CHILD] = ModulesToSaveWrapper(table, adapter)
        config = model.peft_config[adapter]
        config.modules_to_save = list(dict.fromkeys([*(config.modules_to_save or []), CHILD]))


_UNLOADS = ("merge_and_unload", "unload")  # other layers take the place of those with the recipe
_UNLOADING = (
    "the model is sparsified, and peft's unloading would leave the recipe behind: call "
    "actsparse.merge_adapter(model), which keeps it, or the handle's remove() first"
)


def _check_blocks(root: nn.Module, blocks: Blocks) -> None:
    if not blocks:
        raise ValueError("blocks= is empty: there is nothing to modify")
    modules = dict(root.named_modules(remove_duplicate=False))
    for block in blocks:
        if modules.get(block.up.name) is not block.up.module:
            raise ValueError(
                f"block {block.name!r} is not of this {type(root).__name__}: it was found in "
                f"another model or in a part of this one, or its layers were replaced since (by "
                f"peft?); find the blocks of this very model, or give inputs="
            )
        for part in (block.norm, block.gate, block.up, block.down):
            if part is not None and (reason := on_meta(part.module)) is not None:
                raise ValueError(f"block {block.name!r}, {part.name!r}: {reason}")
        site = site_at(block)
        if site is not None and site.modified and thresholds_of(root) is not None:
            raise ValueError(
                f"block {block.name!r} has a threshold; call thresholds_of(model).remove(), then "
                f"sparsify, then calibrate_thresholds again"
            )
        if site is not None and site.modified:
            raise ValueError(
                f"block {block.name!r} is modified already, as part of another model that is "
                f"sparsified or has thresholds; call that one's handle's remove() first"
            )


def _apply(handle: Handle, modification: Modification) -> None:
    reasons: dict[str, str] = {}
    for block in handle.blocks:
        try:
            attached = modification.apply(block)
        except NotApplicable as refusal:
            reasons[block.name] = str(refusal)
            continue
        handle.add(modification, attached)
    name = type(modification).__name__
    if reasons and len(reasons) == len(handle.blocks):
        first, reason = next(iter(reasons.items()))
        raise ValueError(f"{name} fits none of the {len(reasons)} blocks; {first}: {reason}")
    for left, reason in reasons.items():
        handle.leave_alone(name, left, reason)

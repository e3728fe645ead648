"""Weight decay by kind of parameter: choose which parameters decay."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

from torch import nn

from actsparse.blocks.norm import inspect_norm

_KINDS = ("norm", "bias", "zeroth_bias", "named_bias")
_OVER_CHANNELS = (nn.modules.batchnorm._NormBase, nn.GroupNorm)  # batch and instance norms too


def decay_groups(
    model: nn.Module, weight_decay: float, exclude: Iterable[str] = ()
) -> list[dict[str, Any]]:
    """Parameter groups for an optimizer in which only some kinds of parameters decay.

    By default all parameters decay, zeroth biases too: the papers' setting for ViT.
    ``exclude=("norm", "bias")`` gives *vanilla without decay on 1-D parameters*, the control that
    every comparison needs. ``exclude=("named_bias",)`` is the papers' setting for T5.

    Args:
        model: any model. Frozen parameters are left out.
        weight_decay: the weight decay of those that decay, at least 0.
        exclude: the kinds that do not decay: ``"norm"`` (scales of norms), ``"bias"`` (biases of
            norms and layers), ``"zeroth_bias"``, ``"named_bias"`` (every parameter with "bias" in
            its name, among them T5's relative positions and zeroth biases).

    Returns:
        One or two groups, ``{"params": [...], "weight_decay": ...}``, for any torch optimizer.

    Raises:
        ValueError: an unknown kind in ``exclude``, or a negative decay.

    >>> model = nn.Sequential(nn.LayerNorm(4), nn.Linear(4, 2))
    >>> groups = decay_groups(model, 0.5, exclude=("norm", "bias"))
    >>> [(len(g["params"]), g["weight_decay"]) for g in groups]
    [(1, 0.5), (3, 0.0)]
    """
    excluded = {exclude} if isinstance(exclude, str) else set(exclude)
    unknown = excluded - set(_KINDS)
    if unknown:
        raise ValueError(f"unknown kinds {sorted(unknown)} in exclude; known: {', '.join(_KINDS)}")
    if not weight_decay >= 0:
        raise ValueError(f"weight_decay={weight_decay!r}: expected a number ≥ 0")
    kinds: dict[int, str] = {}
    for name, module in model.named_modules():
        norm = inspect_norm(name, module)
        if norm is not None:
            kinds[id(norm.parameter("scale"))] = "norm"
            kinds[id(norm.parameter("bias"))] = "bias"
        elif isinstance(module, _OVER_CHANNELS):
            kinds[id(module.weight)] = "norm"
    groups: dict[bool, list[nn.Parameter]] = {True: [], False: []}
    for name, parameter in model.named_parameters():
        if not parameter.requires_grad:
            continue
        leaf = name.rpartition(".")[2]
        kind: str | None = kinds.get(id(parameter))
        if leaf == "zeroth_bias":
            kind = "zeroth_bias"
        elif kind is None and leaf.endswith("bias") and parameter.dim() <= 1:
            kind = "bias"
        spared = kind in excluded or ("named_bias" in excluded and "bias" in name)
        groups[not spared].append(parameter)
    decays = {True: weight_decay, False: 0.0}
    return [
        {"params": parameters, "weight_decay": decays[decay]}
        for decay, parameters in groups.items()
        if parameters
    ]

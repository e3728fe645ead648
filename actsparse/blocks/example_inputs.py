"""Example inputs of a model: a tensor, a tuple of arguments, or a dict of keyword arguments."""

from __future__ import annotations

import copy
from typing import Any

import torch
from torch import Tensor, nn


def run_forward(model: nn.Module, inputs: Any) -> Any:
    """Call the model as ``inputs`` says: a tensor, a tuple of arguments, or a dict of keywords.

    Raises:
        TypeError: ``inputs`` is none of these.
    """
    if isinstance(inputs, Tensor):
        return model(inputs)
    if isinstance(inputs, tuple):
        return model(*inputs)
    if hasattr(inputs, "keys"):
        return model(**dict(inputs))
    raise TypeError(
        f"inputs must be a tensor, a tuple of arguments or a dict of keyword arguments for "
        f"the model's forward, got {type(inputs).__name__}"
    )


def tensors_in(value: Any) -> list[Tensor]:
    """The tensors that dicts, tuples and lists hold, in order.

    >>> tensors_in({"x": torch.ones(1), "more": [(torch.zeros(1), 2)]})
    [tensor([1.]), tensor([0.])]
    """
    if isinstance(value, Tensor):
        return [value]
    if isinstance(value, dict):
        value = value.values()
    elif not isinstance(value, tuple | list):
        return []
    return [tensor for item in value for tensor in tensors_in(item)]


def copied(inputs: Any) -> Any:
    """A copy of ``inputs``, for a forward that writes into them, as into a key–value cache.

    What cannot be copied stays what it is.

    >>> x = torch.ones(2)
    >>> copied({"x": x, "more": [x]})["more"][0].mul_(2), x
    (tensor([2., 2.]), tensor([1., 1.]))
    """
    inputs = dict(inputs) if hasattr(inputs, "keys") else inputs
    # a tensor's own deep copy takes all of its storage along, and refuses one that has a graph
    clones = {id(tensor): tensor.detach().clone() for tensor in tensors_in(inputs)}
    try:
        return copy.deepcopy(inputs, clones)
    except Exception:  # whatever a stranger's object says to that
        return inputs


def describe_inputs(inputs: Any) -> Any:
    """``inputs`` as plain values, each tensor as its shape and dtype; None if that cannot be.

    >>> describe_inputs({"input_ids": torch.zeros(1, 3, dtype=torch.long)})
    {'input_ids': {'shape': [1, 3], 'dtype': 'int64'}}
    """
    if isinstance(inputs, Tensor):
        return {"shape": list(inputs.shape), "dtype": str(inputs.dtype).removeprefix("torch.")}
    if hasattr(inputs, "keys"):
        return {key: describe_inputs(inputs[key]) for key in inputs}
    if isinstance(inputs, tuple | list):
        return [describe_inputs(value) for value in inputs]
    return inputs if isinstance(inputs, bool | int | float | str) else None


def dummy_inputs(description: Any, device: torch.device) -> Any:
    """Zeros of the shapes that :func:`describe_inputs` noted."""
    if isinstance(description, dict) and set(description) == {"shape", "dtype"}:
        dtype = getattr(torch, description["dtype"])
        return torch.zeros(description["shape"], dtype=dtype, device=device)
    if isinstance(description, dict):
        return {key: dummy_inputs(value, device) for key, value in description.items()}
    if isinstance(description, list):
        return tuple(dummy_inputs(value, device) for value in description)
    return description

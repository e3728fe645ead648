"""Whether the state of a session fits another one."""

from __future__ import annotations

from collections.abc import Mapping

from torch import Tensor


def check_state(state: Mapping[str, Tensor], own: Mapping[str, Tensor]) -> None:
    """Refuse a ``state`` that is not of the session whose tensors are ``own``.

    Raises:
        ValueError: it is of other blocks, measures or sizes.

    >>> import torch
    >>> check_state({"0/train/density/0": torch.empty(0)}, {"0/train/density/0": torch.zeros(8)})
    """
    missing, unknown = sorted(own.keys() - state.keys()), sorted(state.keys() - own.keys())
    if missing or unknown:
        raise ValueError(
            f"the state is of other blocks or measures: missing "
            f"{_some(missing)}; not observed here {_some(unknown)}"
        )
    for key, tensor in own.items():
        given = state[key]
        if not isinstance(given, Tensor):
            raise ValueError(f"not a state of what was seen: {key} is no tensor, but {given!r}")
        if given.numel() and (given.shape, given.dtype) != (tensor.shape, tensor.dtype):
            raise ValueError(
                f"the state is of other sizes: {key} is {given.dtype} {list(given.shape)}, "
                f"but here {tensor.dtype} {list(tensor.shape)}"
            )


def _some(keys: list[str]) -> str:
    return ", ".join(keys[:3]) + (f" and {len(keys) - 3} more" if keys[3:] else "") or "nothing"

"""What looks like an MLP block but is not handled, and the error if there is nothing else."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass

ALONE = (
    "MLP-shaped, but its output is not added to the tokens that it runs on (a mixer's MLP over "
    "transposed tokens, a head)"
)


@dataclass(frozen=True)
class Refused:
    """Something that looks like an MLP block but that actsparse does not handle, and why.

    Args:
        name: the path of the module.
        reason: why it is not handled.
        reached: False if it did not run on the inputs with which the blocks were found.

    >>> Refused("experts.0", "it did not run on the inputs", reached=False).reason
    'it did not run on the inputs'
    """

    name: str
    reason: str
    reached: bool = True


class NoMLPFound(ValueError):
    """No MLP block was found in the model; the message lists what was seen and what is missing.

    Args:
        message: what was seen.
        refused: what looks like a block but cannot be handled, each with its reason.

    >>> from actsparse import find_mlp_blocks
    >>> import torch
    >>> find_mlp_blocks(torch.nn.Linear(8, 8), torch.randn(2, 8))
    Traceback (most recent call last):
    ...
    actsparse.blocks.refused.NoMLPFound: ...
    """

    def __init__(self, message: str, refused: Iterable[Refused] = ()) -> None:
        super().__init__(message)
        self.refused = list(refused)


def told(refused: Iterable[Refused]) -> list[str]:
    """A line for each reason, names that differ in numbers alone taken together.

    >>> told(Refused(f"experts.{i}", "it did not run") for i in range(8))
    ['experts.0 … experts.7 (8): it did not run']
    """
    alike: dict[tuple[str, str], list[str]] = {}
    for item in refused:
        alike.setdefault((without_numbers(item.name), item.reason), []).append(item.name)
    return [
        f"{names[0]}{f' … {names[-1]} ({len(names)})' * (len(names) > 1)}: {reason}"
        for (_, reason), names in alike.items()
    ]


def without_numbers(name: str) -> str:
    """A module's name without the numbers of layers and experts.

    >>> without_numbers("layers.3.mlp.fc1")
    'layers.*.mlp.fc1'
    """
    return ".".join("*" if part.isdecimal() else part for part in name.split("."))

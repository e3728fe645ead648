"""The activations that the kernels compute themselves: exactly 0 up to some threshold.

For them ``z ≤ floor`` says which units to skip, so that nothing but z's comparison is needed to
pack, and the lossless screen may prove it of units that are not computed at all.
"""

from __future__ import annotations

from typing import NamedTuple

from actsparse.activations import known_as, numbers_of

FEW = 16  # tokens, up to which a GPU decodes
FUSED = ("relu", "jsrelu", "squared_relu")  # in the order of cpu/kernels.h


class Form(NamedTuple):
    """φ is 0 where z ≤ ``floor``; above, it is number ``act`` of ``FUSED``.

    ``act`` None: φ has numbers of its own beside the threshold; the kernels give z there, and φ of
    the packed entries is for torch. ``ones``: φ′ is 1 above.
    """

    act: int | None
    floor: float
    ones: bool


def form_of(name: str) -> Form | None:
    """How the kernels run the φ called ``name``; None where it is not of that kind.

    >>> form_of("jsrelu(threshold=0.25)")
    Form(act=1, floor=0.25, ones=False)
    >>> form_of("relu(shift=1)"), form_of("relu6")
    (Form(act=None, floor=1.0, ones=True), None)
    """
    if name not in _FORMS:
        _FORMS[name] = _form(name)
    return _FORMS[name]


# No functools.cache: compilers trace past it.
_FORMS: dict[str, Form | None] = {}


def _form(name: str) -> Form | None:
    base, numbers = numbers_of(name) or ("", {})
    if base not in FUSED:
        return None
    act = FUSED.index(base) if numbers.keys() <= {"threshold"} else None
    floor = max(numbers.get("threshold", 0.0), numbers.get("shift", 0.0))
    return Form(act, floor, base == "relu")


def is_silent(name: str | None) -> bool:
    """Whether the φ called ``name`` is known to be exactly 0 on a set of positive length.

    >>> is_silent("relu(threshold=0.1)"), is_silent("gelu"), is_silent(None)
    (True, False, False)
    """
    known = None if name is None else known_as(name)
    return known is not None and known.silent


# what torch.compiler.assume_constant_result sets; that imports the whole compiler, a second
for _constant in (form_of, is_silent):
    setattr(_constant, "_dynamo_marked_constant", True)  # noqa: B010

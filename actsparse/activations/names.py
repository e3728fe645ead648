"""Names of activation functions, and functions with numbers of your own, such as thresholds."""

from __future__ import annotations

import copyreg
import math
from collections.abc import Callable
from typing import Any, NamedTuple

from actsparse.activations.formulas import (
    ACTIVATIONS,
    ActivationFunction,
    jsrelu_with,
    relu_with,
    s_shape_with,
    squared_relu_with,
)


class Family(NamedTuple):
    """The functions of one form that numbers tell apart; :func:`with_numbers` makes them.

    Names give the numbers in the order of ``defaults``, those at their default left out, but for
    those in ``always``; a base's name without numbers has all at their default.
    """

    make: Callable[..., ActivationFunction]
    defaults: dict[str, float]
    allows: Callable[[dict[str, float]], bool]
    expects: str
    always: tuple[str, ...] = ()


FAMILIES: dict[str, Family] = {
    "relu": Family(
        relu_with, {"shift": 0.0, "threshold": 0.0}, lambda n: min(n.values()) >= 0,
        "finite numbers, shift and threshold at least 0",
    ),
    "jsrelu": Family(
        jsrelu_with, {"jump": 1.0, "cap": math.inf, "threshold": 0.0},
        lambda n: 0 <= n["jump"] < n["cap"] and n["threshold"] >= 0,
        "finite numbers, jump and threshold at least 0, cap above jump",
    ),
    "squared_relu": Family(
        squared_relu_with, {"threshold": 0.0}, lambda n: n["threshold"] >= 0,
        "a finite threshold, at least 0",
    ),
    "s_shape": Family(
        s_shape_with, {"dx": 0.0, "dy": 0.0, "half_width": 1.5}, lambda n: n["half_width"] > 0,
        "finite numbers, half_width above 0", ("dx", "dy"),
    ),
}  # fmt: skip


def _written(base: str, numbers: dict[str, float]) -> str | None:
    """The one name of a function, numbers in full as Python does, whole ones without ``.0``.

    So no two functions share a name, and no function has two. None: there is none.
    """
    family = FAMILIES.get(base)
    if family is None or not numbers.keys() <= family.defaults.keys():
        return None
    full = {key: float(numbers.get(key, at)) + 0.0 for key, at in family.defaults.items()}  # −0 → 0
    changed = [key for key, at in family.defaults.items() if full[key] != at]
    if not all(math.isfinite(full[key]) for key in changed) or not family.allows(full):
        return None
    if not changed:
        return base
    texts = [
        f"{key}={str(value).removesuffix('.0')}"
        for key, value in full.items()
        if key in changed or key in family.always
    ]
    return f"{base}({', '.join(texts)})"


def numbers_of(name: str) -> tuple[str, dict[str, float]] | None:
    """Split the name of an activation function into its base and the numbers in it.

    Args:
        name: a name as :func:`with_numbers` writes it.

    Returns:
        The base name and the numbers by option; None if no function here has that name.

    >>> numbers_of("jsrelu(cap=4, threshold=0.25)")
    ('jsrelu', {'cap': 4.0, 'threshold': 0.25})
    >>> numbers_of("gelu"), numbers_of("gelu(threshold=1)")
    (('gelu', {}), None)
    """
    if name in ACTIVATIONS:
        return name, {}
    base, _, inside = name.removesuffix(")").partition("(")
    try:
        pairs = [pair.split("=") for pair in inside.split(", ")]
        numbers = {key: float(number) for key, number in pairs}
    except ValueError:
        return None
    return (base, numbers) if _written(base, numbers) == name else None


# One function for one name, as in ACTIVATIONS. No functools.cache: compilers trace past it.
_MADE: dict[str, ActivationFunction] = {}


def known_as(name: str) -> ActivationFunction | None:
    """The activation function called ``name``, or None if there is none.

    Args:
        name: as for :func:`named`, which raises an error instead.

    Returns:
        The function. Equal names give the same object.

    >>> known_as("relu").name, known_as("no such function") is None
    ('relu', True)
    """
    if name in ACTIVATIONS:
        return ACTIVATIONS[name]
    if name not in _MADE:
        if (found := numbers_of(name)) is None:
            return None
        base, numbers = found
        _MADE[name] = FAMILIES[base].make(name, **numbers)
    return _MADE[name]


def named(name: str) -> ActivationFunction:
    """The activation function called ``name``: a key of ``ACTIVATIONS``, or one with numbers.

    - ``relu(threshold=t)``, ``jsrelu(threshold=t)``, ``squared_relu(threshold=t)``: φ(z) where
      z > t ≥ 0, else 0; φ jumps at t (FATReLU: Song et al. 2024, ProSparse, arXiv 2402.13516);
    - ``relu(shift=b)``: ``ReLU(z − b)``, b ≥ 0 (shifted ReLU: Mirzadeh et al. 2023, arXiv
      2310.04564); a threshold beside it is compared with z, not with z − b;
    - ``jsrelu(jump=j)``, ``jsrelu(cap=c)``, ``jsrelu(jump=j, cap=c)``: see :func:`jsrelu`;
    - ``s_shape(dx=…, dy=…)``: see :func:`shifted_s_shape`.

    Args:
        name: one of these names, written as :func:`with_numbers` writes it.

    Returns:
        The function. Equal names give the same object.

    Raises:
        ValueError: no activation has that name; the message lists those that exist.

    >>> import torch
    >>> named("relu(threshold=0.5)").value(torch.tensor([0.4, 0.5, 0.6]))
    tensor([0.0000, 0.0000, 0.6000])
    >>> named("s_shape(dx=1.6, dy=-1.6)") is shifted_s_shape(1.6, -1.6)
    True
    """
    function = known_as(name)
    if function is None:
        base, form, _ = name.partition("(")
        family = FAMILIES.get(base) if form else None
        takes = f"{base} takes {family.expects}; " if family else ""
        known = ", ".join(sorted(ACTIVATIONS))
        raise ValueError(
            f"unknown activation {name!r}; {takes}known: {known}, and with numbers of your own "
            f"'relu(threshold=0.5)', 'relu(shift=1)', 'jsrelu(jump=0.5, cap=4, threshold=0.1)', "
            f"'squared_relu(threshold=0.5)', 's_shape(dx=1.6, dy=-1.6)' or "
            f"'s_shape(dx=1.6, dy=0, half_width=2)', each as with_numbers(...).name writes it"
        )
    return function


def with_numbers(base: str, **numbers: float) -> ActivationFunction:
    """The activation function ``base`` with numbers of your own.

    Args:
        base: ``"relu"``, ``"jsrelu"``, ``"squared_relu"`` or ``"s_shape"``.
        **numbers: the options of that function, as :func:`named` lists them. Those left out keep
            their default.

    Returns:
        The function. :func:`named` finds it by its ``name``.

    Raises:
        ValueError: ``base`` has no such option, or a number is out of range.

    >>> with_numbers("jsrelu", cap=4, jump=0.5).name
    'jsrelu(jump=0.5, cap=4)'
    """
    name = _written(base, numbers)
    if name is not None:
        return named(name)
    given = f"{base}({', '.join(f'{key}={value!r}' for key, value in numbers.items())})"
    if base not in FAMILIES:
        raise ValueError(f"{given}: {', '.join(FAMILIES)} take numbers, {base!r} does not")
    family = FAMILIES[base]
    raise ValueError(f"{given}: options are {', '.join(family.defaults)}: {family.expects}")


def thresholded(name: str, threshold: float) -> ActivationFunction:
    """The activation function ``name`` with a threshold: φ(z) where z > ``threshold``, else 0.

    Args:
        name: a function that takes a threshold: ReLU, JSReLU or squared ReLU, with numbers or not.
        threshold: at least 0. If the function has one already, the larger of the two counts.

    Returns:
        The function.

    Raises:
        ValueError: the function takes no threshold, or it is not a finite number ≥ 0.

    >>> thresholded("jsrelu(cap=4)", 0.25).name
    'jsrelu(cap=4, threshold=0.25)'
    """
    base, numbers = numbers_of(named(name).name) or (name, {})
    before = numbers.get("threshold", 0.0)
    larger = before if 0 <= threshold <= before else threshold
    return with_numbers(base, **{**numbers, "threshold": larger})


class SShape(NamedTuple):
    """The numbers that tell one S-shape ``s(z − dx) + dy`` from another.

    :func:`shifted_s_shape` makes the function.

    Args:
        dx: how far it is shifted along z.
        dy: how far it is shifted along φ.
        half_width: h, half the length of the interval on which it is flat, above 0.

    >>> SShape(dx=1.6, dy=-1.6).name
    's_shape(dx=1.6, dy=-1.6)'
    """

    dx: float = 0.0
    dy: float = 0.0
    half_width: float = 1.5

    @property
    def name(self) -> str:
        """The name of the function, which :func:`named` finds it by.

        Raises:
            ValueError: a number is not finite, or ``half_width`` is not above 0.
        """
        return shifted_s_shape(*self).name


def s_shape_of(name: str) -> SShape | None:
    """The numbers of the S-shape called ``name``, or None if that is not the name of one.

    Args:
        name: a name as :func:`with_numbers` writes it.

    Returns:
        The numbers, or None.

    >>> s_shape_of("s_shape(dx=1.6, dy=-1.6)")
    SShape(dx=1.6, dy=-1.6, half_width=1.5)
    >>> s_shape_of("s_shape"), s_shape_of("relu")
    (SShape(dx=0.0, dy=0.0, half_width=1.5), None)
    """
    found = numbers_of(name)
    return SShape(**found[1]) if found is not None and found[0] == "s_shape" else None


def shifted_s_shape(
    dx: float = 0.0, dy: float = 0.0, half_width: float = 1.5
) -> ActivationFunction:
    """The S-shape ``s(z − dx) + dy``, whose φ and φ′ are zero in different places.

    ``s(z) = r(z−h)² − r(−z−h)²``, r = ReLU, h = ``half_width`` (arXiv 2309.03004 and 2605.25612,
    the manipulation experiments).

    Args:
        dx: how far it is shifted along z.
        dy: how far it is shifted along φ.
        half_width: h, above 0.

    Returns:
        The function. Equal numbers give the same object, which :func:`named` finds by its name.

    Raises:
        ValueError: a number is not finite, or ``half_width`` is not above 0.

    >>> import torch
    >>> f = shifted_s_shape(dy=1.6)
    >>> f.value(torch.zeros(1)), f.derivative(torch.zeros(1))
    (tensor([1.6000]), tensor([0.]))
    >>> f.name
    's_shape(dx=0, dy=1.6)'
    """
    return with_numbers("s_shape", dx=dx, dy=dy, half_width=half_width)


def _pickled(function: ActivationFunction) -> Any:
    """Ours pickle and copy by name, so that models that use them do."""
    if known_as(function.name) is function:
        return named, (function.name,)
    return object.__reduce_ex__(function, 4)


copyreg.pickle(ActivationFunction, _pickled)

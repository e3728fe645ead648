"""Numbers as text: each format once, with a true minus sign, and a dash where there is none."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Literal

from actsparse_lab.analysis.intervals import Estimate, Factor

NONE = "–"
_RAISED = str.maketrans("-0123456789", "⁻⁰¹²³⁴⁵⁶⁷⁸⁹")
Scale = Literal["log", "share", "points", "number"]  # how an effect is shown


def minus(text: str) -> str:
    """The text with true minus signs."""
    return text.replace("-", "−")


def decimal(
    value: Estimate | float | None,
    digits: int = 3,
    scale: float = 1,
    unit: str = "",
    signed: bool = False,
) -> str:
    """``scale`` times the value with so many digits after the point, and half its interval.

    >>> decimal(Estimate(0.1918, 0.0141, 5)), decimal(-0.5, 1, signed=True), decimal(None)
    ('0.192 ± 0.014', '−0.5', '–')
    """
    if value is None:
        return NONE
    found = value if isinstance(value, Estimate) else Estimate(value, None, 1)
    mean = minus(f"{scale * found.mean:{'+' if signed else ''}.{digits}f}")
    half = "" if found.half is None else f" ± {scale * found.half:.{digits}f}"
    return f"{mean}{half}{unit}"


def percent(share: Estimate | float | None, digits: int = 1) -> str:
    """A share in per cent: ``28.1 ± 3.0 %``."""
    return decimal(share, digits, 100, " %")


def quality(name: str | None, value: Estimate | float | None) -> str:
    """Accuracy in per cent, any other quality in its own unit."""
    return percent(value) if name == "accuracy" else decimal(value)


def change(name: str | None, value: Estimate | None, digits: int = 1, unit: str = " points") -> str:
    """A change of accuracy in percentage points, of any other quality in its own unit."""
    if name == "accuracy":
        return decimal(value, digits, 100, unit, signed=True)
    return decimal(value, signed=True)


def amount(value: Estimate | float | None, scale: float = 1, unit: str = "") -> str:
    """``scale`` times a number of any size, three digits of it, and of half its interval.

    >>> amount(31215.0), amount(0.25), amount(-0.0000314), amount(1e-5)
    ('31200', '0.25', '−3.14 × 10⁻⁵', '10⁻⁵')
    >>> amount(Estimate(0.5, 0.25, 3), 100, " %")
    '50 ± 25 %'
    """
    if value is None:
        return NONE
    if isinstance(value, Estimate):
        half = "" if value.half is None else f" ± {amount(scale * value.half)}"
        return f"{amount(scale * value.mean)}{half}{unit}"
    digits, e, power = f"{float(f'{scale * value:.3g}'):g}".partition("e")
    if e:
        raised = str(int(power)).translate(_RAISED)
        digits = f"10{raised}" if digits == "1" else f"{digits} × 10{raised}"
    return minus(f"{digits}{unit}")


def ratio(found: Factor | None) -> str:
    """``1.52 (1.40 to 1.66)``: the median, and the interval of the geometric mean.

    >>> ratio(Factor(2.0, None, None, 2.0, 1)), ratio(None)
    ('2.00', '–')
    """
    if found is None:
        return NONE
    ends = f" ({found.low:.2f} to {found.high:.2f})" if found.low and found.high else ""
    return f"{found.median:.2f}{ends}"


def span(values: Sequence[float], digits: int = 2) -> str:
    """From the least to the largest; one number where they read alike.

    >>> span([3.0, 1.0]), span([1.0])
    ('1.00 to 3.00', '1.00')
    """
    low, high = decimal(min(values), digits), decimal(max(values), digits)
    return low if low == high else f"{low} to {high}"


def counted(count: int, what: str) -> str:
    """``1 seed``, ``2 seeds``."""
    return f"{count} {what}{'' if count == 1 else 's'}"


def effect(value: float, scale: Scale, like: float | None = None) -> str:
    """``−23 %``, ``÷ 12`` and ``× 20`` of a logarithm; ``like`` is one that it is to look like.

    >>> [effect(math.log(ratio), "log") for ratio in (0.77, 1, 1.5, 20, 1 / 12)]
    ['−23 %', '0 %', '+50 %', '× 20', '÷ 12']
    >>> effect(-0.01, "points"), effect(0.724, "share")
    ('−1 point', '72.4 %')
    """
    if scale == "number":
        return amount(value)
    if scale == "share":
        return amount(value, 100, " %")
    if scale == "points":
        text = amount(100 * value)
        return f"{'+' if value > 0 else ''}{text} point{'' if text in ('1', '−1') else 's'}"
    if abs(value if like is None else like) >= math.log(10):
        return f"{'×' if value > 0 else '÷'} {amount(math.exp(abs(value)))}"
    return f"{'+' if value > 0 else ''}{amount(100 * math.expm1(value))} %"


def mean_effect(found: Estimate, scale: Scale) -> str:
    """The mean effect with its interval, e.g. ``−23 % (−30 % to −15 %), 5 seeds``."""
    mean, *ends = (
        effect(value, scale, like=found.mean)
        for value in (found.mean, found.low, found.high)
        if value is not None
    )
    if scale == "points":  # the unit once
        ends = [end.split(" ")[0] for end in ends]
    interval = f" ({' to '.join(ends)})" if ends else ""
    return f"{mean}{interval}, {counted(found.n, 'seed')}"

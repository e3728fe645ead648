"""Check values that come from outside: files, options, callers.

A type annotation says what a value must be: ``int``, ``float | None``, ``Literal["a", "b"]``,
``tuple[str, ...]``, ``dict[str, float]``, and narrower ones that are named here, such as `Share`.
`check` looks at the plain values of a file, `check_fields` at a dataclass, `checked` makes a
dataclass of plain values, `checked_arguments` looks at a function's arguments. Each raises
`BadValue`, which names the place, the value and what would be right.
"""

from __future__ import annotations

import dataclasses
import functools
import inspect
import math
import reprlib
import types
import unicodedata
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Annotated, Any, Literal, TypeVar, Union, get_args, get_origin, get_type_hints

T = TypeVar("T")
Shape = Any


class BadValue(ValueError):
    """A value that cannot work; the message names it and says what would be right."""


@dataclass(frozen=True)
class Rule:
    """What a value must be besides its type: in words, and as a test."""

    right: str
    holds: Callable[[Any], bool]


Count = Annotated[int, Rule("a whole number, 0 or more", lambda value: value >= 0)]
Positive = Annotated[int, Rule("a whole number, 1 or more", lambda value: value >= 1)]
Above0 = Annotated[float, Rule("a finite number above 0", lambda value: value > 0)]
AtLeast0 = Annotated[float, Rule("a finite number, 0 or more", lambda value: value >= 0)]
Share = Annotated[float, Rule("a share from 0 to 1", lambda value: 0 <= value <= 1)]
Name = Annotated[
    str,
    Rule(
        "a name: printable characters in one line, none of them $",  # which starts a formula
        lambda name: name != "" and printable(name) == name and not set(name) & set("$\n"),
    ),
]
Text = Annotated[str, Rule("text that is not empty", bool)]

_INT = 2**63  # what torch and the files' formats hold
_WORDS = {
    bool: "true or false",
    int: "a whole number",
    float: "a finite number",
    str: "text",
    dict: "an object",
    types.NoneType: "null",
}
_REPR = reprlib.Repr()
_REPR.maxlevel, _REPR.maxstring, _REPR.maxother = 3, 120, 120
_REPR.maxdict = _REPR.maxlist = _REPR.maxtuple = 8


def printable(text: str) -> str:
    r"""Text with control and invisible characters escaped, all but the newline.

    >>> print(printable("\x1b[31m red \u202e"))
    \x1b[31m red \u202e
    """
    if text.isascii() and text.isprintable():
        return text
    return "".join(
        each.encode("unicode_escape").decode()
        if unicodedata.category(each)[0] == "C" and each != "\n"
        else each
        for each in text
    )


def shown(value: Any) -> str:
    r"""A value in a message: short, with everything that is not printable escaped.

    >>> print(shown("\x1b[31mred"), shown(list(range(1000))))
    '\x1b[31mred' [0, 1, 2, 3, 4, 5, 6, 7, ...]
    """
    return _REPR.repr(value)


def check(name: str, value: Any, shape: Shape) -> None:
    """Check plain values against a shape; what the shape does not name is not looked at.

    A shape is an annotation, an object of shapes, a list of one shape, or (shape, None): may be
    null. In an object a field whose name ends in "?" may be absent.

    Args:
        name: where the value stands, for the message.
        value: plain values, as JSON has them.
        shape: what it must be.

    Raises:
        BadValue: the value is something else.

    >>> check("train", {"step": 3, "loss": 0.5}, {"step": Count, "before?": float})
    >>> check("train", {"step": -3}, {"step": Count})
    Traceback (most recent call last):
    ...
    actsparse.values.BadValue: train.step must be a whole number, 0 or more; got -3
    """
    null = ""
    if isinstance(shape, tuple):
        if value is None:
            return
        shape, null = shape[0], " or null"
    if isinstance(shape, dict):
        needed = [field for field in shape if not field.endswith("?")]
        if not isinstance(value, dict):
            of = f" of {', '.join(needed)}" if needed else ""
            raise BadValue(f"{name} must be an object{of}; got {shown(value)}")
        for field in needed:
            if field not in value:
                raise BadValue(f"{name} lacks {field!r}; it needs {', '.join(needed)}")
        for field, inner in shape.items():
            field = field.removesuffix("?")
            if field in value:
                check(f"{name}.{field}", value[field], inner)
    elif isinstance(shape, list):
        if not isinstance(value, list):
            raise BadValue(f"{name} must be a list; got {shown(value)}")
        for index, each in enumerate(value):
            check(f"{name}[{index}]", each, shape[0])
    elif not fits(value, shape):
        raise BadValue(f"{name} must be {words(shape)}{null}; got {shown(value)}")


def check_fields(of: Any, form: str = "{}={}") -> None:
    """Check every field of a dataclass against its annotation; for ``__post_init__``.

    ``form`` is how the message writes a field and its value.

    Raises:
        BadValue: a field holds something else.
    """
    for field, kind in _kinds(type(of)).items():  # type: ignore[arg-type]
        _check_one(field, getattr(of, field), kind, form)


def checked(cls: type[T], values: Any, where: str) -> T:
    """A dataclass made of plain values. Lists become tuples where the class has tuples.

    Args:
        cls: a dataclass whose ``__post_init__`` calls `check_fields`.
        values: an object, field → value.
        where: the file, or what else the values are from, for the message.

    Raises:
        BadValue: no object, a field that is unknown, missing or wrong.
    """
    kinds, fields = _kinds(cls), dataclasses.fields(cls)  # type: ignore[arg-type]
    absent = dataclasses.MISSING
    needed = [f.name for f in fields if f.default is absent and f.default_factory is absent]
    check(where, values, dict.fromkeys(needed, Any))
    if unknown := sorted(set(values) - set(kinds)):
        raise BadValue(f"{where}: unknown field {unknown[0]!r}; known: {', '.join(kinds)}")
    try:
        return cls(**{name: _plain_as(value, kinds[name]) for name, value in values.items()})
    except ValueError as error:
        raise BadValue(f"{where}: {error}") from error


def checked_arguments(made: Callable[..., Any], given: dict[str, Any], what: str) -> dict[str, Any]:
    """``given`` as arguments of ``made``, whose annotations say what they must be.

    Raises:
        BadValue: ``made`` takes no such argument, or another kind of value for it.
    """
    kinds = _kinds(made)
    taken = inspect.signature(made).parameters
    for name, value in given.items():
        if name not in taken:
            known = ", ".join(sorted(taken))
            raise BadValue(f"unknown setting {name!r} of the {what}; known: {known}")
        _check_one(name, value, kinds.get(name, Any), "{}={}")
    return {name: _plain_as(value, kinds.get(name, Any)) for name, value in given.items()}


def fits(value: Any, kind: Any) -> bool:
    """Whether a value is what an annotation says.

    >>> fits(3, float), fits(True, int), fits(float("nan"), float), fits(["a"], tuple[str, ...])
    (True, False, False, True)
    """
    origin, inner = get_origin(kind), get_args(kind)
    if kind is Any:
        return True
    if origin is Annotated:
        rules = inner[1:]
        return fits(value, inner[0]) and all(rule.holds(value) for rule in rules)
    if origin in (Union, types.UnionType):
        return any(fits(value, each) for each in inner)
    if origin is Literal:
        return any(type(value) is type(each) and value == each for each in inner)
    if kind is None or kind is types.NoneType:
        return value is None
    if kind is int:
        return isinstance(value, int) and not isinstance(value, bool) and abs(value) < _INT
    if kind is float:
        return fits(value, int) or (isinstance(value, float) and math.isfinite(value))
    if origin in (list, Sequence) or (origin is tuple and inner[-1] is Ellipsis):
        return isinstance(value, list | tuple) and all(fits(each, inner[0]) for each in value)
    if origin is tuple:
        fixed = isinstance(value, list | tuple) and len(value) == len(inner)
        return fixed and all(map(fits, value, inner))
    if origin in (dict, Mapping):
        return isinstance(value, dict) and all(
            fits(key, inner[0]) and fits(each, inner[1]) for key, each in value.items()
        )
    return callable(value) if origin is Callable else isinstance(value, origin or kind)


def words(kind: Any) -> str:
    """What an annotation asks for, in words.

    >>> words(Share | None), words(tuple[str, ...]), words(Literal["a", False])
    ('a share from 0 to 1, or None', 'a list of text', "one of 'a', False")
    """
    origin, inner = get_origin(kind), get_args(kind)
    if origin is Annotated:
        return str(inner[1].right)
    if origin in (Union, types.UnionType):
        said = [words(each) for each in inner if each is not types.NoneType]
        return ", or ".join([*said, *(["None"] if types.NoneType in inner else [])])
    if origin is Literal:
        return ("one of " if len(inner) > 1 else "") + ", ".join(map(repr, inner))
    if origin is tuple and inner[-1] is not Ellipsis:
        return f"a list of {len(inner)}: {', '.join(map(words, inner))}"
    if origin in (list, tuple, Sequence):
        return "a list" if inner[0] is Any else f"a list of {words(inner[0])}"
    if origin in (dict, Mapping):
        return "an object" if inner[1] is Any else f"an object of {words(inner[1])}"
    return _WORDS.get(kind, getattr(kind, "__name__", str(kind)))


@functools.cache
def _kinds(of: Any) -> dict[str, Any]:
    """Field or argument → annotation."""
    if dataclasses.is_dataclass(of):
        hints = get_type_hints(of, include_extras=True)
        return {field.name: hints[field.name] for field in dataclasses.fields(of)}
    hints = get_type_hints(of.__init__ if inspect.isclass(of) else of, include_extras=True)
    return {name: hint for name, hint in hints.items() if name != "return"}


def _check_one(name: str, value: Any, kind: Any, form: str) -> None:
    if not fits(value, kind):
        raise BadValue(f"{form.format(name, shown(value))}: expected {words(kind)}")


def _plain_as(value: Any, kind: Any) -> Any:
    """JSON has no tuples."""
    kinds = [kind, *get_args(kind)]
    wanted = any(get_origin(each) in (tuple, Sequence) for each in kinds)
    return tuple(value) if wanted and isinstance(value, list) else value

"""Public names say what they do, take, return and raise, and show it: Google's style, no gaps."""

from __future__ import annotations

import ast
import importlib
import inspect
import re
import textwrap
from typing import Any

import pytest

ROOMS = ["", ".activations", ".blocks", ".kernels", ".modify", ".observe", ".train"]
WITHOUT_EXAMPLE = {
    "load": "the example of save shows it",
    "load_adapter": "the example of save_adapter shows it",
    "merge_adapter": "the example of save_adapter shows it",
    "Handle.add": "called by sparsify",
    "Handle.hold": "called by sparsify",
    "Handle.leave_alone": "called by sparsify",
    "Handle.look": "a hook",
    "Seen.plot": "needs matplotlib",
    "Seen.pool": "needs several processes",
    "Seen.print": "colours depend on the terminal",
    "SparsityCallback.take_up": "needs a training that has ended",
}


def public() -> dict[str, tuple[Any, str]]:
    """What the rooms export; of classes also methods that no base has, with the class's text."""
    found: dict[str, tuple[Any, str]] = {}
    for room in ROOMS:
        module = importlib.import_module(f"actsparse{room}")
        for value in (getattr(module, name) for name in module.__all__):
            if inspect.isclass(value) or inspect.isfunction(value):
                found[value.__qualname__] = (value, "")
            for name, part in vars(value).items() if inspect.isclass(value) else ():
                part = getattr(part, "__func__", part)
                described = name.startswith("_") or any(hasattr(b, name) for b in value.__bases__)
                if not described and isinstance(part, property | type(public)):
                    found[f"{value.__qualname__}.{name}"] = (part, inspect.getdoc(value) or "")
    return found


def entries(text: str, section: str) -> set[str]:
    """The names before the colons of a section's entries, as in ``a, b: what they are``."""
    lines = re.search(rf"^{section}:\n((?: .*\n|\n)+)", text + "\n", re.MULTILINE)
    found = re.findall(r"^    (\S[^:]*):", lines.group(1) if lines else "", re.MULTILINE)
    return {name for entry in found for name in entry.split(", ")}


def raised(function: Any) -> set[str]:
    """The exceptions in ``raise X`` of a function's body; none where a dataclass wrote it."""
    code = getattr(function, "__code__", None)
    if code is None or code.co_filename == "<string>":
        return set()
    tree = ast.parse(textwrap.dedent(inspect.getsource(function)))
    values = [node.exc for node in ast.walk(tree) if isinstance(node, ast.Raise)]
    names = {getattr(getattr(value, "func", value), "id", "") for value in values}
    return {name for name in names if name[:1].isupper()} - {"NotImplementedError"}


PUBLIC = public()


@pytest.mark.parametrize("name", PUBLIC)
def test_docstring(name: str) -> None:
    value, of_class = PUBLIC[name]
    text, is_class = inspect.getdoc(value) or "", inspect.isclass(value)
    assert re.fullmatch(r"(?!.*\. ).*\.", text.partition("\n")[0]), "the first line is no sentence"
    own = vars(value) if is_class else {"": getattr(value, "fget", value)}
    bodies = [own.get("__init__"), own.get("__post_init__")] if is_class else own.values()
    assert set().union(*map(raised, bodies)) <= entries(text, "Raises")
    if isinstance(value, property) or (is_class and "__init__" not in own):
        return
    takes = inspect.signature(value)
    taken = {str(each.replace(annotation=each.empty)) for each in takes.parameters.values()}
    assert {each.partition("=")[0] for each in taken} - {"self", "cls"} <= entries(text, "Args")
    assert is_class or takes.return_annotation in (None, "None") or "\nReturns:\n" in text
    calls = rf"^(>>>|\.\.\.) .*\.{name.rpartition('.')[2]}\("
    assert ">>> " in text or re.search(calls, of_class, re.MULTILINE) or name in WITHOUT_EXAMPLE

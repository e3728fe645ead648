"""Reads docstrings for the API pages: doctests become blocks of code, Sphinx's roles code."""

from __future__ import annotations

import re
from typing import Any

import griffe

ROLE = re.compile(r":(?:func|class|meth|mod|data):`([^`]+)`")
DOCTEST = re.compile(r"^( *)(>>> .*(?:\n\1.*\S.*)*)", re.MULTILINE)


class Docstrings(griffe.Extension):
    """An extension of griffe, which mkdocs.yml names."""

    def on_instance(self, *, obj: griffe.Object, **_: Any) -> None:
        """Rewrite a docstring before it is parsed."""
        if obj.docstring:
            text = ROLE.sub(r"`\1`", obj.docstring.value)
            obj.docstring.value = DOCTEST.sub(r"\1```pycon\n\1\2\n\1```", text)

"""What pages say, and the figures that plots draw, laid out but not rendered."""

from __future__ import annotations

import re
from html import unescape
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
from matplotlib.figure import Figure


def words(page: Path) -> str:
    """The text of a page as it is read."""
    html = re.sub(r"<(style|title)>.*?</\1>", "", page.read_text("utf-8"), flags=re.DOTALL)
    text = unescape(re.sub(r"<[^>]+>", " ", html)).replace("\N{NO-BREAK SPACE}", " ")
    return " ".join(text.split())


def figures(monkeypatch: pytest.MonkeyPatch, name: str, *modules: ModuleType) -> list[Figure]:
    """Figures that reach the function ``name`` of these modules, with what it is given beside."""
    drawn: list[Figure] = []

    def keep(figure: Figure, beside: Any) -> bytes:
        figure.beside = beside
        drawn.append(figure)
        return b"kept"

    for module in modules:
        monkeypatch.setattr(module, name, keep)
    return drawn

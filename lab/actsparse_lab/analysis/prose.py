"""The words beside plots and experiments, which stand in Markdown files of this package.

A file has sections: a heading and its text. The heading of a picture is ``## name: Title`` and its
text the caption. An experiment's ``claims.md`` begins with its title and what was done;
``## Claims`` lists ``- `key` (source): claim``, and ``## Limits`` says what it cannot tell.
"""

from __future__ import annotations

import importlib.resources
import re
from collections.abc import Callable, Mapping
from functools import cache

from actsparse_lab.analysis.plots import Picture


@cache
def sections(file: str) -> dict[str, str]:
    """The text under each heading of a Markdown file of the laboratory, in one line each."""
    text = importlib.resources.files("actsparse_lab").joinpath(file).read_text("utf-8")
    _, *parts = re.split(r"^#+ (.*)$", text, flags=re.MULTILINE)
    return {
        head: " ".join(body.split()) for head, body in zip(parts[::2], parts[1::2], strict=True)
    }


def pictures(plots: Mapping[str, Callable[..., bytes | None]], file: str) -> tuple[Picture, ...]:
    """The plots by name, with the titles and captions that ``file`` has of them."""
    words = {}
    for head, caption in sections(file).items():
        name, _, title = head.partition(": ")
        words[name] = title, caption
    return tuple(Picture(name, plot, *words[name]) for name, plot in plots.items())

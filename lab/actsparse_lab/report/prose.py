"""The words beside plots and experiments, which stand in Markdown files of this package.

A file has sections: a heading and its text. The heading of a picture is ``## name: Title`` and its
text the caption. An experiment's file begins with its title and what was done; ``## Claims`` lists
``- `key` (source): claim``, and ``## Limits`` says what it cannot tell.
"""

from __future__ import annotations

import importlib.resources
import re
from collections.abc import Callable, Mapping
from functools import cache

from actsparse_lab.report.findings import Asked, Experiment
from actsparse_lab.report.plots import Picture


@cache
def sections(file: str) -> dict[str, str]:
    """The text under each heading of a Markdown file of this package, in one line each."""
    text = importlib.resources.files("actsparse_lab.report").joinpath(file).read_text("utf-8")
    _, *parts = re.split(r"^#+ (.*)$", text, flags=re.MULTILINE)
    return {
        head: " ".join(body.split()) for head, body in zip(parts[::2], parts[1::2], strict=True)
    }


def pictures(
    plots: Mapping[str, Callable[..., bytes | None]], file: str = "captions.md"
) -> tuple[Picture, ...]:
    """The plots by name, with the titles and captions that ``file`` has of them."""
    words = {}
    for head, caption in sections(file).items():
        name, _, title = head.partition(": ")
        words[name] = title, caption
    return tuple(Picture(name, plot, *words[name]) for name, plot in plots.items())


def experiment(
    name: str, asked: Mapping[str, Asked], plots: Mapping[str, Callable[..., bytes | None]]
) -> Experiment:
    """The experiment whose words are in ``claims/NAME.md``; ``asked`` is by the claims' keys."""
    file = f"claims/{name}.md"
    words = sections(file)
    title = next(iter(words))
    listed = re.findall(r"- `(\S+)` \((.*?)\): (.*?)(?= - `|$)", words["Claims"])
    told = {key: (text, source) for key, source, text in listed}
    questions = tuple(each.question(*told[key]) for key, each in asked.items())
    return Experiment(name, title, words[title], questions, pictures(plots, file), words["Limits"])

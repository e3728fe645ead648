"""The papers' experiments by name: what each asks of its records, and where its modules are.

Claims and plots do without torch. Runs need it, so they are imported when they are asked for.
"""

from __future__ import annotations

import re
from importlib import import_module
from typing import Any

from actsparse_lab.analysis.findings import Experiment
from actsparse_lab.analysis.prose import pictures, sections

NAMES = (
    "ratio", "ablation", "manipulate", "pruning", "noise", "robustness", "weight-noise", "finetune",
    "learning-rate", "decay",
)  # fmt: skip


def part_of(name: str, part: str) -> Any:
    """An experiment's module ``runs``, ``claims`` or ``plot``; `ValueError` lists the known ones.

    >>> part_of("weight-noise", "claims").__name__
    'actsparse_lab.papers.weight_noise.claims'
    """
    if name not in NAMES:
        raise ValueError(f"unknown experiment {name!r}; known: {', '.join(NAMES)}")
    return import_module(f"actsparse_lab.papers.{name.replace('-', '_')}.{part}")


def _experiment(name: str) -> Experiment:
    """Its questions and plots, with the words of its ``claims.md``."""
    asked, plots = part_of(name, "claims").QUESTIONS, part_of(name, "plot").PLOTS
    file = f"papers/{name.replace('-', '_')}/claims.md"
    words = sections(file)
    title = next(iter(words))
    listed = re.findall(r"- `(\S+)` \((.*?)\): (.*?)(?= - `|$)", words["Claims"])
    told = {key: (text, source) for key, source, text in listed}
    questions = tuple(each.question(*told[key]) for key, each in asked.items())
    return Experiment(name, title, words[title], questions, pictures(plots, file), words["Limits"])


EXPERIMENTS: dict[str, Experiment] = {name: _experiment(name) for name in NAMES}

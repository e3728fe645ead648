"""How a handle is printed: what changed, and what did not and why, in lines for the terminal."""

from __future__ import annotations

import re
from typing import Any

from torch import nn

from actsparse import html
from actsparse.blocks.block import Blocks
from actsparse.blocks.refused import told


def text_of(recipe: str, model: nn.Module, blocks: Blocks, rows: list[dict[str, str]]) -> str:
    """A line for each modification and each change; layers that differ in numbers share one.

    ``rows`` are those of :meth:`actsparse.Handle.rows`.
    """
    count = len(blocks)
    lines = [f"{recipe}: {count} MLP block{'s' * (count != 1)} of {type(model).__name__}"]
    for key, label in (("change", ""), ("left_alone", "left alone: ")):
        alike: dict[tuple[str, str], list[str]] = {}
        for row in rows:
            if key in row:
                text = _alike(row[key])
                alike.setdefault((row["modification"], text), []).append(row["block"] or "(root)")
        for (modification, text), names in alike.items():
            where = names[0] if len(names) == 1 else f"{names[0]} … {names[-1]}"
            lines.append(f"  {modification:<18} {where}: {label}{text}")
    lines += [f"  refused {line}" for line in told(blocks.refused)]
    return "\n".join(lines)


def repr_of(handle: Any) -> str:
    """In one line."""
    count, model = len(handle.blocks), type(handle.model).__name__
    steps = f" of {handle.steps}" if handle.steps else ""
    return (
        f"<Handle {handle.recipe.name}: {count} MLP block{'s' * (count != 1)} of {model}, "
        f"step {handle.step}{steps}>"
    )


def html_of(handle: Any) -> str:
    """The rows as a table, for notebooks."""
    cells = [
        (row["modification"], row["block"], row.get("change") or f"left alone: {row['left_alone']}")
        for row in handle.rows()
    ]
    refused = (f"refused {line}" for line in told(handle.blocks.refused))
    table = html.table(("modification", "block", "change"), cells, repr_of(handle).strip("<>"))
    return table + html.lines(refused)


def _alike(text: str) -> str:
    """The text without the numbers of layers, so that it is the same in every layer.

    >>> _alike("h.0.ln.weight, weight 0.5")
    'h.*.ln.weight, weight 0.5'
    """
    decimal, layer = r"(?<![\w.])\d+\.\d+(?![\w.])", r"\.\d+\b"
    return re.sub(f"({decimal})|{layer}", lambda found: found[1] or ".*", text)

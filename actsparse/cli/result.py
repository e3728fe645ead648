"""Results of benchmarks: write the record, print JSON, format cells of tables."""

from __future__ import annotations

import itertools
import json as jsonlib
from collections.abc import Callable, Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any

import typer

from actsparse.time_left import TimeLeft


def tell(what: str) -> None:
    """Say how far it is, on stderr."""
    from actsparse.terminal import Terminal

    Terminal(stderr=True).print(what, highlight=False, soft_wrap=True)


def telling(parts: Sequence[float], said: Callable[[str], None] = tell) -> Callable[[str], None]:
    """To be called when each part begins: says which, of how many, and about how long is left.

    ``parts`` are estimates of how long each takes, in any unit.

    >>> began = telling([1, 1], print)
    >>> began("density 0.1"), began("density 0.2")
    [1/2] density 0.1
    [2/2] density 0.2, about 0 s left
    (None, None)
    """
    left, begun = TimeLeft(), itertools.count()

    def began(what: str) -> None:
        i = next(begun)
        said(f"[{i + 1}/{len(parts)}] {what}{left(sum(parts[:i]) / sum(parts))}")

    return began


def in_turn(folders: Sequence[Path]) -> Iterator[Path]:
    """The folders; says when each begins."""
    began = telling([1.0] * len(folders))
    for folder in folders:
        began(str(folder))
        yield folder


def cells(tokens: Iterable[int], densities: Sequence[float]) -> list[float]:
    """About how long a benchmark takes for each T and density: few tokens read cold weights."""
    return [t + 300.0 for t in tokens for _ in densities]


def ratio_text(ratio: dict[str, Any]) -> str:
    """A :class:`actsparse.bench.timing.Ratio` in a cell.

    >>> ratio_text({"value": 2.0, "low": 1.9, "high": 2.125})
    '2.00 [1.90, 2.12]'
    """
    return f"{ratio['value']:.2f} [{ratio['low']:.2f}, {ratio['high']:.2f}]"


def keep_record(result: dict[str, Any], out: Path | None, json: bool) -> bool:
    """Keep a benchmark's result with where it ran; True where JSON was printed, and no table is."""
    import torch

    from actsparse.environment import environment

    record = {**environment(threads=torch.get_num_threads()), **result}
    text = jsonlib.dumps(record, indent=1) + "\n"
    if out is not None:
        write_result(out, text)
        typer.echo(f"record: {out}", err=True)
    if json:
        typer.echo(text, nl=False)
    return json


def write_result(out: Path, text: str) -> None:
    """Write a result's file whole.

    Raises:
        ValueError: the disk refuses, and what to do.
    """
    from actsparse import files

    try:
        files.write(out, text.encode())
    except OSError as error:
        raise ValueError(files.refusal(out, error)) from error


def table_of(rows: Sequence[dict[str, str]]) -> Any:
    """A table of the terminal: cells by column, the same columns in each row; nothing is cut."""
    from rich.table import Column, Table

    table = Table(*(Column(name, overflow="fold") for name in rows[0]))
    for row in rows:
        table.add_row(*row.values())
    return table

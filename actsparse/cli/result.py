"""Results of benchmarks: write the record, print JSON, format cells of tables."""

from __future__ import annotations

import json as jsonlib
from pathlib import Path
from typing import Any

import typer


def tell(what: str) -> None:
    """Say how far it is, on stderr."""
    from actsparse.terminal import Terminal

    Terminal(stderr=True).print(what, highlight=False)


def wide_console() -> Any:
    """Wide enough for a table where it goes to a file."""
    from sys import stdout

    from actsparse.terminal import Terminal

    return Terminal(width=None if stdout.isatty() else 120)


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

"""``actsparse report``: the page and the table of a folder of records."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer
from rich.console import Console

from actsparse.records import RecordError, read_runs


def report(
    directory: Annotated[
        Path, typer.Argument(help="The folder that `actsparse compare --out` wrote.")
    ],
    json: Annotated[
        bool, typer.Option("--json", help="Print the table as JSON instead, and nothing else.")
    ] = False,
    markdown: Annotated[
        bool, typer.Option("--markdown", help="Print the tables as Markdown, and nothing else.")
    ] = False,
) -> None:
    """Rebuild a comparison's page from its records alone; nothing is trained.

    Writes report.html, plots/ and table.json into the folder, and theory.json where the records
    hold measures of gradients.

    Example: actsparse report out
    """
    if json and markdown:
        typer.echo("Error: --json and --markdown exclude each other", err=True)
        raise typer.Exit(2)
    try:
        from actsparse.report import (
            compare,
            markdown_table,
            markdown_theory,
            print_table,
            to_json,
            write_report,
        )
    except ModuleNotFoundError as error:
        message = f"Error: a report needs {error.name}: pip install 'actsparse[report]'"
        typer.echo(message, err=True)
        raise typer.Exit(2) from error
    try:
        page = write_report(directory)
        runs = read_runs(directory)
    except RecordError as error:
        typer.echo(f"Error: {error}", err=True)
        raise typer.Exit(2) from error
    if json:
        typer.echo(to_json(compare(runs)))
        return
    if markdown:
        typer.echo(markdown_table(compare(runs)), nl=False)
        if theory := markdown_theory(runs):
            typer.echo("\n" + theory, nl=False)
        return
    print_table(runs, Console())
    typer.echo(str(page))

"""``actsparse blocks``: print the MLP blocks of a model."""

from __future__ import annotations

from typing import Annotated

import typer


def blocks(
    model: Annotated[
        str,
        typer.Argument(
            help="The path of a local Hugging Face folder or config.json; "
            "package.module:factory, a function that returns a model or (model, inputs); "
            "or digits, text or lm."
        ),
    ],
    json: Annotated[bool, typer.Option("--json", help="Print the rows as JSON.")] = False,
) -> None:
    """Print the MLP blocks of a model: norm, up, gate, activation, down and widths.

    Of a Hugging Face folder only the config is read. Weights do not matter here, and no code from
    the folder runs. The module of a factory is imported, so its code runs.

    Examples:

      actsparse blocks lm

      actsparse blocks path/to/llama/config.json --json

      actsparse blocks my_package.models:build
    """
    from json import dumps

    from rich.table import Table
    from rich.text import Text

    from actsparse.blocks import find_mlp_blocks
    from actsparse.blocks.refused import told
    from actsparse.cli.models import model_named
    from actsparse.terminal import Terminal

    found = find_mlp_blocks(*model_named(model))
    rows = [block.row() for block in found]
    if json:
        refused = [{"name": each.name, "reason": each.reason} for each in found.refused]
        typer.echo(dumps({"blocks": rows, "refused": refused}, indent=2))
        return
    console = Terminal()
    table = Table(box=None, pad_edge=False, header_style="bold")
    names = ["name", "norm", "up", "gate", "activation", "down", "D → H"]
    for name in names:
        table.add_column(name, overflow="fold")
    for row in rows:
        inner = row["name"] + "."
        shown = [str(row[name] or "–").removeprefix(inner) for name in names[1:-1]]
        shown[3] = row["function"] or shown[3]
        width = f"{row['d_model']} → {row['d_hidden']}"
        table.add_row(*map(Text, (row["name"], *shown, width)))
    console.print(table)
    for line in told(found.refused):
        console.print(Text(f"refused: {line}"), soft_wrap=True)

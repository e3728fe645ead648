"""``actsparse judge``: what a converted checkpoint costs and spares, on text of your own."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer


def judge(
    folder: Annotated[Path, typer.Argument(help="A folder that actsparse convert wrote.")],
    text: Annotated[
        list[Path],
        typer.Option(help="A file of text: .txt, .jsonl or .jsonl.xz; a row for each."),
    ],
    dense: Annotated[
        Path | None,
        typer.Option(help="The checkpoint before conversion, for excess loss and agreement."),
    ] = None,
    window: Annotated[int, typer.Option(help="Tokens of a window.", min=2)] = 512,
    eval_tokens: Annotated[
        int, typer.Option(help="Judge on at most so many tokens of each text.", min=2)
    ] = 100_000,
    json: Annotated[bool, typer.Option("--json", help="Print JSON instead of a table.")] = False,
) -> None:
    """Judge a converted checkpoint: loss, agreement with the dense model, density, bytes read.

    Examples:

      actsparse judge my_model-sparse --text held_out.txt

      actsparse judge my_model-sparse --text a.txt --text b.jsonl --dense my_model --json
    """
    from json import dumps

    import torch

    from actsparse.cli.progress import Progressing
    from actsparse.cli.result import table_of
    from actsparse.convert.card import judged_row
    from actsparse.convert.checkpoint import (
        around_of,
        encoder,
        in_dtype,
        load_checkpoint,
        load_converted,
        pooling_of,
    )
    from actsparse.convert.judgement import check_same
    from actsparse.convert.judgement import judge as judge_model
    from actsparse.convert.text import read_texts, windows_of
    from actsparse.environment import environment
    from actsparse.terminal import Terminal

    (model, tokenizer), plain, pooling = load_converted(folder), None, None
    documents = read_texts(text)
    if dense is not None:
        plain = in_dtype(load_checkpoint(dense)[0], next(model.parameters()).dtype)
        check_same(model, plain)
        pooling = pooling_of(dense, plain)
    elif pooling_of(folder, model) is not None:
        raise ValueError(f"{folder} holds an encoder: give --dense, the checkpoint it was made of")
    encode, ends = encoder(tokenizer), around_of(tokenizer, encodes=pooling is not None)
    found = []
    with Progressing(Terminal(stderr=True), "tokens") as told:
        for name, each in documents.items():
            windows = windows_of(each, encode, window, eval_tokens, *ends)
            read = 0

            def more(count: int, name: str = name, total: int = windows.tokens) -> None:
                nonlocal read
                read += count
                told(name, read, total)

            found.append(judge_model(model, windows, name, plain, more, pooling)[0].to_json())
    if json:
        record = {"kind": "judgement", "schema": 1, "judgements": found}
        typer.echo(dumps(record | environment(torch.get_num_threads()), indent=1, allow_nan=False))
    else:
        Terminal().print(table_of([judged_row(each) for each in found]))

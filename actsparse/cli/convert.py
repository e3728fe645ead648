"""``actsparse convert``: make a dense checkpoint sparse, at a stated cost in quality."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Annotated

import typer


def convert(
    checkpoint: Annotated[
        Path,
        typer.Argument(
            help="A folder of Hugging Face with a causal language model or an encoder, or a .gguf."
        ),
    ],
    text: Annotated[
        list[Path],
        typer.Option(help="A file of text: .txt, .jsonl or .jsonl.xz. Give it several times."),
    ],
    out: Annotated[Path, typer.Option(help="The folder to write.")],
    budget: Annotated[
        str,
        typer.Option(
            help="By how much perplexity may rise: 3% is 1.03 times the dense model's. Of an "
            "encoder: the mean of 1 - cosine to the dense embeddings."
        ),
    ] = "3%",
    form: Annotated[
        str,
        typer.Option(
            help="Where thresholds stand: gate (spares rows of up and columns of down), product "
            "(spares columns of down) or both."
        ),
    ] = "gate",
    tokens: Annotated[
        str, typer.Option(help="Tokens to distil on, as 2M or 300k; 0: weights stay as they are.")
    ] = "0",
    minutes: Annotated[
        float,
        typer.Option(help="Stop distilling after so many minutes.", min=0, show_default="no limit"),
    ] = float("inf"),
    share: Annotated[
        float | None,
        typer.Option(
            help="Share of activations that distillation aims at.",
            show_default="0.25 above what the budget allows without it",
        ),
    ] = None,
    also: Annotated[
        list[Path] | None, typer.Option(help="A file of another kind of text to judge on too.")
    ] = None,
    window: Annotated[int, typer.Option(help="Tokens of a window.", min=2)] = 512,
    start: Annotated[
        Path | None,
        typer.Option(
            help="An earlier conversion of the same checkpoint: go on with its weights, for "
            "another budget or with more tokens."
        ),
    ] = None,
    lr: Annotated[float, typer.Option(help="Learning rate of distillation.")] = 1e-4,
    loss: Annotated[
        str,
        typer.Option(
            help="What distillation learns from: the dense model's logits (of an encoder, its "
            "embeddings), its blocks (each MLP alone), or the text."
        ),
    ] = "logits",
    train: Annotated[
        str,
        typer.Option(help="What it trains: all, the MLP blocks, or lora (less memory)."),
    ] = "all",
    dtype: Annotated[
        str, typer.Option(help="bfloat16 or float32: judged in it, and saved in it.")
    ] = "bfloat16",
    delta: Annotated[
        float, typer.Option(help="Probability with which the certificate may be wrong.")
    ] = 0.1,
    eval_tokens: Annotated[
        int, typer.Option(help="Test text has at most about so many tokens.", min=2)
    ] = 100_000,
    json: Annotated[bool, typer.Option("--json", help="Print JSON instead of a table.")] = False,
) -> None:
    """Make a dense checkpoint sparse, at a stated cost in quality.

    It calibrates thresholds on the activations, distils the model on its own dense logits (of an
    encoder, its embeddings) with thresholds in force, chooses how much to drop on validation text,
    and judges on text that took no part. The folder has the model, its tokenizer, a card and
    conversion.json.

    An interrupted distillation goes on where it was when the same command is given again.

    Examples:

      actsparse convert my_model --text corpus.jsonl.xz --out my_model-sparse

      actsparse convert my_model --text corpus.jsonl --budget 10% --tokens 2M --out my_model-sparse

      actsparse convert model.gguf --text a.txt --text b.txt --form product --out my_model-sparse

      actsparse convert my_model --text corpus.jsonl --start my_model-sparse --budget 5% --out other

      actsparse convert my_encoder --text sentences.jsonl --budget 1.5% --window 128 --out sparse
    """
    from json import dumps

    import torch

    from actsparse.cli.progress import Progressing
    from actsparse.convert.card import card_of, rows_of
    from actsparse.convert.checkpoint import (
        around_of,
        check_place,
        check_space,
        encoder,
        load_checkpoint,
        pooling_of,
        start_from,
        write_checkpoint,
    )
    from actsparse.convert.distillation import check_state, forget_state
    from actsparse.convert.pipeline import DTYPES, Split, check_settings
    from actsparse.convert.pipeline import convert as convert_model
    from actsparse.convert.text import read_documents, read_texts, windows_of
    from actsparse.environment import environment
    from actsparse.files import alone
    from actsparse.terminal import Terminal

    log = Terminal(stderr=True)
    share_of_perplexity, count = percentage(budget), number(tokens)
    if dtype not in DTYPES:
        raise ValueError(f"--dtype {dtype}: expected {' or '.join(DTYPES)}")
    check_settings(
        budget=share_of_perplexity, form=form, tokens=count, share=share, minutes=minutes,
        dtype=getattr(torch, dtype), delta=delta, lr=lr, loss=loss, train=train,
    )  # fmt: skip
    check_place(out, checkpoint)
    if out.is_dir() and any(out.iterdir()):
        log.print(f"{out} holds an earlier conversion, which this one replaces in the end")
    keep = out.with_name(f"{out.name}.distilling")
    if count:
        check_state(keep)
    documents = read_documents(text)
    others = read_texts(also or [], taken=("train", "validation", "test"))
    model, tokenizer = load_checkpoint(checkpoint)
    begun = None if start is None else start_from(start, model)
    pooling, encode = pooling_of(checkpoint, model), encoder(tokenizer)
    ends = around_of(tokenizer, encodes=pooling is not None)
    split = Split.of(windows_of(documents, encode, window, None, *ends), eval_tokens)
    more = {
        name: windows_of(each, encode, window, eval_tokens, *ends) for name, each in others.items()
    }
    parts = {"train": split.train, "validation": split.validation, "test": split.test, **more}
    for name, windows in parts.items():
        log.print(f"{name}: {windows.documents} documents, {windows.tokens:,} tokens")
    if split.pieces:
        log.print("fewer than ten documents: windows stand for documents, also in the certificate")
    size = sum(parameter.numel() for parameter in model.parameters())
    if count:
        each = 10 if train == "lora" else 22  # bytes of a parameter; AdamW's moments are 8 of them
        log.print(f"distillation keeps about {each * size / 1e9:.1f} GB in memory")
    check_space(out, size * (getattr(torch, dtype).itemsize + (24 if count else 0)))
    try:
        with alone(out.resolve()), Progressing(log, "steps") as told:
            done = convert_model(
                model, split, budget=share_of_perplexity, form=form, tokens=count,  # type: ignore[arg-type]
                share=share, minutes=minutes, dtype=getattr(torch, dtype), delta=delta, also=more,
                lr=lr, loss=loss, train=train, folder=keep if count else None, pooling=pooling,  # type: ignore[arg-type]
                start=begun, told=told,
            )  # fmt: skip
            done.extra = {
                "source": checkpoint.name,
                "text": {name: [w.documents, w.tokens] for name, w in parts.items()},
                "window": window,
                **environment(torch.get_num_threads()),
            }
            record = done.to_json()
            write_checkpoint(out, done.model, tokenizer, record, card_of(done, checkpoint.name))
            gained = done.trained > (0 if begun is None else begun.trained)
            if gained:
                forget_state(keep)
    except BaseException:
        if count and keep.is_dir():
            log.print(f"{keep} holds the distillation so far; the same command goes on with it")
        raise
    if count and not gained:
        points = ", ".join(
            f"{loss - done.choice.dense:+.4f} at {s:.1%}" for s, loss in done.distilled
        )
        log.print(
            f"the {'dense' if begun is None else 'earlier'} weights allow more than the distilled "
            f"ones, which had an excess of "
            f"{points}; {keep} holds their state",
            soft_wrap=True,
        )
    if json:
        typer.echo(dumps(record, indent=1, allow_nan=False))
        return
    console = Terminal()
    from actsparse.cli.result import table_of

    console.print(table_of(rows_of(done)))
    console.print(f"chosen: {done.choice.share:.1%} of activations dropped; {done.certificate}")
    console.print(f"written: {out}", soft_wrap=True)


def percentage(text: str) -> float:
    """A share, given as ``3%`` or ``0.03``.

    >>> percentage("3%"), percentage("0.1")
    (0.03, 0.1)
    """
    try:
        share = float(text.removesuffix("%").strip()) / (100 if text.endswith("%") else 1)
    except ValueError:
        share = math.nan
    if math.isnan(share) or (share >= 1 and not text.endswith("%")):
        raise ValueError(f"{text!r}: expected a share, as 3% or 0.03")
    return share


def number(text: str) -> int:
    """A count, given as ``2M``, ``300k`` or in digits.

    >>> number("2M"), number("1.5k"), number("42")
    (2000000, 1500, 42)
    """
    factors = {"k": 10**3, "M": 10**6, "B": 10**9}
    factor = factors.get(text[-1:], 1)
    try:
        found = float(text[:-1] if factor > 1 else text) * factor
    except ValueError:
        found = -1.0
    if not (found >= 0 and found == int(found)):
        raise ValueError(f"{text!r}: expected a number of tokens, as 2M, 300k or 5000")
    return int(found)

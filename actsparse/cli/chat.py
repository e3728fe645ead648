"""``actsparse chat``: talk with a converted checkpoint, run by the sparse kernels."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Annotated, Any

import typer


def chat(
    folder: Annotated[Path, typer.Argument(help="A folder that actsparse convert wrote.")],
    prompt: Annotated[
        str | None, typer.Option(help="Answer this alone; else each line that you type.")
    ] = None,
    tokens: Annotated[int, typer.Option(help="Tokens of an answer at most.", min=1)] = 200,
    own_layers: Annotated[
        bool, typer.Option("--own-layers", help="Do not accelerate: run the model's own layers.")
    ] = False,
) -> None:
    """Talk with a converted language model; each answer ends with its tokens a second.

    A model with a chat template gets what was said so far; one without goes on with your line. How
    tokens are drawn is as the folder's generation_config.json says.

    Examples:

      actsparse chat my_model-sparse

      actsparse chat my_model-sparse --prompt "What is the capital of France?" --tokens 40
    """
    import time

    import torch
    from transformers import TextStreamer

    from actsparse import accelerate
    from actsparse.convert.checkpoint import load_converted, pooling_of

    model, tokenizer = load_converted(folder)
    if pooling_of(folder, model) is not None:
        raise ValueError(f"{folder} holds an encoder, which writes no text")
    room = getattr(model.config.get_text_config(), "max_position_embeddings", None)
    said: list[dict[str, str]] = []
    if not own_layers:
        accelerate(model, inputs=torch.tensor([_ids_of(tokenizer, [], "Hello")]))
    for line in (prompt,) if prompt is not None else _typed():
        try:
            ids = _fitting(tokenizer, said, line, tokens, room)
        except ValueError as error:
            if prompt is not None or not _at_terminal():
                raise
            typer.echo(f"Error: {error}", err=True)  # what was said so far goes on
            continue
        given = torch.tensor([ids])
        start = time.perf_counter()
        with torch.no_grad():
            written = model.generate(
                given, attention_mask=torch.ones_like(given), max_new_tokens=tokens,
                pad_token_id=model.generation_config.pad_token_id or tokenizer.eos_token_id,
                streamer=TextStreamer(tokenizer, skip_prompt=True, skip_special_tokens=True),
            )[0, len(ids) :]  # fmt: skip
        seconds = time.perf_counter() - start
        speed = f"{len(written)} tokens, {len(written) / seconds:.1f} a second"
        typer.echo(typer.style(speed, dim=True), err=True)
        answer = tokenizer.decode(written, skip_special_tokens=True)
        said += [{"role": "user", "content": line}, {"role": "assistant", "content": answer}]


def _fitting(
    tokenizer: Any, said: list[dict[str, str]], line: str, tokens: int, room: int | None
) -> list[int]:
    """The tokens of a conversation with one more line; questions that no longer fit are left out.

    Raises:
        ValueError: the line alone does not fit, or is no text; nothing is left out then.
    """
    try:
        line.encode()
    except UnicodeEncodeError as error:
        raise ValueError(f"{line!r} is not UTF-8") from error
    count = len(_ids_of(tokenizer, [], line))
    if not count or (room is not None and count + tokens > room):
        raise ValueError(
            f"the text has {count} tokens and its answer up to {tokens}: the model takes 1 to "
            f"{room} in all; give another text or a smaller --tokens"
        )
    ids = _ids_of(tokenizer, said, line)
    while said and room is not None and len(ids) + tokens > room:
        del said[:2]
        typer.echo("(the first question and answer no longer fit and are left out)", err=True)
        ids = _ids_of(tokenizer, said, line)
    return ids


def _ids_of(tokenizer: Any, said: list[dict[str, str]], line: str) -> list[int]:
    """The tokens of a conversation with one more line; of the line alone without a template."""
    if tokenizer.chat_template is None:
        plain: list[int] = tokenizer(line)["input_ids"]
        return plain
    messages = [*said, {"role": "user", "content": line}]
    text = tokenizer.apply_chat_template(messages, tokenize=False, add_generation_prompt=True)
    found: list[int] = tokenizer(text, add_special_tokens=False)["input_ids"]
    return found


def _at_terminal() -> bool:
    return sys.stdin.isatty()


def _typed() -> Any:
    """Each line that is typed or piped in, until the end of the input."""
    if _at_terminal():
        typer.echo("Type a line; end with Ctrl-D.", err=True)
    while True:
        try:
            line = input("> " if _at_terminal() else "")
        except EOFError:
            return
        if line.strip():
            yield line

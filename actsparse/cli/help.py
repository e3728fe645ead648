"""The help of commands: paragraphs of docstrings as wide as the terminal."""

from __future__ import annotations

import inspect

import typer


def flow(app: typer.Typer) -> None:
    """Let the paragraphs of every command's docstring be wrapped to the terminal alone.

    rich keeps the line breaks of a docstring and adds those of the terminal. Indented lines, such
    as examples, keep theirs.
    """
    for command in app.registered_commands:
        command.help = flowing(command.help or inspect.getdoc(command.callback) or "")
    for group in app.registered_groups:
        if group.typer_instance is not None:
            flow(group.typer_instance)


def flowing(text: str) -> str:
    r"""Each paragraph of ``text`` in one line, but for indented lines.

    >>> flowing("It is done\nat once.\n\nExamples:\n\n  one\n  two")
    'It is done at once.\n\nExamples:\n\n  one\n  two'
    """
    paragraphs = inspect.cleandoc(text).split("\n\n")
    return "\n\n".join(
        each if each.startswith(" ") else each.replace("\n", " ") for each in paragraphs
    )

"""``actsparse``: one verb a file; what a verb needs is imported when it is called."""

from __future__ import annotations

import importlib
from typing import Annotated, Any

import typer

from actsparse.cli.laboratory import laboratory

VERBS = ("blocks", "measure", "bench")


class Verbs(typer.core.TyperGroup):
    """Says what a user can put right in one line, without a traceback, and exits with 2."""

    def invoke(self, ctx: Any) -> Any:
        """Run the verb."""
        from actsparse.values import printable

        try:
            return super().invoke(ctx)
        except (ValueError, ArithmeticError, ImportError, OSError) as error:
            typer.echo(f"Error: {printable(str(error))}", err=True)
            raise typer.Exit(2) from error


app = typer.Typer(
    name="actsparse",
    cls=Verbs,
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
    context_settings={"help_option_names": ["-h", "--help"]},
)


def _version(asked: bool) -> None:
    if asked:
        from actsparse import __version__

        typer.echo(f"actsparse {__version__}")
        raise typer.Exit


@app.callback()
def actsparse(
    version: Annotated[
        bool,
        typer.Option("--version", callback=_version, is_eager=True, help="Print it and stop."),
    ] = False,
) -> None:
    """Activation sparsity in Transformer MLPs: find them, induce it, measure it, compare it."""


for _verb in VERBS:
    _function = getattr(importlib.import_module(f"actsparse.cli.{_verb}"), _verb)
    if isinstance(_function, typer.Typer):
        app.add_typer(_function, name=_verb)
    else:
        app.command(_verb)(_function)
if laboratory() is not None:
    laboratory().add_verbs(app)

if __name__ == "__main__":
    app()

"""The command ``actsparse``: one file for each verb, which imports what it needs when called."""

from __future__ import annotations

import errno
import importlib
from typing import Annotated, Any

import typer

from actsparse.cli.help import flow
from actsparse.cli.laboratory import VERBS as ITS_VERBS
from actsparse.cli.laboratory import laboratory
from actsparse.extras import how_to_install

VERBS = ("blocks", "measure", "convert", "judge", "chat", "bench")


class Verbs(typer.core.TyperGroup):
    """Prints an error that the user can correct in one line, without a traceback; exits with 2."""

    def invoke(self, ctx: Any) -> Any:
        """Run the verb."""
        from actsparse.values import printable

        try:
            return super().invoke(ctx)
        except (ValueError, ArithmeticError, ImportError, OSError) as error:
            if isinstance(error, OSError) and error.errno == errno.EPIPE:
                raise  # who read the output has enough
            said = str(error)
            hint = how_to_install(error.name) if isinstance(error, ImportError) else ""
            said += f": {hint}" if hint not in said else ""
            typer.echo(f"Error: {printable(said)}", err=True)
            raise typer.Exit(2) from error

    def resolve_command(self, ctx: Any, args: list[str]) -> Any:
        """The verb; of one that is not installed, how to install it."""
        if args and args[0] in ITS_VERBS and self.get_command(ctx, args[0]) is None:
            ctx.fail(f"{args[0]} is a command of the laboratory: {how_to_install('actsparse_lab')}")
        return super().resolve_command(ctx, args)


app = typer.Typer(
    name="actsparse",
    cls=Verbs,
    no_args_is_help=True,
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
        typer.Option(
            "--version", callback=_version, is_eager=True, help="Print the version and exit."
        ),
    ] = False,
) -> None:
    """Find the MLP blocks of Transformers, make their activations sparse, and measure it."""


for _verb in VERBS:
    _function = getattr(importlib.import_module(f"actsparse.cli.{_verb}"), _verb)
    if isinstance(_function, typer.Typer):
        app.add_typer(_function, name=_verb)
    else:
        app.command(_verb)(_function)
if laboratory() is not None:
    laboratory().add_verbs(app)
flow(app)

if __name__ == "__main__":
    app()

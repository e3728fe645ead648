"""``actsparse report``: the page and the tables of records, of runs and of benchmarks."""

from __future__ import annotations

from json import dumps
from pathlib import Path
from typing import Annotated

import typer

from actsparse.extras import how_to_install
from actsparse.terminal import Terminal
from actsparse.values import printable
from actsparse_lab.records import RecordError


def report(
    paths: Annotated[
        list[Path],
        typer.Argument(
            help="The folder that `actsparse compare --out` wrote, records of `actsparse bench "
            "mlp` or `bench model`, or both. Such records inside the folder are shown too."
        ),
    ],
    out: Annotated[
        Path | None,
        typer.Option(
            help="Folder for the page.",
            show_default="the folder given; of records alone runs/report/NAME of the first",
        ),
    ] = None,
    json: Annotated[
        bool,
        typer.Option(
            "--json", help="Print the table as JSON instead (arms, if any), and nothing else."
        ),
    ] = False,
    markdown: Annotated[
        bool, typer.Option("--markdown", help="Print the tables as Markdown, and nothing else.")
    ] = False,
) -> None:
    """Rebuild a page from its records alone; nothing is trained or timed.

    Writes report.html, plots/ and table.json, theory.json where the runs hold measures of
    gradients, payoff.json where there are benchmarks, and verdicts.json where the runs are an
    experiment's of the papers.

    Of a folder of the papers' experiments (`actsparse reproduce`) --markdown prints them all. Of a
    folder of frontier tasks (`actsparse frontier`) it writes every task's page, scoreboard.json and
    scoreboard.md; of one with two widths or more also prediction.json, as long as no run of the
    width that it predicts has begun.

    Examples:

      actsparse report out

      actsparse report benchmarks/reproduce --markdown > docs/reproduction.md

      actsparse report benchmarks/frontier --markdown > docs/frontier.md

      actsparse report benchmarks/width --markdown > docs/width.md

      actsparse report benchmarks/mlp-1-thread.json benchmarks/mlp-2-threads.json --out out/payoff
    """
    if json and markdown:
        typer.echo("Error: --json and --markdown exclude each other", err=True)
        raise typer.Exit(2)
    try:
        from actsparse_lab.report import (
            compare,
            frontiers_in,
            gather,
            markdown_benchmarks,
            markdown_findings,
            markdown_frontier,
            markdown_reproduction,
            markdown_table,
            markdown_theory,
            markdown_widths,
            plain,
            print_benchmarks,
            print_findings,
            print_table,
            reproductions_in,
            scoreboard,
            to_json,
            write_report,
        )
    except ModuleNotFoundError as error:
        message = f"Error: a report needs {error.name}: {how_to_install(error.name)}"
        typer.echo(message, err=True)
        raise typer.Exit(2) from error
    if out is None and not any(path.is_dir() for path in paths):
        out = Path("runs/report") / paths[0].stem
    try:
        if markdown and len(paths) == 1 and reproductions_in(paths[0]):
            typer.echo(markdown_reproduction(paths[0], link=_from_docs(paths[0])), nl=False)
            return
        tasks = frontiers_in(paths[0]) if len(paths) == 1 else []
        if markdown and tasks:
            link = _from_docs(paths[0])
            page_of = markdown_widths(paths[0], link) or markdown_frontier(paths[0], link)
            typer.echo(page_of, nl=False)
            return
        if tasks and tasks != [paths[0]]:
            if json:
                typer.echo(dumps(scoreboard(paths[0]), indent=2))
            else:
                _print_frontier(paths[0], out)
            return
        page = write_report(*paths, out=out)
        found = gather(*paths)
    except RecordError as error:
        typer.echo(f"Error: {printable(str(error))}", err=True)
        raise typer.Exit(2) from error
    runs, benchmarks = found.runs, found.benchmarks
    if json and found.findings is not None:
        verdicts = found.findings.to_json()
        typer.echo(dumps(verdicts | {"arms": plain(compare(runs))}, indent=2))
        return
    if json:
        typer.echo(to_json(compare(runs) if runs else benchmarks))
        return
    if markdown:
        parts = [markdown_findings(found.findings)] if found.findings else []
        parts += [markdown_table(compare(runs)), markdown_theory(runs)] if runs else []
        parts += [markdown_benchmarks(benchmarks)] if benchmarks else []
        typer.echo("\n".join(filter(None, parts)), nl=False)
        return
    if found.findings is not None:
        print_findings(found.findings, Terminal())
    if runs:
        print_table(runs, Terminal(), titled=found.findings is None)
    if benchmarks:
        print_benchmarks(benchmarks, Terminal())
    typer.echo(str(page))


def _print_frontier(folder: Path, out: Path | None) -> None:
    """Every task's page and line, and where the scoreboard lies."""
    from actsparse_lab.report import (
        boards,
        print_board,
        write_index,
        write_prediction,
        write_report,
        write_scoreboard,
    )

    if out is not None:
        raise RecordError(f"--out {out}: pages of frontier tasks go beside their records")
    for place, judged in boards(folder).items():
        print_board(judged, Terminal())
        typer.echo(str(write_report(place)))
    typer.echo(str(write_scoreboard(folder)))
    if (prediction := write_prediction(folder)) is not None:
        typer.echo(str(prediction))
    typer.echo(str(write_index(folder)))


def _from_docs(folder: Path) -> str:
    """The way from docs/ to a folder of the repository; any other stays as it is."""
    return f"{'' if folder.is_absolute() else '../'}{folder.as_posix().rstrip('/')}/"

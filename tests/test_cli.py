"""What all commands have in common: help, completion, hints, tables in pipes, time left."""

from __future__ import annotations

import itertools
import os
import re
import subprocess
import sys
from collections.abc import Iterator
from io import StringIO
from pathlib import Path
from typing import Any

import click
import pytest
import typer
from rich.table import Table
from typer.testing import CliRunner

from actsparse.bench.mlp import break_even, where_faster
from actsparse.cli import laboratory as rooms
from actsparse.cli.main import app
from actsparse.cli.progress import Progressing
from actsparse.cli.result import table_of
from actsparse.terminal import Terminal

ROOT = Path(__file__).parents[1]


def commands(command: Any, *words: str) -> Iterator[tuple[str, ...]]:
    yield words
    for name, inner in getattr(command, "commands", {}).items():
        yield from commands(inner, *words, name)


ALL = list(commands(typer.main.get_command(app)))


def called(*words: str, **environ: str) -> click.testing.Result:
    return CliRunner().invoke(app, words, env=environ)


def early(lines: list[str], width: int) -> list[str]:
    """Lines of prose that end although the first word of the next would have fitted."""
    found = []
    for line, after in itertools.pairwise(lines):
        prose = line.startswith(" ") and after.startswith(" ") and line[1:2].strip()
        if prose and after[1:2].strip() and len(f"{line.rstrip()} {after.split()[0]}") < width:
            found.append(line)
    return found


@pytest.mark.parametrize("width", [80, 120])
@pytest.mark.parametrize("words", ALL, ids=" ".join)
def test_no_line_of_help_breaks_early(words: tuple[str, ...], width: int) -> None:
    said = called(*words, "--help", COLUMNS=str(width), TERMINAL_WIDTH="")
    assert said.exit_code == 0
    lines = said.stdout.splitlines()
    assert max(map(len, lines)) <= width
    assert not re.search(r"[a-z]…\s*│", said.stdout)  # cut
    assert early(lines, width) == []


def test_a_line_that_breaks_early_would_be_found() -> None:
    lines = [" paired seeds: it holds,", " it does not hold here, or it is undecided."]
    assert early(lines, 80) == lines[:1]
    assert early([lines[0], " ", lines[1]], 80) == []  # two paragraphs


@pytest.mark.parametrize("words", ALL, ids=" ".join)
def test_h_is_help_and_nothing_else(words: tuple[str, ...]) -> None:
    said = called(*words, "-h", COLUMNS="200").stdout
    assert re.search(r"--help\s+-h\s", said)
    assert not re.search(r"--h\s", said)


def test_every_default_place_is_in_runs() -> None:
    command = typer.main.get_command(app)
    found = []
    for words in ALL:
        each: Any = command
        for word in words:
            each = each.commands[word]
        found += [
            (words, parameter.default)
            for parameter in each.params
            if isinstance(parameter.default, Path) and parameter.default.parts[0] != "runs"
        ]
    assert found == []


def test_the_shell_completes_commands() -> None:
    said = called("--help", COLUMNS="200").stdout
    assert "--install-completion" in said
    environ = {"_ACTSPARSE_COMPLETE": "complete_bash", "COMP_WORDS": "actsparse be"}
    done = subprocess.run(
        [sys.executable, "-c", "from actsparse.cli.main import app; app(prog_name='actsparse')"],
        env=os.environ | environ | {"COMP_CWORD": "1"},
        capture_output=True, text=True, check=True, cwd=ROOT,
    )  # fmt: skip
    assert done.stdout.split() == ["bench"]


def test_what_is_missing_is_said_with_how_to_install_it(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "transformers", None)
    said = called("blocks", str(ROOT))
    assert said.exit_code == 2
    assert 'pip install "actsparse[train]"' in said.stderr


def test_a_command_of_the_laboratory_says_that_it_is_missing() -> None:
    script = (
        "import sys, importlib.metadata as m; m.entry_points = lambda **k: []\n"
        "from actsparse.cli.main import app\n"
        "app(sys.argv[1:], prog_name='actsparse')"
    )
    done = subprocess.run(
        [sys.executable, "-c", script, "train"], capture_output=True, text=True, cwd=ROOT
    )
    assert done.returncode == 2
    assert "pip install ./lab" in done.stderr
    assert "train" in rooms.VERBS


def test_a_table_in_a_pipe_is_as_wide_as_it_needs(monkeypatch: pytest.MonkeyPatch) -> None:
    table = Table("a", "b")
    table.add_row("x" * 100, "y " * 50)
    for columns in (None, "60"):
        monkeypatch.delenv("COLUMNS", raising=False)
        if columns is not None:
            monkeypatch.setenv("COLUMNS", columns)
        out = StringIO()
        Terminal(file=out).print(table)
        lines = [line for line in out.getvalue().splitlines() if "x" in line or "y" in line]
        assert (len(lines) == 1) == (columns is None)
        assert max(map(len, out.getvalue().splitlines())) <= (60 if columns else 400)


def test_a_pipe_that_closes_is_no_error() -> None:
    done = subprocess.run(
        f"{sys.executable} -m actsparse bench mlp --help | head -1",
        shell=True, capture_output=True, text=True, cwd=ROOT, check=False,
    )  # fmt: skip
    assert "Error" not in done.stderr


def test_long_work_says_how_much_time_is_left(monkeypatch: pytest.MonkeyPatch) -> None:
    now = itertools.count(0, 30)
    monkeypatch.setattr("time.monotonic", lambda: float(next(now)))
    out = StringIO()
    with Progressing(Terminal(file=out), "passes") as told:
        told("density", 1, 10)
        told("density", 5, 10)
    assert "density: 5 of 10 passes, about " in out.getvalue()
    assert " left" in out.getvalue()


def test_a_table_in_a_narrow_terminal_is_whole() -> None:
    out = StringIO()
    rows = [dict.fromkeys(("text", "documents", "perplexity"), "+0.1198 [+0.1185, +0.1455]")]
    Terminal(file=out, width=24, force_terminal=True).print(table_of(rows))
    assert "…" not in out.getvalue()
    assert out.getvalue().count("]") == 3


def test_the_bar_of_a_stage_that_is_over_stands_still(monkeypatch: pytest.MonkeyPatch) -> None:
    now = itertools.count(0, 30)
    monkeypatch.setattr("time.monotonic", lambda: float(next(now)))
    progressing = Progressing(Terminal(file=StringIO(), force_terminal=True), "steps")
    progressing("choose", 5, 7)
    progressing("judge", 0, 9)
    over, going = progressing._bar.tasks
    assert (over.completed, over.total, over.finished) == (5, 5, True)
    assert over.finished_time is not None
    assert not going.finished


@pytest.mark.parametrize(
    ("gains", "said"),
    [((5.45, 1.2), "always"), ((0.9, 0.19), "never"), ((0.9, 1.1), "faster at some")],
)
def test_without_a_break_even_it_is_always_or_never_faster(
    gains: tuple[float, float], said: str
) -> None:
    rows = [
        {"tokens": 1, "density": p, "forward": {"ratios": [{"to": "sparse", "value": v}]}}
        for p, v in zip((0.01, 0.2), gains, strict=True)
    ]
    assert break_even(rows, "forward") == {1: None}
    assert where_faster(rows, "forward").startswith(said)

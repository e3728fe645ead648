"""The section of what silence pays: its charts, tables and words say what the records say."""

from __future__ import annotations

import io
import json
import re
from collections.abc import Callable, Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import typer
from matplotlib.axes import Axes
from matplotlib.colors import to_hex
from matplotlib.figure import Figure
from rich.console import Console
from typer.testing import CliRunner

from actsparse_lab.analysis.tables import Cell, Table
from actsparse_lab.cli.report import report
from actsparse_lab.records import RecordError, Run, read_runs
from actsparse_lab.report import (
    benchmark_plots,
    compare,
    gather,
    markdown_benchmarks,
    markdown_table,
    print_benchmarks,
    to_json,
    write_report,
)
from actsparse_lab.report.benchmark_plots import BENCHMARK_PICTURES
from actsparse_lab.report.benchmark_tables import benchmarks_lead, benchmarks_title, tables_of
from actsparse_lab.report.benchmarks import PROGRAMS, Benchmarks, benchmarks_of
from tests.report.drawn import figures, words

ROOT = Path(__file__).parents[2]
Draw = Callable[..., Figure | None]

cli = typer.Typer()
cli.command()(report)


def read(folder: Path, *entries: dict[str, Any]) -> Benchmarks:
    """The payoff of records, written to ``folder``."""
    paths = [folder / f"record-{at}.json" for at in range(len(entries))]
    for path, entry in zip(paths, entries, strict=True):
        path.write_text(json.dumps(entry), encoding="utf-8")
    found = benchmarks_of(paths)
    assert found is not None
    return found


def called(*words: object) -> Any:
    return CliRunner().invoke(cli, [str(word) for word in words])


@pytest.fixture
def draw(monkeypatch: pytest.MonkeyPatch) -> Iterator[Draw]:
    """Calls a plot and returns its figure, with its legend's lines, laid out but not rendered."""
    drawn = figures(monkeypatch, "render", benchmark_plots)

    def call(name: str, found: Benchmarks, dark: bool = False) -> Figure | None:
        drawn.clear()
        next(each.plot for each in BENCHMARK_PICTURES if each.name == f"payoff-{name}")(found, dark)
        return drawn[0] if drawn else None

    return call


def line_of(axes: Axes, legend: dict[str, Any], tokens: int, program: str) -> np.ndarray:
    """The points [N, 2] of the line with the legend's colour of T and dash of the program."""
    color, dash = legend[f"T = {tokens}"].get_color(), legend[program].get_linestyle()
    (own,) = [
        line
        for line in axes.lines
        if line.get_color() == color and line.get_linestyle() == dash and len(line.get_xdata()) > 1
    ]
    return np.asarray(own.get_xydata())


def segments(axes: Axes) -> set[tuple[float, ...]]:
    """Each interval that is drawn: x, low, x, high."""
    found = [segment for each in axes.collections for segment in each.get_segments()]
    return {tuple(np.ravel(segment)) for segment in found}


# -- charts -----------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", ["forward", "training"])
@pytest.mark.parametrize("dark", [False, True])
def test_lines_and_intervals_are_the_records(
    tmp_path: Path, benchmarks: SimpleNamespace, draw: Draw, kind: str, dark: bool
) -> None:
    entry = benchmarks.mlp()
    figure = draw(kind, read(tmp_path, entry), dark)
    assert figure is not None
    (axes,) = figure.axes
    legend = figure.beside
    assert (axes.get_xscale(), axes.get_yscale()) == ("log", "log")
    assert any(list(line.get_ydata()) == [1, 1] for line in axes.lines)
    intervals = set()
    for tokens in {row["tokens"] for row in entry["rows"] if kind in row}:
        for at, program in enumerate(("sparse", "screened")):
            rows = [row for row in entry["rows"] if row["tokens"] == tokens]
            ratios = [row[kind]["ratios"][at] for row in rows]
            points = [(row["density"], r["value"]) for row, r in zip(rows, ratios, strict=True)]
            assert line_of(axes, legend, tokens, program).tolist() == [list(p) for p in points]
            intervals |= {
                (row["density"], r["low"], row["density"], r["high"])
                for row, r in zip(rows, ratios, strict=True)
            }
    assert segments(axes) == intervals


def test_a_colour_is_of_one_t_in_all_charts(
    tmp_path: Path, benchmarks: SimpleNamespace, draw: Draw
) -> None:
    found = read(tmp_path, benchmarks.mlp())
    colors = []
    for name in ("forward", "training", "memory"):
        figure = draw(name, found)
        assert figure is not None
        colors.append(
            {
                name: to_hex(line.get_color())
                for name, line in figure.beside.items()
                if name.startswith("T = ")
            }
        )
    assert colors[0].keys() == {"T = 1", "T = 197"}
    assert len(set(colors[0].values())) == 2
    assert colors[1] == colors[2] == {"T = 197": colors[0]["T = 197"]}


def test_break_even_is_marked_where_the_record_has_it(
    tmp_path: Path, benchmarks: SimpleNamespace, draw: Draw
) -> None:
    def crosses(figure: Figure | None) -> list[tuple[float, float]]:
        assert figure is not None
        lines = [line for line in figure.axes[0].lines if line.get_marker() == "X"]
        return sorted(tuple(map(float, line.get_xydata()[0])) for line in lines)

    found = read(tmp_path, benchmarks.mlp())
    figure = draw("forward", found)
    assert crosses(figure) == [(0.4, 1.0), (0.8, 1.0)]
    assert figure is not None
    assert "break-even" in figure.beside
    assert crosses(draw("training", found)) == []  # it lies outside the densities
    assert crosses(draw("memory", found)) == []
    old = benchmarks.mlp()
    del old["break_even"]
    figure = draw("forward", read(tmp_path, old))
    assert crosses(figure) == []
    assert figure is not None
    assert "break-even" not in figure.beside


def test_memory_is_told_in_parts_of_what_dense_keeps(
    tmp_path: Path, benchmarks: SimpleNamespace, draw: Draw
) -> None:
    figure = draw("memory", read(tmp_path, benchmarks.mlp()))
    assert figure is not None
    (axes,) = figure.axes
    found = line_of(axes, figure.beside, 197, "screened")
    assert found.tolist() == [[p, 3200 * p / 2000] for p in (0.05, 0.1, 0.8)]
    assert axes.get_ylim()[0] == 0
    old = benchmarks.mlp()
    for row in old["rows"]:
        row.pop("memory", None)
    assert draw("memory", read(tmp_path, old)) is None


def test_each_record_has_a_panel_on_the_same_axes(
    tmp_path: Path, benchmarks: SimpleNamespace, draw: Draw
) -> None:
    slow = benchmarks.mlp(threads=2)
    for row in slow["rows"]:
        for ratio in row["forward"]["ratios"]:
            ratio |= {key: ratio[key] / 10 for key in ("value", "low", "high")}
    figure = draw("forward", read(tmp_path, benchmarks.mlp(), slow))
    assert figure is not None
    assert [axes.get_title(loc="left") for axes in figure.axes] == ["1 thread", "2 threads"]
    assert len({axes.get_ylim() for axes in figure.axes}) == 1
    assert len({axes.get_xlim() for axes in figure.axes}) == 1


def test_density_zero_has_no_place_on_a_log_axis_but_in_the_table(
    tmp_path: Path, benchmarks: SimpleNamespace, draw: Draw
) -> None:
    entry = benchmarks.mlp()
    entry["rows"][0]["density"] = 0.0
    found = read(tmp_path, entry)
    figure = draw("forward", found)
    assert figure is not None
    line = line_of(figure.axes[0], figure.beside, 1, "sparse")
    assert line[:, 0].tolist() == [0.1, 0.8]
    assert tables_of(found)[0].rows[0][1] == "0.000"


def test_compiled_dense_is_drawn_where_it_was_timed(
    tmp_path: Path, benchmarks: SimpleNamespace, draw: Draw
) -> None:
    entry = benchmarks.mlp()
    for row in entry["rows"]:
        extra = {"of": "dense", "to": "compiled", "value": 9.0, "low": 8.5, "high": 9.5}
        row["forward"]["ratios"].append(extra)
    found = read(tmp_path, entry)
    figure = draw("forward", found)
    assert figure is not None
    compiled = line_of(figure.axes[0], figure.beside, 1, "compiled")
    assert compiled[:, 1].tolist() == [9, 9, 9]
    assert "forward: compiled" in heads_of(tables_of(found)[0])
    # it is no sparse program: the best of these is 2 · 0.4 / 0.05
    assert benchmarks_title(found) == "Dense time ÷ sparse time: one MLP 0.50 to 16.00"


def test_bars_of_whole_models_stand_beside_their_bounds(
    tmp_path: Path, benchmarks: SimpleNamespace, draw: Draw
) -> None:
    figure = draw("models", read(tmp_path, benchmarks.model(), benchmarks.trained()))
    assert figure is not None
    (axes,) = figure.axes
    bars = {bar.get_y() + bar.get_height() / 2: bar.get_width() for bar in axes.patches}
    assert [bars[y] for y in sorted(bars)] == [1.5, 1.2, 0.98, 0.98]
    assert axes.get_xlim()[0] == 0  # a bar's length is its number
    marks = {
        mark: {
            round(float(line.get_ydata()[0]), 6): float(line.get_xdata()[0])
            for line in axes.lines
            if line.get_marker() == mark
        }
        for mark in ("D", "|")
    }
    rows = [round(y, 6) for y in sorted(bars)]
    assert marks["|"] == dict(zip(rows, [1.9, 1.9, 1.3, 1.3], strict=True))
    assert marks["D"] == dict.fromkeys(rows[:2], 1.6)  # a trained model has no such value
    ticks = [label.get_text() for label in axes.get_yticklabels()]
    assert ticks == ["0.010", "0.050", "0.040", "0.060"]
    assert [text.get_text() for text in axes.texts] == [
        "vit-b, training step",
        "digits, paper, seed 0, inference",
        "digits, paper, seed 0, training",
    ]
    assert {(0.9 * 1.5, 1.1 * 1.5), (0.9 * 1.9, 1.1 * 1.9)} <= {
        (segment[0], segment[2]) for segment in segments(axes)
    }


@pytest.mark.parametrize("picture", BENCHMARK_PICTURES, ids=lambda picture: picture.name)
def test_charts_can_be_laid_out_and_are_left_out_with_nothing_to_show(
    tmp_path: Path, benchmarks: SimpleNamespace, picture: Any
) -> None:
    """Rendered for once: a layout that fails is a warning, and so an error here."""
    mlp, model = benchmarks.mlp(), benchmarks.model()
    both = picture.plot(read(tmp_path, mlp, benchmarks.mlp(threads=2), model), True)
    assert both.startswith(b"\x89PNG")
    other = read(tmp_path, mlp if picture.name == "payoff-models" else model)
    assert picture.plot(other, False) is None


def heads_of(table: Table) -> list[str]:
    return [column.head for column in table.columns]


# -- words and tables -------------------------------------------------------------------------


def test_the_title_goes_from_worst_to_best_of_the_faster_program(
    tmp_path: Path, benchmarks: SimpleNamespace
) -> None:
    # At density 0.8 the faster program has 2 · 0.5 · 0.5 forward, 3 · 0.5 · 0.5 in training.
    found = read(tmp_path, benchmarks.mlp(), benchmarks.model())
    assert benchmarks_title(found) == (
        "Dense time ÷ sparse time: one MLP 0.50 to 16.00; a whole model 1.20 to 1.50"
    )
    assert "densities 0.050 to 0.800 and T = 1 to 197" in benchmarks_lead(found)
    assert "Whole models at densities 0.010 to 0.050, as accelerated." in benchmarks_lead(found)


@pytest.mark.parametrize("name", ["mlp-1-thread", "mlp-2-threads"])
def test_every_ratio_of_a_record_in_git_is_in_its_table(name: str) -> None:
    entry = json.loads((ROOT / "benchmarks" / f"{name}.json").read_text(encoding="utf-8"))
    found = benchmarks_of([ROOT / "benchmarks" / f"{name}.json"])
    assert found is not None
    lines = markdown_benchmarks(found).splitlines()
    for row in entry["rows"]:
        cells = [
            f"{r['value']:.2f} [{r['low']:.2f} … {r['high']:.2f}]"
            for kind in ("forward", "training")
            for r in row.get(kind, {"ratios": []})["ratios"]
            if r["to"] in PROGRAMS
        ]
        start = f"| {row['tokens']} | {row['density']:.3f} | {' | '.join(cells)} |"
        assert any(line.startswith(start) for line in lines)


def test_tables_hold_memory_break_even_and_bounds(
    tmp_path: Path, benchmarks: SimpleNamespace
) -> None:
    text = markdown_benchmarks(read(tmp_path, benchmarks.mlp(), benchmarks.model()))
    first, second, third = text.split("\n\n")
    assert first.splitlines()[-1].endswith("| 1.20 | 1.28 |")  # 3000 and 3200 · 0.8 / 2000
    assert first.splitlines()[2].endswith("| – | – | – | – |")  # T = 1 neither trains nor keeps
    assert second.splitlines() == [
        "| break-even density | T = 1 | T = 197 |",
        "| --- | --- | --- |",
        "| forward | 0.800 | 0.400 |",
        "| forward + backward | – | – |",
    ]
    assert third.splitlines()[2] == (
        "| vit-b, training step | 0.010 | 2.5 | 1.50 [1.35 … 1.65] | 1.60 | 94 % | "
        "1.90 [1.71 … 2.09] | 4.00 | 0.75 | 2 × 10⁻⁷ |"
    )


def test_columns_that_no_record_fills_are_left_out(
    tmp_path: Path, benchmarks: SimpleNamespace
) -> None:
    (table,) = tables_of(read(tmp_path, benchmarks.trained()))
    heads = ["model", "density", "dense, s", "dense ÷ accelerated", "limit: without MLPs"]
    assert heads_of(table) == heads


def test_the_terminal_shows_every_row_in_80_columns(
    tmp_path: Path, benchmarks: SimpleNamespace
) -> None:
    out = io.StringIO()
    console = Console(file=out, width=80)
    every = (benchmarks.mlp(), benchmarks.mlp(threads=2), benchmarks.model(), benchmarks.trained())
    print_benchmarks(read(tmp_path, *every), console)
    text = out.getvalue()
    assert max(map(len, text.splitlines())) <= 80
    assert "…" not in text
    for threads in ("1 thread", "2 threads"):
        assert len(re.findall(rf"^{threads} +\d+ +0\.\d+", text, re.MULTILINE)) == 6
    bounds = [r"1\.50 +1\.60 +94 % +1\.90 +4\.00", r"0\.98 +– +– +1\.30 +–"]
    assert all(re.search(rf"{bound} *$", text, re.MULTILINE) for bound in bounds)


# -- the page and the command -----------------------------------------------------------------


def test_benchmarks_alone_make_a_page_beside_the_first(
    tmp_path: Path, benchmarks: SimpleNamespace
) -> None:
    paths = benchmarks.write(tmp_path)
    page = write_report(*paths)
    assert page == tmp_path / "mlp" / "report.html"
    pictures = {each.name for each in (page.parent / "plots").iterdir()}
    assert pictures == {f"{picture.name}.png" for picture in BENCHMARK_PICTURES}
    assert {path.name for path in page.parent.iterdir()} == {"plots", "report.html", "payoff.json"}
    found = benchmarks_of(paths)
    assert found is not None
    assert (page.parent / "payoff.json").read_text() == to_json(found) + "\n"
    text = words(page)
    assert "Speed-up and memory" in text
    assert benchmarks_title(found) in text
    for table in tables_of(found):
        for row in table.rows:
            cells = (cell if isinstance(cell, Cell) else Cell(cell) for cell in row)
            shown = [word for cell in cells for word in (cell.text, *cell.lines)]
            assert " ".join(shown) in text
    for absent in ("Arms", "To look at", "Every run", "dead units"):
        assert absent not in text
    assert "vit-b.json: vit-b, 1 thread, batch = 8, rounds = 5, kernels: avx512" in text
    html = re.sub(r"base64,[^\"]+", "", page.read_text("utf-8"))
    assert not re.search(r"https?://|//\w|@import|<script|<link", html)


@pytest.mark.usefixtures("undrawn")
def test_a_folder_of_runs_shows_its_benchmarks_too(
    tmp_path: Path, add_run: Callable[..., Run], benchmarks: SimpleNamespace
) -> None:
    for arm in ("vanilla", "paper"):
        add_run(arm, 0)
    folder = tmp_path
    benchmarks.write(folder)
    other = folder / "elsewhere" / "gpt2.json"
    other.parent.mkdir()
    other.write_text(json.dumps(benchmarks.model(model="gpt2")))
    done = called(folder, other, folder / "mlp.json")
    assert done.exit_code == 0, done.output
    assert done.stdout.splitlines()[-1] == str(folder / "report.html")
    assert "Dense time ÷ sparse time: " in done.stdout
    text = words(folder / "report.html")
    assert text.index("To look at") < text.index("Speed-up and memory") < text.index("What ran")
    assert "gpt2, training step 0.010" in text
    table = json.loads((folder / "table.json").read_text())
    shown = json.loads((folder / "payoff.json").read_text())
    assert len(shown["layers"]) == 2  # mlp.json is given and in the folder: once
    assert json.loads(called(folder, "--json").stdout) == table
    runs, found = read_runs(folder), gather(folder).benchmarks
    assert found is not None
    both = f"{markdown_table(compare(runs))}\n{markdown_benchmarks(found)}"
    assert called(folder, "--markdown").stdout == both


@pytest.mark.usefixtures("undrawn")
def test_the_command_prints_json_or_tables_of_benchmarks_alone(
    tmp_path: Path, benchmarks: SimpleNamespace
) -> None:
    paths = benchmarks.write(tmp_path)
    out = tmp_path / "page"
    done = called(paths[0], "--out", out, "--json")
    assert done.exit_code == 0, done.output
    assert json.loads(done.stdout) == json.loads((out / "payoff.json").read_text())
    found = benchmarks_of(paths[:1])
    assert found is not None
    assert called(paths[0], "--out", out, "--markdown").stdout == markdown_benchmarks(found)
    assert not (tmp_path / "mlp").exists()


def test_wrong_paths_are_errors_in_one_line(tmp_path: Path, benchmarks: SimpleNamespace) -> None:
    (tmp_path / "torn.json").write_text('{"benchmark": "mlp", "ro')
    done = called(tmp_path / "torn.json")
    assert done.exit_code == 2
    assert done.stderr.startswith(f"Error: {tmp_path / 'torn.json'}: not whole JSON: ")
    assert called(tmp_path).stderr == done.stderr
    done = called(tmp_path / "none.json")
    assert done.exit_code == 2
    assert "give a folder of runs or a record of `actsparse bench`" in done.stderr
    assert "no records under" in called(tmp_path / "none").stderr
    assert [path.name for path in tmp_path.iterdir()] == ["torn.json"]
    for name in ("a", "b"):
        (tmp_path / name).mkdir()
    with pytest.raises(RecordError, match=r"a page is of one folder of runs, got .*a, .*b; give"):
        gather(tmp_path / "a", tmp_path / "b")

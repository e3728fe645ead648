"""The page and the terminal say what the records say, no more and nothing less."""

from __future__ import annotations

import io
import json
import re
import shutil
from collections.abc import Callable
from html import unescape
from pathlib import Path
from typing import Any

import pytest
import typer
from rich.console import Console
from typer.testing import CliRunner

from actsparse_lab.cli.report import report
from actsparse_lab.records import RecordError, RecordWriter, Run, read_runs, run_path
from actsparse_lab.report import compare, print_table, to_json, write_report
from actsparse_lab.report.page import PICTURES
from actsparse_lab.report.summary import lead, remarks, title

AddRun = Callable[..., Run]
Measured = Callable[..., dict[str, Any] | None]

cli = typer.Typer()
cli.command()(report)


def page_text(out: Path) -> str:
    html = write_report(out).read_text(encoding="utf-8")
    html = re.sub(r"<(style|title)>.*?</\1>", "", html, flags=re.DOTALL)
    words = unescape(re.sub(r"<[^>]+>", " ", html)).replace("\N{NO-BREAK SPACE}", " ")
    return " ".join(words.split())


def fail_run(out: Path, header: dict[str, Any], arm: str, seed: int, why: str | None) -> None:
    new = {**header, "arm": arm, "seed": seed}
    with RecordWriter(run_path(out, arm, seed), new) as record:
        if why:
            record.write("failed", step=3, reason=why)


@pytest.fixture
def copy(comparison: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(comparison, tmp_path / "copy"))


def test_page_plots_and_json_are_there(copy: Path) -> None:
    page = write_report(copy)
    assert page == copy / "report.html"
    pictures = {each.name for each in (copy / "plots").iterdir()}
    assert pictures == {f"{picture.name}.png" for picture in PICTURES}
    assert all((copy / "plots" / name).read_bytes().startswith(b"\x89PNG") for name in pictures)
    table = compare(read_runs(copy))
    assert (copy / "table.json").read_text() == to_json(table) + "\n"
    text = page_text(copy)
    assert "Why it is sparse" not in text  # the records hold nothing of it
    assert not (copy / "theory.json").exists()
    for arm in table.arms:
        assert f" {arm.name} " in text
    assert "actsparse compare --task digits --seeds 3" in text


@pytest.mark.usefixtures("undrawn")
def test_the_page_asks_for_nothing_outside(copy: Path) -> None:
    html = write_report(copy).read_text(encoding="utf-8")
    assert not re.search(
        r"https?://|//\w|@import|<script|<link", re.sub(r"base64,[^\"]+", "", html)
    )
    assert html.count("data:image/png;base64,") == 2 * len(PICTURES)


@pytest.mark.usefixtures("undrawn")
def test_records_cannot_write_markup(tmp_path: Path, add_run: AddRun) -> None:
    add_run("vanilla", 0)
    add_run("a<b>&c", 0)
    html = write_report(tmp_path).read_text(encoding="utf-8")
    assert "a<b>" not in html
    assert "a&lt;b&gt;&amp;c" in html


def test_title_follows_the_numbers(tmp_path: Path, add_run: AddRun, measured: Measured) -> None:
    def write(densities: list[float], qualities: list[float]) -> str:
        for seed, (density, quality) in enumerate(zip(densities, qualities, strict=True)):
            add_run("vanilla", seed, inference=measured(0.2), quality=0.9)
            add_run("paper", seed, inference=measured(density), quality=quality)
        return title(compare(read_runs(tmp_path)))

    one = write([0.15], [0.9])
    assert one == "paper: 25 % fewer active neurons than vanilla, in one seed"
    same, more, fewer = [0.9, 0.901, 0.899], [0.26, 0.261, 0.259], [0.15, 0.151, 0.149]
    assert write(fewer, same) == (
        "paper: 25 % fewer active neurons than vanilla, at accuracy that is kept"
    )
    assert write(fewer, [0.9, 0.95, 0.85]) == (
        "paper: 25 % fewer active neurons than vanilla, accuracy unclear at so few seeds"
    )
    assert write(more, [0.8, 0.81, 0.79]) == (
        "paper: 30 % more active neurons than vanilla, but at clearly worse accuracy"
    )
    assert write([0.1, 0.3, 0.2], [0.95, 0.951, 0.949]) == (
        "paper: no clear change in active neurons against vanilla, at better accuracy"
    )


def test_lead_gives_the_numbers_under_the_title(comparison: Path) -> None:
    table = compare(read_runs(comparison))
    paper = table.arm("paper")
    assert paper is not None
    assert paper.inference_density is not None
    assert paper.inference_density.half is not None
    density, half = paper.inference_density.mean, paper.inference_density.half
    assert f"{100 * density:.1f} ± {100 * half:.1f} % of the hidden units" in lead(table)
    assert "3 paired seeds" in lead(table)


@pytest.mark.usefixtures("undrawn")
@pytest.mark.parametrize(
    ("control", "said"),
    [
        ([0.9, 0.901, 0.899], "This task does not need its MLPs: density here proves little."),
        ([0.9], "(no-mlp) has too few seeds"),
        ([], "(no-mlp) was not run"),
    ],
)
def test_the_page_says_when_the_task_proves_little(
    tmp_path: Path, add_run: AddRun, control: list[float], said: str
) -> None:
    for seed in range(3):
        add_run("vanilla", seed, quality=0.9)
        add_run("paper", seed, quality=0.9)
    for seed, quality in enumerate(control):
        add_run("no-mlp", seed, quality=quality, inference=None, training=None, skippable=None)
    assert said in page_text(tmp_path)


def test_a_task_that_needs_its_mlps_gets_no_warning(comparison: Path) -> None:
    table = compare(read_runs(comparison))
    assert table.needs_mlps is True
    assert not any("MLPs" in remark for remark in remarks(table))


@pytest.mark.usefixtures("undrawn")
def test_lost_runs_are_shown_with_counts(copy: Path) -> None:
    header = read_runs(copy)[0].header
    fail_run(copy, header, "paper", 3, "the loss became NaN")
    fail_run(copy, header, "paper", 4, None)
    fail_run(copy, header, "l1", 0, "out of memory")
    text = page_text(copy)
    assert "Not in the numbers: paper (1 failed, 1 unfinished); l1 (1 failed)." in text
    assert "failed: the loss became NaN" in text
    assert "failed: out of memory" in text
    paper = compare(read_runs(copy)).arm("paper")
    assert paper is not None
    assert (paper.failed, paper.unfinished, paper.seeds) == (1, 1, (0, 1, 2))


@pytest.mark.usefixtures("undrawn")
def test_a_torn_run_is_unfinished_and_said_to_be_torn(copy: Path) -> None:
    path = run_path(copy, "paper", 0)
    path.write_bytes(path.read_bytes()[:-5])
    assert "unfinished, last line torn" in page_text(copy)


@pytest.mark.usefixtures("undrawn")
def test_one_seed_and_different_steps_are_said(tmp_path: Path, add_run: AddRun) -> None:
    add_run("vanilla", 0, step=1500)
    add_run("paper", 0, step=900)
    text = page_text(tmp_path)
    assert "One seed gives no interval" in text
    assert "different numbers of steps (900, 1500)" in text


@pytest.mark.usefixtures("undrawn")
def test_the_settings_of_an_arm_are_shown(copy: Path) -> None:
    text = page_text(copy)
    assert "modify.zeroth_bias = 0.1" in text
    assert "optimizer.lr" not in text  # the same in all


@pytest.mark.parametrize("picture", PICTURES, ids=lambda picture: picture.name)
@pytest.mark.parametrize("dark", [False, True])
def test_a_plot_with_nothing_to_show_is_left_out(
    tmp_path: Path, add_run: AddRun, picture: Any, dark: bool
) -> None:
    run = add_run("no-mlp", 0, inference=None, training=None, skippable=None)
    assert picture.plot(compare([run]), [run], dark) is None


@pytest.mark.usefixtures("undrawn")
def test_a_quality_where_lower_is_better_keeps_its_unit(tmp_path: Path, add_run: AddRun) -> None:
    text = {"quality_name": "nats per byte", "higher_is_better": False}
    for seed in range(3):
        add_run("vanilla", seed, quality=1.5, baselines={"bigram": 2.4}, **text)
        add_run("paper", seed, quality=1.6 + 0.001 * seed, baselines={"bigram": 0.1}, **text)
    shown = page_text(tmp_path)
    assert "nats per byte" in shown
    assert "+0.101 ± 0.002 clearly worse" in shown
    assert "No better than counting pairs of bytes (bigram): paper." in shown


@pytest.mark.usefixtures("undrawn")
def test_failed_runs_alone_still_make_a_page(
    tmp_path: Path, comparison: Path, add_run: AddRun
) -> None:
    fail_run(tmp_path, read_runs(comparison)[0].header, "paper", 0, "the loss became NaN")
    text = page_text(tmp_path)
    assert "digits: no finished runs to compare yet" in text
    assert "failed: the loss became NaN" in text
    add_run("vanilla", 1)
    assert "digits: no pair of arms to compare yet" in page_text(tmp_path)


def test_the_terminal_shows_every_arm_in_80_columns(comparison: Path) -> None:
    out = io.StringIO()
    runs = read_runs(comparison)
    print_table(runs, Console(file=out, width=80))
    text = out.getvalue()
    assert max(map(len, text.splitlines())) <= 80
    assert "…" not in text
    for arm in ("vanilla", "paper", "no-norm-decay", "hoyer", "no-mlp"):
        assert re.search(rf"^{arm} ", text, re.MULTILINE)


@pytest.mark.usefixtures("undrawn")
def test_command_prints_table_and_path(copy: Path) -> None:
    done = CliRunner().invoke(cli, [str(copy)])
    assert done.exit_code == 0, done.output
    assert done.stdout.startswith("paper: ")
    assert done.stdout.splitlines()[-1] == str(copy / "report.html")


@pytest.mark.usefixtures("undrawn")
def test_command_prints_json_and_nothing_else(copy: Path) -> None:
    done = CliRunner().invoke(cli, [str(copy), "--json"])
    assert done.exit_code == 0
    assert json.loads(done.stdout) == json.loads((copy / "table.json").read_text())


def test_no_records_is_an_error_that_says_what_to_do(tmp_path: Path) -> None:
    done = CliRunner().invoke(cli, [str(tmp_path)])
    assert done.exit_code == 2
    assert "no records under" in done.stderr
    assert "actsparse compare --out" in done.stderr
    assert list(tmp_path.iterdir()) == []


def test_a_broken_record_stops_the_report(copy: Path) -> None:
    run_path(copy, "paper", 1).write_text("not a record\n")
    with pytest.raises(RecordError, match=r"paper-seed1.record\.jsonl:1"):
        write_report(copy)
    assert CliRunner().invoke(cli, [str(copy)]).exit_code == 2


def test_without_the_extra_the_command_says_what_to_install(
    copy: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    import sys

    for name in [name for name in sys.modules if name.startswith("actsparse_lab.report")]:
        monkeypatch.delitem(sys.modules, name)
    monkeypatch.setitem(sys.modules, "jinja2", None)
    done = CliRunner().invoke(cli, [str(copy)])
    assert done.exit_code == 2
    assert "a report needs jinja2: pip install ./lab" in done.stderr

"""What records hold of the theory, as numbers: read, checked and averaged as told."""

from __future__ import annotations

import json
import math
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import typer
from typer.testing import CliRunner

from actsparse_lab.analysis.comparison import compare, to_json
from actsparse_lab.analysis.measures import Measured, Theory, read_measures, read_spectra, theory_of
from actsparse_lab.analysis.tables import Cell
from actsparse_lab.cli.report import report
from actsparse_lab.records import RecordError, RecordWriter, Run, read_run, read_runs, run_path
from actsparse_lab.report.theory_tables import curvature_table, how_text, identity_text

AddRun = Callable[..., Run]
MeasuredBy = Callable[..., dict[str, Any] | None]


def theory_in(out: Path) -> Theory:
    runs = read_runs(out)
    found = theory_of(compare(runs), runs)
    assert found is not None
    return found


def arm_in(out: Path, name: str) -> Measured:
    return next(arm for arm in theory_in(out).arms if arm.arm == name)


# -- the identity -----------------------------------------------------------------------------


def test_the_identity_is_held_to_every_pair_of_every_line(theory_runs: Path) -> None:
    identity = theory_in(theory_runs).identity
    assert identity is not None
    # Of 2 arms × 2 seeds: 6 training lines, the last fifth, measures.json; each whole and 2 blocks.
    assert identity.count == 4 * 8 * 3
    assert identity.skipped == 0
    # Two products and two quotients make it, one more compares it: 2⁻⁵³ each.
    assert identity.gap <= 5 * 2.0**-53 * (1 + 1e-9)


def test_the_largest_gap_is_found_and_named(
    tmp_path: Path, add_run: AddRun, measured: MeasuredBy, theory_parts: SimpleNamespace
) -> None:
    for seed, gap in ((0, 0.001), (1, -0.02)):
        training = theory_parts.explained(measured(0.25))
        row = training["blocks"][1]
        row["density_from_flatness"] = row["derivative_density"] * (1 + gap)
        add_run("paper", seed, training=training)
    identity = theory_in(tmp_path).identity
    assert identity is not None
    assert identity.gap == pytest.approx(0.02, rel=1e-12)  # 1 + gap keeps 2⁻⁵³ of 1
    assert identity.where == "paper seed 1, last fifth of training, blocks.1.mlp"
    text = identity_text(identity)
    assert "at most 0.02 of the density (paper seed 1, last fifth" in text
    assert "more than rounding" in text


def test_pairs_of_other_passes_or_without_numbers_are_not_compared(
    tmp_path: Path, add_run: AddRun, measured: MeasuredBy, theory_parts: SimpleNamespace
) -> None:
    wrong = {"density_from_flatness": 0.9}
    add_run("paper", 0, training=theory_parts.explained(measured(0.25), skipped=2, **wrong))
    add_run("paper", 1, training=theory_parts.explained(measured(0.25), density_from_flatness=None))
    silent = theory_parts.explained(measured(0.25), derivative_density=0.0, **wrong)
    add_run("paper", 2, training=silent)
    runs = read_runs(tmp_path)
    assert theory_of(compare(runs), runs) is None
    add_run("paper", 3, training=theory_parts.explained(measured(0.25)))
    identity = theory_in(tmp_path).identity
    assert identity is not None
    assert (identity.count, identity.skipped) == (3, 3)
    assert "more than rounding" not in identity_text(identity)
    assert "3 more are not compared" in identity_text(identity)


# -- curvature --------------------------------------------------------------------------------


def test_curvature_over_seeds_by_hand(tmp_path: Path, theory_parts: SimpleNamespace) -> None:
    theory_parts.write(tmp_path, seeds=3)
    paper = arm_in(tmp_path, "paper")
    trace = paper.gauss_newton
    assert trace is not None
    # 20, 21, 22: s = 1, t(0.975; 2) = 4.302653
    assert trace.over_seeds.mean == pytest.approx(21)
    assert trace.over_seeds.half == pytest.approx(4.302653 / math.sqrt(3), rel=1e-6)
    # The mean of three independent numbers of standard error 3.
    assert trace.standard_error == pytest.approx(3 / math.sqrt(3))
    assert paper.hessian is not None
    assert paper.hessian.over_seeds.mean == -1.5  # a Hessian has negative parts
    assert paper.seeds == 3
    assert not arm_in(tmp_path, "no-mlp").curved
    table = curvature_table(theory_in(tmp_path))
    assert table.columns[1].head == "Gauss–Newton trace"
    assert [row[0] for row in table.rows] == ["vanilla", "paper"]
    _, gauss_newton, hessian, *_, seeds = table.rows[1]
    assert gauss_newton == Cell("21 ± 2.48", ("SE 1.73",))
    assert isinstance(hessian, Cell)
    assert hessian.text.startswith("−1.5")
    assert seeds == "3"


@pytest.mark.parametrize(("gated", "total"), [(False, 4.0 + 1.0), (True, 4.0 + 2.0 + 1.0)])
def test_flatness_beside_the_traces_is_that_of_all_layers(
    tmp_path: Path,
    add_run: AddRun,
    measured: MeasuredBy,
    theory_parts: SimpleNamespace,
    gated: bool,
    total: float,
) -> None:
    run = add_run("paper", 0)
    whole = theory_parts.explained(measured(0.2), 4.0, gated)
    theory_parts.measures_file(run, measures=whole)
    flatness = arm_in(tmp_path, "paper").flatness
    assert flatness is not None
    assert (flatness.mean, flatness.half) == (total, None)
    theory_parts.measures_file(run, measures=whole | {"flatness_down": None})
    assert arm_in(tmp_path, "paper").flatness is None


def test_a_standard_error_is_given_only_where_all_runs_give_theirs(
    tmp_path: Path, add_run: AddRun, theory_parts: SimpleNamespace
) -> None:
    for seed, error in ((0, 2.0), (1, None)):
        part = {"gauss_newton": {"value": 8.0, "standard_error": error}, "hessian": None}
        theory_parts.measures_file(add_run("paper", seed), curvature=part)
    paper = arm_in(tmp_path, "paper")
    assert paper.gauss_newton is not None
    assert paper.gauss_newton.over_seeds.n == 2
    assert paper.gauss_newton.standard_error is None
    assert paper.hessian is None
    heads = [column.head for column in curvature_table(theory_in(tmp_path)).columns]
    assert heads == ["arm", "Gauss–Newton trace", "AF of all MLP layers", "seeds"]


def test_two_ways_of_measuring_are_said_not_to_compare(
    tmp_path: Path, add_run: AddRun, theory_parts: SimpleNamespace
) -> None:
    theory_parts.measures_file(add_run("vanilla", 0), how={"labels": "model", "seed": 1})
    theory_parts.measures_file(add_run("paper", 0), how={"labels": "model", "seed": 2})
    assert how_text(theory_in(tmp_path)) == "How: labels: model."
    theory_parts.measures_file(add_run("paper", 1), how={"labels": "data"})
    assert "2 ways, which do not compare like with like" in how_text(theory_in(tmp_path))


def test_a_line_of_the_run_stands_in_for_the_file(
    tmp_path: Path, comparison: Path, theory_parts: SimpleNamespace
) -> None:
    old = read_runs(comparison)[-1]
    assert old.result is not None
    result = {key: value for key, value in old.result.items() if key != "kind"}
    path = run_path(tmp_path, old.arm, 0)
    with RecordWriter(path, {**old.header, "seed": 0}) as record:
        for step, value in ((0, 1.0), (result["step"], 2.0)):
            found = {"gauss_newton": {"value": value, "standard_error": 0.5}}
            record.write("measured", step=step, how={}, measures=None, curvature=found)
        record.write("result", **result)
    trace = arm_in(tmp_path, old.arm).gauss_newton
    assert trace is not None
    assert trace.over_seeds.mean == 2.0
    theory_parts.measures_file(read_run(path))
    trace = arm_in(tmp_path, old.arm).gauss_newton
    assert trace is not None
    assert trace.over_seeds.mean == 20.0


def test_a_line_of_an_earlier_step_does_not_stand_in(
    tmp_path: Path, add_run: AddRun, measured: MeasuredBy, theory_parts: SimpleNamespace
) -> None:
    run = add_run("paper", 0, training=theory_parts.explained(measured(0.25)))
    found = {"gauss_newton": {"value": 1.0, "standard_error": 0.5}}
    line = {"kind": "measured", "step": 7, "how": {}, "measures": None, "curvature": found}
    with run.path.open("a", encoding="utf-8") as file:
        file.write(json.dumps(line) + "\n")
    assert not arm_in(tmp_path, "paper").curved


# -- measures.json ----------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("text", "complaint"),
    [
        ("", "not whole JSON"),
        ('{"kind": "meas', "not whole JSON"),
        ('{"kind": "measures", "schema": 1, "curvature": {"hessian": {"value": NaN}}}', "NaN"),
        ("[1]", "must be an object of kind, schema; got"),
        ('{"kind": "run", "schema": 1}', "kind must be 'measures'; got 'run'"),
        ('{"kind": "measures"}', "lacks 'schema'"),
        ('{"kind": "measures", "schema": 2}', "schema must be 1, .*upgrade it, or .*; got 2"),
        ('{"kind": "measures", "schema": 1, "seed": 4}', "measured seed 4, .*of 0"),
        ('{"kind": "measures", "schema": 1, "arm": "l1"}', "measured arm 'l1', .*of 'paper'"),
        ('{"kind": "measures", "schema": 1, "measures": 3}', "measures must be an object"),
        (
            '{"kind": "measures", "schema": 1, "measures": {"flatness": "low"}}',
            "measures.flatness must be a finite number or null; got 'low'",
        ),
        ('{"kind": "measures", "schema": 1, "measures": {"blocks": [1]}}', r"blocks\[0\].* object"),
        ('{"kind": "measures", "schema": 1, "curvature": []}', "curvature must be an object"),
        ('{"kind": "measures", "schema": 1, "curvature": {"hessian": 1}}', "curvature.hessian"),
        (
            '{"kind": "measures", "schema": 1, "curvature": {"hessian": {"value": 1e999}}}',
            "curvature.hessian.value must be a finite number or null; got inf",
        ),
        ('{"kind": "measures", "schema": 1, "spectra": {}}', "spectra must be a list"),
    ],
)
def test_a_broken_or_foreign_file_is_refused_by_name(
    add_run: AddRun, text: str, complaint: str
) -> None:
    run = add_run("paper", 0)
    run.path.with_name("measures.json").write_text(text, encoding="utf-8")
    with pytest.raises(RecordError, match=rf"paper-seed0.measures\.json: .*{complaint}"):
        read_measures(run)


def test_a_file_that_cannot_be_read_is_an_error_and_none_is_none(add_run: AddRun) -> None:
    run = add_run("paper", 0)
    assert read_measures(run) is None
    run.path.with_name("measures.json").mkdir()
    with pytest.raises(RecordError, match=r"cannot read .*measures\.json"):
        read_measures(run)


def test_a_broken_file_stops_the_report(tmp_path: Path, add_run: AddRun) -> None:
    add_run("vanilla", 0)
    add_run("paper", 0).path.with_name("measures.json").write_text("{", encoding="utf-8")
    cli = typer.Typer()
    cli.command()(report)
    done = CliRunner().invoke(cli, [str(tmp_path)])
    assert done.exit_code == 2
    assert "paper-seed0/measures.json: not whole JSON" in done.stderr
    assert not (tmp_path / "report.html").exists()


@pytest.mark.parametrize(
    "parts",
    [
        {},
        {"how": None, "measures": None, "curvature": None, "spectra": None},
        {"measures": {"flatness": None, "blocks": None}, "curvature": {"hessian": None}},
        {"curvature": {"hessian": {"value": None, "standard_error": None}}, "spectra": []},
    ],
)
def test_every_part_of_the_file_is_optional(
    tmp_path: Path, add_run: AddRun, parts: dict[str, Any]
) -> None:
    run = add_run("paper", 0)
    entry = {"kind": "measures", "schema": 1, **parts}
    run.path.with_name("measures.json").write_text(json.dumps(entry), encoding="utf-8")
    assert read_measures(run) == entry
    assert read_spectra(run) == []
    runs = read_runs(tmp_path)
    assert theory_of(compare(runs), runs) is None


# -- spectra, and the whole as JSON -----------------------------------------------------------


def test_spectra_come_from_the_result_or_the_file(
    add_run: AddRun, theory_parts: SimpleNamespace
) -> None:
    one, two = theory_parts.spectrum("a"), theory_parts.spectrum("b")
    cut = {key: value for key, value in one.items() if key != "bins"}
    run = add_run("paper", 0)
    theory_parts.measures_file(run, spectra=[two, cut, {**two, "marchenko_pastur": None}])
    assert read_spectra(run) == [two]
    run = add_run("paper", 0, spectra=[one])
    assert read_spectra(run) == [one]


@pytest.mark.parametrize(
    "wrong", [{"bins": [1.0, 2.0]}, {"counts": "many"}, {"marchenko_pastur": {"lower": 1.0}}]
)
def test_a_spectrum_of_wrong_numbers_is_refused_by_name(
    add_run: AddRun, theory_parts: SimpleNamespace, wrong: dict[str, Any]
) -> None:
    run = add_run("paper", 0)
    theory_parts.measures_file(run, spectra=[{**theory_parts.spectrum("a", "gate"), **wrong}])
    with pytest.raises(RecordError, match=r"measures\.json: the spectrum of gate in a needs lists"):
        read_spectra(run)


def test_theory_as_json_is_strict_and_whole(theory_runs: Path) -> None:
    def refuse(name: str) -> None:
        raise AssertionError(name)

    found = json.loads(to_json(theory_in(theory_runs)), parse_constant=refuse)
    assert set(found) == {"task", "identity", "arms", "how"}
    paper = next(arm for arm in found["arms"] if arm["arm"] == "paper")
    # After step 1200 of 1500, lines at 1250 and 1500: 10⁻⁴ and 10⁻⁵, times 1 and 2 of the seeds.
    assert paper["training"]["flatness"]["mean"] == pytest.approx(1.5 * 5.5e-5)
    assert paper["training"]["flatness"]["n"] == 2
    assert paper["gauss_newton"]["over_seeds"]["mean"] == 20.5
    assert next(arm for arm in found["arms"] if arm["arm"] == "no-mlp")["training"] == {}


def test_records_without_any_of_it_have_no_theory(comparison: Path) -> None:
    runs = read_runs(comparison)
    assert theory_of(compare(runs), runs) is None

"""What pruning and thresholds left, by arm: means over seeds, changes paired, and on the page."""

from __future__ import annotations

import json
import math
import statistics
from pathlib import Path
from typing import Any

import pytest
from scipy.stats import t as student

from actsparse_lab.campaigns.slim import FORMS
from actsparse_lab.records import RecordError
from actsparse_lab.report import markdown_frontier, scoreboard
from actsparse_lab.report.slim import SLIM_RULE, TITLE, WORDS, Form, Slim, read_slim, slim_text
from tests.report.frontier_records import ordinary, write_task


def form(quality: float, left: float = 1.0, density: float = 0.02) -> dict[str, Any]:
    parameters = {"model": round(2000 + 1000 * left), "mlps": round(1000 * left)}
    sizes = {"units": round(100 * left), "parameters": parameters, "bytes": round(8000 * left)}
    return {"loss": 0.5, "quality": quality, "density": density, "active": 4.0, **sizes}


def made(arm: str, seed: int, moved: float = 2e-6, **changed: Any) -> dict[str, Any]:
    """A run's row: quality falls by 0.001 · (1 + seed) with thresholds, a quarter is dead."""
    quality, cost = 0.96 + 0.001 * seed, 0.001 * (1 + seed)
    prune = {"units": 100, "cut": 25, "logit": 8.0, "moved": moved}
    times = {"pruned": 1.2, "trained, accelerated": 1.5, "both, accelerated": 2.0 * (1 + seed)}
    return {
        "arm": arm,
        "seed": seed,
        "forms": {
            "trained": form(quality),
            "pruned": form(quality, 0.75),
            "thresholds": form(quality - cost, 1.0, 0.01),
            "both": form(quality - cost, 0.75, 0.01),
        },
        "prune": {**prune, "trained_off": 3e-6, "pruned_off": 3.5e-6},
        "refused": {},
        "speed": {
            "ratios": [{"of": "trained", "to": to, "value": by} for to, by in times.items()],
            "ran": {"trained": "1 of 1 blocks sparse", "both": "1 of 1 blocks sparse"},
        },
        **changed,
    }


def write(place: Path, *rows: dict[str, Any], **changed: Any) -> Path:
    record = {"benchmark": "slim", "threads": 1, "budget": 0.003, "runs": list(rows), **changed}
    (place / "slim.json").write_text(json.dumps(record))
    return place


def read(place: Path) -> Slim:
    found = read_slim(place)
    assert found is not None
    return found


def forms(of: Slim, arm: str) -> dict[str, Form]:
    (found,) = (each for each in of.arms if each.arm == arm)
    return {each.form: each for each in found.forms}


def test_names_are_those_of_the_record() -> None:
    assert tuple(WORDS) == FORMS


def test_changes_are_paired_and_have_t_intervals(tmp_path: Path) -> None:
    found = forms(read(write(tmp_path, *(made("best", seed) for seed in range(5)))), "best")
    costs = [-0.001 * (1 + seed) for seed in range(5)]
    change = found["both"].change
    assert change is not None
    assert change.mean == pytest.approx(statistics.fmean(costs))
    half = student.ppf(0.975, 4) * statistics.stdev(costs) / math.sqrt(5)
    assert change.half == pytest.approx(half)
    assert found["trained"].change is None
    assert found["pruned"].change is not None
    assert found["pruned"].change.mean == 0
    assert (found["trained"].mlps.mean, found["pruned"].mlps.mean) == (1000, 0.75)
    assert (found["trained"].bytes.mean, found["pruned"].bytes.mean) == (8000, 0.75)
    assert found["both"].seeds == 5


def test_times_are_geometric_means_by_form(tmp_path: Path) -> None:
    found = forms(read(write(tmp_path, made("best", 0), made("best", 1))), "best")
    both, pruned, trained = (found[name] for name in ("both", "pruned", "trained"))
    assert both.accelerated is not None
    assert both.accelerated.mean == pytest.approx(math.sqrt(2.0 * 4.0))
    assert both.layers is None
    assert pruned.layers is not None
    assert pruned.layers.mean == pytest.approx(1.2)
    assert (trained.layers, pruned.accelerated, found["thresholds"].accelerated) == (None,) * 3


def test_the_run_in_which_a_logit_moved_most_is_told(tmp_path: Path) -> None:
    rows = [made("best", 0), made("best", 1, moved=4e-6), made("vanilla", 0, moved=1e-6)]
    found = read(write(tmp_path, *rows))
    assert found.arms[0].moved is not None
    assert found.arms[0].moved.moved == 4e-6
    said = slim_text(found)
    assert said.startswith("Pruning moved no logit of the validation rows by more than 5 × 10⁻⁷ of")
    assert "(best: 4 × 10⁻⁶ of 8, where float32 is off from float64 by 3 × 10⁻⁶ as trained" in said
    assert "0.3 % of the validation loss. Threads: 1." in said


def test_a_form_that_could_not_be_is_missing_and_says_why(tmp_path: Path) -> None:
    row = made("top-k", 0, refused={"pruned": "a unit depends on the others"}, prune=None)
    for name in ("pruned", "both"):
        del row["forms"][name]
    found = read(write(tmp_path, row))
    assert [each.form for each in found.arms[0].forms] == ["trained", "thresholds"]
    assert found.arms[0].moved is None
    assert found.arms[0].refused == ("not pruned: a unit depends on the others",)
    assert slim_text(found).startswith("Budget of the thresholds")


def test_the_frontiers_page_shows_it_where_it_is(tmp_path: Path) -> None:
    place = write_task(tmp_path, ordinary())
    assert TITLE not in markdown_frontier(tmp_path)
    assert scoreboard(tmp_path)["digits"]["slim"] is None
    write(place, *(made("sparse", seed) for seed in range(5)))
    page = markdown_frontier(tmp_path)
    assert page.count(SLIM_RULE) == 1
    table = page[page.index(f"### {TITLE}") :]
    assert "| sparse | as trained | 96.2 ± 0.2 % | – | 0.02 ± 0 | 4 ± 0 | 1000 ± 0 |" in table
    for said in (
        "| sparse | pruned | 96.2 ± 0.2 % | +0.00 ± 0.00 points | 0.02 ± 0 | 4 ± 0 | 75 ± 0 % | "
        "75 ± 0 % | 2 × 10⁻⁶ of 8 | 3 × 10⁻⁶ / 3.5 × 10⁻⁶ | 1.20 (1.20 to 1.20) | – | 5 |",
        "| sparse | pruned, thresholds | 95.9 ± 0.0 % | −0.30 ± 0.20 points |",
        "sparse: as trained, accelerated: 1 of 1 blocks sparse; sparse: pruned, thresholds,",
    ):
        assert said in table, said
    lines = [line for line in table.splitlines() if line.startswith("|")]
    assert len(lines) == 2 + len(FORMS)
    assert {line.count(" | ") for line in lines} == {12}
    told = scoreboard(tmp_path)["digits"]["slim"]
    assert [each["form"] for each in told["arms"][0]["forms"]] == [*FORMS]
    json.dumps(told, allow_nan=False)


@pytest.mark.parametrize(
    ("changed", "message"),
    [
        ({"benchmark": "speed"}, "benchmark must be 'slim'; got 'speed'"),
        ({"runs": [{"arm": "best"}]}, "lacks 'seed'"),
        ({"runs": [made("best", 0, forms={"pruned": form(0.9)})]}, "lacks 'trained'"),
        (
            {"runs": [made("best", 0, forms={"trained": form(0.9), "both": {}})]},
            r"best\.forms\.both lacks 'quality'",
        ),
        (
            {"runs": [made("best", 0, forms={"trained": form(0.9, density=2.0)})]},
            "density must be a share from 0 to 1; got 2.0",
        ),
    ],
    ids=["another benchmark", "a field is missing", "no form as trained", "half a form", "share"],
)
def test_another_file_is_named(changed: dict[str, Any], message: str, tmp_path: Path) -> None:
    write(tmp_path, **changed)
    with pytest.raises(RecordError, match=rf"slim\.json.*{message}"):
        read_slim(tmp_path)


def test_without_the_file_there_is_nothing(tmp_path: Path) -> None:
    assert read_slim(tmp_path) is None

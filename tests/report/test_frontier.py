"""The frontier's verdicts follow from records by the stated rules, and its pages say the same."""

from __future__ import annotations

import json
import math
import statistics
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st
from scipy.stats import t as student
from typer.testing import CliRunner

from actsparse.cli.main import app
from actsparse_lab.analysis.intervals import t_interval
from actsparse_lab.analysis.verdicts import beyond
from actsparse_lab.records import RecordError, RecordWriter, read_runs, run_path
from actsparse_lab.report import boards, markdown_frontier, markdown_scoreboard, write_report
from actsparse_lab.report.frontier import Board, Row, board
from actsparse_lab.report.frontier_page import sections, summary
from tests.report.frontier_records import WHERE, Made, ordinary, write_task


def judged(out: Path, arms: dict[str, Made], **how: Any) -> Board:
    found = board(write_task(out, arms, **how))
    assert found is not None
    return found


def row(of: Board, arm: str) -> Row:
    found = of.row(arm)
    assert found is not None
    return found


def called(*words: str | Path) -> Any:
    return CliRunner().invoke(app, [str(word) for word in words])


@given(
    effects=st.lists(st.floats(-1, 1), min_size=2, max_size=9),
    bar=st.floats(-1, 1),
    planned=st.integers(1, 8),
)
def test_an_interval_beyond_a_bar(effects: list[float], bar: float, planned: int) -> None:
    mean, n = statistics.fmean(effects), len(effects)
    half = student.ppf(0.975, n - 1) * statistics.stdev(effects) / math.sqrt(n)
    found = beyond(t_interval(effects), bar, planned)
    # within 1e-9 of an end the two ways of summing may differ
    if n < 5 or n < planned:
        assert found == "undecided"
    elif mean - half > bar + 1e-9:
        assert found == "yes"
    elif mean + half < bar - 1e-9:
        assert found == "no"
    elif mean - half < bar - 1e-9 and mean + half > bar + 1e-9:
        assert found == "undecided"


def test_the_best_vanilla_is_that_of_validation_rows(tmp_path: Path) -> None:
    arms = ordinary()
    arms["vanilla"] = replace(arms["vanilla"], quality=[0.9] * 5, validation=[0.99] * 5)
    assert judged(tmp_path, arms).best == "vanilla"
    assert judged(tmp_path / "again", ordinary()).best == "vanilla-no-1d-decay"


def test_the_best_vanilla_is_one_of_the_seeds_that_both_have(tmp_path: Path) -> None:
    arms = ordinary()
    base = arms["vanilla-no-1d-decay"].quality
    arms["vanilla"] = Made([*(q + 0.001 for q in base[:4]), 0.5], 0.25)
    arms["vanilla-no-1d-decay"] = Made(base[:4], 0.2)
    assert judged(tmp_path, arms).best == "vanilla"


def test_changes_are_paired_with_the_best_vanilla(tmp_path: Path) -> None:
    found = judged(tmp_path, ordinary())
    sparse, best = row(found, "sparse"), row(found, "vanilla-no-1d-decay")
    assert sparse.change is not None
    assert sparse.change.mean == pytest.approx(-0.001)
    assert sparse.change.half == pytest.approx(0, abs=1e-12)  # alike in each seed
    densities = [(0.2 + 0.01 * seed, 0.02 + 0.0005 * seed) for seed in range(5)]
    fewer = t_interval([(old - new) / old for old, new in densities])
    assert fewer is not None
    assert sparse.inference_improvement is not None
    assert sparse.inference_improvement.mean == pytest.approx(fewer.mean)
    assert sparse.inference_improvement.half == pytest.approx(fewer.half)
    assert (best.change, best.within_noise, best.sparse, best.fewer) == (None, None, None, None)
    assert sparse.dead_share is not None
    assert sparse.dead_share.mean == pytest.approx(0.4)
    assert sparse.living_density is not None
    assert sparse.living_density.mean == pytest.approx(0.021 / 0.6)


@pytest.mark.parametrize(
    ("shifts", "word"),
    [
        ([-0.002] * 4 + [-0.0021], "yes"),
        ([0.01] * 4 + [0.02], "yes"),
        ([-0.004] * 4 + [-0.0041], "no"),
        ([-0.002, -0.004, -0.002, -0.004, -0.003], "undecided"),
        ([0.0] * 4, "undecided"),
    ],
    ids=["worse, within", "better", "worse", "at the bar", "a seed is missing"],
)
@pytest.mark.parametrize("name", ["accuracy", "bits per byte"])
def test_within_noise(shifts: list[float], word: str, name: str, tmp_path: Path) -> None:
    # of a loss the bar is 1 % of the mean, 0.02 of 2.0; more is worse
    scale = 1.0 if name == "accuracy" else -0.02 / 0.003
    base = [0.96] * 5 if name == "accuracy" else [2.0] * 5
    arms = {"vanilla": Made(base), "other": Made([base[0] + scale * each for each in shifts])}
    found = judged(tmp_path, arms, name=name)
    assert found.margin == pytest.approx(0.003 if name == "accuracy" else 0.02)
    assert row(found, "other").within_noise == word


def test_fewer_seeds_than_planned_decide_nothing(tmp_path: Path) -> None:
    found = judged(tmp_path, ordinary(), seeds=6)
    assert {each.within_noise for each in found.rows} == {None, "undecided"}
    assert (found.at_knee, found.needs_mlps, found.counts) == ("undecided",) * 3
    assert found.chosen is None


@pytest.mark.parametrize(
    ("half", "without", "words"),
    [
        (-0.004, -0.05, ("yes", "yes", "yes")),
        (-0.03, -0.05, ("no", "yes", "no")),
        (-0.004, 0.001, ("yes", "no", "no")),
        (-0.004, -0.002, ("yes", "no", "no")),
        (0.01, -0.05, ("yes", "yes", "yes")),
    ],
    ids=["counts", "not at the knee", "no need of MLPs", "hardly any", "half is better"],
)
def test_whether_a_task_counts(
    half: float, without: float, words: tuple[str, ...], tmp_path: Path
) -> None:
    arms = ordinary()
    base = arms["vanilla-no-1d-decay"].quality
    arms["half-steps"] = Made([q + half for q in base])
    arms["no-mlp"] = Made([q + without for q in base], None)
    found = judged(tmp_path, arms)
    assert (found.at_knee, found.needs_mlps, found.counts) == words
    assert found.knee is not None
    assert found.knee.mean == pytest.approx(-half)


def test_of_losses_more_steps_help_downwards(tmp_path: Path) -> None:
    base = [2.0, 2.01, 2.02, 2.03, 2.04]
    arms = {
        "vanilla-no-1d-decay": Made(base),
        "half-steps": Made([q + 0.2 for q in base]),
        "no-mlp": Made([q + 0.5 for q in base], None),
    }
    found = judged(tmp_path, arms, name="nats per token")
    assert (found.at_knee, found.needs_mlps) == ("no", "yes")
    assert found.knee is not None
    assert found.knee.mean == pytest.approx(0.2)
    arms["half-steps"] = Made([q + 0.05 for q in base])
    assert judged(tmp_path / "near", arms, name="nats per token").at_knee == "yes"


def test_targets(tmp_path: Path) -> None:
    arms = ordinary()
    base = arms["vanilla-no-1d-decay"].quality
    arms["dense-in-training"] = Made(base, 0.02, training=0.05)
    arms["about"] = Made(base, 0.028, jitter=0.001)
    found = judged(tmp_path, arms)
    targets = {each.name: (each.sparse, each.fewer) for each in found.rows}
    assert targets == {
        "vanilla": ("no", "no"),
        "vanilla-no-1d-decay": (None, None),
        "half-steps": ("no", "no"),
        "dense": ("no", "no"),
        "about": ("undecided", "yes"),
        "dense-in-training": ("no", "yes"),
        "sparse": ("yes", "yes"),
        "costly": ("no", "yes"),  # sparse enough, at too high a price
        "no-mlp": (None, None),
    }
    assert list(targets) == [each.name for each in found.rows]
    means = [each.inference_density.mean for each in found.rows if each.inference_density]
    assert means == sorted(means, reverse=True)


def test_the_test_split_has_no_say_in_the_choice(tmp_path: Path) -> None:
    arms = ordinary()
    base = arms["vanilla-no-1d-decay"].quality
    arms["lucky"] = Made(base, 0.005, validation=[q - 0.02 for q in base])
    arms["unlucky"] = Made([q - 0.02 for q in base], 0.015, validation=base)
    found = judged(tmp_path, arms)
    assert row(found, "lucky").within_noise == "yes"
    assert found.chosen == "unlucky"
    assert "unlucky" in summary(found)
    assert "(within noise: no)" in summary(found)


@pytest.mark.parametrize(
    ("density", "training", "lower", "word"),
    [
        (0.12, 0.12, 0.0, "yes"),
        (0.12, 0.16, 0.0, "no"),
        (0.2, 0.12, 0.0, "no"),
        (0.12, 0.12, 0.1, "no"),
    ],
)
def test_the_papers_claim_is_judged_against_their_own_vanilla(
    density: float, training: float, lower: float, word: str, tmp_path: Path
) -> None:
    arms = ordinary()
    assert judged(tmp_path / "without", arms).claim is None
    arms["paper"] = Made(
        [q - lower for q in arms["vanilla"].quality], density, training=training, jitter=0.001
    )
    found = judged(tmp_path / "with", arms)
    assert found.claim is not None
    # of 0.25, 0.12 is 52 % fewer, 0.16 is 36 % fewer, and 0.2 is 20 % fewer
    assert found.claim.holds == word
    said = {"yes": "The papers’ claim holds", "no": "The papers’ claim does not hold here"}[word]
    assert said in summary(found)


def test_lost_runs_and_a_folder_without_vanilla(tmp_path: Path) -> None:
    place = write_task(tmp_path, {"sparse": ordinary()["sparse"]})
    header = {"task": "digits", "arm": "broken", "seed": 0, "config": {}, **WHERE}
    with RecordWriter(run_path(place, "broken", 0), header) as record:
        record.write("failed", step=3, reason="the loss became NaN")
    found = board(place)
    assert found is not None
    assert (found.best, found.chosen, found.counts) == (None, None, "undecided")
    broken = row(found, "broken")
    assert (broken.seeds, broken.failed, broken.quality) == ((), 1, None)
    assert "there is nothing to compare with" in summary(found)
    assert "0, 1 lost" in markdown_frontier(tmp_path)


# -- speed -------------------------------------------------------------------------------------


def speed(arm: str, seed: int, model: float, **changed: Any) -> dict[str, Any]:
    ratio = {"of": "dense", "to": "accelerated", "value": model}
    ratio |= {"low": 0.9 * model, "high": 1.1 * model}
    row = {"arm": arm, "seed": seed, "density": 0.02, "model": ratio, "why": "1 of 1 blocks sparse"}
    return {**row, "mlps": ratio | {"value": 2 * model}, **changed}


def write_speed(place: Path, *rows: dict[str, Any], **changed: Any) -> None:
    record = {"benchmark": "speed", "threads": 1, "runs": list(rows), **changed}
    (place / "speed.json").write_text(json.dumps(record))


def test_speed_joins_by_arm_and_seed(tmp_path: Path) -> None:
    place = write_task(tmp_path, ordinary())
    write_speed(place, speed("sparse", 0, 1.0), speed("sparse", 1, 4.0), speed("dense", 0, 1.1))
    found = board(place)
    assert found is not None
    two, one = row(found, "sparse").speed, row(found, "dense").speed
    assert two is not None
    assert one is not None
    assert (two.model.mean, two.model.n) == (pytest.approx(2.0), 2)
    assert two.mlps.mean == pytest.approx(4.0)
    assert (one.model.mean, one.model.low, one.model.n) == (1.1, pytest.approx(0.99), 1)
    assert row(found, "costly").speed is None
    assert "Blocks in inference: dense: 1 of 1 blocks sparse" in markdown_frontier(tmp_path)


@pytest.mark.parametrize(
    ("changed", "message"),
    [
        ({"benchmark": "mlp"}, "benchmark must be 'speed'; got 'mlp'"),
        ({"runs": [speed("sparse", 0, 0.0)]}, "value must be a finite number above 0; got 0.0"),
        ({"runs": [{"arm": "sparse"}]}, "lacks 'seed'"),
    ],
    ids=["another benchmark", "no time", "a field is missing"],
)
def test_another_file_for_speed_is_named(
    changed: dict[str, Any], message: str, tmp_path: Path
) -> None:
    place = write_task(tmp_path, ordinary())
    write_speed(place, **changed)
    with pytest.raises(RecordError, match=rf"speed\.json.*{message}"):
        board(place)


# -- pages -------------------------------------------------------------------------------------


@pytest.mark.usefixtures("undrawn")
def test_the_page_of_all_tasks_is_made_of_the_records(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    out = tmp_path / "benchmarks" / "frontier"
    place = write_task(out, ordinary())
    losses = {"vanilla": Made([2.0, 2.1, 2.2, 2.1, 2.0]), "thin": Made([2.0] * 5, 0.01)}
    write_task(out, losses, task="web", name="nats per token")
    monkeypatch.chdir(tmp_path)
    done = called("report", "benchmarks/frontier")
    assert done.exit_code == 0, done.output
    index = (out / "index.html").read_text(encoding="utf-8")
    for task in ("digits", "web"):
        assert f'<a href="{task}/report.html">{task}</a>' in index
    page = called("report", "benchmarks/frontier", "--markdown")
    assert page.exit_code == 0, page.output
    for said in (
        "digits counts. Half the steps cost 0.40 ± 0.00 points of accuracy (below 1.50 points: "
        "yes)",
        "without MLPs it changes by −5.00 ± 0.00 points (worse by more than 0.30 points: yes)",
        "Best vanilla: vanilla-no-1d-decay, 96.4 ± 0.4 %",
        "| sparse | 96.3 ± 0.4 % | −0.10 ± 0.00 | yes | 0.0210 ± 0.0010 | 0.0250 ± 0.0000 |",
        "![The frontier](../benchmarks/frontier/digits/plots/frontier.png)",
        "| thin | 2.000 ± 0.000 |",
    ):
        assert said in page.stdout, said
    for plot in ("digits", "web"):
        shown = (out / plot / "plots" / "frontier.png").read_bytes()
        assert shown.startswith(b"\x89PNG")
        assert f"(../benchmarks/frontier/{plot}/plots/frontier.png)" in page.stdout
    assert markdown_scoreboard("benchmarks/frontier") in page.stdout
    # beside the records the same, with its own way to the plots
    beside = (out / "scoreboard.md").read_text()
    assert beside == page.stdout.replace("../benchmarks/frontier/", "")
    told = json.loads(called("report", "benchmarks/frontier", "--json").stdout)
    assert told == json.loads((out / "scoreboard.json").read_text())
    assert told["digits"]["chosen"] == "sparse"
    assert told["digits"]["summary"] in page.stdout
    # and of one task alone
    alone = called("report", place.relative_to(tmp_path), "--markdown").stdout
    assert "(../benchmarks/frontier/digits/plots/frontier.png)" in alone
    assert "| thin |" not in alone


def test_a_changed_record_changes_the_page(tmp_path: Path) -> None:
    write_task(tmp_path, ordinary())
    before = markdown_frontier(tmp_path)
    arms = ordinary()
    arms["sparse"] = replace(arms["sparse"], density=0.021)
    write_task(tmp_path, arms)
    assert markdown_frontier(tmp_path) != before


@pytest.mark.usefixtures("undrawn")
def test_a_tasks_own_page_shows_the_frontier_first(tmp_path: Path) -> None:
    place = write_task(tmp_path, ordinary())
    html = write_report(place).read_text(encoding="utf-8")
    title = "digits: sparse has 90 % fewer active neurons than the best vanilla"
    assert title in html.replace("\N{NO-BREAK SPACE}", " ")
    assert html.index('id="frontier"') < html.index('aria-label="Table: arms"')
    for arm in ordinary():
        assert f'<th scope="row">{arm}</th>' in html


@pytest.mark.parametrize("dark", [False, True], ids=["light", "dark"])
def test_the_plot_has_every_arm_and_bears_none_alive(dark: bool, tmp_path: Path) -> None:
    arms = ordinary()
    arms["mute"] = Made([0.9] * 5, 0.0, dead=1000)
    place = write_task(tmp_path, arms)
    (section,) = sections(place, read_runs(place))
    drawn = section.picture.plot(*section.shown, dark)
    assert drawn is not None
    assert drawn.startswith(b"\x89PNG")
    bare = write_task(tmp_path / "bare", {"no-mlp": Made([0.9] * 5, None)})
    (section,) = sections(bare, read_runs(bare))
    assert section.picture.plot(*section.shown, dark) is None


@pytest.mark.parametrize(
    ("text", "message"),
    [("{", "not whole JSON"), ("{}", "lacks 'task'")],
    ids=["torn", "empty"],
)
def test_a_broken_manifest_is_named(text: str, message: str, tmp_path: Path) -> None:
    place = write_task(tmp_path, ordinary())
    (place / "frontier.json").write_text(text)
    with pytest.raises(RecordError, match=rf"{message}|frontier\.json.*{message}"):
        boards(tmp_path)
    done = called("report", tmp_path)
    assert done.exit_code == 2
    assert "frontier.json" in done.stderr


def test_folders_that_are_no_frontier(tmp_path: Path) -> None:
    place = write_task(tmp_path, ordinary())
    (place / "frontier.json").unlink()
    assert board(place) is None
    assert sections(place, read_runs(place)) == []
    with pytest.raises(RecordError, match=r"no frontier\.json with finished runs"):
        markdown_frontier(tmp_path)
    done = called("report", write_task(tmp_path, ordinary()).parent, "--out", tmp_path / "x")
    assert done.exit_code == 2
    assert "go beside their records" in done.stderr

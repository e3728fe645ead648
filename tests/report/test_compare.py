"""The table's numbers, against numbers worked out by hand and by scipy."""

from __future__ import annotations

import json
import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import scipy.stats
from hypothesis import given
from hypothesis import strategies as st

from actsparse_lab.analysis.comparison import Comparison, compare, loss_drop, to_json
from actsparse_lab.analysis.intervals import t_interval
from actsparse_lab.records import RecordError, Run, read_runs
from actsparse_lab.report.arms_table import markdown_table

AddRun = Callable[..., Run]
Measured = Callable[..., dict[str, Any] | None]


def table_of(out: Path) -> Comparison:
    return compare(read_runs(out))


def test_the_interval_by_hand() -> None:
    # mean 2, s = 1, t(0.975; 2) = 4.302653, half = 4.302653 / sqrt(3)
    estimate = t_interval([1.0, 2.0, 3.0])
    assert estimate is not None
    assert estimate.half is not None
    assert estimate.mean == 2.0
    assert estimate.half == pytest.approx(4.302653 / math.sqrt(3), rel=1e-6)
    assert (estimate.low, estimate.high) == (2.0 - estimate.half, 2.0 + estimate.half)


EIGHTHS = st.integers(-8000, 8000).map(lambda count: count / 8)


@given(st.lists(EIGHTHS, min_size=2, max_size=12).filter(lambda v: len(set(v)) > 1))
def test_the_interval_is_scipys(values: list[float]) -> None:
    estimate = t_interval(values)
    assert estimate is not None
    error = scipy.stats.sem(values)
    low, high = scipy.stats.t.interval(
        0.95, len(values) - 1, loc=sum(values) / len(values), scale=error
    )
    # Both sum in floats of the size of the values.
    assert estimate.low == pytest.approx(low, rel=1e-9, abs=1e-9)
    assert estimate.high == pytest.approx(high, rel=1e-9, abs=1e-9)


def test_one_seed_has_no_interval_and_none_has_no_mean() -> None:
    one = t_interval([0.25])
    assert one is not None
    assert (one.mean, one.half, one.low, one.high) == (0.25, None, None, None)
    assert t_interval([]) is None


def test_relative_improvement_is_paired_by_seed(
    tmp_path: Path, add_run: AddRun, measured: Measured
) -> None:
    # Seed by seed: (0.4 − 0.3) / 0.4 = 0.25, (0.2 − 0.1) / 0.2 = 0.5. Means first would give 1/3.
    for seed, (base, own) in enumerate([(0.4, 0.3), (0.2, 0.1)]):
        add_run("vanilla", seed, inference=measured(base), training=measured(0.5))
        add_run("paper", seed, inference=measured(own), training=measured(0.6))
    add_run("paper", 7, inference=measured(0.9))  # no vanilla of this seed
    paper = table_of(tmp_path).arm("paper")
    assert paper is not None
    assert paper.inference_improvement is not None
    assert paper.inference_improvement.mean == pytest.approx(0.375)
    assert paper.inference_improvement.n == 2
    # s = 0.25 / sqrt(2), t(0.975; 1) = 12.7062
    assert paper.inference_improvement.half == pytest.approx(12.7062 * 0.125, rel=1e-5)
    assert paper.training_improvement is not None
    assert paper.training_improvement.mean == pytest.approx(-0.2)
    assert paper.seeds == (0, 1, 7)


@pytest.mark.parametrize(
    ("higher", "changes", "verdict"),
    [
        (True, [0.010, 0.011, 0.012], "better"),
        (True, [-0.010, -0.011, -0.012], "lower"),
        (True, [-0.010, 0.011, 0.000], "unclear"),  # low end -0.026, a loss of over a point
        (True, [-0.001, 0.001, 0.000], "kept"),  # low end -0.0025
        (False, [-0.001, 0.001, 0.000], "kept"),
        (False, [-0.010, 0.011, 0.000], "unclear"),
        (False, [0.010, 0.011, 0.012], "lower"),
        (False, [-0.010, -0.011, -0.012], "better"),
        (True, [-0.5], "one seed"),
    ],
)
def test_verdict_on_quality(
    tmp_path: Path, add_run: AddRun, higher: bool, changes: list[float], verdict: str
) -> None:
    for seed, change in enumerate(changes):
        add_run("vanilla", seed, quality=0.9, higher_is_better=higher)
        add_run("paper", seed, quality=0.9 + change, higher_is_better=higher)
    paper = table_of(tmp_path).arm("paper")
    assert paper is not None
    assert paper.change is not None
    assert paper.change.mean == pytest.approx(sum(changes) / len(changes))
    assert paper.verdict == verdict


def curve(drop: float) -> list[float]:
    """Ten losses; the last is lower than the eighth by the given share."""
    return [3.0, 2.5, 2.2, 2.1, 2.05, 2.02, 2.01, 2.0, 2.0 - drop, 2.0 * (1 - drop)]


@pytest.mark.parametrize(
    ("drops", "undertrained"),
    [
        ([0.05, 0.051, 0.049], True),
        ([0.05, -0.05, 0.06], False),  # 2 % on average, but one seed rose
        ([0.02, 0.05, 0.10], True),  # far apart, yet all fell
        ([0.009, 0.009, 0.009], False),  # clear, but under 1 %
        ([0.0, 0.0, 0.0], False),
        ([-0.05, -0.05, -0.05], False),  # overfits
        ([0.05], True),  # one seed: its mean alone
        ([0.009], False),
    ],
)
def test_undertrained(
    tmp_path: Path, add_run: AddRun, drops: list[float], undertrained: bool
) -> None:
    for seed, drop in enumerate(drops):
        run = add_run("vanilla", seed, losses=curve(drop))
        assert loss_drop(run) == pytest.approx(drop)
    arm = table_of(tmp_path).arm("vanilla")
    assert arm is not None
    assert arm.undertrained is undertrained


def test_too_few_validations_cannot_tell(tmp_path: Path, add_run: AddRun) -> None:
    assert loss_drop(add_run("vanilla", 0, losses=[2.0, 1.0])) is None
    assert loss_drop(add_run("vanilla", 1)) is None
    arm = table_of(tmp_path).arm("vanilla")
    assert arm is not None
    assert arm.undertrained is None


def test_dead_and_living(tmp_path: Path, add_run: AddRun, measured: Measured) -> None:
    add_run("hoyer", 0, inference=measured(0.1, dead=0.5))
    arm = table_of(tmp_path).arm("hoyer")
    assert arm is not None
    assert arm.dead_share is not None
    assert arm.living_density is not None
    assert arm.dead_share.mean == 0.5
    assert arm.living_density.mean == pytest.approx(0.2)


def test_bigram(tmp_path: Path, add_run: AddRun) -> None:
    add_run("vanilla", 0, loss=2.0, baselines={"bigram": 2.4})
    add_run("paper", 0, loss=2.5, baselines={"bigram": 2.4})
    add_run("hoyer", 0, loss=2.5)
    found = {arm.name: arm.beats_bigram for arm in table_of(tmp_path).arms}
    assert found == {"vanilla": True, "paper": False, "hoyer": None}


@pytest.mark.parametrize(
    ("control", "needs"),
    [
        ([0.5, 0.51, 0.52], True),
        ([0.9, 0.901, 0.899], False),
        ([0.9, 0.95, 0.85], None),
        ([0.5], None),
    ],
)
def test_does_the_task_need_its_mlps(
    tmp_path: Path, add_run: AddRun, control: list[float], needs: bool | None
) -> None:
    for seed, quality in enumerate(control):
        add_run("vanilla", seed, quality=0.9)
        add_run("no-mlp", seed, quality=quality, inference=None, training=None, skippable=None)
    table = table_of(tmp_path)
    assert table.needs_mlps is needs
    arm = table.arm("no-mlp")
    assert arm is not None
    assert arm.inference_density is None
    assert arm.inference_improvement is None


def test_the_strongest_baseline_keeps_its_quality(
    tmp_path: Path, add_run: AddRun, measured: Measured
) -> None:
    arms = {
        "vanilla": (0.90, 0.30),
        "paper": (0.90, 0.20),
        "paper-lr": (0.90, 0.01),  # the paper's own, no baseline
        "no-decay": (0.90, 0.25),
        "hoyer": (0.91, 0.10),
        "l1": (0.50, 0.02),  # sparse and bad
        "no-mlp": (0.90, None),
    }
    for name, (quality, density) in arms.items():
        for seed in range(3):
            now = measured(density)
            add_run(name, seed, quality=quality + 0.001 * seed, inference=now, training=now)
    table = table_of(tmp_path)
    assert (table.subject, table.baseline) == ("paper", "hoyer")
    assert table.baseline_gain is not None
    assert table.baseline_gain.mean == pytest.approx(0.5)
    order = [arm.name for arm in table.arms]
    assert order == ["vanilla", "no-decay", "paper", "hoyer", "l1", "paper-lr", "no-mlp"]


def test_to_json_is_strict_and_whole(comparison: Path) -> None:
    def refuse(name: str) -> None:
        raise AssertionError(name)

    table = table_of(comparison)
    found = json.loads(to_json(table), parse_constant=refuse)
    assert [arm["name"] for arm in found["arms"]] == [arm.name for arm in table.arms]
    paper = next(arm for arm in found["arms"] if arm["name"] == "paper")
    mine = table.arm("paper")
    assert mine is not None
    assert mine.inference_density is not None
    density = mine.inference_density
    assert paper["inference_density"] == {
        "mean": density.mean,
        "low": density.low,
        "high": density.high,
        "n": 3,
    }


def test_what_does_not_compare_is_refused(tmp_path: Path, add_run: AddRun) -> None:
    with pytest.raises(RecordError, match="no runs to compare"):
        compare([])
    run = add_run("vanilla", 0)
    with pytest.raises(RecordError, match="'vanilla' has 2 records of seed 0"):
        compare([run, run])
    other = add_run("paper", 0, quality_name="nats per byte")
    with pytest.raises(RecordError, match="2 measures of quality: accuracy and nats per byte"):
        compare([run, other])
    other.header["task"] = "text"
    with pytest.raises(RecordError, match="2 tasks: digits and text"):
        compare([run, other])


def test_where_finetuning_began_stands_beside_what_came_of_it(
    tmp_path: Path, add_run: AddRun, measured: Measured
) -> None:
    for seed, (quality, density) in enumerate([(0.9, 0.6), (0.8, 0.5)]):
        before = {"loss": 1.0, "quality": quality, "inference": measured(density)}
        add_run("vanilla", seed, before=before)
        add_run("paper-finetune", seed, before=before, inference=measured(0.1 + seed / 10))
        add_run("paper-hoyer-finetune", seed, before=before, inference=measured(0.01))
    table = table_of(tmp_path)
    assert table.subject == "paper-finetune"  # not the sparser arm that adds a penalty
    arm = table.arm("vanilla")
    assert arm is not None
    assert arm.before_quality is not None
    assert arm.before_density is not None
    assert (arm.before_quality.mean, arm.before_density.mean) == pytest.approx((0.85, 0.55))
    text = markdown_table(table)
    assert text.startswith("| arm | before: accuracy, density | accuracy |")
    assert "0.550 ± " in text.splitlines()[2]
    add_run("no-mlp", 0)
    assert table_of(tmp_path).arm("no-mlp").before_quality is None  # type: ignore[union-attr]

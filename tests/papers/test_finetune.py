"""Finetuning: effects by hand from made-up records, verdicts turned round, the picture."""

from __future__ import annotations

import math
import random

import pytest

from actsparse_lab.analysis.verdicts import fewest_seeds
from actsparse_lab.papers import rows_plot
from actsparse_lab.papers.experiments import EXPERIMENTS
from actsparse_lab.papers.finetune.claims import FROM_SPARED, HOYER, PLAIN, RECIPE
from actsparse_lab.papers.finetune.plot import ROWS
from actsparse_lab.papers.questions import SPARED
from actsparse_lab.records import Run
from tests.papers.made_up import answers, assert_drawn, density_of, figure_of, made_up, words

EXPERIMENT = EXPERIMENTS["finetune"]
PICTURE = EXPERIMENT.pictures[0].plot

INFERENCE, TRAINING, KEPT, LIVING, BESIDE_SPARED, FROM, ALL_SPARED = range(7)
PENALTY, PENALTY_LIVING, PENALTY_KEPT = range(7, 10)
SEEDS = range(fewest_seeds())
# What each arm does to ln density; another number for each, so that no two can be confused.
EFFECTS = {
    PLAIN: -0.05,
    f"{PLAIN}{SPARED}": -0.12,
    RECIPE: -0.4,
    f"{RECIPE}{SPARED}": -0.47,
    HOYER: -1.5,
    f"{PLAIN}{FROM_SPARED}": -0.07,
    f"{PLAIN}{SPARED}{FROM_SPARED}": -0.1,
    f"{RECIPE}{FROM_SPARED}": -0.2,
    f"{RECIPE}{SPARED}{FROM_SPARED}": -0.26,
    f"{HOYER}{FROM_SPARED}": -1.7,
}
# An exp, a product, a quotient, a log: under 20 roundings of numbers below 2.
TOLERANCE = 20 * 2 * 2**-53


def nudge(seed: int, arm: str) -> float:
    return 0.01 * random.Random(f"{seed}{arm}").uniform(-1, 1)


def finetuned(effects: dict[str, float] = EFFECTS, seeds: range = SEEDS) -> list[Run]:
    """Every arm; training density falls by twice the effect, accuracy by a tenth of a nudge."""
    runs = []
    for seed in seeds:
        for arm, effect in effects.items():
            start = 0.2 if arm.endswith(FROM_SPARED) else 0.3
            moved = effect + nudge(seed, arm)
            runs.append(
                made_up(
                    arm,
                    seed,
                    start * math.exp(moved),
                    0.95 + nudge(seed, arm) / 10,
                    training=start * math.exp(2 * moved),
                    before=(start, 0.94),
                )
            )
    return runs


def test_an_effect_is_the_log_ratio_of_two_arms_from_one_base() -> None:
    found = answers(EXPERIMENT, finetuned())
    pairs = {
        INFERENCE: (RECIPE, PLAIN),
        LIVING: (RECIPE, PLAIN),
        BESIDE_SPARED: (RECIPE, f"{PLAIN}{SPARED}"),
        FROM: (f"{RECIPE}{FROM_SPARED}", f"{PLAIN}{FROM_SPARED}"),
        ALL_SPARED: (f"{RECIPE}{SPARED}{FROM_SPARED}", f"{PLAIN}{SPARED}{FROM_SPARED}"),
        PENALTY: (RECIPE, HOYER),
        PENALTY_LIVING: (RECIPE, HOYER),
    }
    for seed in SEEDS:
        moved = {arm: effect + nudge(seed, arm) for arm, effect in EFFECTS.items()}
        for question, (own, other) in pairs.items():
            expected = moved[own] - moved[other]
            assert found[question].effects[seed] == pytest.approx(expected, abs=TOLERANCE)
        trained = 2 * (moved[RECIPE] - moved[PLAIN])
        assert found[TRAINING].effects[seed] == pytest.approx(trained, abs=TOLERANCE)
        kept = (nudge(seed, RECIPE) - nudge(seed, PLAIN)) / 10
        assert found[KEPT].effects[seed] == pytest.approx(kept, abs=TOLERANCE)
        penalised = (nudge(seed, HOYER) - nudge(seed, PLAIN)) / 10
        assert found[PENALTY_KEPT].effects[seed] == pytest.approx(penalised, abs=TOLERANCE)


def test_what_is_sparser_holds_and_a_stronger_baseline_does_not() -> None:
    said = words(EXPERIMENT, finetuned())
    assert {said.pop(PENALTY_LIVING), said.pop(PENALTY)} == {"does not hold here"}
    assert set(said) == {"holds"}


@pytest.mark.parametrize(
    ("arm", "turned"),
    [
        (PLAIN, {INFERENCE, TRAINING, LIVING}),
        (f"{PLAIN}{SPARED}", {BESIDE_SPARED}),
        (f"{PLAIN}{FROM_SPARED}", {FROM}),
        (f"{PLAIN}{SPARED}{FROM_SPARED}", {ALL_SPARED}),
    ],
    ids=("plain", "spared", "from-spared", "spared-from-spared"),
)
def test_a_planted_reversal_turns_round_what_it_bears_on(arm: str, turned: set[int]) -> None:
    said = words(EXPERIMENT, finetuned(EFFECTS | {arm: -1.0}))
    failed = {at for at, word in enumerate(said) if word == "does not hold here"}
    assert failed == turned | {PENALTY, PENALTY_LIVING}


@pytest.mark.parametrize(
    ("arm", "asked", "other"),
    [(RECIPE, KEPT, PENALTY_KEPT), (HOYER, PENALTY_KEPT, KEPT)],
    ids=("recipe", "hoyer"),
)
def test_accuracy_that_falls_by_points_is_not_kept(arm: str, asked: int, other: int) -> None:
    runs = [run for run in finetuned() if run.arm != arm]
    runs += [made_up(arm, seed, 0.2, 0.92 + nudge(seed, "quality")) for seed in SEEDS]
    found = answers(EXPERIMENT, runs)
    assert found[asked].verdict.word == "does not hold here"
    assert found[other].verdict.word == "holds"


def test_a_penalty_that_only_kills_units_is_not_sparser_among_the_living() -> None:
    runs = [run for run in finetuned() if run.arm != HOYER]
    for seed in SEEDS:  # 9 of 10 units die; the living are as dense as at the start
        runs.append(made_up(HOYER, seed, 0.03 * math.exp(nudge(seed, HOYER)), dead=900))
    found = answers(EXPERIMENT, runs)
    assert found[PENALTY].verdict.word == "does not hold here"
    assert found[PENALTY_LIVING].verdict.word == "holds"


def test_sources_are_the_papers_or_ours() -> None:
    found = answers(EXPERIMENT, [])
    sources = [each.question.claim.source for each in found]
    assert sources[:3] == ["v1, v2; bar ours", "v1, v2; bar ours", "v2; bar ours"]
    assert set(sources[3:]) == {"ours"}


def test_dead_units_do_not_count_for_living_density() -> None:
    runs = [run for run in finetuned() if run.arm != RECIPE]
    plain = 0.3 * math.exp(EFFECTS[PLAIN])
    for seed in SEEDS:  # half of the units die, the others are a fifth denser
        runs.append(made_up(RECIPE, seed, 0.6 * plain * math.exp(nudge(seed, "")), dead=500))
    found = answers(EXPERIMENT, runs)
    assert found[INFERENCE].verdict.word == "holds"
    assert found[LIVING].verdict.word == "does not hold here"


def test_few_seeds_and_missing_arms_are_undecided() -> None:
    assert set(words(EXPERIMENT, finetuned(seeds=SEEDS[:-1]))) == {"undecided"}
    found = answers(EXPERIMENT, [run for run in finetuned() if not run.arm.endswith(FROM_SPARED)])
    lacking = {at for at, each in enumerate(found) if not each.effects}
    assert lacking == {FROM, ALL_SPARED}
    assert all(found[at].verdict.word == "undecided" for at in lacking)
    assert not any(each.effects for each in answers(EXPERIMENT, []))


# -- the picture ------------------------------------------------------------------------------


def test_the_picture() -> None:
    assert_drawn(PICTURE, finetuned())


def test_a_line_leads_from_the_checkpoint_to_the_end(monkeypatch: pytest.MonkeyPatch) -> None:
    runs = finetuned()
    density, accuracy = figure_of(monkeypatch, rows_plot, PICTURE, runs).axes
    assert (density.get_xscale(), accuracy.get_xscale()) == ("linear", "linear")
    thick = [line for line in density.lines if line.get_linewidth() == 2.4]
    paths = {round(line.get_ydata()[0], 6): tuple(line.get_xdata()) for line in thick}
    for row, (_, arm) in enumerate(ROWS):
        for down, end, start in ((-rows_plot.APART, "", 0.3), (rows_plot.APART, FROM_SPARED, 0.2)):
            own = [density_of(run) or 0.0 for run in runs if run.arm == arm + end]
            path = paths.pop(round(row + down, 6))
            assert path == pytest.approx((start, sum(own) / len(own)), abs=TOLERANCE)
    assert not paths


def test_the_axis_fits_all_rows_but_the_penalty_whose_means_stand_at_its_edge(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    runs = finetuned()
    density, accuracy = figure_of(monkeypatch, rows_plot, PICTURE, runs).axes
    rest = [density_of(run) or 0.0 for run in runs if not run.arm.startswith(HOYER)]
    low, high = min(rest), 0.3  # where the denser model began
    margin = 0.08 * (high - low)
    assert density.get_xlim() == pytest.approx((low - margin, high + margin), abs=TOLERANCE)
    notes = []
    for end in ("", FROM_SPARED):
        own = [density_of(run) or 0.0 for run in runs if run.arm == HOYER + end]
        notes.append(f"← {sum(own) / len(own):.2g}")
    assert [text.get_text() for text in density.texts] == notes
    assert not accuracy.texts
    # nothing to note of one that lies among the others
    near = finetuned(EFFECTS | {HOYER: -0.2, f"{HOYER}{FROM_SPARED}": -0.2})
    assert not figure_of(monkeypatch, rows_plot, PICTURE, near).axes[0].texts

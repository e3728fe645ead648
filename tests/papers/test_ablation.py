"""The ablation: effects by hand from made-up records, verdicts turned round, pictures."""

from __future__ import annotations

import math
import random
from itertools import product

import pytest

from actsparse_lab.analysis.effects import Arms
from actsparse_lab.analysis.verdicts import fewest_seeds
from actsparse_lab.papers import rows_plot
from actsparse_lab.papers.ablation.claims import PARTS, combination, main_effect
from actsparse_lab.papers.ablation.plot import COMBINATIONS, VARIANTS
from actsparse_lab.papers.experiments import EXPERIMENTS
from actsparse_lab.papers.questions import SPARED
from actsparse_lab.records import Run
from tests.papers.made_up import answers, assert_drawn, density_of, figure_of, made_up, words

EXPERIMENT = EXPERIMENTS["ablation"]

INFERENCE, TRAINING, KEPT, LIVING, BESIDE_SPARED, KEPT_SPARED, BOTH_SPARED = range(7)
BIAS, FLOOR, JSRELU, FLOOR_SPARED, PLACE, HIGHER, MATTER = range(7, 14)
MAIN = {"bias": -0.1, "floor": -0.5, "jsrelu": 0.2}  # on ln density, with decay
SEEDS = range(fewest_seeds())
# An exp, a product, a quotient, a log and sums of four: under 20 roundings of numbers below 2.
TOLERANCE = 20 * 2 * 2**-53


def start(seed: int) -> float:
    """The density of vanilla."""
    return 0.3 + random.Random(seed).uniform(-0.05, 0.05)


def nudge(seed: int, arm: str) -> float:
    """What no seed has in common with another, on ln density."""
    return 0.02 * random.Random(f"{seed}{arm}").uniform(-1, 1)


def factorial(
    main: dict[str, float], spared: float = -0.6, seeds: range = SEEDS, spared_floor: float = 0.0
) -> list[Run]:
    """All arms: each part adds its effect to ln density, and without 1-D decay it is ``spared``
    whatever was modified, but for ``spared_floor`` of the floor; of each seed vanilla is exact
    and the rest nudged. Vanilla without 1-D decay is two points better, no MLPs 15 worse."""
    runs = []
    for seed in seeds:
        for taken in product((False, True), repeat=3):
            names = [part for part, one in zip(PARTS, taken, strict=True) if one]
            arm = combination(names)
            effect = sum(main[name] for name in names) + (nudge(seed, arm) if names else 0.0)
            runs.append(made_up(arm, seed, start(seed) * math.exp(effect)))
            alike = spared + nudge(seed, arm + SPARED) + ("floor" in names) * spared_floor
            quality = 0.95 if names else 0.97 + nudge(seed, "quality") / 10
            runs.append(made_up(arm + SPARED, seed, start(seed) * math.exp(alike), quality))
        for arm, effect in (("bias-at-output", 0.05), ("floor-2", -0.7), ("floor-4", -0.9)):
            runs.append(made_up(arm, seed, start(seed) * math.exp(effect + nudge(seed, arm))))
        runs.append(made_up("no-mlp", seed, None, 0.8 + nudge(seed, "no-mlp") / 10))
    return runs


def test_combination_names_every_arm_once() -> None:
    arms = [
        combination([part for part, one in zip(PARTS, taken, strict=True) if one])
        for taken in product((False, True), repeat=3)
    ]
    assert sorted(arms) == sorted(arm for _, arm in COMBINATIONS)
    assert combination(reversed(PARTS)) == "paper"


def test_an_effect_is_the_log_ratio_of_the_densities_of_a_seed() -> None:
    found = answers(EXPERIMENT, factorial(MAIN))
    for seed in SEEDS:
        paper = sum(MAIN.values()) + nudge(seed, "paper")
        for question in (INFERENCE, TRAINING, LIVING):
            assert found[question].effects[seed] == pytest.approx(paper, abs=TOLERANCE)
        spared = -0.6 + nudge(seed, f"vanilla{SPARED}")
        assert found[BESIDE_SPARED].effects[seed] == pytest.approx(paper - spared, abs=TOLERANCE)
        both = nudge(seed, f"paper{SPARED}") - nudge(seed, f"vanilla{SPARED}")
        assert found[BOTH_SPARED].effects[seed] == pytest.approx(both, abs=TOLERANCE)
        place = MAIN["bias"] + nudge(seed, "bias") - 0.05 - nudge(seed, "bias-at-output")
        assert found[PLACE].effects[seed] == pytest.approx(place, abs=TOLERANCE)
        higher = -0.9 + nudge(seed, "floor-4") - MAIN["floor"] - nudge(seed, "floor")
        assert found[HIGHER].effects[seed] == pytest.approx(higher, abs=TOLERANCE)
        assert found[KEPT].effects[seed] == 0.0
        lost = -0.02 - nudge(seed, "quality") / 10
        assert found[KEPT_SPARED].effects[seed] == pytest.approx(lost, abs=TOLERANCE)
        worth = 0.15 - nudge(seed, "no-mlp") / 10
        assert found[MATTER].effects[seed] == pytest.approx(worth, abs=TOLERANCE)
    assert found[KEPT_SPARED].verdict.word == "does not hold here"
    assert found[MATTER].verdict.word == "holds"


@pytest.mark.parametrize("end", ["", SPARED], ids=("decay", "spared"))
@pytest.mark.parametrize("part", PARTS)
def test_a_main_effect_is_half_the_contrast_of_the_eight_logs(part: str, end: str) -> None:
    """A brute-force twin: with the part +1, without it −1, over four; whatever the densities."""
    draw = random.Random(part)
    ends = ("", SPARED)
    densities = {arm + each: draw.uniform(0.01, 0.9) for _, arm in COMBINATIONS for each in ends}
    found = main_effect(part, end)(Arms([made_up(arm, 3, d) for arm, d in densities.items()]))
    asked = {arm: densities[arm + end] for _, arm in COMBINATIONS}

    def has(arm: str) -> bool:
        return arm == "paper" or part in arm.split("+")

    contrast = sum((1 if has(arm) else -1) * math.log(d) for arm, d in asked.items()) / 4
    # 8 logs of at most ln 100 < 5, rounded and added
    assert found == {3: pytest.approx(contrast, abs=16 * 5 * 2**-53)}


def test_parts_that_add_up_are_told_apart_and_judged() -> None:
    found = answers(EXPERIMENT, factorial(MAIN))
    for question, part in ((BIAS, "bias"), (FLOOR, "floor"), (JSRELU, "jsrelu")):
        mean = found[question].verdict.estimate
        # eight nudges of at most 0.02, over four
        assert mean is not None
        assert abs(mean.mean - MAIN[part]) <= 8 * 0.02 / 4
    words = [each.verdict.word for each in found]
    assert words[BIAS] == words[FLOOR] == words[PLACE] == words[HIGHER] == "holds"
    assert words[JSRELU] == "does not hold here"


@pytest.mark.parametrize("floor", [-0.9, 0.5], ids=("falls", "rises"))
def test_a_planted_reversal_turns_the_verdicts_round(floor: float) -> None:
    said = words(EXPERIMENT, factorial(MAIN | {"floor": floor}))
    expected = "holds" if floor < 0 else "does not hold here"
    # −0.8 on ln density is 55 % fewer
    assert {said[each] for each in (INFERENCE, TRAINING, LIVING, FLOOR)} == {expected}


@pytest.mark.parametrize(
    ("floor", "word"), [(-0.1, "holds"), (0.1, "does not hold here")], ids=("falls", "rises")
)
def test_the_floor_without_1d_decay_is_asked_on_its_own(floor: float, word: str) -> None:
    found = answers(EXPERIMENT, factorial(MAIN, spared_floor=floor))
    assert found[FLOOR].verdict.word == "holds"
    assert found[FLOOR_SPARED].verdict.word == word
    mean = found[FLOOR_SPARED].verdict.estimate
    assert mean is not None
    assert abs(mean.mean - floor) <= 8 * 0.02 / 4  # eight nudges of at most 0.02, over four


def test_claims_and_effects_say_which_decay_they_are_of() -> None:
    found = answers(EXPERIMENT, [])
    for questions, decay in (
        ((BIAS, FLOOR, JSRELU), "with 1-D decay"),
        ((FLOOR_SPARED,), "without 1-D decay"),
    ):
        for each in (found[at].question for at in questions):
            assert decay in each.claim.text
            assert each.effect.endswith(f"all eight arms {decay}")


def test_mlps_that_cost_nothing_to_leave_out_do_not_matter() -> None:
    runs = [run for run in factorial(MAIN) if run.arm != "no-mlp"]
    runs += [made_up("no-mlp", at, None, 0.945 + nudge(at, "no-mlp") / 10) for at in SEEDS]
    assert answers(EXPERIMENT, runs)[MATTER].verdict.word == "does not hold here"


def test_36_and_50_percent_are_bars_of_their_own() -> None:
    """40 % fewer in both: enough in inference, not in training."""
    main = dict.fromkeys(PARTS, math.log(0.6) / 3)
    found = answers(EXPERIMENT, factorial(main))
    assert found[INFERENCE].verdict.word == "holds"
    assert found[TRAINING].verdict.word == "does not hold here"
    assert (found[INFERENCE].bar, found[TRAINING].bar) == ("below −36 %", "below −50 %")


@pytest.mark.parametrize(
    ("spared", "word"), [(-0.1, "holds"), (-0.9, "does not hold here")], ids=("weak", "strong")
)
def test_the_control_without_1d_decay_is_asked_on_its_own(spared: float, word: str) -> None:
    found = answers(EXPERIMENT, factorial(MAIN | {"floor": -0.6}, spared))
    assert found[INFERENCE].verdict.word == "holds"  # −0.5 on ln density is 39 % fewer
    assert found[BESIDE_SPARED].verdict.word == word


def test_dead_units_do_not_count_for_living_density() -> None:
    runs = []
    for seed in SEEDS:
        # 60 % of the units die, the others stay as they are
        runs.append(made_up("vanilla", seed, start(seed)))
        few = 0.4 * start(seed) * math.exp(nudge(seed, "paper"))
        runs.append(made_up("paper", seed, few, dead=600))
    found = answers(EXPERIMENT, runs)
    assert found[INFERENCE].verdict.word == "holds"
    assert found[LIVING].verdict.word == "does not hold here"
    assert found[LIVING].effects[0] == pytest.approx(nudge(0, "paper"), abs=TOLERANCE)


@pytest.mark.parametrize(
    ("lost", "word"), [(0.001, "holds"), (0.03, "does not hold here")], ids=("little", "much")
)
@pytest.mark.parametrize("control", ["vanilla", f"vanilla{SPARED}"])
def test_quality_is_kept_where_less_than_a_point_is_lost(
    control: str, lost: float, word: str
) -> None:
    runs = []
    for seed in SEEDS:
        runs.append(made_up("vanilla", seed, 0.3, 0.95 if control == "vanilla" else 0.5))
        runs.append(made_up(f"vanilla{SPARED}", seed, 0.3, 0.95 if control != "vanilla" else 0.5))
        runs.append(made_up("paper", seed, 0.2, 0.95 - lost + nudge(seed, "quality") / 10))
    found = answers(EXPERIMENT, runs)
    asked, other = (KEPT, KEPT_SPARED) if control == "vanilla" else (KEPT_SPARED, KEPT)
    assert found[asked].verdict.word == word
    assert found[other].verdict.word == "holds"


def test_a_seed_that_lacks_an_arm_drops_out_and_few_are_undecided() -> None:
    runs = [run for run in factorial(MAIN) if (run.arm, run.seed) != ("bias+floor", 0)]
    found = answers(EXPERIMENT, runs)
    for question in (BIAS, FLOOR, JSRELU):
        assert set(found[question].effects) == set(SEEDS) - {0}
        assert found[question].verdict.word == "undecided"
    assert set(found[INFERENCE].effects) == set(SEEDS)


def test_without_numbers_everything_is_undecided() -> None:
    silent = [made_up(arm, seed, 0.0, dead=1000) for _, arm in COMBINATIONS for seed in SEEDS]
    for runs in ([], silent):
        found = answers(EXPERIMENT, runs)
        assert {each.verdict.word for each in found} == {"undecided"}
        assert all(not each.effects for at, each in enumerate(found) if at != KEPT)
        assert {each.question.claim.source for each in found} == {"v2", "v2; bar ours", "ours"}


# -- pictures ---------------------------------------------------------------------------------


@pytest.mark.parametrize("name", [picture.name for picture in EXPERIMENT.pictures])
def test_pictures_are_drawn_and_only_of_densities(name: str) -> None:
    plot = next(picture.plot for picture in EXPERIMENT.pictures if picture.name == name)
    assert_drawn(plot, factorial(MAIN, seeds=range(2)))
    assert plot(Arms([made_up("no-mlp", 0, None)]), False) is None


def test_a_large_mark_is_the_mean_in_the_row_and_colour_of_its_arm(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    runs = factorial(MAIN)
    picture = next(picture for picture in EXPERIMENT.pictures if picture.name == "variants")
    density, accuracy = figure_of(monkeypatch, rows_plot, picture.plot, runs).axes
    marks = {
        (line.get_label(), round(line.get_ydata()[0])): line.get_xdata()[0]
        for line in density.lines
        if line.get_markersize() > 5
    }
    ways = {"1-D parameters decay": "", "they do not": SPARED}
    expected = {}
    for row, (_, arm) in enumerate(VARIANTS):
        for label, end in ways.items():
            own = [each for run in runs if run.arm == arm + end if (each := density_of(run))]
            if own:
                expected[label, row] = sum(own) / len(own)
    assert marks == pytest.approx(expected, abs=TOLERANCE)
    names = [text.get_text() for text in density.get_yticklabels()]
    assert names == [name for name, _ in VARIANTS]
    mean = sum(map(start, SEEDS)) / len(SEEDS)
    for name, effect in {"floor 2": -0.7, "floor 4": -0.9, "bias at output": 0.05}.items():
        # nudges of at most 2 %
        found = marks["1-D parameters decay", names.index(name)]
        assert found == pytest.approx(mean * math.exp(effect), rel=math.expm1(0.02))
    assert density.get_xlim()[0] == 0
    last = [line for line in accuracy.lines if line.get_markersize() > 5][-1]
    # no-mlp has an accuracy, and no density; nudges of at most 0.2 points
    assert last.get_xdata()[0] == pytest.approx(80, abs=0.2)

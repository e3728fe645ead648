"""Robustness: checkpoints matched by hand, effects of made-up records, verdicts, pictures."""

from __future__ import annotations

import math
import random
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from scipy.stats import spearmanr

from actsparse_lab.analysis.effects import Arms
from actsparse_lab.analysis.verdicts import verdict
from actsparse_lab.papers.experiments import EXPERIMENTS
from actsparse_lab.papers.robustness import claims
from actsparse_lab.papers.robustness.claims import (
    CONTROL,
    SPARING,
    TRAINED,
    goes_with,
    moves,
)
from actsparse_lab.papers.robustness.plot import SHOWN
from actsparse_lab.records import Entry, Run
from tests.papers.made_up import answers, assert_drawn, effects, words

EXPERIMENT = EXPERIMENTS["robustness"]

# the questions, by place: paper against vanilla, both sparing, paper against that, and the rest
ATTACK, FEATURES, WEIGHTS, ATTACK_SPARED, FEATURES_SPARED, WEIGHTS_SPARED = range(6)
FEATURES_MIXED, WEIGHTS_MIXED, NOISE_TRAINED, GRADIENTS, COVERING = range(6, 11)
TOLERANCE = 1e-12  # a few sums and quotients of numbers near 1, each rounded by 2⁻⁵³
DISTURBANCES = ("fgsm", "pgd", "x", "d", "weights")
ARMS = tuple(dict.fromkeys((*TRAINED, *SHOWN)))
DONE = 600


def row(name: str, size: float, accuracy: float) -> Entry:
    kind = name if name in ("clean", "fgsm", "pgd") else "noise"
    at = {"at": name} if kind == "noise" else {}
    return {"disturbance": kind, "size": size, **at, "loss": 1.0, "accuracy": accuracy}


def checkpoint(
    step: int, clean: float, participation: float | None = 0.1, covered: float = 0.6, **under: float
) -> Entry:
    """A measured line; at a smaller size, which is not to be read, a disturbance does nothing."""
    rows = [row("clean", 0.0, clean)]
    for name, accuracy in under.items():  # not in the order of sizes
        rows += [row(name, 0.3, accuracy), row(name, 0.1, clean)]
    asked = {"disturbance": "fgsm", "size": 0.1, "rho": 0.1}
    covering = [
        {**asked, "block": f"blocks.{i}.mlp", "layer": layer, "tokens": 10, "covered": share}
        for i, shares in enumerate([(covered - 0.1, 0.0), (covered + 0.1, 1.0)])
        for layer, share in zip(("up", "down"), shares, strict=True)
    ]
    measures = {"participation": participation, "gradient_sparsity": step / 1000}
    trials = {"robustness": rows, "covering": covering}
    return {"step": step, "how": {}, "measures": measures, "curvature": {}, "trials": trials}


def made(arm: str, seed: int, lines: Sequence[Entry]) -> Run:
    """A finished run with these measured lines, not on disk."""
    header = {"task": "digits", "arm": arm, "seed": seed}
    return Run(Path(), header, [], [], list(lines), {"step": DONE}, None, False)


def world(seeds: int = 5, sign: float = 1.0) -> list[Run]:
    """All arms, equally good on clean rows; what the claims say is so, or for ``sign`` −1 is not.

    The modified arms keep about 20 points more, participation falls in uneven steps, and what is
    kept moves against it, but for some noise.
    """
    runs = []
    for seed in range(seeds):
        draw = random.Random(f"robustness{seed}")
        for arm in ARMS:
            modified = arm in ("paper", SPARING, "weight-noise")
            better = 0.2 * modified + 0.01 * draw.random()
            lines = [checkpoint(0, 0.1, 0.2, **dict.fromkeys(DISTURBANCES, 0.1))]
            participation, level = 0.3, 0.5
            for step in range(100, DONE + 1, 100):
                fall = draw.uniform(0.05, 0.4)
                participation *= math.exp(-fall)
                level += sign * 0.1 * fall + 0.01 * draw.gauss(0, 1)
                under = dict.fromkeys(DISTURBANCES, level + sign * better)
                covered = 0.5 + sign * (0.2 + 0.01 * draw.random())
                lines.append(checkpoint(step, 0.9, participation, covered, **under))
            runs.append(made(arm, seed, lines))
    return runs


# -- where arms are compared ------------------------------------------------------------------


@pytest.mark.parametrize(
    ("own", "other", "steps"),
    [
        ({500: 0.95, 600: 0.97}, {500: 0.95, 600: 0.96}, (600, 600)),  # a point apart, in decimals
        ({500: 0.95, 600: 0.99}, {500: 0.95, 600: 0.96}, (500, 600)),  # 3 points apart at the end
        ({500: 0.95, 600: 0.96}, {500: 0.955, 600: 0.98}, (600, 500)),
        # equally late: nearer in accuracy first, then the later of its own
        ({500: 0.969, 600: 0.953}, {500: 0.95, 600: 0.97}, (500, 600)),
        ({500: 0.967, 600: 0.951}, {500: 0.95, 600: 0.97}, (600, 500)),
        ({500: 0.969, 600: 0.951}, {500: 0.95, 600: 0.97}, (600, 500)),
        ({200: 0.9, 300: 0.8, 600: 0.99}, {200: 0.9, 300: 0.8, 600: 0.9}, (300, 300)),
        ({200: 0.9, 600: 0.99}, {200: 0.9, 600: 0.9}, None),  # alike in the first half alone
    ],
    ids=["end", "earlier-own", "earlier-other", "nearer", "nearer-2", "tie", "half", "none"],
)
def test_arms_are_compared_at_the_latest_checkpoints_that_are_equally_good(
    own: dict[int, float], other: dict[int, float], steps: Any
) -> None:
    runs = [
        made(arm, 0, [checkpoint(step, clean) for step, clean in path.items()])
        for arm, path in (("paper", own), ("vanilla", other))
    ]
    pair = claims.matched(*runs)
    assert (pair and tuple(entry["step"] for entry in pair)) == steps


# -- effects ----------------------------------------------------------------------------------


def test_effects_by_hand() -> None:
    """The largest size is read, over clean accuracy, where clean accuracies match."""
    own = [
        checkpoint(500, 0.8, pgd=0.4, x=0.6, d=0.4, weights=0.2, fgsm=0.7),
        checkpoint(600, 0.9, pgd=0.9, x=0.9, d=0.9, weights=0.9, fgsm=0.7),
    ]
    other = [checkpoint(600, 0.805, pgd=0.161, x=0.322, d=0.644, weights=0.0, fgsm=0.1)]
    spared = [checkpoint(600, 0.9, pgd=0.45, x=0.9, d=0.0, weights=0.9)]
    trained = [checkpoint(600, 0.8, covered=0.7, weights=0.4)]
    sparing = [checkpoint(600, 0.9, pgd=0.18, x=0.36, d=0.36, weights=0.99)]
    each = {"paper": own, "vanilla": other, CONTROL: spared, "weight-noise": trained}
    each[SPARING] = sparing
    found = effects(EXPERIMENT, [made(arm, 3, each[arm]) for arm in each])
    expected = {
        ATTACK: 0.5 - 0.2,
        FEATURES: 0.625 - 0.6,
        WEIGHTS: 0.25 - 0.0,
        ATTACK_SPARED: 0.2 - 0.5,
        FEATURES_SPARED: 0.4 - 0.5,
        WEIGHTS_SPARED: 1.1 - 1,
        FEATURES_MIXED: 1 - 0.5,
        WEIGHTS_MIXED: 1 - 1,
        NOISE_TRAINED: 0.5 - 0.0,
        COVERING: 0.7,  # of up, not of down
    }
    for at, value in expected.items():
        assert found[at] == {3: pytest.approx(value, abs=TOLERANCE)}, at
    assert found[GRADIENTS] == {}


def with_itself(lines: Sequence[Entry]) -> float | None:
    found = moves(made("vanilla", 0, lines))
    return goes_with(found, found)


changes = st.lists(
    st.tuples(*[st.sampled_from([-0.2, -0.1, 0.0, 0.1, 0.3])] * 2), min_size=4, max_size=9
)


@given(changes)
def test_the_correlation_is_spearmans_of_changes(moves: list[tuple[float, float]]) -> None:
    sparsity = 3 + np.cumsum([0.0, *(a for a, _ in moves)])
    share = 5 + np.cumsum([0.0, *(b for _, b in moves)])
    lines = [checkpoint(0, 0.1, 0.9, x=0.1, d=0.1)]
    for at, (level, kept) in enumerate(zip(sparsity, share, strict=True), start=1):
        under = 0.8 * kept / 10  # 0.08 · kept ± 0.02: their mean is read
        lines.append(checkpoint(60 * at, 0.8, math.exp(-level), x=under + 0.02, d=under - 0.02))
    found = with_itself(lines)
    one, two = (np.array(each) for each in zip(*moves, strict=True))
    if len(set(one)) == 1 or len(set(two)) == 1:
        assert found is None
    else:
        assert found == pytest.approx(spearmanr(one, two).statistic, abs=TOLERANCE)


def test_gradients_that_only_shrink_are_not_sparser() -> None:
    """The share of small entries, which rises with every line, is not what is read."""
    lines = [checkpoint(100 * at, 0.9, 0.1, x=0.5 + 0.02 * at**2, d=0.5) for at in range(7)]
    assert with_itself(lines) is None


@pytest.mark.parametrize("told", [4, 5])
def test_few_checkpoints_have_no_correlation(told: int) -> None:
    """5 after the start make 4 changes."""
    lines = [checkpoint(100 * at, 0.9, 0.5 ** (at**2), x=0.1 * at**1.5, d=0.1) for at in range(6)]
    found = with_itself(lines[: told + 1])
    # the steps of −ln participation grow, and those of x
    assert found == (None if told == 4 else pytest.approx(1.0, abs=TOLERANCE))


def path(sparser: Sequence[float], more: Sequence[float]) -> list[Entry]:
    """Checkpoints with these changes of sparsity and of what is kept."""
    levels = np.cumsum([1.0, *sparser]), np.cumsum([0.3, *more])
    return [
        checkpoint(100 * at, 0.9, math.exp(-level), x=0.9 * share, d=0.9 * share)
        for at, (level, share) in enumerate(zip(*levels, strict=True), start=1)
    ]


def test_what_other_seeds_share_is_taken_off_by_hand() -> None:
    """Ranks 1 2 3 4 against themselves, turned round, and with the last two swapped (0.8)."""
    up, down, swapped = [0.01, 0.02, 0.03, 0.04], [0.04, 0.03, 0.02, 0.01], [0.01, 0.02, 0.04, 0.03]
    each = [path(up, up), path(up, down), path(down, swapped)]
    arms = Arms([made("vanilla", seed, lines) for seed, lines in enumerate(each)])
    found = claims.beyond_the_step(arms, "vanilla")
    expected = {0: 1 - (-1 + 0.8) / 2, 1: -1 - (1 + 0.8) / 2, 2: -0.8 - (-1 + 1) / 2}
    assert found == {seed: pytest.approx(value, abs=TOLERANCE) for seed, value in expected.items()}
    alone = Arms([made("vanilla", 0, each[0]), made("vanilla", 1, each[1][:4])])  # 3 changes
    assert claims.beyond_the_step(alone, "vanilla") == {}


def test_a_schedule_that_all_seeds_share_does_not_hold_up() -> None:
    """Every run's own changes correlate, but as much with those of the other seeds."""
    runs = []
    for seed in range(5):
        for arm in TRAINED:
            draw = random.Random(f"schedule{seed}{arm}")
            slower = [0.1 / step for step in range(1, 7)]
            two = [[value * draw.uniform(0.5, 2) for value in slower] for _ in range(2)]
            runs.append(made(arm, seed, path(*two)))
    own = [goes_with(found, found) for found in map(moves, runs)]
    alone = np.mean(np.reshape(own, (5, -1)), axis=1).tolist()
    assert verdict(EXPERIMENT.questions[GRADIENTS].claim, alone).word == "holds"
    assert answers(EXPERIMENT, runs)[GRADIENTS].verdict.word == "undecided"


def test_one_run_that_cannot_tell_takes_its_seed_out() -> None:
    runs = world()
    assert list(answers(EXPERIMENT, runs)[GRADIENTS].effects) == [0, 1, 2, 3, 4]
    lacking = [run for run in runs if (run.arm, run.seed) != (SPARING, 2)]
    found = answers(EXPERIMENT, lacking)[GRADIENTS].effects
    assert list(found) == [0, 1, 3, 4]
    own = [claims.beyond_the_step(Arms(lacking), arm)[1] for arm in TRAINED]
    assert found[1] == pytest.approx(np.mean(own), abs=TOLERANCE)


# -- verdicts ---------------------------------------------------------------------------------


def test_what_is_planted_holds_and_its_reversal_does_not() -> None:
    assert set(words(EXPERIMENT, world())) == {"holds"}
    assert set(words(EXPERIMENT, world(sign=-1))) == {"does not hold here"}


def words_without(runs: Sequence[Run], change: Callable[[Run], list[Entry]]) -> list[str]:
    return words(EXPERIMENT, [made(run.arm, run.seed, change(run)) for run in runs])


def test_what_is_missing_is_undecided() -> None:
    assert set(words(EXPERIMENT, world(seeds=4))) == {"undecided"}
    assert set(words_without(world(), lambda run: [])) == {"undecided"}
    older = words_without(
        world(), lambda run: [{k: v for k, v in e.items() if k != "trials"} for e in run.measured]
    )
    assert set(older) == {"undecided"}
    bare = words_without(world(), lambda run: [e | {"measures": None} for e in run.measured])
    assert bare[GRADIENTS] == "undecided"  # the rest is told without gradients
    assert {*bare[:GRADIENTS], bare[COVERING]} == {"holds"}


def test_arms_that_are_nowhere_equally_good_are_not_compared() -> None:
    def worse(run: Run) -> list[Entry]:
        if run.arm not in ("paper", SPARING, "weight-noise"):
            return run.measured
        return [checkpoint(DONE, 0.8, **dict.fromkeys(DISTURBANCES, 0.5))]

    found = answers(EXPERIMENT, [made(run.arm, run.seed, worse(run)) for run in world()])
    assert not any(each.effects for each in found[:GRADIENTS])
    assert {each.verdict.word for each in found[:GRADIENTS]} == {"undecided"}


def test_covering_before_the_end_is_not_the_ends() -> None:
    assert claims.covered(made("weight-noise", 0, [checkpoint(500, 0.9)])) is None


@pytest.mark.parametrize("other", [{"disturbance": "pgd"}, {"size": 0.05}, {"rho": 0.3}], ids=str)
def test_covering_of_another_attack_is_not_read(other: Entry) -> None:
    last = checkpoint(DONE, 0.9)
    assert claims.covered(made("weight-noise", 0, [last])) == pytest.approx(0.6)
    last["trials"]["covering"] = [row | other for row in last["trials"]["covering"]]
    assert claims.covered(made("weight-noise", 0, [last])) is None


def test_words_stand_in_a_table() -> None:
    for question in EXPERIMENT.questions:
        assert "|" not in question.effect + question.claim.text


# -- pictures ---------------------------------------------------------------------------------


def test_pictures_are_drawn_from_whatever_is_there() -> None:
    lacking = ("hoyer-no-1d-decay", CONTROL)
    for picture in EXPERIMENT.pictures:
        assert_drawn(picture.plot, [run for run in world(seeds=2) if run.arm not in lacking])


def test_no_picture_without_data() -> None:
    start = checkpoint(0, 0.1, **dict.fromkeys(DISTURBANCES, 0.1))
    bare = [[made("vanilla", 0, lines)] for lines in ([], [start])]
    for runs in bare:
        assert [picture.plot(Arms(runs), False) for picture in EXPERIMENT.pictures] == [None, None]

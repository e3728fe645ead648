"""What the backward pass can skip: effects by hand from made-up records, verdicts, pictures."""

from __future__ import annotations

import math
import random
from dataclasses import replace
from typing import Any

import pytest

from actsparse_lab.analysis.effects import Arms
from actsparse_lab.analysis.plots import Picture
from actsparse_lab.papers.experiments import EXPERIMENTS
from actsparse_lab.papers.pruning.claims import BASES, DROPPED, SPARED, dropping
from actsparse_lab.records import Entry, Run
from tests.papers.made_up import answers, assert_drawn, effects, made_up, words

EXPERIMENT = EXPERIMENTS["pruning"]

SAVED, SAVED_PAPER, MORE, MORE_SPARED, KEPT, KEPT_PAPER, KEPT_ONE, SOME, FEWER, ERROR, MATTER = (
    range(11)
)
TOLERANCE = 1e-12  # sums of fewer than ten numbers below 5, a few roundings of 2⁻⁵³ each
PRODUCTS = ("z = xUᵀ", "y = aVᵀ", "dV = g_yᵀa", "g_a = g_yV", "dx = g_zU", "dU = g_zᵀx")


def trial(density: float, error: float = 0.075, rate: float = 1.0) -> list[Entry]:
    """A share e^(−rate · τ) of the entries that are not zero is kept; ``error``: at τ = 0.3."""
    return [
        {
            "threshold": threshold,
            "kept": density * math.exp(-rate * threshold),
            "derivative_density": density,
            "error": error * threshold / 0.3,
            "cosine": 0.9,
        }
        for threshold in (0.03, 0.1, 0.3, 1.0, 3.0)
    ]


def made(
    arm: str,
    seed: int,
    quality: float,
    skippable: Entry | None = None,
    tried: dict[int, list[Entry]] | None = None,
) -> Run:
    """A finished run; ``tried`` are its trials by step, the last of them 400."""
    empty = {"how": {}, "measures": None, "curvature": {}}
    lines = [
        {"step": step, **empty, "trials": {"pruning": rows}} for step, rows in (tried or {}).items()
    ]
    run = made_up(arm, seed, 0.9, quality, skippable=skippable, measured=lines)
    return replace(run, result=(run.result or {}) | {"step": 400})


def exact(density: float, products: bool = True) -> Entry:
    """What zeros of that density spare under ReLU."""
    zeros = 1 - density
    found: Entry = {"forward": zeros / 2, "backward": zeros}
    each = dict.fromkeys(PRODUCTS, zeros) | {PRODUCTS[0]: 0.0}
    return found | ({"products": each} if products else {})


def world(
    seeds: int = 5,
    density: float = 0.25,
    paper: float = 0.2,
    lost: float = 0.002,
    error: float = 0.075,
    without: float = 0.85,
    nothing: float = 0.85,
    rate: float = 2.0,
    products: bool = True,
) -> list[Run]:
    """All arms; each threshold costs ``lost`` of quality, and ``density`` of η is kept at last.

    Of the entries that are not zero e^(−τ) exceeds τ at the start, e^(−rate · τ) at the end.
    """
    runs = []
    for seed in range(seeds):
        draw = random.Random(f"pruning{seed}")

        def near(value: float, draw: random.Random = draw) -> float:
            return value * (1 + 0.01 * draw.random())

        densities = {"vanilla": density, "paper": paper, f"vanilla{SPARED}": density}
        for base, end in densities.items():
            tried = {0: trial(0.5), 400: trial(near(end), near(error), near(rate))}
            own = near(0.95)
            runs.append(made(base, seed, own, exact(near(end), products), tried))
            for threshold in DROPPED:
                arm = dropping(base, threshold)
                runs.append(made(arm, seed, own - near(lost), exact(near(end), products)))
        runs.append(made("no-mlp", seed, near(without)))
        dropped = made("vanilla-drop-all", seed, near(nothing), exact(near(0.5), products))
        runs.append(dropped)
    return runs


def test_effects_by_hand() -> None:
    plain, spared = "vanilla", f"vanilla{SPARED}"
    tried = {0: trial(0.5), 200: trial(0.01), 400: trial(0.3, error=0.25, rate=3)}
    late = {0: trial(0.6, rate=0.5), 400: trial(0.2, error=0.5, rate=2)}
    runs = [
        made(plain, 2, 0.9, exact(0.375), tried),
        made("paper", 2, 0.95, exact(0.25), late),
        made(spared, 2, 0.85, exact(0.3125)),
        made("vanilla-drop-0.3", 2, 0.89),
        made("paper-drop-0.3", 2, 0.96),
        made("vanilla-drop-1", 2, 0.87),
        made("paper-drop-1", 2, 0.94),
        made("vanilla-drop-1-no-1d-decay", 2, 0.86),
        made("no-mlp", 2, 0.82),
        made("vanilla-drop-all", 2, 0.84, exact(0.5625)),
    ]
    found = effects(EXPERIMENT, runs)
    expected = {
        SAVED: 0.625 - 0.4375,
        SAVED_PAPER: 0.75 - 0.4375,
        MORE: 0.125,
        MORE_SPARED: 0.0625,
        KEPT: -0.01,
        KEPT_PAPER: 0.01,
        KEPT_ONE: (-0.03 - 0.01 + 0.01) / 3,
        SOME: 0.03,
        FEWER: -0.3 * ((3 - 1) + (2 - 0.5)) / 2,  # of what is not zero: density has no part
        ERROR: 0.375,
        MATTER: 0.08,
    }
    for at, value in expected.items():
        assert found[at] == {2: pytest.approx(value, abs=TOLERANCE)}, at


def test_arms_are_named_as_in_the_experiment() -> None:
    assert dropping("paper", 1.0) == "paper-drop-1"
    assert dropping(f"vanilla{SPARED}", 0.3) == "vanilla-drop-0.3-no-1d-decay"


def test_what_is_planted_holds() -> None:
    assert set(words(EXPERIMENT, world())) == {"holds"}


@pytest.mark.parametrize(
    ("changed", "turned"),
    [
        pytest.param(
            {"density": 0.6, "paper": 0.7},
            {SAVED, SAVED_PAPER, MORE, MORE_SPARED},
            id="dense, the papers' recipe the more",
        ),
        pytest.param({"lost": 0.02}, {KEPT, KEPT_PAPER, KEPT_ONE}, id="quality lost"),
        pytest.param({"without": 0.97}, {MATTER}, id="no need of MLPs"),
        pytest.param({"error": 0.11}, {ERROR}, id="a gradient too far off"),
        pytest.param({"rate": 0.9}, {FEWER}, id="more exceed, of fewer that are not zero"),
    ],
)
def test_a_planted_reversal_turns_the_verdict(changed: dict[str, Any], turned: set[int]) -> None:
    said = words(EXPERIMENT, world(**changed))
    assert {at for at, word in enumerate(said) if word == "does not hold here"} == turned
    assert {word for at, word in enumerate(said) if at not in turned} == {"holds"}


def test_seeds_that_lack_what_is_read_drop_out() -> None:
    short = made("paper", 1, 0.95, None, {0: trial(0.5), 200: trial(0.2)})  # stops short of 400
    found = answers(EXPERIMENT, [*world(), short])
    without = {SAVED_PAPER, MORE, MORE_SPARED, FEWER, ERROR}
    for at, answer in enumerate(found):
        assert list(answer.effects) == ([0, 2, 3, 4] if at in without else [0, 1, 2, 3, 4])
        assert answer.verdict.word == ("undecided" if at in without else "holds")


def test_what_no_gradient_can_tell_is_left_out() -> None:
    unknown = dict.fromkeys(("kept", "error", "cosine", "derivative_density"))
    rows = [row | unknown for row in trial(0.2)]
    runs = [*world(), made("vanilla", 0, 0.95, None, {0: rows, 400: rows})]
    found = effects(EXPERIMENT, runs)
    for at in (SAVED, MORE, FEWER, ERROR):
        assert list(found[at]) == [1, 2, 3, 4]
    for picture in EXPERIMENT.pictures:
        assert picture.plot(Arms(runs), False) is not None


@pytest.mark.parametrize("picture", EXPERIMENT.pictures, ids=lambda picture: picture.name)
def test_pictures(picture: Picture) -> None:
    assert picture.plot(Arms([made(base, 0, 0.9) for base in BASES]), False) is None
    assert_drawn(picture.plot, world(seeds=2))
    assert_drawn(picture.plot, world(seeds=1, products=False))

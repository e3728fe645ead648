"""The papers' recipe against Σ lr·decay: effects by hand, what each form asks, the pictures."""

from __future__ import annotations

import math

import pytest

from actsparse_lab.analysis.findings import findings
from actsparse_lab.papers.decay import plot
from actsparse_lab.papers.decay.claims import CONTROL, LEVELS, PARTS, QUICK, arm
from actsparse_lab.papers.experiments import EXPERIMENTS
from actsparse_lab.records import Run
from tests.papers.made_up import MANIFEST, assert_drawn, made_up, with_measures

EXPERIMENT = EXPERIMENTS["decay"]
DENSITY = {"vanilla": 0.3, "paper": 0.1, CONTROL: 0.2, **dict.fromkeys(PARTS, 0.25)}


def world(seeds: int = 5, levels: tuple[int, ...] = LEVELS, **changed: float) -> list[Run]:
    runs = []
    for name, dense in (DENSITY | changed).items():
        for total in levels:
            for seed in range(seeds):
                moved = {"vanilla": 0.0, "paper": 0.01}.get(name, 0.005) * seed
                value, quality = dense * (1 + moved), 0.97 + 0.1 * moved
                run = made_up(arm(name, total), seed, value, quality)
                measures = {"flatness": 2.0, "input_norm": 40.0, "activation_gradient": 0.1}
                runs.append(with_measures(run, measures))
    return runs


def words(runs: list[Run], full: bool) -> dict[str, str]:
    found = findings(EXPERIMENT, runs, MANIFEST | {"full": full}).findings
    return {each.question.claim.text: each.verdict.word for each in found}


def test_the_full_form_asks_of_sums_that_the_quick_one_does_not_train() -> None:
    quick, full = (words(world(), whole) for whole in (False, True))
    assert set(quick) < set(full)
    assert all(any(f"= {total}:" in text for total in QUICK) for text in quick)
    assert [sum(f"= {at}:" in text for text in full) for at in LEVELS] == [4, 7, 4]


def test_planted_claims_hold_and_their_reversal_does_not() -> None:
    assert set(words(world(), True).values()) == {"holds"}
    turned = words(world(paper=0.35, floor=0.35, bias=0.35, jsrelu=0.35), True)
    kept = {text for text, word in turned.items() if word == "holds"}
    assert kept == {text for text in turned if "accuracy" in text}


def test_an_effect_by_hand() -> None:
    (first, *_) = findings(EXPERIMENT, world(), MANIFEST).findings
    assert first.effects[3] == pytest.approx(math.log(0.1 * 1.03 / 0.3))


def test_a_picture() -> None:
    assert_drawn(plot.over_decay, world(seeds=2))

"""Gradient noise: effects by hand from made-up records, verdicts turned round, pictures."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Sequence
from functools import partial
from statistics import fmean
from typing import Any

import numpy as np
import pytest
from matplotlib.axes import Axes

from actsparse_lab.analysis.effects import Arms
from actsparse_lab.papers.experiments import EXPERIMENTS
from actsparse_lab.papers.noise import plot
from actsparse_lab.papers.noise.claims import grid
from actsparse_lab.records import Entry, Run
from tests.papers import made_up as made
from tests.papers.made_up import assert_drawn, figure_of, made_up, run_of

EXPERIMENT = EXPERIMENTS["noise"]
effects, words = (partial(read, EXPERIMENT) for read in (made.effects, made.words))

(
    FEATURES, GRADIENTS, FEATURES_FIT, GRADIENTS_FIT, KEPT, KEPT_DECAYED, DECAYED, WEIGHTS,
    WEIGHTS_DECAYED,
) = range(9)  # fmt: skip
WIDTHS, DECAYS, SEEDS, LAYERS = (16, 64, 256), (0.0, 0.1, 0.3), range(5), range(4)
END = 300  # the step of `made_up`'s result
# With u = 2⁻⁵³: a planted number is a power, an exponential and two products, within 8u of itself.
# Its ln, below 8, is rounded by an ulp, 8u at most, and means over layers and then widths by 4u
# each: 24u. The difference of two, and what is counted by hand (below 2), add less than 16u.
TOLERANCE = 64 * 2**-53

WORLD: dict[str, Any] = {
    "beyond": {"feature": 0.3, "gradient": 0.2},  # of ln A over that of random rows; see `beyond`
    "misfit": {"feature_equal": -0.3, "gradient_equal": -0.2, "weight": -0.1},  # likewise
    "growth": 0.2,  # likewise
    "shrinks": 1.0,  # ln of gradients' A falls by so much a decay, and a tenth of it more a seed
}
REVERSED: dict[str, Any] = {
    "beyond": {"feature": 1.2, "gradient": 1.1},
    "misfit": {"feature_equal": 0.3, "gradient_equal": 0.2, "weight": 0.1},
    "growth": 0.9,
    "shrinks": -1.0,
}


def layer_at_end(world: dict[str, Any], width: int, decay: float, seed: int, layer: int) -> Entry:
    row: Entry = {"layer": layer + 1, "anisotropy_limit": math.sqrt(width * (width - 1))}
    for of in ("feature", "gradient"):
        a = (0.5 + 0.1 * layer) * width**0.9
        if of == "gradient":
            a *= math.exp(-world["shrinks"] * (1 + 0.1 * seed) * decay)
        row[f"{of}_anisotropy"] = a
        row[f"{of}_random_anisotropy"] = a / math.exp(beyond(world, of, width, decay, seed))
        row |= {f"{of}_ks": 1.0, f"{of}_ks_limit": 0.5}  # at the paper's number of samples
    for of, misfit in world["misfit"].items():
        row[f"{of}_ks_limit"] = 0.1 / (1 + layer)
        row[f"{of}_ks"] = row[f"{of}_ks_limit"] * math.exp(
            misfit + 0.01 * seed + 0.05 * layer - 0.075
        )
    row["concentration"] = 30 * (1 + layer) * math.exp(growth(world, width, decay, seed))
    return row


def beyond(world: dict[str, Any], of: str, width: int, decay: float, seed: int) -> float:
    """Of ln A; its mean over widths is ``beyond + 0.01 · seed`` without decay, much more with."""
    return float(world["beyond"][of] + 0.01 * seed + WIDTHS.index(width) - 1 + 5 * decay)


def growth(world: dict[str, Any], width: int, decay: float, seed: int) -> float:
    """Of ln concentration; its mean over widths is ``growth + 0.01 · seed`` at any decay."""
    return float(world["growth"] + 0.01 * seed + 0.1 * (WIDTHS.index(width) - 1))


def planted(world: dict[str, Any] = WORLD, seeds: Sequence[int] = SEEDS) -> list[Run]:
    """Runs of three measured lines: the start, one whose numbers nothing reads, and the end."""
    runs = []
    for width in WIDTHS:
        for decay in DECAYS:
            for seed in seeds:
                end = [layer_at_end(world, width, decay, seed, layer) for layer in LAYERS]
                start = [
                    {**row, "concentration": 30.0 * row["layer"], "weight_ks": None} for row in end
                ]
                other = [{**row, "concentration": 7.0, "weight_ks": 9.0} for row in end]
                lines = [
                    {"step": step, "measures": {"layers": rows}}
                    for step, rows in ((1, start), (150, other), (END, end))
                ]
                run = made_up(f"p{width}-decay{decay:g}", seed, None)
                runs.append(dataclasses.replace(run, measured=lines))
    return runs


def layers_of(run: Run, line: int = -1) -> list[Entry]:
    return list(run.measured[line]["measures"]["layers"])


@pytest.mark.parametrize("world", [WORLD, REVERSED], ids=["planted", "reversed"])
def test_effects_are_what_was_planted(world: dict[str, Any]) -> None:
    by_hand = {
        FEATURES: [world["beyond"]["feature"] + 0.01 * seed for seed in SEEDS],
        GRADIENTS: [world["beyond"]["gradient"] + 0.01 * seed for seed in SEEDS],
        FEATURES_FIT: [world["misfit"]["feature_equal"] + 0.01 * seed for seed in SEEDS],
        GRADIENTS_FIT: [world["misfit"]["gradient_equal"] + 0.01 * seed for seed in SEEDS],
        KEPT: [world["growth"] + 0.01 * seed for seed in SEEDS],
        KEPT_DECAYED: [world["growth"] + 0.01 * seed for seed in SEEDS],
        DECAYED: [-0.3 * world["shrinks"] * (1 + 0.1 * seed) for seed in SEEDS],
        WEIGHTS: [world["misfit"]["weight"] + 0.01 * seed for seed in SEEDS],
        WEIGHTS_DECAYED: [world["misfit"]["weight"] + 0.01 * seed for seed in SEEDS],
    }
    found = effects(planted(world))
    assert len(found) == len(by_hand)
    for at, expected in by_hand.items():
        assert found[at] == pytest.approx(dict(enumerate(expected)), abs=TOLERANCE, rel=0), at


def test_planted_claims_hold_and_their_reversal_does_not() -> None:
    assert words(planted()) == ["holds"] * 9
    assert words(planted(REVERSED)) == ["does not hold here"] * 9


def test_anisotropy_may_be_up_to_twice_that_of_random_rows() -> None:
    for least, word in ((0.6, "holds"), (0.72, "does not hold here")):  # ln 2 = 0.693
        said = words(planted(WORLD | {"beyond": {"feature": least, "gradient": 0.2}}))
        assert said[FEATURES] == word
        assert said[GRADIENTS] == "holds"


def test_concentration_may_grow_up_to_twice() -> None:
    for growth, word in ((0.6, "holds"), (0.72, "does not hold here")):  # ln 2 = 0.693
        assert words(planted(WORLD | {"growth": growth}))[KEPT] == word


def test_a_peak_in_the_middle_counts() -> None:
    runs = planted()
    for run in runs:
        for layer in layers_of(run, 1):
            layer["concentration"] = 300.0 * layer["layer"] * 1.01**run.seed
    found = effects(runs)[KEPT]
    expected = {seed: math.log(10) + seed * math.log(1.01) for seed in SEEDS}
    assert found == pytest.approx(expected, abs=TOLERANCE, rel=0)
    assert words(runs)[KEPT] == "does not hold here"


def test_only_what_is_asked_is_read() -> None:
    runs = planted()
    for run in runs:
        for layer in layers_of(run) if run.arm.endswith("-decay0.3") else ():
            layer["feature_anisotropy"] = layer["gradient_random_anisotropy"] = None
            layer["gradient_anisotropy"] = layer["weight_ks"] = layer["feature_equal_ks"] = None
    changed, before = effects(runs), effects(planted())
    assert changed[DECAYED] == {}  # nothing else reads the largest decay
    others = [at for at in range(9) if at != DECAYED]
    assert [changed[at] for at in others] == [before[at] for at in others]


def test_a_seed_that_lacks_a_number_drops_out() -> None:
    runs = planted()
    layers_of(run_of(runs, "p16-decay0", 3))[2].update(
        feature_anisotropy=None, feature_equal_ks=None, gradient_equal_ks_limit=None, weight_ks=None
    )
    layers_of(run_of(runs, "p64-decay0", 3), line=0)[1]["concentration"] = None
    layers_of(run_of(runs, "p256-decay0.3", 3))[0]["gradient_anisotropy"] = 0.0  # has no ln
    found, said = effects(runs), words(runs)
    for at in range(9):
        lacks = at not in (GRADIENTS, KEPT_DECAYED, WEIGHTS_DECAYED)
        assert list(found[at]) == ([0, 1, 2, 4] if lacks else list(SEEDS)), at
        assert said[at] == ("undecided" if lacks else "holds"), at
    assert set(words(planted(seeds=range(4)))) == {"undecided"}


def test_a_missing_run_takes_its_seed_from_what_reads_it() -> None:
    runs = [run for run in planted() if (run.arm, run.seed) != ("p64-decay0.1", 2)]
    left = {at for at, found in enumerate(effects(runs)) if 2 in found}
    assert left == set(range(9)) - {KEPT_DECAYED, WEIGHTS_DECAYED}


def test_a_line_before_the_end_is_no_end() -> None:
    runs = [dataclasses.replace(run, measured=run.measured[:-1]) for run in planted()]
    assert effects(runs) == [{}] * 9
    alone = [dataclasses.replace(run, measured=run.measured[-1:]) for run in planted()]
    assert [at for at, found in enumerate(effects(alone)) if not found] == [KEPT, KEPT_DECAYED]


def test_widths_and_decays_are_those_at_hand() -> None:
    narrow = effects([run for run in planted() if not run.arm.startswith("p256")])
    assert narrow[FEATURES] == pytest.approx(
        {seed: 0.3 - 0.5 + 0.01 * seed for seed in SEEDS}, abs=TOLERANCE, rel=0
    )
    mild = effects([run for run in planted() if not run.arm.endswith("decay0.3")])
    assert mild[DECAYED] == pytest.approx(
        {seed: -0.1 * (1 + 0.1 * seed) for seed in SEEDS}, abs=TOLERANCE, rel=0
    )
    one_width = effects([run for run in planted() if run.arm.startswith("p64")])
    assert one_width[GRADIENTS] == pytest.approx(
        {seed: 0.2 + 0.01 * seed for seed in SEEDS}, abs=TOLERANCE, rel=0
    )
    plain = effects([run for run in planted() if run.arm.endswith("decay0")])
    assert [at for at, found in enumerate(plain) if not found] == [
        KEPT_DECAYED,
        DECAYED,
        WEIGHTS_DECAYED,
    ]


def test_arms_of_both_forms_are_understood_and_others_left_out() -> None:
    names = ("p1024-decay0.03", "p16-decay0", "p16-decay1e-05", "vanilla", "p16-decay0-no-1d-decay")
    assert list(grid({name: {} for name in names})) == [(16, 0.0), (16, 1e-5), (1024, 0.03)]


# -- pictures ---------------------------------------------------------------------------------

DRAW = {picture.name: picture.plot for picture in EXPERIMENT.pictures}


@pytest.mark.parametrize("name", sorted(DRAW))
def test_pictures(name: str) -> None:
    assert_drawn(DRAW[name], planted(seeds=range(2)))
    assert DRAW[name](Arms([made_up("vanilla", 0, 0.2), made_up("p16-decay0", 0, None)])) is None


def panels_of(name: str, runs: list[Run], monkeypatch: pytest.MonkeyPatch) -> list[Axes]:
    return figure_of(monkeypatch, plot, DRAW[name], runs).axes


def test_the_first_picture_shows_shares_by_width(monkeypatch: pytest.MonkeyPatch) -> None:
    panels = panels_of("noise-anisotropy", planted(seeds=[1]), monkeypatch)
    titles = [axes.get_title(loc="left") for axes in panels]
    assert titles == [f"{of}s  (dotted: Gaussian rows)" for of in ("feature", "gradient")]
    for axes, of in zip(panels, ("feature", "gradient"), strict=True):
        thick = [line for line in axes.lines if line.get_linewidth() > 2]
        dotted = [line for line in axes.lines if line.get_linestyle() == ":"]
        for decay, line, reference in zip(DECAYS, thick, dotted, strict=True):
            by_hand = [
                fmean(
                    row[f"{of}_anisotropy"] / math.sqrt(width * (width - 1))
                    for row in (layer_at_end(WORLD, width, decay, 1, nth) for nth in LAYERS)
                )
                for width in WIDTHS
            ]
            assert np.asarray(line.get_xdata()).tolist() == list(WIDTHS)
            np.testing.assert_allclose(np.asarray(line.get_ydata()), by_hand)
            lower = [math.exp(beyond(WORLD, of, width, decay, 1)) for width in WIDTHS]
            expected = np.divide(by_hand, lower)
            np.testing.assert_allclose(np.asarray(reference.get_ydata()), expected)
        said = [text.get_text() for text in axes.texts]
        assert sorted(said) == ["decay 0", "decay 0.1", "decay 0.3"]


def test_the_second_picture_shows_concentration_by_step(monkeypatch: pytest.MonkeyPatch) -> None:
    panels = panels_of("noise-concentration", planted(seeds=range(3)), monkeypatch)
    assert [axes.get_title(loc="left") for axes in panels] == [f"width {w}" for w in WIDTHS]
    start = 30 * 24**0.25  # the geometric mean of 30, 60, 90, 120
    for axes, width in zip(panels, WIDTHS, strict=True):
        assert axes.get_yscale() == "log"
        thick = [line for line in axes.lines if line.get_linewidth() > 2]
        for decay, line in zip(DECAYS, thick, strict=True):
            assert np.asarray(line.get_xdata()).tolist() == [1, 150, END]
            end = start * math.exp(growth(WORLD, width, decay, 1))  # seed 1 is the mean of three
            np.testing.assert_allclose(np.asarray(line.get_ydata()), [start, 7.0, end])

"""The rule of verdicts: by hand, by its laws, and its error rates on simulated null effects."""

from __future__ import annotations

import math
import random
from collections.abc import Callable

import numpy as np
import pytest
import scipy.stats
from hypothesis import given
from hypothesis import strategies as st

from actsparse_lab.analysis.intervals import t_interval
from actsparse_lab.analysis.verdicts import Claim, Verdict, fewest_seeds, verdict

FIVE = [1.0, 2.0, 3.0, 4.0, 5.0]  # mean 3, s² = 2.5, half = 2.776445 · sqrt(2.5 / 5) = 1.963243


def rises(least: float = 0.0) -> Claim:
    return Claim("it rises", "§1", "rises", least)


def falls(least: float = 0.0) -> Claim:
    return Claim("it falls", "§1", "falls", least)


def word(claim: Claim, effects: list[float], claims: int = 1) -> str:
    return verdict(claim, effects, claims).word


# By hand


@pytest.mark.parametrize(
    ("claim", "effects", "expected"),
    [
        pytest.param(rises(), FIVE, "holds", id="above 0"),
        pytest.param(falls(), FIVE, "does not hold here", id="above 0, claimed below"),
        pytest.param(rises(), [-v for v in FIVE], "does not hold here", id="below 0"),
        pytest.param(rises(0.9), FIVE, "holds", id="above the least"),
        pytest.param(falls(0.9), [-v for v in FIVE], "holds", id="below minus the least"),
        pytest.param(falls(0.9), FIVE, "does not hold here", id="nowhere near"),
        # the interval is 1.0368 to 4.9632, yet the seed at 1 lies on the bar, not beyond it
        pytest.param(rises(1.0), FIVE, "undecided", id="a seed on the bar"),
        pytest.param(rises(1.1), FIVE, "undecided", id="bar within the interval"),
        pytest.param(rises(4.9), FIVE, "undecided", id="bar within, far end"),
        pytest.param(rises(5.1), FIVE, "does not hold here", id="too small an effect"),
        pytest.param(rises(-1.0), [v - 3.5 for v in FIVE], "undecided", id="a loss too wide"),
        pytest.param(rises(-3.0), [v - 3.5 for v in FIVE], "holds", id="an allowed loss"),
        pytest.param(rises(), FIVE[:4], "undecided", id="four seeds"),
        pytest.param(rises(), [2.0], "undecided", id="one seed"),
        pytest.param(rises(), [], "undecided", id="no seeds"),
        pytest.param(rises(), [0.1] * 9, "undecided", id="equal effects"),
        pytest.param(
            rises(-0.01),
            [0.0, 0.01, 0.003, 0.007, 292 / 300 - 295 / 300],
            "undecided",
            id="a loss of the bar itself",
        ),
        pytest.param(
            rises(),
            [0.98 - 0.97, 0.97 - 0.96, 0.96 - 0.95, 0.95 - 0.94, 0.01],
            "undecided",
            id="equal but for rounding",
        ),
        pytest.param(rises(), [*[9.0, 10.0] * 3, -0.1], "undecided", id="6 of 7 seeds"),
        pytest.param(rises(), [*[9.0, 10.0] * 3, 9.5, -0.1], "holds", id="7 of 8 seeds"),
        pytest.param(rises(), [*[9.0, 10.0] * 3, -0.1, -0.1], "undecided", id="6 of 8 seeds"),
        pytest.param(rises(), [*[9.0, 10.0] * 3, 9.5, -99.0], "undecided", id="one bad failure"),
    ],
)
def test_the_rule_by_hand(claim: Claim, effects: list[float], expected: str) -> None:
    assert word(claim, effects) == expected


def test_the_estimate_is_the_effects_own() -> None:
    assert verdict(falls(0.5), FIVE).estimate == t_interval(FIVE)
    assert verdict(falls(0.5), []).estimate is None


@pytest.mark.parametrize(
    ("found", "why"),
    [
        pytest.param(
            verdict(falls(0.5), [-v for v in FIVE]),
            "5 of 5 seeds and the 95 % interval, -4.963 to -1.037, lie below -0.5",
            id="decided",
        ),
        pytest.param(
            verdict(falls(), FIVE),
            "5 of 5 seeds and the 95 % interval, 1.037 to 4.963, lie above 0",
            id="no minus zero",
        ),
        pytest.param(
            verdict(rises(2), FIVE),
            "the 95 % interval, 1.037 to 4.963, does not exclude 2",
            id="interval",
        ),
        pytest.param(
            verdict(rises(1), FIVE),
            "the 95 % interval, 1.037 to 4.963, lies above 1, but 4 of 5 seeds do; 5 must",
            id="seeds",
        ),
        pytest.param(
            verdict(rises(), [0.1] * 5),
            "all 5 effects are 0.1; seeds that change nothing count as one",
            id="equal",
        ),
        pytest.param(
            verdict(rises(), FIVE, claims=2),
            "5 paired seeds; 6 are the fewest that can decide 2 claims",
            id="claims",
        ),
    ],
)
def test_it_says_why(found: Verdict, why: str) -> None:
    assert found.why == why


def test_several_claims_take_more_seeds_and_a_wider_interval() -> None:
    six = [2.0, 2.0, 3.0, 3.0, 4.0, 4.0]  # mean 3, s² = 0.8, standard error 0.365148
    assert word(rises(), six, claims=3) == "holds"
    assert word(rises(), six, claims=4) == "undecided"  # 1 in 64 is not rarer than 1 in 80
    # lower ends: t(0.975; 5) = 2.570582 gives 2.061, for two claims t(0.9875; 5) = 3.1634 1.845
    assert word(rises(1.9), six, claims=1) == "holds"
    assert word(rises(1.9), six, claims=2) == "undecided"
    assert word(rises(1.8), six, claims=2) == "holds"
    assert "the 97.5 % interval, 1.845 to 4.155," in verdict(rises(), six, claims=2).why


@pytest.mark.parametrize("n", range(5, 31))
@pytest.mark.parametrize("claims", [1, 2, 3])
def test_the_seeds_that_must_agree_are_the_sign_tests(n: int, claims: int) -> None:
    for agree in range(n - n // 4, n + 1):
        effects = [1e3 + at % 2 for at in range(agree)] + [-1e-3] * (n - agree)
        mean = scipy.stats.ttest_1samp(effects, 0.0, alternative="greater")
        assert mean.pvalue < 0.025 / claims  # so that the signs decide
        signs = scipy.stats.binomtest(agree, n, alternative="greater")
        expected = "holds" if signs.pvalue < 0.05 / claims else "undecided"
        assert word(rises(), effects, claims) == expected


@pytest.mark.parametrize("bad", [math.nan, math.inf, -math.inf], ids=str)
def test_an_effect_that_is_no_number_is_named(bad: float) -> None:
    with pytest.raises(ValueError, match=rf"effects\[2\] of 'it rises' is {bad}"):
        verdict(rises(), [1.0, 2.0, bad])


def test_a_claim_that_says_nothing_is_refused() -> None:
    with pytest.raises(ValueError, match="direction='up'"):
        Claim("more", "§1", "up")  # type: ignore[arg-type]
    with pytest.raises(ValueError, match="least=nan"):
        rises(math.nan)
    with pytest.raises(ValueError, match="claims=0"):
        fewest_seeds(0)


# Laws. Eighths, so that shifts and powers of two are exact.

EIGHTHS = st.integers(-80, 240).map(lambda count: count / 8)
EFFECTS = st.lists(EIGHTHS, max_size=12) | st.lists(EIGHTHS.map(abs), min_size=5, max_size=12)
CLAIMS = st.builds(Claim, st.just("c"), st.just("§"), st.sampled_from(["rises", "falls"]), EIGHTHS)
ORDER = {"does not hold here": 0, "undecided": 1, "holds": 2}


@given(CLAIMS, EFFECTS, EIGHTHS.map(abs))
def test_a_larger_effect_never_speaks_against_the_claim(
    claim: Claim, effects: list[float], by: float
) -> None:
    along = by if claim.direction == "rises" else -by
    shifted = [effect + along for effect in effects]
    assert ORDER[word(claim, shifted)] >= ORDER[word(claim, effects)]


@given(CLAIMS, EFFECTS, EIGHTHS.map(abs))
def test_a_higher_bar_never_speaks_for_the_claim(
    claim: Claim, effects: list[float], by: float
) -> None:
    higher = Claim(claim.text, claim.source, claim.direction, claim.least + by)
    assert ORDER[word(higher, effects)] <= ORDER[word(claim, effects)]


@given(CLAIMS, EFFECTS)
def test_signs_and_direction_turned_together_change_nothing(
    claim: Claim, effects: list[float]
) -> None:
    turned = falls(claim.least) if claim.direction == "rises" else rises(claim.least)
    assert word(turned, [-effect for effect in effects]) == word(claim, effects)


@given(EFFECTS, st.integers(-60, 60))
def test_the_unit_of_the_effects_does_not_matter(effects: list[float], power: int) -> None:
    assert word(rises(), [effect * 2.0**power for effect in effects]) == word(rises(), effects)


@given(CLAIMS, EFFECTS, st.randoms(use_true_random=False))
def test_the_order_of_seeds_does_not_matter(
    claim: Claim, effects: list[float], draw: random.Random
) -> None:
    mixed = draw.sample(effects, len(effects))
    assert verdict(claim, mixed).word == verdict(claim, effects).word


@given(CLAIMS, EFFECTS, st.integers(1, 5))
def test_more_claims_never_decide_more(claim: Claim, effects: list[float], claims: int) -> None:
    assert word(claim, effects, claims + 1) in (word(claim, effects, claims), "undecided")


# Error rates

Draw = Callable[[np.random.Generator, tuple[int, ...]], np.ndarray]
DRAWS = 20_000


def shares(rows: int, share: float) -> Draw:
    return lambda rng, s: (rng.binomial(rows, share, s) - rng.binomial(rows, share, s)) / rows


def ratio(rng: np.random.Generator, s: tuple[int, ...]) -> np.ndarray:
    return 1 - rng.lognormal(0, 0.5, s) / rng.lognormal(0, 0.5, s)


# Each with 0 as its median, or (discrete) with no more than half its mass above 0.
NULLS: dict[str, Draw] = {
    "normal": lambda rng, s: rng.standard_normal(s),
    "laplace": lambda rng, s: rng.laplace(size=s),
    "t3": lambda rng, s: rng.standard_t(3, s),
    "cauchy": lambda rng, s: rng.standard_cauchy(s),
    "exponential behind": lambda rng, s: math.log(2) - rng.exponential(size=s),
    "exponential ahead": lambda rng, s: rng.exponential(size=s) - math.log(2),
    "lognormal behind": lambda rng, s: 1 - rng.lognormal(size=s),
    "lognormal ahead": lambda rng, s: rng.lognormal(size=s) - 1,
    "two points": lambda rng, s: rng.choice([-1.0, 1.0], s),
    "two points uneven": lambda rng, s: rng.choice([-0.01, 1.0], s),
    "shares near 0": shares(64, 0.02),
    "shares of 360 near 1": shares(360, 0.97),
    "shares of 1000": shares(1000, 0.3),
    "relative improvement": ratio,
}
# Skewed, with 0 as the mean: more than half of the seeds lie beyond the bar.
MEAN_NULLS: dict[str, Draw] = {
    "exponential behind": lambda rng, s: 1 - rng.exponential(size=s),
    "lognormal behind": lambda rng, s: math.exp(0.5) - rng.lognormal(size=s),
    "a fifth behind": lambda rng, s: (
        rng.choice([1.0, -4.0], s, p=[0.8, 0.2]) + rng.normal(0, 0.1, s)
    ),
}


def by_interval(effects: np.ndarray, claims: int = 1) -> np.ndarray:
    """Which rows' t-interval lies above 0."""
    n = effects.shape[-1]
    half = scipy.stats.t.ppf(1 - 0.025 / claims, n - 1) * scipy.stats.sem(effects, axis=-1)
    return effects.mean(-1) > half


def holds(effects: np.ndarray, claims: int = 1) -> np.ndarray:
    """The rule on many experiments at once, for a rise above 0; rows are experiments."""
    n = effects.shape[-1]
    sign = scipy.stats.binom.sf((effects > 0).sum(-1) - 1, n, 0.5) < 0.05 / claims
    return by_interval(effects, claims) & sign & (np.ptp(effects, axis=-1) > 0)


def drawn(draw: Draw, *shape: int) -> np.ndarray:
    return draw(np.random.default_rng(shape), shape)


def below_1_in_20(count: int, draws: int = DRAWS) -> bool:
    """A rate of 1 in 20 would give so few in 1 of a million simulations."""
    return bool(scipy.stats.binom.cdf(count, draws, 0.05) < 1e-6)


@pytest.mark.parametrize("name", NULLS)
@pytest.mark.parametrize("n", [5, 8])
def test_the_rule_at_once_is_the_rule(name: str, n: int) -> None:
    effects = drawn(NULLS[name], 50, n) + drawn(NULLS["normal"], 50, 1)
    effects[:2] = effects[:2, :1]  # equal effects too
    expected = ["holds" if each else "other" for each in holds(effects)]
    words = [word(rises(), row.tolist()) for row in effects]
    assert [each if each == "holds" else "other" for each in words] == expected
    assert "holds" in words


@pytest.mark.parametrize("n", range(5, 11))
@pytest.mark.parametrize("name", NULLS)
def test_a_null_effect_holds_in_fewer_than_1_of_20(name: str, n: int) -> None:
    assert below_1_in_20(int(holds(drawn(NULLS[name], DRAWS, n)).sum()))


@pytest.mark.parametrize(("n", "claims"), [(6, 3), (7, 6), (8, 4), (10, 10)])
def test_of_several_null_claims_any_holds_in_fewer_than_1_of_20(n: int, claims: int) -> None:
    effects = drawn(NULLS["normal"], DRAWS, claims, n)
    assert below_1_in_20(int(holds(effects, claims).any(-1).sum()))


def test_several_claims_read_as_if_each_were_alone_would_not() -> None:
    found = holds(drawn(NULLS["normal"], DRAWS, 4, 8)).any(-1).sum()
    assert scipy.stats.binom.sf(found - 1, DRAWS, 0.05) < 1e-6


@pytest.mark.parametrize(
    ("name", "five", "eight"),
    [
        ("normal", 2.0, 1.8),
        ("laplace", 1.4, 1.4),
        ("t3", 1.6, 1.4),
        ("exponential behind", 2.9, 1.4),
        ("lognormal behind", 2.8, 1.4),
        ("two points", 0.0, 3.1),
        ("relative improvement", 2.6, 1.5),
    ],
)
def test_the_error_rates_are_as_told(name: str, five: float, eight: float) -> None:
    for n, told in ((5, five), (8, eight)):
        found = 100 * holds(drawn(NULLS[name], DRAWS, n)).mean()
        # a tenth of rounding and of the table's own draws, five standard errors of these at 3 %
        assert found == pytest.approx(told, abs=0.1 + 500 * math.sqrt(0.03 * 0.97 / DRAWS))


def test_looking_after_each_seed_doubles_the_false_holds() -> None:
    effects = drawn(NULLS["normal"], DRAWS, 10)
    found = np.any([holds(effects[:, :n]) for n in range(5, 11)], axis=0).mean()
    # half a hundredth of rounding, and five standard errors: 5 · sqrt(0.04 · 0.96 / 20 000) = 0.007
    assert found == pytest.approx(0.04, abs=0.005 + 0.007)


def test_the_interval_alone_would_be_fooled() -> None:
    effects = drawn(NULLS["two points uneven"], DRAWS, 5)
    # 4 or 5 of 5 at 1: (5 + 1) / 32 = 0.1875; five standard errors of 20 000 draws are 0.014
    assert by_interval(effects).mean() == pytest.approx(6 / 32, abs=0.014)
    assert not holds(effects).any()


@pytest.mark.parametrize(
    ("name", "rate"),
    [("exponential behind", 0.09), ("lognormal behind", 0.15), ("a fifth behind", 0.33)],
)
def test_what_the_rule_does_not_promise_is_as_told(name: str, rate: float) -> None:
    # half a hundredth of rounding, and five standard errors: 5 · sqrt(0.22 / 20 000) = 0.0166
    found = holds(drawn(MEAN_NULLS[name], DRAWS, 5)).mean()
    assert found == pytest.approx(rate, abs=0.005 + 0.0166)


@pytest.mark.parametrize(
    ("n", "d", "power"),
    [(5, 1, 0.35), (5, 2, 0.87), (5, 3, 0.99), (7, 1, 0.30), (8, 1, 0.58), (8, 2, 0.99)],
)
def test_the_power_is_as_told(n: int, d: int, power: float) -> None:
    # half a hundredth of rounding, and five standard errors: 5 · sqrt(0.25 / 20 000) = 0.0177
    found = holds(drawn(NULLS["normal"], DRAWS, n) + d).mean()
    assert found == pytest.approx(power, abs=0.005 + 0.0177)

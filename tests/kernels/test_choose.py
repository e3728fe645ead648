"""The choice of a program: timed in turn, shared by near densities, and never much slower."""

from __future__ import annotations

import time

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from actsparse.kernels import build
from actsparse.kernels.choose import MARGIN, NEAR, ROUNDS, Trial, Trials, apart, programs_of
from actsparse.kernels.dense import has_onednn
from actsparse.kernels.programs import Weights
from actsparse_lab.bench.auto import bench_auto

densities = st.floats(0, 1)
seconds = st.floats(1e-6, 10)


def test_programs_run_in_turn_and_the_slow_one_is_told() -> None:
    order: list[str] = []

    def slow() -> None:
        order.append("slow")
        time.sleep(0.01)

    trials = Trials(0)
    programs = {"dense": slow, "sparse": lambda: order.append("fast")}
    trial = trials.run("kind", 0.1, programs, cold=False, device=torch.device("cpu"))
    assert order[:6] == ["slow", "fast"] * 3
    assert ROUNDS[0] <= len(order) // 2 - 1 <= ROUNDS[1]
    assert trial.seconds["dense"] > 0.01 > trial.seconds["sparse"]
    assert trials.near("kind", 0.1) is trial
    assert trials.near("another", 0.1) is None


def test_a_long_program_is_timed_few_times() -> None:
    calls: list[int] = []

    def long() -> None:
        calls.append(1)
        time.sleep(0.1)

    Trials(0).run("kind", 0.1, {"dense": long}, cold=False, device=torch.device("cpu"))
    assert len(calls) == 1 + ROUNDS[0]


def test_a_trial_goes_on_until_the_fastest_is_clear_of_the_second() -> None:
    rounds: dict[str, int] = {}
    for name, seconds in (("near", 0.0102), ("far", 0.03)):
        calls: list[int] = []

        def dense(calls: list[int] = calls) -> None:
            calls.append(1)
            time.sleep(0.05)

        def second(seconds: float = seconds) -> None:
            time.sleep(seconds)

        programs = {"dense": dense, "packed": lambda: time.sleep(0.01), "sparse": second}
        Trials(0).run("kind", 0.1, programs, cold=False, device=torch.device("cpu"))
        rounds[name] = len(calls) - 1
    assert rounds["far"] < rounds["near"] == ROUNDS[1]


def test_a_trial_asks_what_calls_ask() -> None:
    asked: list[int] = []
    weights = Weights(torch.ones(4, 2), None, torch.ones(2, 4), None)
    x = torch.ones(3, 2)
    programs = programs_of(
        ["sparse", "packed"], weights, "relu", x, False, False, lambda: asked.append(1)
    )
    with torch.no_grad():
        for count, name in enumerate(("dense", "packed", "sparse")):
            if name != "packed" or has_onednn():
                programs[name]()
            assert len(asked) == count // 2


@given(st.lists(densities, min_size=1, max_size=6), densities)
def test_the_nearest_trial_is_found_if_it_is_near(known: list[float], density: float) -> None:
    trials = Trials(0)
    trials.known["kind"] = [Trial(each, {"dense": 1.0}) for each in known]
    found = trials.near("kind", density)
    closest = min(apart(each, density) for each in known)
    if found is None:
        assert closest > NEAR
    else:
        assert apart(found.density, density) == closest <= NEAR


@given(seconds, seconds, seconds, st.sampled_from(["dense", "sparse", "screened"]))
def test_the_best_program_gains(dense: float, sparse: float, screened: float, now: str) -> None:
    trial = Trial(0.1, {"dense": dense, "sparse": sparse, "screened": screened})
    best = trial.best(now)
    fastest = min(dense, sparse, screened)
    if best == "dense":
        assert dense < fastest * (MARGIN if now == "dense" else 1) * (1 + 1e-9)
    else:
        assert trial.seconds[best] == fastest
        assert trial.ratio(best) >= (MARGIN if now == "dense" else 1)


@pytest.mark.slow
@pytest.mark.skipif(build.level() == "reference", reason="auto keeps to the layers here")
@pytest.mark.parametrize("tokens", [1, 4, 16, 64, 197, 1576])
def test_auto_never_loses_to_dense(tokens: int) -> None:
    """Fails where the whole 95 % interval of 101 rounds lies below 0.97; wants an idle machine."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        rows = bench_auto(tokens=[tokens], rounds=101)["rows"]
    finally:
        torch.set_num_threads(threads)
    assert [row for row in rows if row["ratio"]["high"] < 0.97] == []

"""Ratios come from what was timed, and programs take turns."""

from __future__ import annotations

from actsparse.bench.timing import interleaved, ratio


def test_every_program_runs_once_a_round_and_none_always_first() -> None:
    calls: list[str] = []
    programs = {name: (lambda name=name: calls.append(name)) for name in "abc"}
    interleaved(programs, rounds=6, warmup=0)
    rounds = [calls[i : i + 3] for i in range(0, 18, 3)]
    assert all(sorted(each) == ["a", "b", "c"] for each in rounds)
    assert {each[0] for each in rounds} == {"a", "b", "c"}


def test_ratio_of_medians_lies_in_its_interval() -> None:
    times = {"slow": [2.0, 2.2, 1.8, 9.0, 2.1], "fast": [1.0, 1.1, 0.9, 1.0, 4.0]}
    result = ratio(times, "slow", "fast")
    assert result.value == 2.1  # medians 2.1 and 1.0
    assert result.low <= result.value <= result.high


def test_what_slows_a_whole_round_slows_both() -> None:
    base = [1.0, 5.0, 1.2, 3.0, 1.1, 0.9, 4.0]
    times = {"a": [1.5 * t for t in base], "b": base}
    result = ratio(times, "a", "b")
    assert max(abs(x - 1.5) for x in (result.value, result.low, result.high)) < 1e-12

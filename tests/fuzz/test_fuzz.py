"""What strangers wrote is taken or refused in words: no traceback, no wait, no call, little memory.

The same harness runs 10⁵ inputs: ``python -m tests.fuzz.run 100000``.
"""

from __future__ import annotations

import json

import pytest

from tests.fuzz import mutate
from tests.fuzz.kinds import KINDS, SHARES
from tests.fuzz.run import main, run_kind, told


@pytest.mark.parametrize("name", [name for name in KINDS if SHARES[name] >= 5])
def test_wrong_inputs_are_refused_in_words(name: str) -> None:
    outcomes = run_kind(name, min(60, max(3, round(SHARES[name]))))
    assert not any(each.wrong for each in outcomes), told(name, outcomes)
    assert any(each.word == "refused" for each in outcomes) or name in (
        "manifests",
        "command_lines",
    )


@pytest.mark.slow
@pytest.mark.parametrize("name", [name for name in KINDS if name != "settings"])
def test_right_inputs_are_taken(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Else all the wrong ones end at the same first check."""
    monkeypatch.setattr(mutate, "plain", lambda value, _: value)
    monkeypatch.setattr(mutate, "text", lambda value, _: json.dumps(value).encode())
    monkeypatch.setattr(mutate, "content", lambda value, _: value)
    outcomes = run_kind(name, 3)
    assert any(each.word == "taken" for each in outcomes), told(name, outcomes)


@pytest.mark.slow
def test_a_hundred_thousand_wrong_inputs() -> None:
    assert main(100_000, []) == 0

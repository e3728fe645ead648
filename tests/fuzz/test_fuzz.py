"""What strangers wrote is taken or refused in words: no traceback, no wait, no call, little memory.

The same harness runs 10⁵ inputs: ``python -m tests.fuzz.run 100000``.
"""

from __future__ import annotations

import pytest

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
def test_a_hundred_thousand_wrong_inputs() -> None:
    assert main(100_000, []) == 0

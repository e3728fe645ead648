"""docs/claims.md gives each verdict as the records do."""

from __future__ import annotations

import re
from pathlib import Path

from actsparse_lab.papers.experiments import part_of
from actsparse_lab.report.frontier import board
from actsparse_lab.report.reproduction import findings_in

ROOT = Path(__file__).parents[1]
PAGE = (ROOT / "docs" / "claims.md").read_text(encoding="utf-8")
WORDS = {"yes": "holds", "no": "does not hold here", "undecided": "undecided"}
WRITTEN = re.findall(r"`([\w-]+):([\w-]+)` (holds|does not hold here|undecided)", PAGE)


def test_every_verdict_is_that_of_the_records() -> None:
    assert len(WRITTEN) > 20
    assert len(WRITTEN) == len(re.findall(r"`[\w-]+:[\w-]+`", PAGE)) - 1  # one says how to read it
    for name, key, word in WRITTEN:
        if name == "frontier":
            judged = board(ROOT / "benchmarks" / "frontier" / key)
            assert judged is not None
            assert judged.claim is not None
            assert word == WORDS[judged.claim.holds], key
            continue
        found = findings_in(ROOT / "benchmarks" / "reproduce" / name)
        assert found is not None
        keys = [
            key
            for key, asked in part_of(name, "claims").QUESTIONS.items()
            if found.manifest["full"] or not asked.full
        ]
        verdicts = dict(zip(keys, found.findings, strict=True))
        assert word == verdicts[key].verdict.word, f"{name}:{key}"

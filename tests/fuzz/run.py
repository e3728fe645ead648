"""Many wrong inputs, from one seed: ``python -m tests.fuzz.run 100000``.

Prints for each kind how many were taken and refused, the slowest, the most memory, and one line
for everything that went wrong. Exits with 1 if anything did.
"""

from __future__ import annotations

import logging
import os
import sys
import tempfile
import warnings
from collections import Counter
from pathlib import Path
from random import Random

from tests.fuzz import files, models, settings  # noqa: F401  (they add their kinds)
from tests.fuzz.guard import Outcome, watched
from tests.fuzz.kinds import KINDS, SHARES

REFUSALS = (ValueError, OSError)
MOST = 1024  # MiB above what the process held before


def run_kind(name: str, count: int, seed: int = 0) -> list[Outcome]:
    """Outcomes of ``count`` inputs of a kind; the same for the same seed."""
    random = Random(f"{name} {seed}")
    found = []
    here = Path.cwd()
    with tempfile.TemporaryDirectory() as folder, warnings.catch_warnings():
        warnings.simplefilter("ignore")
        os.environ["HF_HUB_OFFLINE"] = "1"
        (Path(folder) / "evil.py").write_text("raise SystemExit('called')\n", encoding="utf-8")
        make = KINDS[name](Path(folder))
        for _ in range(count):
            outcome = watched(make(random), REFUSALS)
            if outcome.mib > MOST:
                outcome.word = f"took {outcome.mib:.0f} MiB"
            found.append(outcome)
        os.chdir(here)
    return found


def told(name: str, outcomes: list[Outcome]) -> str:
    """One line of a kind, and one for each way in which it went wrong."""
    words = Counter("wrong" if each.wrong else each.word for each in outcomes)
    lines = [
        f"{name:22} {len(outcomes):6} inputs: {words['taken']} taken, {words['refused']} refused, "
        f"{words['wrong']} wrong; slowest {max(each.seconds for each in outcomes):.2f} s, "
        f"most {max(each.mib for each in outcomes):.0f} MiB"
    ]
    wrong = Counter((each.word, each.called) for each in outcomes if each.wrong)
    first = {(each.word, each.called): each.said for each in reversed(outcomes)}
    for (word, called), times in wrong.most_common(12):
        lines.append(f"    {times} × {word} {called or ''}: {first[word, called][:160]!r}")
    return "\n".join(lines)


def main(total: int, names: list[str]) -> int:
    """Runs them; returns how many went wrong."""
    logging.disable(logging.CRITICAL)
    wrong = 0
    for name in names or KINDS:
        share = 1 if names else SHARES[name] / sum(SHARES.values())
        count = max(1, round(total * share))
        outcomes = run_kind(name, count)
        wrong += sum(each.wrong for each in outcomes)
        print(told(name, outcomes), flush=True)
    return wrong


if __name__ == "__main__":
    sys.exit(main(int(sys.argv[1]), sys.argv[2:]) > 0)

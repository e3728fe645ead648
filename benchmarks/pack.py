"""Move the finished runs of each folder below into its one file: what is committed is small.

    python benchmarks/pack.py [FOLDER]

FOLDER, `benchmarks` by default, holds campaigns anywhere below: folders with ``runs/``. A run that
is not finished, and weights, stay where they are.
"""

from __future__ import annotations

import sys
from pathlib import Path

from actsparse_lab.packed import pack
from actsparse_lab.records import read_runs

if __name__ == "__main__":
    folder = Path(sys.argv[1]) if len(sys.argv) > 1 else Path(__file__).parent
    for out in sorted({record.parents[2] for record in folder.rglob("runs/*/record.jsonl")}):
        finished = [run.path.parent.name for run in read_runs(out) if run.finished]
        target = pack(out, finished)
        print(f"{target}: {len(finished)} runs, {target.stat().st_size / 1000:.0f} kB")

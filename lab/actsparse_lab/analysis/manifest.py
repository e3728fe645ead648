"""JSON files beside runs: what the runs are of, and what was measured of them."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from actsparse.untrusted import read_json
from actsparse.values import Count, Text, check
from actsparse_lab.records import Entry, write_whole

SHAPE = {"seeds": Count, "steps": (Count, None), "command": Text, "time": {"seconds": float}}


def read_checked(path: Path, shape: Any) -> Entry | None:
    """A JSON object of that shape; None for no file, `RecordError` for anything else."""
    if not path.is_file():
        return None
    found = read_json(path)
    check(str(path), found, shape)
    return dict(found)


def write_json(path: Path, fields: Entry) -> None:
    """Written whole or not at all."""
    write_whole(path, (json.dumps(fields, indent=2) + "\n").encode())

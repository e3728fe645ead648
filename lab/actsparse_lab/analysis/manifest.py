"""JSON files beside runs: what the runs are of, and what was measured of them."""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from actsparse.untrusted import parse_json
from actsparse.values import Count, Name, Text, check
from actsparse_lab.packed import read_file
from actsparse_lab.records import Entry, write_whole

_COMMON = {"seeds": Count, "steps": (Count, None), "command": Text, "time": {"seconds": float}}


@dataclass(frozen=True)
class Manifest:
    """The file in a folder of runs that says what they are of."""

    file: str
    shape: dict[str, Any]

    def read(self, folder: str | Path) -> Entry | None:
        """What `write` wrote; None where there is none. `RecordError` for another file."""
        return read_checked(Path(folder) / self.file, {**self.shape, **_COMMON})

    def write(self, folder: str | Path, **fields: Any) -> None:
        """Say what the runs are of; written whole or not at all."""
        write_whole(Path(folder) / self.file, (json.dumps(fields, indent=2) + "\n").encode())


REPRODUCTION = Manifest("reproduction.json", {"name": Name, "full": bool})
FRONTIER = Manifest("frontier.json", {"task": Name})


def read_checked(path: Path, shape: Any) -> Entry | None:
    """A JSON object of that shape, packed or not; None for no file, `RecordError` for another."""
    try:
        found = parse_json(read_file(path), str(path))
    except FileNotFoundError:
        return None
    check(f"{path}: {path.stem}", found, shape)
    return dict(found)

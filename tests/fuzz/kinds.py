"""The kinds of input: for each a right one, and what reads it after it was made wrong."""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Callable
from pathlib import Path
from random import Random
from typing import Any

from tests.fuzz import mutate

Action = Callable[[], Any]
Make = Callable[[Random], Action]  # an input made wrong, and what reads it
ROOT = Path(__file__).parents[2]
KINDS: dict[str, Callable[[Path], Make]] = {}
# how many of 1000 inputs are of a kind; what takes longer comes less often
SHARES: dict[str, float] = {}


def kind(share: float) -> Callable[[Callable[[Path], Make]], Callable[[Path], Make]]:
    def add(prepare: Callable[[Path], Make]) -> Callable[[Path], Make]:
        KINDS[prepare.__name__], SHARES[prepare.__name__] = prepare, share
        return prepare

    return add


def of_file(file: Path, read: Action, make: Callable[[bytes, Random], bytes]) -> Make:
    """``read`` after ``file`` was made wrong; now and then it is no file at all."""
    right = file.read_bytes()

    def once(random: Random) -> Action:
        clear(file)
        if random.random() < 0.01:
            odd(file, random)
        else:
            file.write_bytes(make(right, random))
        return read

    return once


def json_of(right: bytes, random: Random) -> bytes:
    return mutate.text(json.loads(right), random)


def clear(file: Path) -> None:
    if file.is_dir() and not file.is_symlink():
        shutil.rmtree(file)
    else:
        file.unlink(missing_ok=True)


def odd(file: Path, random: Random) -> None:
    """A FIFO, a folder, a link in a circle, to a device, or to nothing."""
    match random.randrange(5):
        case 0:
            os.mkfifo(file)
        case 1:
            file.mkdir()
        case 2:
            file.symlink_to(file.name)
        case 3:
            file.symlink_to("/dev/zero")
        case _:
            file.symlink_to("gone")
